"""`select_smallest` is exact for any dtype, any ties, any tree, and under every transformation."""

import re

import compiling
import hlo
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sparsejax

F16, BF16 = np.dtype(np.float16), np.dtype(jnp.bfloat16)
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)

# Nested, with an empty leaf and a scalar. One set of shapes, so that jit compiles once per dtype.
SHAPES = {"a": (3, 5), "b": (), "c": (0, 4), "d": {"e": (7,), "f": (2, 3, 2)}}
TOTAL = 35
DTYPES = {
  "float16": [F16] * 5,
  "bfloat16": [BF16] * 5,
  "float32": [F32] * 5,
  "mixed": [F16, BF16, F32, BF16, F32],
}
WIDE_DTYPES = {"float64": [F64] * 5, "mixed": [F64, F16, F64, F32, BF16]}

PROPERTY = hypothesis.settings(
  max_examples=60, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)


def _unjitted(scores, k, among=None):
  return sparsejax.select_smallest(scores, k, among=among)


# A traced k, always. What is said here of every bit is to be true of what users compile.
select = jax.jit(_unjitted, compiler_options=compiling.AS_USERS)


def is_shape(node):
  return isinstance(node, tuple)


def from_bits(bits, dtype):
  return np.asarray(bits).astype(f"uint{8 * dtype.itemsize}").view(dtype)


