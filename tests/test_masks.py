"""Masks as pytrees: applied, counted, compared, and made from scores with exact counts."""

from fractions import Fraction

import compiling
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.tree_util import DictKey, GetAttrKey, SequenceKey

import sparsejax
from sparsejax import masks as masks_lib
from sparsejax import trees

SPARSITIES = [0.0, 1 / 3, 0.5, 0.729, 0.98]


def small_scores(seed=0):
  """Three kernels, one of them stacked deeper, and two leaves that are never pruned."""
  rng = np.random.default_rng(seed)
  shapes = {
    "conv": {"kernel": (3, 3, 2, 5), "bias": (5,)},
    "dense": {"kernel": (15, 7)},
    "head": {"kernel": (7, 3), "scale": ()},
  }
  return jax.tree.map(
    lambda shape: np.asarray(rng.normal(size=shape), np.float32),
    shapes,
    is_leaf=lambda node: isinstance(node, tuple),
  )


LAYERS = [("conv", (3, 3, 2, 5)), ("dense", (15, 7)), ("head", (7, 3))]
POOL = 90 + 105 + 21


def kernels(tree):
  return [tree[name]["kernel"] for name, _ in LAYERS]


def kept(masks):
  return [int(np.sum(kernel)) for kernel in kernels(masks)]


def assert_full_tree(masks, scores):
  """Boolean everywhere, and True throughout what is not a kernel."""
  assert jax.tree.structure(masks) == jax.tree.structure(scores)
  for mask, score in zip(jax.tree.leaves(masks), jax.tree.leaves(scores), strict=True):
    assert mask.dtype == bool
    assert mask.shape == score.shape
  assert np.all(masks["conv"]["bias"])
  assert np.all(masks["head"]["scale"])


# is_kernel.


@pytest.mark.parametrize("make", [jnp.zeros, lambda shape: jax.ShapeDtypeStruct(shape, np.float32)])
def test_a_kernel_has_two_dimensions_or_more(make):
  verdicts = [sparsejax.is_kernel((), make((2,) * rank)) for rank in range(5)]
  assert verdicts == [False, False, True, True, True]


@pytest.mark.parametrize(
  ("path", "verdict"),
  [
    ((DictKey("query"), DictKey("bias")), False),
    ((GetAttrKey("norm"), GetAttrKey("scale")), False),
    ((DictKey("scale"), DictKey("kernel")), True),
    ((DictKey("bias"), SequenceKey(0)), True),
    ((DictKey("rescale"),), True),
  ],
)
def test_biases_and_scales_are_no_kernels_whatever_their_rank(path, verdict):
  assert sparsejax.is_kernel(path, jnp.ones((4, 8))) == verdict


class _Block(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x)), None


