"""Densities per layer against the original ER and ERK code and against their own definition."""

import json
import pathlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import sparsejax
from sparsejax import allocation

ORACLE = json.loads((pathlib.Path(__file__).parent / "oracles" / "erk.json").read_text())["archs"]
CASES = [
  pytest.param(name, float(density), id=f"{name}-{density}")
  for name, architecture in ORACLE.items()
  for density in architecture["by_density"]
]
KINDS = ["uniform", "er", "erk"]


def shapes_of(name):
  return [tuple(layer["shape_hwio"]) for layer in ORACLE[name]["layers"]]


def sizes_of(shapes):
  return np.array([np.prod(shape) for shape in shapes], np.float64)


def expected(name, density):
  return ORACLE[name]["by_density"][str(density)]


def overall(densities, shapes):
  sizes = sizes_of(shapes)
  return float(np.sum(np.asarray(densities, np.float64) * sizes) / sizes.sum())


traced = {
  (name, kind): jax.jit(
    lambda density, name=name, kind=kind: allocation.densities(shapes_of(name), density, kind)
  )
  for name in ORACLE
  for kind in KINDS
}


@pytest.mark.parametrize(("name", "density"), CASES)
def test_erk_is_that_of_granet(name, density):
  result = allocation.densities(shapes_of(name), density, "erk")
  assert isinstance(result, np.ndarray)
  assert result.dtype == np.float64
  np.testing.assert_allclose(result, expected(name, density)["erk_granet"], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "density"), CASES)
def test_traced_erk_is_that_of_granet_in_single_precision(name, density):
  result = traced[name, "erk"](jnp.float32(density))
  np.testing.assert_allclose(result, expected(name, density)["erk_granet"], rtol=1e-5)


@pytest.mark.parametrize(("name", "density"), CASES)
def test_er_is_that_of_rigl_but_for_its_floored_counts(name, density):
  result = allocation.densities(shapes_of(name), density, "er")
  oracle = np.array(expected(name, density)["er_rigl"])
  np.testing.assert_allclose(result, oracle, rtol=0, atol=1e-3)
  np.testing.assert_array_equal(result == 1, oracle == 1)
  exact = reference.er_densities(shapes_of(name), density, kernel=False)
  np.testing.assert_allclose(result, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "density"), CASES)
def test_traced_er_is_that_of_the_definition_in_single_precision(name, density):
  exact = reference.er_densities(shapes_of(name), float(np.float32(density)), kernel=False)
  np.testing.assert_allclose(traced[name, "er"](jnp.float32(density)), exact, rtol=1e-5)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.271, 1.0])
def test_uniform_is_the_same_density_everywhere(density):
  result = allocation.densities(shapes_of("lenet_5_caffe"), density, "uniform")
  np.testing.assert_array_equal(result, np.full(4, density))
  result = traced["lenet_5_caffe", "uniform"](jnp.float32(density))
  np.testing.assert_array_equal(np.asarray(result), np.full(4, np.float32(density)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "density"), CASES)
def test_the_densities_add_up_to_the_overall_one(name, density, kind):
  shapes = shapes_of(name)
  result = allocation.densities(shapes, density, kind)
  assert np.all((result > 0) & (result <= 1))
  np.testing.assert_allclose(overall(result, shapes), density, rtol=1e-12)
  if kind == "erk":
    np.testing.assert_allclose(
      overall(result, shapes), expected(name, density)["overall_density_granet"], rtol=1e-12
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ORACLE)
def test_everything_is_kept_at_density_one_and_nothing_at_zero(name, kind):
  for density in (1.0, 0.0):
    exact = np.full(len(shapes_of(name)), density)
    np.testing.assert_array_equal(allocation.densities(shapes_of(name), density, kind), exact)
    np.testing.assert_array_equal(np.asarray(traced[name, kind](jnp.float32(density))), exact)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", [0.5, 0.1, 0.02])
def test_kernels_of_equal_shape_keep_the_same_density(kind, density):
  shapes = shapes_of("resnet18_cifar10")
  for result in (
    allocation.densities(shapes, density, kind),
    np.asarray(traced["resnet18_cifar10", kind](jnp.float32(density))),
  ):
    by_shape = {}
    for shape, value in zip(shapes, result, strict=True):
      by_shape.setdefault(shape, set()).add(float(value))
    assert len(by_shape) < len(shapes)
    assert all(len(values) == 1 for values in by_shape.values())