def special_bits(dtype):
  """Zeros, denormals, the ends of the normal range, infinities and NaN payloads, in both signs."""
  sign, unit = 1 << (8 * dtype.itemsize - 1), 1 << jnp.finfo(dtype).nmant
  infinity = sign - unit
  one = (infinity // 2) // unit * unit
  finite = [0, 1, 2, unit - 1, unit, one, one + 1, infinity - 1]
  nans = [infinity + 1, infinity + unit // 2, infinity + unit // 2 + 1, sign - 1]
  magnitudes = [*finite, infinity, *nans]
  return magnitudes + [sign | bits for bits in magnitudes]


def common_bits(dtype):
  """Values that several dtypes share: denormals of one are normal numbers of another."""
  values = [0.5, 1.0, 2.0**-24, 2.0**-14, 2.0**-133, 65504.0, 1e30]
  with np.errstate(over="ignore"):
    cast = np.array(values + [-value for value in values]).astype(dtype)
  return cast.view(f"uint{8 * dtype.itemsize}").tolist()


@st.composite
def score_trees(draw, dtypes):
  """Trees of SHAPES made from bit patterns, with few distinct values or with many."""
  tied = draw(st.booleans())
  leaves = []
  for shape, dtype in zip(jax.tree.leaves(SHAPES, is_leaf=is_shape), dtypes, strict=True):
    words = st.sampled_from(special_bits(dtype) + common_bits(dtype))
    if tied:
      words = st.sampled_from(draw(st.lists(words, min_size=1, max_size=3)))
    else:
      words = words | st.integers(0, 2 ** (8 * dtype.itemsize) - 1)
    bits = draw(hnp.arrays(f"uint{8 * dtype.itemsize}", shape, elements=words))
    leaves.append(from_bits(bits, dtype))
  return jax.tree.unflatten(jax.tree.structure(SHAPES, is_leaf=is_shape), leaves)


def boolean_trees():
  structure = jax.tree.structure(SHAPES, is_leaf=is_shape)
  leaves = [hnp.arrays(bool, shape) for shape in jax.tree.leaves(SHAPES, is_leaf=is_shape)]
  return st.tuples(*leaves).map(lambda drawn: jax.tree.unflatten(structure, drawn))


def on_device(tree):
  return jax.tree.map(jnp.asarray, tree)


def count(masks):
  return sum(int(np.sum(leaf)) for leaf in jax.tree.leaves(masks))


def assert_same(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for mask, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert mask.dtype == bool
    assert mask.shape == wanted.shape
    np.testing.assert_array_equal(np.asarray(mask), wanted)


def tied_tree(seed=0, batch=()):
  """A small float32 tree with ties, zeros of both signs, infinities and a NaN or two."""
  rng = np.random.default_rng(seed)
  values = np.array([-1.5, -0.0, 0.0, 0.5, 0.5, 2.0, np.inf, -np.inf, np.nan], np.float32)
  shapes = {"w": (6, 4), "b": (5,), "v": (2, 3, 3)}
  return {name: rng.choice(values, batch + shape) for name, shape in shapes.items()}


TIED_TOTAL = 24 + 5 + 18


# Exactness.


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@PROPERTY
@hypothesis.given(data=st.data())
def test_the_selection_is_that_of_a_stable_argsort(dtypes, data):
  scores = data.draw(score_trees(dtypes))
  k = data.draw(st.integers(0, TOTAL + 2))
  assert_same(select(on_device(scores), k), reference.select_smallest(scores, k))


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@PROPERTY
@hypothesis.given(data=st.data())
def test_the_selection_among_candidates_is_that_of_a_stable_argsort(dtypes, data):
  scores = data.draw(score_trees(dtypes))
  among = data.draw(boolean_trees())
  k = data.draw(st.integers(0, TOTAL + 2))
  expected = reference.select_smallest(scores, k, among=among)
  assert count(expected) == min(k, count(among))
  assert_same(select(on_device(scores), k, on_device(among)), expected)


@pytest.mark.parametrize("dtypes", WIDE_DTYPES.values(), ids=WIDE_DTYPES)
@PROPERTY
@hypothesis.given(data=st.data())
def test_float64_scores_are_compared_in_full_precision(dtypes, data):
  scores = data.draw(score_trees(dtypes))
  among = data.draw(boolean_trees())
  k = data.draw(st.integers(0, TOTAL + 2))
  with jax.enable_x64(True):
    actual = select(on_device(scores), jnp.asarray(k), on_device(among))
    assert_same(actual, reference.select_smallest(scores, k, among=among))


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@PROPERTY
@hypothesis.given(data=st.data())
def test_a_tree_of_counts_selects_inside_each_leaf(dtypes, data):
  scores = data.draw(score_trees(dtypes))
  among = data.draw(boolean_trees())
  k = jax.tree.map(
    lambda shape: data.draw(st.integers(0, int(np.prod(shape)) + 1)), SHAPES, is_leaf=is_shape
  )
  expected = reference.select_smallest(scores, k, among=among)
  for mask, allowed, number in zip(*map(jax.tree.leaves, (expected, among, k)), strict=True):
    assert mask.sum() == min(number, allowed.sum())
  assert_same(select(on_device(scores), k, on_device(among)), expected)


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_every_special_value_has_its_place_in_the_order(dtype):
  scores = from_bits(special_bits(dtype), dtype)
  scores = np.random.default_rng(0).permutation(np.tile(scores, 2))
  for k in range(scores.size + 1):
    assert_same(select(jnp.asarray(scores), k), reference.select_smallest(scores, k))


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_denormals_are_not_taken_for_zeros(dtype):
  sign = 1 << (8 * dtype.itemsize - 1)
  scores = from_bits([2, 1, sign, 0, sign | 1, sign | 2], dtype)
  for k, smallest in enumerate([[], [5], [4, 5], [2, 4, 5], [2, 3, 4, 5], [1, 2, 3, 4, 5]]):
    assert np.flatnonzero(select(jnp.asarray(scores), k)).tolist() == smallest


def test_zeros_of_both_signs_are_equal_and_the_first_ones_go_first():
  scores = jnp.array([1.0, 0.0, -0.0, 0.0, -0.0])
  for k in range(6):
    assert np.flatnonzero(select(scores, k)).tolist() == sorted([1, 2, 3, 4, 0][:k])


def test_nan_of_any_sign_and_payload_ranks_above_infinity_by_position():
  nans = from_bits([0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7FC00000], F32)
  scores = np.concatenate([nans, np.array([np.inf, -np.inf], np.float32)])
  for k, smallest in enumerate([[], [5], [4, 5], [0, 4, 5], [0, 1, 4, 5], [0, 1, 2, 4, 5]]):
    assert np.flatnonzero(select(jnp.asarray(scores), k)).tolist() == smallest


def test_leaves_of_different_dtypes_are_compared_by_value():
  # 2^-24 is a denormal float16 and a normal float32; 1/3 differs in every dtype.
  third = 1.0 / 3.0
  scores = {
    "a": np.array([2.0**-24, third, 1.0], F32),
    "b": np.array([third, 2.0**-24, 1.0], F16),
    "c": np.array([1.0, third, 2.0**-24], BF16),
  }
  values = np.concatenate([leaf.astype(F64) for leaf in scores.values()])
  assert np.unique(values).size == 5
  for k in range(10):
    assert_same(select(on_device(scores), k), reference.select_smallest(scores, k))


def test_leaves_of_the_two_types_of_half_precision_are_compared_by_value():
  scores = {
    "a": np.array([1 / 3, 2.0**-24, 1.0], F16),
    "b": np.array([1.0, 1 / 3, 2.0**100], BF16),  # The last is none of float16.
  }
  for k in range(7):
    assert_same(select(on_device(scores), k), reference.select_smallest(scores, k))


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_thousands_of_ties_are_cut_at_the_right_index(dtype):
  rng = np.random.default_rng(1)
  scores = {
    "a": rng.integers(0, 3, (129, 5)).astype(dtype),
    "b": rng.integers(0, 3, (257, 301)).astype(dtype),  # More ties than sixteen bits can index.
    "c": np.zeros((70,), dtype),
  }
  zeros = sum(int((leaf == 0).sum()) for leaf in scores.values())
  zeros_of_a = int((scores["a"] == 0).sum())
  counts = [1, zeros_of_a, zeros_of_a + 1, zeros - 71, zeros - 70, zeros - 1, zeros, zeros + 1]
  total = sum(leaf.size for leaf in scores.values())
  for k in [*counts, 2 * zeros + 5, total]:
    assert_same(select(on_device(scores), k), reference.select_smallest(scores, k))


def test_equal_scores_go_by_index_beyond_sixteen_bits():
  scores = jnp.zeros((300, 301))
  for k in (1, 300, 65_535, 65_536, 65_537, 90_000, 90_299):
    chosen = np.asarray(select(scores, k)).ravel()
    assert chosen[:k].all()
    assert not chosen[k:].any()


def test_continuous_scores_are_cut_exactly():
  rng = np.random.default_rng(2)
  scores = {name: rng.normal(size=(200, 211)).astype(F32) for name in ("a", "b")}
  for k in (1, 1000, 42_200, 84_399):
    assert_same(select(on_device(scores), k), reference.select_smallest(scores, k))


# The count.


def test_no_count_selects_nothing():
  scores = on_device(tied_tree())
  assert count(sparsejax.select_smallest(scores, 0)) == 0
  assert count(select(scores, 0)) == 0


@pytest.mark.parametrize("k", [TIED_TOTAL, 2**31, 2**32, 2**40])
def test_a_static_count_of_everything_or_more_selects_everything(k):
  masks = sparsejax.select_smallest(on_device(tied_tree()), k)
  assert all(bool(leaf.all()) for leaf in jax.tree.leaves(masks))


def test_a_traced_count_beyond_thirty_two_bits_selects_everything():
  with jax.enable_x64(True):
    masks = select(on_device(tied_tree()), jnp.asarray(2**40))
    assert count(masks) == TIED_TOTAL


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32"])
def test_a_count_of_any_integer_dtype_is_the_same_number(dtype):
  scores = jnp.asarray(np.random.default_rng(3).normal(size=300).astype(F32))
  top = np.iinfo(dtype).max
  for k in (0, 7, min(top, 290), top):
    masks = select(scores, jnp.asarray(k, dtype))
    assert_same(masks, reference.select_smallest(np.asarray(scores), k))


def test_static_and_traced_counts_and_the_unjitted_call_agree():
  scores = tied_tree(4)
  device = on_device(scores)
  expected = reference.select_smallest(scores, 20)
  assert_same(sparsejax.select_smallest(device, 20), expected)
  assert_same(sparsejax.select_smallest(device, np.int64(20)), expected)
  assert_same(sparsejax.select_smallest(device, jnp.int32(20)), expected)
  assert_same(jax.jit(lambda tree: sparsejax.select_smallest(tree, 20))(device), expected)
  assert_same(select(device, 20), expected)


def test_a_static_tree_of_counts_selects_inside_each_leaf():
  scores = tied_tree(5)
  k = {"w": 11, "b": 0, "v": 100}
  expected = reference.select_smallest(scores, k)
  assert [int(expected[name].sum()) for name in ("w", "b", "v")] == [11, 0, 18]
  assert_same(sparsejax.select_smallest(on_device(scores), k), expected)


def test_a_new_traced_count_does_not_recompile():
  fresh = jax.jit(lambda scores, k: sparsejax.select_smallest(scores, k))
  scores = on_device(tied_tree())
  for k in (3, 4, 40):
    fresh(scores, k)
  assert fresh._cache_size() == 1


# Candidates.


def test_nothing_outside_the_candidates_is_selected_however_small():
  scores = np.array([-5.0, 3.0, -4.0, 1.0, 2.0], F32)
  among = np.array([False, True, False, True, True])
  masks = select(jnp.asarray(scores), 2, jnp.asarray(among))
  assert np.flatnonzero(masks).tolist() == [3, 4]


def test_no_candidates_means_no_selection():
  scores = on_device(tied_tree())
  among = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, bool), scores)
  assert count(sparsejax.select_smallest(scores, 5, among=among)) == 0
  assert count(select(scores, 5, among)) == 0


def test_selecting_twice_among_the_rest_is_selecting_once():
  scores = on_device(tied_tree(6))
  first = select(scores, 13)
  second = select(scores, 9, jax.tree.map(jnp.logical_not, first))
  together = jax.tree.map(lambda a, b: np.asarray(a) | np.asarray(b), first, second)
  assert_same(select(scores, 22), together)


# Trees.


def test_a_single_array_is_a_tree():
  scores = np.array([[3.0, 1.0], [2.0, 1.0]], F32)
  expected = np.array([[False, True], [True, True]])
  assert_same(sparsejax.select_smallest(jnp.asarray(scores), 3), expected)
  assert_same(sparsejax.select_smallest([jnp.asarray(scores)], 3), [expected])


def test_a_scalar_leaf_is_selected_by_its_value():
  scores = {"a": jnp.float32(1.0), "b": jnp.float32(-1.0)}
  assert_same(sparsejax.select_smallest(scores, 1), {"a": np.array(False), "b": np.array(True)})


def test_trees_without_elements_give_empty_masks():
  assert sparsejax.select_smallest({}, 3) == {}
  empty = {"a": jnp.zeros((0, 3)), "b": jnp.zeros((2, 0), jnp.bfloat16)}
  expected = {"a": np.zeros((0, 3), bool), "b": np.zeros((2, 0), bool)}
  assert_same(sparsejax.select_smallest(empty, 0), expected)
  assert_same(sparsejax.select_smallest(empty, 3), expected)
  assert_same(select(empty, 3), expected)


def test_positions_without_a_leaf_stay_as_they_are():
  scores = {"a": jnp.array([2.0, 1.0]), "b": optax.MaskedNode(), "c": None}
  expected = {"a": np.array([False, True]), "b": optax.MaskedNode(), "c": None}
  assert_same(sparsejax.select_smallest(scores, 1), expected)


def test_ties_go_by_the_order_of_the_leaves_of_the_tree():
  # Dictionaries flatten by sorted key, lists by position.
  masks = sparsejax.select_smallest({"z": jnp.zeros(2), "a": jnp.zeros(2)}, 3)
  assert_same(masks, {"z": np.array([True, False]), "a": np.array([True, True])})
  masks = sparsejax.select_smallest([jnp.zeros(2), jnp.zeros(2)], 3)
  assert_same(masks, [np.array([True, True]), np.array([True, False])])


def test_hundreds_of_small_leaves_are_one_pool():
  rng = np.random.default_rng(7)
  shapes = [(3,), (2, 2), (), (5, 1), (0,)] * 60
  scores = [np.asarray(rng.integers(0, 40, shape), F32) for shape in shapes]
  device = on_device(scores)
  # Without optimization, which is what takes the time to compile so many leaves.
  options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
  select_unoptimized = jax.jit(sparsejax.select_smallest, compiler_options=options)
  for k in (1, 300, 779):
    masks = select_unoptimized(device, jnp.int32(k))
    assert_same(masks, reference.select_smallest(scores, k))


def test_numpy_arrays_are_accepted_as_scores():
  scores = tied_tree(8)
  assert_same(sparsejax.select_smallest(scores, 17), reference.select_smallest(scores, 17))


# Errors.


@pytest.mark.parametrize("k", [-1, -37, jnp.int32(-37)])
def test_a_negative_count_is_an_error_that_shows_it(k):
  with pytest.raises(ValueError, match=f"k must not be negative, got .*{int(k)}"):
    sparsejax.select_smallest(jnp.ones(3), k)


def test_a_negative_count_in_a_tree_is_an_error_that_shows_it():
  with pytest.raises(ValueError, match="-37"):
    sparsejax.select_smallest({"a": jnp.ones(3), "b": jnp.ones(3)}, {"a": 1, "b": -37})


@pytest.mark.parametrize(
  "among",
  [
    {"a": jnp.ones(3, bool)},
    {"a": jnp.ones(3, bool), "c": jnp.ones(2, bool)},
    [jnp.ones(3, bool), jnp.ones(2, bool)],
    {"a": jnp.ones(2, bool), "b": jnp.ones(2, bool)},
    {"a": jnp.ones((), bool), "b": jnp.ones(2, bool)},
  ],
  ids=["missing leaf", "other key", "other container", "other shape", "broadcastable shape"],
)
def test_candidates_that_do_not_match_the_scores_are_an_error(among):
  with pytest.raises(ValueError):
    sparsejax.select_smallest({"a": jnp.ones(3), "b": jnp.ones(2)}, 1, among=among)


def test_a_tree_of_counts_that_does_not_match_the_scores_is_an_error():
  with pytest.raises(ValueError):
    sparsejax.select_smallest({"a": jnp.ones(3), "b": jnp.ones(2)}, {"a": 1})


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
def test_scores_that_are_not_floating_point_are_an_error_that_names_the_dtype(dtype):
  with pytest.raises((TypeError, ValueError), match=dtype):
    sparsejax.select_smallest({"a": jnp.ones(3, dtype)}, 1)


@pytest.mark.parametrize("k", [None, [], {"b": 1}])
def test_a_count_that_is_no_count_is_an_error(k):
  with pytest.raises(ValueError, match="k must be an integer or a tree of integers"):
    sparsejax.select_smallest({"a": jnp.ones(3)}, k)


@pytest.mark.parametrize("k", [2**64 - 1, 2**64, 10**30])
def test_a_count_beyond_all_bounds_selects_everything(k):
  assert np.all(sparsejax.select_smallest(jnp.ones(3), k))
  candidates = jnp.array([True, False, True])
  np.testing.assert_array_equal(
    sparsejax.select_smallest(jnp.ones(3), k, among=candidates), candidates
  )


@pytest.mark.parametrize("k", [True, 2.0, np.array([1]), jnp.array([1, 2]), jnp.float32(2)])
def test_a_count_that_is_not_one_integer_is_an_error_that_shows_it(k):
  with pytest.raises(ValueError, match=f"k must be one integer, .* got {re.escape(repr(k))}"):
    sparsejax.select_smallest(jnp.ones(3), k)


def test_a_leaf_of_as_many_scores_as_cannot_be_indexed_is_an_error_that_names_it():
  huge = {"a": jax.ShapeDtypeStruct((2**16, 2**16), jnp.bfloat16)}
  with pytest.raises(ValueError, match=r"fewer than 2\*\*32 entries, but \['a'\] has 4294967296"):
    jax.eval_shape(lambda scores: sparsejax.select_smallest(scores, 1), huge)


# Neither sorting nor gathering.


def equations(jaxpr):
  """All equations of a jaxpr and of the jaxprs inside it."""
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  for equation in jaxpr.eqns:
    yield equation
    inner = jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda node: hasattr(node, "eqns")
    )
    for node in inner:
      if hasattr(node, "eqns") or hasattr(node, "jaxpr"):
        yield from equations(node)