def test_of_layers_of_attention_that_are_scanned_the_kernels_are_pruned():
  layers = nn.scan(_Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
  params = jax.eval_shape(layers.init, jax.random.key(0), jnp.ones((1, 5, 8)), None)
  pruned = masks_lib.select_prunable(params, sparsejax.is_kernel)
  assert {name.rsplit("/", 1)[1] for name in trees.leaves_by_name(pruned)} == {"kernel"}
  # Each of three: queries, keys, values and outputs.
  assert sum(leaf.size for leaf in jax.tree.leaves(pruned)) == 3 * 4 * 8 * 8


# apply_masks.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_applied_masks_give_exact_zeros_and_leave_the_rest_as_it_was(dtype):
  rng = np.random.default_rng(1)
  tree = {"w": jnp.asarray(rng.normal(size=(4, 6)), dtype), "b": jnp.ones(3, dtype)}
  masks = {"w": jnp.asarray(rng.random((4, 6)) < 0.5), "b": jnp.ones(3, bool)}
  result = sparsejax.apply_masks(tree, masks)
  assert jax.tree.structure(result) == jax.tree.structure(tree)
  for name, leaf in result.items():
    assert leaf.dtype == dtype
    values, wanted = np.asarray(leaf), np.where(masks[name], tree[name], 0)
    np.testing.assert_array_equal(values.astype(np.float64), wanted.astype(np.float64))
  assert 0 < np.sum(np.asarray(result["w"]) == 0) < 24


def test_applied_masks_zero_what_is_infinite_or_nan():
  tree = {"w": jnp.array([[np.inf, np.nan, 1.0], [-np.inf, 2.0, np.nan]])}
  masks = {"w": jnp.array([[False, False, True], [False, False, True]])}
  np.testing.assert_array_equal(
    np.asarray(sparsejax.apply_masks(tree, masks)["w"]), [[0.0, 0.0, 1.0], [0.0, 0.0, np.nan]]
  )


def test_applied_masks_keep_denormals_to_the_bit():
  bits = np.array([[1, 0x80000001], [0x007FFFFF, 3]], np.uint32)
  tree = {"w": jnp.asarray(bits.view(np.float32))}
  masks = {"w": jnp.array([[True, True], [True, False]])}
  result = np.asarray(sparsejax.apply_masks(tree, masks)["w"]).view(np.uint32)
  np.testing.assert_array_equal(result, np.where(masks["w"], bits, 0))


def test_masks_apply_under_jit_and_vmap():
  tree, masks = {"w": jnp.arange(12.0).reshape(3, 2, 2)}, {"w": jnp.eye(2, dtype=bool)}
  result = jax.jit(jax.vmap(sparsejax.apply_masks, (0, None)))(tree, masks)
  np.testing.assert_array_equal(np.asarray(result["w"]), np.asarray(tree["w"]) * np.eye(2))


def test_masks_of_another_tree_cannot_be_applied():
  with pytest.raises(ValueError):
    sparsejax.apply_masks({"w": jnp.ones((2, 2))}, {"v": jnp.ones((2, 2), bool)})


# sparsity.


def counted_masks(pruned, total=(8, 125)):
  kernel = (np.arange(np.prod(total)) >= pruned).reshape(total)
  return {"kernel": jnp.asarray(kernel), "bias": jnp.ones(500, bool)}


def test_sparsity_counts_the_pruned_pool_only():
  value = sparsejax.sparsity(counted_masks(729))
  assert jnp.shape(value) == ()
  np.testing.assert_allclose(float(value), 0.729, rtol=1e-6)


@pytest.mark.parametrize("pruned", [0, 1, 999, 1000])
def test_sparsity_is_the_pruned_fraction(pruned):
  np.testing.assert_allclose(
    float(jax.jit(sparsejax.sparsity)(counted_masks(pruned))), pruned / 1000, rtol=1e-6
  )


def test_sparsity_weighs_layers_by_their_size():
  masks = {"a": jnp.zeros((2, 5), bool), "b": jnp.ones((10, 9), bool)}
  np.testing.assert_allclose(float(sparsejax.sparsity(masks)), 0.1, rtol=1e-6)


def test_sparsity_follows_the_choice_of_what_is_prunable():
  masks = {"kernel": jnp.zeros((2, 5), bool), "other": jnp.ones((10, 9), bool)}
  everything = sparsejax.sparsity(masks, prunable=lambda path, leaf: True)
  only = sparsejax.sparsity(masks, prunable=lambda path, leaf: "kernel" in str(path))
  np.testing.assert_allclose([float(everything), float(only)], [0.1, 1.0], rtol=1e-6)


def test_the_sparsity_of_nothing_prunable_is_an_error():
  with pytest.raises(ValueError, match="no leaf is prunable"):
    sparsejax.sparsity({"bias": jnp.ones(3, bool)})


# overlap.


def test_overlap_is_the_jaccard_index_of_the_kept_weights():
  a = {
    "x": {"kernel": jnp.array([[1, 1, 1, 0]], bool)},
    "y": jnp.array([[1, 0, 0], [1, 0, 0]], bool),
  }
  b = {
    "x": {"kernel": jnp.array([[1, 0, 1, 1]], bool)},
    "y": jnp.array([[1, 0, 0], [0, 0, 0]], bool),
  }
  result = sparsejax.overlap(a, b)
  assert sorted(result.per_layer) == ["x/kernel", "y"]
  np.testing.assert_allclose(float(result.per_layer["x/kernel"]), 2 / 4, rtol=1e-6)
  np.testing.assert_allclose(float(result.per_layer["y"]), 1 / 2, rtol=1e-6)
  np.testing.assert_allclose(float(result.overall), 3 / 6, rtol=1e-6)


def test_overlap_is_symmetric_and_one_for_the_same_masks_and_zero_for_disjoint_ones():
  rng = np.random.default_rng(2)
  a = {"w": jnp.asarray(rng.random((9, 8)) < 0.4)}
  b = {"w": jnp.asarray(rng.random((9, 8)) < 0.6)}
  disjoint = {"w": ~a["w"]}
  assert float(sparsejax.overlap(a, a).overall) == 1.0
  assert float(sparsejax.overlap(a, disjoint).overall) == 0.0
  forwards, backwards = sparsejax.overlap(a, b), sparsejax.overlap(b, a)
  assert 0.0 < float(forwards.overall) < 1.0
  assert float(forwards.overall) == float(backwards.overall)
  assert float(forwards.per_layer["w"]) == float(forwards.overall)


def test_overlap_leaves_out_what_is_never_pruned():
  a = {"kernel": jnp.array([[1, 0]], bool), "bias": jnp.ones(100, bool)}
  b = {"kernel": jnp.array([[1, 1]], bool), "bias": jnp.ones(100, bool)}
  result = sparsejax.overlap(a, b)
  assert list(result.per_layer) == ["kernel"]
  np.testing.assert_allclose(float(result.overall), 0.5, rtol=1e-6)
  everything = sparsejax.overlap(a, b, prunable=lambda path, leaf: True)
  assert sorted(everything.per_layer) == ["bias", "kernel"]
  np.testing.assert_allclose(float(everything.overall), 101 / 102, rtol=1e-6)


def test_masks_that_keep_nothing_overlap_fully():
  nothing = {"kernel": jnp.zeros((2, 3), bool)}
  result = sparsejax.overlap(nothing, nothing)
  assert result.overall == result.per_layer["kernel"] == 1


@pytest.mark.parametrize(
  ("other", "said"),
  [
    ({"kernel": jnp.ones((1, 3), bool)}, r"'kernel' has shape \(2, 3\) in the first masks"),
    (
      {"kernel": jnp.ones((2, 3), bool), "new": jnp.ones((2, 3), bool)},
      "the second masks have 'new', but the first masks have not",
    ),
  ],
)
def test_masks_of_another_tree_cannot_be_compared(other, said):
  with pytest.raises(ValueError, match=said):
    sparsejax.overlap({"kernel": jnp.ones((2, 3), bool)}, other)


# masks_from_scores.


@pytest.mark.filterwarnings("ignore:no weight is left")  # As it has to be, at 0.98.
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_a_global_threshold_prunes_exactly_the_smallest_scores_of_the_pool(sparsity):
  scores = small_scores()
  masks = sparsejax.masks_from_scores(scores, sparsity)
  assert_full_tree(masks, scores)
  assert sum(kept(masks)) == round((1 - sparsity) * POOL)
  expected = reference.keep_largest(kernels(scores), round((1 - sparsity) * POOL))
  for mask, wanted in zip(kernels(masks), expected, strict=True):
    np.testing.assert_array_equal(np.asarray(mask), wanted)


@pytest.mark.parametrize(
  ("sparsity", "kept"),
  [
    (0.9, 2),  # 0.1 * 25 is 2.4999999999999996 in float64, but 2.5000006 in float32.
    (0.7, 8),  # 7.500000000000001 in float64.
    (0.5, 12),  # 12.5, to even.
    (0.3, 18),  # 17.5, to even.
    (0.98, 1),  # 0.5000000000000004 in float64.
  ],
)
def test_the_count_is_rounded_in_float64_as_python_rounds(sparsity, kept):
  assert round((1 - sparsity) * 25) == kept
  scores = {"w": jnp.zeros((5, 5))}  # All tied: the first ones go.
  masks = np.asarray(sparsejax.masks_from_scores(scores, sparsity)["w"])
  np.testing.assert_array_equal(masks.ravel(), np.arange(25) >= 25 - kept)


def densities_of(allocation, density):
  shapes = [shape for _, shape in LAYERS]
  if allocation == "uniform":
    return reference.uniform_densities(shapes, density)
  return reference.er_densities(shapes, density, kernel=allocation == "erk")


@pytest.mark.filterwarnings("ignore:no weight is left")  # As it has to be, at 0.98.
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("allocation", ["uniform", "er", "erk"])
def test_each_layer_keeps_its_density_rounded(allocation, sparsity):
  scores = small_scores(3)
  masks = sparsejax.masks_from_scores(scores, sparsity, allocation=allocation)
  assert_full_tree(masks, scores)
  densities = densities_of(allocation, 1 - sparsity)
  counts = [
    round(float(density) * int(np.prod(shape)))
    for density, (_, shape) in zip(densities, LAYERS, strict=True)
  ]
  assert kept(masks) == counts
  for mask, wanted in zip(
    kernels(masks), reference.keep_largest(kernels(scores), counts), strict=True
  ):
    np.testing.assert_array_equal(np.asarray(mask), wanted)


def test_the_allocations_differ():
  scores = small_scores(4)
  counts = {
    allocation: tuple(kept(sparsejax.masks_from_scores(scores, 0.8, allocation=allocation)))
    for allocation in ("global", "uniform", "er", "erk")
  }
  assert len(set(counts.values())) == 4
  assert all(abs(sum(count) - round(0.2 * POOL)) <= 1.5 for count in counts.values())


def test_a_tree_of_sparsities_gives_each_leaf_its_own():
  scores = small_scores(5)
  sparsity = {
    "conv": {"kernel": 0.5, "bias": 0.0},
    "dense": {"kernel": 0.9},
    "head": {"kernel": 0.0, "scale": 0.0},
  }
  masks = sparsejax.masks_from_scores(scores, sparsity)
  assert_full_tree(masks, scores)
  counts = [45, round((1 - 0.9) * 105), 21]
  assert kept(masks) == counts
  for mask, wanted in zip(
    kernels(masks), reference.keep_largest(kernels(scores), counts), strict=True
  ):
    np.testing.assert_array_equal(np.asarray(mask), wanted)


@pytest.mark.parametrize("allocation", ["global", "uniform", "er", "erk"])
def test_a_traced_sparsity_is_counted_to_the_nearest_weight(allocation):
  scores = jax.tree.map(jnp.asarray, small_scores(6))
  traced = jax.jit(lambda s: sparsejax.masks_from_scores(scores, s, allocation=allocation))
  for sparsity in [*SPARSITIES, 1.0]:
    value = np.float32(sparsity)
    masks = traced(value)
    assert_full_tree(masks, scores)
    if allocation == "global":
      pruned = POOL - sum(kept(masks))
      assert abs(Fraction(pruned) - Fraction(float(value)) * POOL) <= Fraction(1, 2)
    else:
      densities = densities_of(allocation, 1 - float(value))
      for count, density, (_, shape) in zip(kept(masks), densities, LAYERS, strict=True):
        assert abs(count - density * np.prod(shape)) <= 0.5 + 1e-3


def test_a_traced_sparsity_is_counted_exactly_where_float32_cannot_count():
  total = 4099 * 4111  # Odd, and more than 2^24.
  scores = {"w": jnp.zeros((4099, 4111), jnp.bfloat16)}
  traced = jax.jit(lambda s: jnp.sum(~sparsejax.masks_from_scores(scores, s)["w"], dtype=jnp.int32))
  for sparsity in (0.1, 0.3, 0.729, 0.9):
    value = np.float32(sparsity)
    pruned = int(traced(value))
    assert abs(Fraction(pruned) - Fraction(float(value)) * total) <= Fraction(1, 2)


def test_a_sweep_over_sparsities_under_vmap_is_a_loop():
  scores = jax.tree.map(jnp.asarray, small_scores(7))
  values = jnp.asarray(SPARSITIES, jnp.float32)
  swept = jax.jit(jax.vmap(lambda s: sparsejax.masks_from_scores(scores, s)))(values)
  single = jax.jit(lambda s: sparsejax.masks_from_scores(scores, s))
  for i, value in enumerate(values):
    for mask, wanted in zip(jax.tree.leaves(swept), jax.tree.leaves(single(value)), strict=True):
      np.testing.assert_array_equal(np.asarray(mask[i]), np.asarray(wanted))


def test_only_what_is_prunable_is_pruned():
  scores = small_scores(8)
  masks = sparsejax.masks_from_scores(
    scores, 0.5, prunable=lambda path, leaf: leaf.ndim >= 2 and "head" not in str(path)
  )
  assert np.all(masks["head"]["kernel"])
  assert sum(kept(masks)[:2]) == round(0.5 * (90 + 105))


def test_scores_of_nothing_prunable_give_masks_of_ones():
  scores = {"bias": jnp.arange(4.0), "scale": jnp.float32(1.0)}
  masks = sparsejax.masks_from_scores(scores, 0.5)
  assert all(bool(np.all(mask)) for mask in jax.tree.leaves(masks))
  assert jax.tree.structure(masks) == jax.tree.structure(scores)


def test_nan_scores_are_kept():
  scores = {"w": jnp.array([[np.nan, 1.0, np.inf, 2.0]])}
  masks = sparsejax.masks_from_scores(scores, 0.75)
  np.testing.assert_array_equal(np.asarray(masks["w"]), [[True, False, False, False]])


@pytest.mark.parametrize("scores", [jnp.arange(9).reshape(3, 3), np.ones((3, 3), bool)])
def test_scores_that_are_no_floating_point_numbers_are_an_error_that_names_them(scores):
  with pytest.raises(ValueError, match=r"floating-point numbers, but .*kernel.* has dtype"):
    sparsejax.masks_from_scores({"kernel": scores}, 0.5)


def test_an_unknown_allocation_is_an_error_that_names_the_known_ones():
  with pytest.raises(ValueError, match="layerwise") as error:
    sparsejax.masks_from_scores(small_scores(), 0.5, allocation="layerwise")
  assert all(name in str(error.value) for name in ("global", "uniform", "er", "erk"))


@pytest.mark.parametrize("sparsity", [-0.25, 1.0, 1.25, 72.9, float("nan")])
def test_a_sparsity_that_leaves_nothing_or_is_no_fraction_is_an_error_that_shows_it(sparsity):
  with pytest.raises(ValueError, match=str(sparsity)):
    sparsejax.masks_from_scores(small_scores(), sparsity)


def test_a_tree_of_sparsities_that_does_not_match_is_an_error():
  with pytest.raises(ValueError):
    sparsejax.masks_from_scores(
      {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}, {"a": 0.5, "c": 0.5}
    )


def test_masks_that_are_known_when_compiling_are_not_counted_by_the_compiler():
  def count():
    masks = {"kernel": jnp.ones((20, 30), bool)}
    return sparsejax.sparsity(masks), sparsejax.overlap(masks, masks).overall

  compiled = jax.jit(count).lower().compile(compiling.AS_USERS)
  assert compiled.as_text().count(" reduce(") >= 2


def test_two_leaves_of_one_name_are_an_error_where_leaves_are_told_apart_by_name():
  masks = {"a": {"b": jnp.ones((2, 2), bool)}, "a/b": jnp.zeros((2, 2), bool)}
  for function in (sparsejax.summary, sparsejax.apply_masks, sparsejax.deploy.final.check):
    with pytest.raises(ValueError, match="two leaves have the name 'a/b': rename one of them"):
      function(masks, masks)