def test_erk_does_not_depend_on_the_layout_but_er_reads_the_last_two_dimensions():
  shapes = shapes_of("lenet_5_caffe")
  turned = [shape[::-1] for shape in shapes]
  erk = [allocation.densities(layout, 0.1, "erk") for layout in (shapes, turned)]
  np.testing.assert_allclose(erk[0], erk[1], rtol=1e-12)
  er = [allocation.densities(layout, 0.1, "er") for layout in (shapes, turned)]
  assert np.max(np.abs(er[0] - er[1])) > 0.01


KERNELS = st.sampled_from([(3, 3, 3, 16), (1, 1, 16, 32), (3, 3, 16, 16), (400, 300), (300, 10)])
DENSITIES = st.floats(0, 1) | st.sampled_from([0.0, 1.0, 0.5, 1 - 1e-12, 1e-12])


@pytest.mark.parametrize("kind", ["er", "erk"])
@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(shapes=st.lists(KERNELS, min_size=1, max_size=6), density=DENSITIES)
def test_any_network_and_density_follow_the_definition(kind, shapes, density):
  result = allocation.densities(shapes, density, kind)
  exact = reference.er_densities(shapes, density, kernel=kind == "erk")
  np.testing.assert_allclose(result, exact, rtol=1e-9, atol=1e-12)
  assert np.all((result >= 0) & (result <= 1))
  np.testing.assert_allclose(overall(result, shapes), density, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["er", "erk"])
@pytest.mark.parametrize("name", ["lenet_5_caffe", "resnet18_cifar10"])
@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(density=st.floats(0, 1, width=32))
def test_any_traced_density_follows_the_definition(kind, name, density):
  shapes = shapes_of(name)
  result = np.asarray(traced[name, kind](jnp.float32(density)))
  assert np.all((result >= 0) & (result <= 1))
  np.testing.assert_allclose(overall(result, shapes), density, rtol=1e-5, atol=1e-7)
  exact = reference.er_densities(shapes, density, kernel=kind == "erk")
  np.testing.assert_allclose(result, exact, rtol=1e-4, atol=1e-7)


def test_a_sweep_of_densities_under_vmap_is_a_loop():
  densities = jnp.asarray([0.5, 0.3, 0.1, 0.02, 1.0, 0.0], jnp.float32)
  one = traced["vgg19_cifar10", "erk"]
  looped = np.stack([one(density) for density in densities])
  np.testing.assert_allclose(np.asarray(jax.vmap(one)(densities)), looped, rtol=1e-6)


def test_no_layers_have_no_densities():
  for kind in KINDS:
    assert allocation.densities([], 0.5, kind).shape == (0,)


@pytest.mark.parametrize("density", [0.5, jnp.float32(0.5)], ids=["static", "array"])
def test_an_unknown_allocation_is_an_error_that_names_the_known_ones(density):
  with pytest.raises(ValueError, match="layerwise") as error:
    allocation.densities([(3, 4)], density, "layerwise")
  assert all(name in str(error.value) for name in KINDS)


def layers():
  return {"a": jnp.arange(1.0, 13.0).reshape(3, 4), "b": jnp.arange(1.0, 21.0).reshape(4, 5)}


@pytest.mark.parametrize("as_array", [list, np.array, jnp.array])
@pytest.mark.parametrize("traced", [False, True])
def test_an_allocation_of_ones_own_may_return_any_kind_of_array(as_array, traced):
  sparsity = jnp.float32(0.5) if traced else 0.5
  tx = sparsejax.one_shot_pruning(sparsity, at=0, allocation=lambda s, d: as_array([0.75, 0.25]))
  _, state = jax.jit(tx.update)(layers(), tx.init(layers()), layers())
  assert [int(jnp.sum(~m)) for m in jax.tree.leaves(state.masks)] == [3, 15]


@pytest.mark.parametrize(
  "returned", [[0.5], [0.5, 0.5, 0.5], [[0.5, 0.5]], [0.5, 1.5], [-0.5, 0.5]]
)
def test_an_allocation_of_ones_own_has_to_return_one_density_for_each_layer(returned):
  with pytest.raises(ValueError, match="returned"):
    sparsejax.masks_from_scores(layers(), 0.5, allocation=lambda shapes, density: returned)