def forbidden(function, *args, sample=0):
  """The sorts, prefix sums and concatenations in a function's jaxpr, of more than a sample."""
  leaves = len(jax.tree.leaves(args[0]))
  found = []
  for equation in equations(jax.make_jaxpr(function)(*args)):
    name, size = equation.primitive.name, max(var.aval.size for var in equation.outvars)
    if size > sample and (name in ("sort", "cumsum") or "top_k" in name):
      found.append(name)
    if name == "concatenate" and size > max(sample, 64 * leaves):
      found.append(f"{name} of {size}")
  return found


def test_the_search_for_forbidden_primitives_finds_them():
  def hidden(scores, k):
    def body(carry):
      ordered = jax.lax.cond(k > 1, jnp.sort, lambda x: jax.lax.top_k(x, x.size)[0], carry)
      return jnp.concatenate([jnp.cumsum(ordered), ordered])[: carry.size]

    return jax.jit(lambda x: jax.lax.while_loop(lambda c: c[0] < 0, body, x))(scores)

  found = forbidden(hidden, jnp.ones(200), jnp.int32(2))
  assert sorted(found) == ["concatenate of 400", "cumsum", "sort", "top_k"]


def test_a_change_of_masks_reads_each_leaf_in_one_place_of_one_loop():
  # Buffers of a branch that is not taken still cost time at each call of a step: 0.1 us each.
  params = {"a": jnp.ones((8, 3)), "b": jnp.ones((4, 5)), "c": jnp.ones((2, 2))}
  tx = sparsejax.progressive_pruning(0.5, steps=2, every=1)
  jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
  found = [equation.primitive.name for equation in equations(jaxpr)]
  assert found.count("while") == 1
  assert found.count("reduce") == len(params)


@pytest.mark.parametrize("among", [False, True], ids=["all", "among"])
@pytest.mark.parametrize("kind", ["static", "traced", "tree"])
def test_the_selection_neither_sorts_nor_concatenates_more_than_a_sample(kind, among):
  sample = 128 + 3  # Of each leaf rounded up.
  scores = {"a": jnp.ones((64, 64)), "b": jnp.ones((4096,), jnp.bfloat16), "c": jnp.ones((8, 600))}
  candidates = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), scores) if among else None
  if kind == "static":
    found = forbidden(lambda s, m: _unjitted(s, 3, m), scores, candidates, sample=sample)
  else:
    k = jnp.int32(3) if kind == "traced" else jax.tree.map(lambda _: jnp.int32(3), scores)
    found = forbidden(_unjitted, scores, k, candidates, sample=sample)
  assert not found


def test_the_selection_needs_less_than_two_bytes_of_temporary_memory_per_weight():
  scores = {"a": jnp.ones((1000, 700)), "b": jnp.ones((500, 600), jnp.bfloat16)}
  compiled = select.lower(scores, 5).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 2 * 1_000_000


@pytest.mark.parametrize("kind", ["pooled", "of each"])
def test_arrays_that_are_alike_share_kernels(kind):
  scores = [jax.ShapeDtypeStruct((64, 32), jnp.float32)] * 6
  k = jnp.int32(5) if kind == "pooled" else [jnp.int32(5)] * 6
  text = jax.jit(sparsejax.select_smallest).lower(scores, k).compile(compiling.AS_USERS).as_text()
  kernels = []
  for computation in text.split("\n\n"):
    if (
      computation.startswith("%fused") and "f32[64,32]" in computation and " reduce(" in computation
    ):
      # Without names, and without where in the source an operation comes from.
      body = re.sub(r", metadata=\{[^}]*\}|[%\w]*[.][\d]+", "", computation.split("\n", 1)[1])
      kernels.append(re.sub(r"param_\d+", "", body))
  assert len(kernels) == 6
  # The index of an array is not in the code, though the order of parameters may differ.
  assert len(set(kernels)) <= 3