@pytest.mark.parametrize("name", ["er", "erk"])
def test_traced_counts_do_not_depend_on_how_they_are_compiled(name):
  shapes = [(3, 3, 64, 64), (3, 3, 64, 128), (3, 3, 128, 256), (512, 10), (1024, 1000)]

  def count(sparsity):
    pruned = allocation.count_pruned(shapes, sparsity, name)
    return pruned.low

  sparsities = jnp.asarray(np.random.default_rng(0).uniform(0, 1, 60), jnp.float32)
  jitted, batched = jax.jit(count), jax.jit(jax.vmap(count))(sparsities)
  for i, sparsity in enumerate(sparsities):
    np.testing.assert_array_equal(jitted(sparsity), batched[i])
    with jax.disable_jit(i < 3):
      np.testing.assert_array_equal(count(sparsity), batched[i])


# Shares of 1,000 weights that are half a weight: single precision sees other numbers than double.
CHOICES = (0.9805, 0.7005, 0.0, 0.1, 0.5, 1 - 1e-9, 0.0245)


def to_ints(count):
  return np.asarray(count.high, np.uint64) * 2**32 + np.asarray(count.low, np.uint64)


@pytest.mark.parametrize("kind", ["global", *KINDS])
@pytest.mark.parametrize(
  "shapes",
  [[(25, 40)], [(7, 19), (3, 5)], [(2**20, 2**13), (1001, 999)], [(3, 3, 64, 128), (9, 5)]],
)
def test_one_of_several_sparsities_has_the_counts_of_the_float_that_it_is(kind, shapes):
  def count(index):
    return allocation.count_pruned(shapes, sparsejax.OneOf(CHOICES, index), kind)

  lanes = to_ints(jax.jit(jax.vmap(count))(jnp.arange(len(CHOICES))))
  expected = [allocation.count_pruned(shapes, sparsity, kind) for sparsity in CHOICES]
  np.testing.assert_array_equal(lanes, expected)


def test_a_traced_sparsity_is_another_number_than_the_float():
  # Or else the test above could not tell the two apart.
  traced = to_ints(allocation.count_pruned([(25, 40)], jnp.float32(CHOICES[0]), "global"))
  assert traced != allocation.count_pruned([(25, 40)], CHOICES[0], "global")


def test_each_leaf_may_have_one_of_several_sparsities_of_its_own():
  sizes = {"a": (3, 4), "b": (25, 40), "c": (5, 6), "d": (1, 7)}
  scores = {name: jnp.arange(1.0, np.prod(s) + 1).reshape(s) for name, s in sizes.items()}

  @jax.jit
  def pruned(i, j, sparsity):
    tree = {
      "a": sparsejax.OneOf((0.25, 0.75), i),
      "b": sparsejax.OneOf(CHOICES, j),
      "c": 0.1,
      "d": sparsity,
    }
    masks = sparsejax.masks_from_scores(scores, tree)
    return jax.tree.map(lambda mask: jnp.sum(~mask), masks)

  assert pruned(1, 0, 0.5) == {"a": 9, "b": 1000 - round((1 - 0.9805) * 1000), "c": 3, "d": 3}
  assert pruned(0, 4, 0.0) == {"a": 3, "b": 500, "c": 3, "d": 0}


@pytest.mark.parametrize(
  ("values", "index", "said"),
  [
    ((0.5, 1.0), 0, r"values\[1\] of OneOf .* must be in \[0, 1\), got 1.0"),
    ((0.5, "0.9"), 0, r"values\[1\] of OneOf must be a number in \[0, 1\), got '0.9'"),
    ((jnp.float32(0.5),), 0, "values of OneOf must be Python or NumPy numbers"),
    ((), 0, "at least one value"),
    ((0.5, 0.9), 2, r"the index of OneOf must be in \[0, 2\), got 2"),
    ((0.5, 0.9), -1, r"the index of OneOf must be in \[0, 2\), got -1"),
    ((0.5, 0.9), 0.0, "the index of OneOf must be one integer, got 0.0"),
    ((0.5, 0.9), jnp.arange(2), "the index of OneOf must be one integer"),
    ((0.5, 0.9), True, "the index of OneOf must be one integer, got True"),
    (0.5, 0, r"values of OneOf must be several numbers, got 0\.5"),
  ],
)
def test_one_of_several_sparsities_is_checked(values, index, said):
  with pytest.raises(ValueError, match=said):
    sparsejax.OneOf(values, index)