@pytest.mark.parametrize("k", [5, 2**31 + 5], ids=["few", "more than 2^31"])
@pytest.mark.parametrize(
  "shapes", [[(2**15, 2**15)] * 3, [(2**16, 2**15 + 1)]], ids=["three leaves", "one leaf"]
)
def test_a_pool_of_more_than_two_billion_weights_can_be_traced(shapes, k):
  scores = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
  masks = jax.eval_shape(lambda tree: sparsejax.select_smallest(tree, k), scores)
  assert [(mask.shape, mask.dtype) for mask in masks] == [(shape, bool) for shape in shapes]


@pytest.mark.parametrize("shape", [(2**31,), (2**32 - 1,), (3 * 2**30, 1)])
def test_an_axis_of_more_than_two_billion_can_be_compiled(shape):
  scores = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  jax.jit(sparsejax.select_smallest, static_argnums=1).lower(scores, 5)


def test_ranks_are_not_promoted_in_silence():
  with jax.numpy_rank_promotion("raise"):
    scores = {"a": jnp.arange(3.0), "b": -jnp.ones((2, 2))}
    assert count(select(scores, 5)) == 5
    assert count(sparsejax.select_smallest(scores, {"a": 1, "b": 2})) == 3


def test_a_sample_is_no_larger_than_what_it_is_of():
  scores = jax.ShapeDtypeStruct((4096, 9), jnp.float32)
  by_row = jax.jit(jax.vmap(lambda row: sparsejax.select_smallest(row, 2)))
  memory = by_row.lower(scores).compile(compiling.AS_USERS).memory_analysis()
  assert memory.temp_size_in_bytes <= 8 * memory.argument_size_in_bytes


# Transformations.


def lane(tree, *index):
  return jax.tree.map(lambda leaf: np.asarray(leaf)[index], tree)


@pytest.mark.parametrize("batched", ["scores and k", "scores", "k", "scores, k and among"])
def test_vmap_is_a_loop(batched):
  lanes = 5
  scores = tied_tree(9, (lanes,) if "scores" in batched else ())
  k = np.array([0, 7, 20, 46, 60]) if "k" in batched else np.array(20)
  among = None
  if "among" in batched:
    rng = np.random.default_rng(10)
    among = jax.tree.map(lambda leaf: rng.random(leaf.shape) < 0.6, scores)
  axes = (0 if "scores" in batched else None, 0 if "k" in batched else None, 0 if among else None)
  masks = jax.jit(jax.vmap(_unjitted, axes))(on_device(scores), jnp.asarray(k), among)
  for i in range(lanes):
    expected = reference.select_smallest(
      lane(scores, i) if axes[0] == 0 else scores,
      k[i] if axes[1] == 0 else k,
      among=None if among is None else lane(among, i),
    )
    assert_same(lane(masks, i), expected)


def test_vmap_of_a_tree_of_counts_is_a_loop():
  scores = tied_tree(11, (3,))
  k = {"w": np.array([0, 5, 30]), "b": np.array([2, 1, 0]), "v": np.array([18, 9, 1])}
  masks = jax.jit(jax.vmap(_unjitted))(on_device(scores), on_device(k))
  for i in range(3):
    assert_same(lane(masks, i), reference.select_smallest(lane(scores, i), lane(k, i)))