def test_one_of_several_sparsities_is_an_error_where_there_can_be_but_one():
  one_of = sparsejax.OneOf((0.5, 0.9), 0)
  for prune in (
    lambda: sparsejax.progressive_pruning(0.95, initial=one_of, steps=2, every=1),
    lambda: sparsejax.lottery.prune(layers(), layers(), one_of),
    lambda: sparsejax.foresight.synflow(
      lambda p, x: x @ p["a"], layers(), jnp.ones((1, 3)), one_of
    ),
  ):
    with pytest.raises(ValueError, match=r"must be a number in \[0, 1\), got OneOf"):
      prune()
  with pytest.raises(ValueError, match=r"must not exceed the sparsity, got 0\.6 and 0\.5"):
    sparsejax.progressive_pruning(one_of, initial=0.6, steps=2, every=1)


def test_a_mapping_is_no_allocation():
  with pytest.raises(ValueError, match="a tree of sparsities instead of one sparsity"):
    sparsejax.progressive_pruning(0.5, steps=4, every=2, allocation={"a": 0.5})
  with pytest.raises(ValueError, match="did you mean 'erk'"):
    sparsejax.progressive_pruning(0.5, steps=4, every=2, allocation="ERK")


def test_a_warning_names_the_layers_that_are_emptied():
  scores = {"a": jnp.full((2, 2), 1.0), "b": jnp.full((2, 2), 2.0), "c": jnp.full((2, 2), 3.0)}
  with pytest.warns(UserWarning, match="no weight is left in 'a', 'b': ") as record:
    masks = sparsejax.masks_from_scores(scores, 0.75)
  assert len(record) == 1
  assert record[0].filename == __file__
  assert [int(jnp.sum(mask)) for mask in masks.values()] == [0, 0, 3]


def test_no_warning_is_given_while_tracing_nor_of_layers_that_have_no_weights():
  scores = {"a": jnp.ones((2, 2)), "b": jnp.full((2, 2), 2.0), "none": jnp.ones((0, 3))}
  masks = jax.jit(lambda scores: sparsejax.masks_from_scores(scores, 0.5))(scores)
  assert not np.any(masks["a"])
  jax.eval_shape(lambda scores: sparsejax.masks_from_scores(scores, 0.5), scores)
  with pytest.warns(UserWarning, match="no weight is left in 'a': "):
    sparsejax.masks_from_scores(scores, 0.5)
  masks = sparsejax.masks_from_scores(scores, 0.25)  # A warning would be an error here.
  assert [int(jnp.sum(mask)) for mask in masks.values()] == [2, 4, 0]


def test_the_warning_about_emptied_layers_looks_at_the_masks_of_all_kinds_of_leaves():
  scores = {"bias": jnp.zeros(3), "kernel": np.arange(1.0, 5.0, dtype=np.float32).reshape(2, 2)}
  masks = sparsejax.masks_from_scores(scores, 0.5)
  assert bool(jnp.all(masks["bias"]))
  with pytest.warns(UserWarning, match="no weight is left in 'bias', 'kernel': "):
    sparsejax.masks_from_scores(
      {**scores, "head": jnp.full((2, 4), 9.0)}, 0.5, prunable=lambda path, leaf: True
    )


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_a_sparsity_that_leaves_nothing_is_an_error(allocation):
  scores = {"a": jnp.ones((2, 2)), "b": jnp.ones((1, 3))}
  with pytest.raises(ValueError, match="none of the 7 prunable weights would be left"):
    sparsejax.masks_from_scores(scores, 0.99, allocation=allocation)


@pytest.mark.parametrize("name", ["er", "erk"])
def test_a_number_is_like_a_vector_of_one(name):
  for density in (0.1, 0.5, 0.995):
    found = sparsejax.allocation.densities([(10, 10), ()], density, name)
    expected = sparsejax.allocation.densities([(10, 10), (1,)], density, name)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(found @ [100, 1], 101 * density)


@pytest.mark.parametrize("name", ["er", "erk"])
def test_a_layer_without_weights_takes_nothing_from_the_others(name):
  np.testing.assert_array_equal(allocation.densities([(0, 5), (4, 4)], 0.5, name), [1, 0.5])