def test_nested_vmap_is_a_nested_loop():
  scores = tied_tree(12, (3, 2))
  k = np.array([0, 13, 30, 47])
  by_seed = jax.vmap(jax.vmap(_unjitted, (0, None)), (0, None))
  masks = jax.jit(jax.vmap(by_seed, (None, 0)))(on_device(scores), jnp.asarray(k))
  for i, j, m in np.ndindex(4, 3, 2):
    assert_same(lane(masks, i, j, m), reference.select_smallest(lane(scores, j, m), k[i]))


def test_a_scan_that_prunes_the_rest_again_and_again_is_a_loop():
  scores = tied_tree(13)
  counts = np.array([5, 0, 12, 1, 9, 100])

  def prune(kept, k):
    pruned = sparsejax.select_smallest(on_device(scores), k, among=kept)
    kept = jax.tree.map(lambda a, b: a & ~b, kept, pruned)
    return kept, kept

  start = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), scores)
  _, history = jax.jit(lambda k: jax.lax.scan(prune, start, k))(jnp.asarray(counts))
  kept = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), scores)
  for step, k in enumerate(counts):
    pruned = reference.select_smallest(scores, k, among=kept)
    kept = jax.tree.map(lambda a, b: a & ~b, kept, pruned)
    assert_same(lane(history, step), kept)


def test_donated_scores_are_selected_from_before_they_are_gone():
  scores = tied_tree(14)
  device = on_device(scores)

  @jax.jit
  def zeroed(tree, k):
    masks = sparsejax.select_smallest(tree, k)
    return jax.tree.map(lambda mask, leaf: jnp.where(mask, 0.0, leaf), masks, tree)

  donating = jax.jit(zeroed, donate_argnums=0)
  result = donating(device, 20)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(device))
  masks = reference.select_smallest(scores, 20)
  for name, mask in masks.items():
    np.testing.assert_array_equal(np.asarray(result[name]), np.where(mask, 0.0, scores[name]))


@pytest.mark.parametrize("place", [on_device, lambda tree: tree], ids=["jax", "numpy"])
def test_the_inputs_are_left_as_they_were(place):
  scores = place(tied_tree(15))
  among = place({name: leaf < 2 for name, leaf in tied_tree(16).items()})
  before = jax.tree.map(lambda leaf: np.array(leaf).tobytes(), (scores, among))
  sparsejax.select_smallest(scores, 20, among=among)
  select(scores, 20, among)
  assert jax.tree.map(lambda leaf: np.array(leaf).tobytes(), (scores, among)) == before


# Many devices.

SPECS = {"a": P("data"), "b": P(None, "data"), "c": P("data"), "d": P()}


def sharded(tree, mesh):
  return {
    name: jax.device_put(leaf, NamedSharding(mesh, SPECS[name])) for name, leaf in tree.items()
  }


def wide_tree():
  rng = np.random.default_rng(17)
  shapes = {"a": (128, 96), "b": (48, 128), "c": (16, 5, 80), "d": (37,)}
  tree = {name: rng.integers(-9, 9, shape).astype(F32) for name, shape in shapes.items()}
  tree["b"] = rng.normal(size=shapes["b"]).astype(F32)
  tree["c"][0, 0, :5] = np.nan
  return tree


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
  mesh = jax.make_mesh((8,), ("data",), axis_types=(request.param,))
  with jax.set_mesh(mesh):
    yield mesh


def test_eight_devices_select_what_one_selects(mesh):
  scores = wide_tree()
  device = sharded(scores, mesh)
  assert len(device["a"].devices()) == 8
  total = sum(leaf.size for leaf in scores.values())
  for k in (0, 1, 5000, 17_000, total - 3, total):
    masks = select(device, k)
    assert_same(masks, reference.select_smallest(scores, k))


def test_eight_devices_select_among_candidates_and_inside_leaves_what_one_selects(mesh):
  scores = wide_tree()
  among = {name: leaf > -5 for name, leaf in wide_tree().items()}
  device, candidates = sharded(scores, mesh), sharded(among, mesh)
  for k in (9000, {"a": 400, "b": 2800, "c": 0, "d": 50}):
    expected = reference.select_smallest(scores, k, among=among)
    assert_same(select(device, k, candidates), expected)


def test_masks_are_sharded_like_their_scores(mesh):
  device = sharded(wide_tree(), mesh)
  masks = select(device, 5000)
  for name, mask in masks.items():
    assert mask.sharding.is_equivalent_to(device[name].sharding, mask.ndim), name


def test_the_unjitted_call_works_on_sharded_scores(mesh):
  scores = wide_tree()
  masks = sparsejax.select_smallest(sharded(scores, mesh), 5000)
  assert_same(masks, reference.select_smallest(scores, 5000))


def test_only_counts_and_a_sample_travel_between_devices(mesh):
  device = sharded(wide_tree(), mesh)
  sizes = [size for _, size in hlo.bytes_between_devices(select.lower(device, 5000).compile())]
  assert sizes
  assert max(sizes) <= 256
