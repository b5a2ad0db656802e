"""Patterns: N:M, blocks and channels, through every transformation, against slow versions."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sparsejax
from sparsejax import patterns
from sparsejax.patterns import NM, Blocks, Channels

KEY = jax.random.key(0)
SGD = optax.sgd(0.1, momentum=0.9)
PATTERNS = (NM(2, 4), NM(1, 4), NM(2, 4, axis=-1), Blocks((4, 4)), Blocks((2,)), Channels())


def make_params(seed=0):
  rng = np.random.default_rng(seed)
  shapes = {"conv": (3, 3, 8, 12), "dense": (16, 24), "bias": (24,)}
  return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def final_sparsity(pattern):
  return 1 - pattern.n / pattern.m if isinstance(pattern, NM) else 0.5


def transformations(pattern):
  sparsity = final_sparsity(pattern)
  cubic = optax.polynomial_schedule(0.0, sparsity, 3, 4)
  dynamic = dict(sparsity=sparsity, every=1, allocation="uniform", pattern=pattern, key=KEY)
  return {
    "progressive": sparsejax.progressive_pruning(sparsity, steps=4, every=1, pattern=pattern),
    "gradual": sparsejax.gradual_pruning(cubic, every=1, end=4, pattern=pattern, pack=True),
    "kept": sparsejax.gradual_pruning(cubic, every=1, pattern=pattern, keep_weights=True),
    "one shot": sparsejax.one_shot_pruning(
      sparsity, at=1, pattern=pattern, criterion="random", key=KEY
    ),
    "granet": sparsejax.granet(SGD, steps=4, fraction=0.5, initial=0.1, **dynamic),
    "rigl": sparsejax.rigl(SGD, end=20, **dynamic),
    "set": sparsejax.dynamic_sparse_training(SGD, fraction=0.3, grow="random", **dynamic),
    "snfs": sparsejax.snfs(SGD, fraction=0.5, redistribute=False, **dynamic),
  }


def masks_over_time(tx, calls=6):
  """The masks of the kernels at the start and after each call, with random gradients."""
  params, state, update = make_params(), None, jax.jit(tx.update)
  state = tx.init(params)
  masks = [sparsejax.get_masks(state, params)]
  params = sparsejax.apply_masks(params, masks[0])
  for call in range(calls):
    updates, state = update(make_params(call + 1), state, params)
    params = optax.apply_updates(params, updates)
    masks.append(sparsejax.get_masks(state, params))
  return [{name: np.asarray(m) for name, m in now.items() if name != "bias"} for now in masks]


def in_groups(array, pattern):
  """One row for each group of N:M."""
  return np.moveaxis(array, pattern.axis, -1).reshape(-1, pattern.m)


def _cases():
  yield from (("progressive", pattern) for pattern in PATTERNS)
  # They differ in what they compute, not in how a pattern comes in.
  yield from ((name, NM(2, 4)) for name in transformations(NM(2, 4)) if name != "progressive")
  yield from (("granet", pattern) for pattern in (Blocks((4, 4)), Channels()))


@pytest.mark.parametrize("name,pattern", list(_cases()), ids=str)
def test_every_transformation_ends_with_masks_of_the_pattern(name, pattern):
  *before, last = masks_over_time(transformations(pattern)[name])
  patterns.check(last, pattern)
  assert 0 < sum(m.sum() for m in last.values()) < sum(m.size for m in last.values())
  for now in before:
    for mask in now.values():
      if isinstance(pattern, NM):
        assert in_groups(mask, pattern).sum(axis=-1).min() >= pattern.n
      else:
        assert pattern.follows(mask)
  changes = list(zip([*before], [*before[1:], last]))
  grown = sum((after[k] & ~now[k]).sum() for now, after in changes for k in now)
  assert (grown > 0) == (name in ("granet", "rigl", "set", "snfs", "kept"))


@pytest.mark.parametrize("pattern", PATTERNS[:3], ids=str)
def test_along_a_ramp_to_n_of_m_the_overall_counts_are_exact(pattern):
  sparsity, size = final_sparsity(pattern), 3 * 3 * 8 * 12 + 16 * 24
  tx = transformations(pattern)["progressive"]
  counts = [sum((~m).sum() for m in now.values()) for now in masks_over_time(tx, calls=4)[1:]]
  assert counts == [size - round((1 - sparsity * (e + 1) / 4) * size) for e in range(4)]


TIED = hnp.arrays(
  np.float32,
  st.sampled_from([(4, 3), (16, 1), (8, 2, 2)]),
  elements=st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0, np.inf]),
)


@hypothesis.settings(max_examples=20)
@hypothesis.given(scores=TIED, n=st.sampled_from([1, 2]), part=st.sampled_from([0.3, 0.7, 1.0]))
def test_n_of_m_is_what_a_slow_version_prunes(scores, n, part):
  pattern = NM(n, 4, axis=0)
  sparsity = part * (1 - n / 4)
  # Of each group the first in order of score, then index, may go, as in a stable sort.
  groups = scores.reshape(-1, 4, *scores.shape[1:])
  order = np.argsort(np.argsort(groups, axis=1, kind="stable"), axis=1, kind="stable")
  may_go = (order < 4 - n).reshape(scores.shape)
  places = [i for i in np.argsort(scores, axis=None, kind="stable") if may_go.reshape(-1)[i]]
  expected = np.ones(scores.size, bool)
  expected[places[: scores.size - round((1 - sparsity) * scores.size)]] = False
  masks = sparsejax.masks_from_scores({"w": jnp.asarray(scores)}, sparsity, pattern=pattern)
  np.testing.assert_array_equal(masks["w"], expected.reshape(scores.shape))
  if part == 1:
    patterns.check(masks, pattern)


@pytest.mark.parametrize("pattern", [Channels(), Channels(axis=0), Blocks((2,)), NM(2, 4)], ids=str)
def test_a_kernel_without_weights_has_any_pattern(pattern):
  scores = make_params() | {"empty": jnp.zeros((0, 4))}
  masks = sparsejax.masks_from_scores(scores, 0.5, pattern=pattern)
  assert masks["empty"].shape == (0, 4)
  patterns.check(masks, pattern)


@pytest.mark.parametrize(
  "pattern,tile",
  [
    (Blocks((4, 4)), {"conv": (1, 1, 4, 4), "dense": (4, 4)}),
    (Blocks((2,)), {"conv": (1, 1, 1, 2), "dense": (1, 2)}),
    (Channels(), {"conv": (3, 3, 8, 1), "dense": (16, 1)}),
    (Channels(axis=-2), {"conv": (3, 3, 1, 12), "dense": (1, 24)}),
  ],
  ids=str,
)
def test_tiles_of_lowest_mean_are_pruned_as_a_whole(pattern, tile):
  scores = {name: np.abs(leaf) for name, leaf in make_params().items()}
  means = {}
  for name, size in tile.items():
    for corner in np.ndindex(*(n // t for n, t in zip(scores[name].shape, size))):
      part = tuple(slice(c * t, (c + 1) * t) for c, t in zip(corner, size))
      means[name, corner] = float(np.mean(scores[name][part], dtype=np.float64)), part
  expected = {name: np.ones_like(s, bool) for name, s in scores.items()}
  ordered = sorted(means, key=lambda unit: means[unit][0])
  for name, corner in ordered[: len(ordered) - round(0.3 * len(ordered))]:
    expected[name][means[name, corner][1]] = False
  masks = sparsejax.masks_from_scores(scores, 0.7, pattern=pattern)
  jax.tree.map(np.testing.assert_array_equal, masks, expected)


@pytest.mark.parametrize("pattern", [Channels(), Blocks((2, 1))], ids=str)
def test_weights_and_gradients_of_both_signs_do_not_cancel_in_a_mean(pattern):
  weights = {"w": jnp.array([[3.0, 1.0, 0.0, 0.0], [-3.0, 1.0, 0.0, 0.0]])}
  tx = sparsejax.one_shot_pruning(0.75, at=0, pattern=pattern)
  _, state = tx.update(weights, tx.init(weights), weights)
  np.testing.assert_array_equal(state.masks["w"], [[True, False, False, False]] * 2)
  # Of the first two one is dropped, and of the others one grows.
  gradients = {"w": jnp.array([[0.0, 0.0, 1.0, 3.0], [0.0, 0.0, 1.0, -3.0]])}
  tx = sparsejax.dynamic_sparse_training(
    SGD, sparsity=None, masks={"w": weights["w"] != 0}, fraction=0.5, every=1, pattern=pattern
  )
  _, state = tx.update(gradients, tx.init(weights), weights)
  np.testing.assert_array_equal(state.masks["w"], [[True, False, False, True]] * 2)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_means_of_half_precision_are_not_rounded_to_it(dtype):
  scores = jax.random.uniform(jax.random.key(2), (64, 256), dtype)
  means = np.mean(np.asarray(scores, np.float64), axis=0)
  masks = sparsejax.masks_from_scores({"w": scores}, 0.5, pattern=Channels())
  kept = np.argsort(means, kind="stable")[128:]
  np.testing.assert_array_equal(np.flatnonzero(np.any(masks["w"], axis=0)), np.sort(kept))


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("spec", [P("data"), P(None, "data")], ids=str)
def test_eight_devices_give_the_masks_of_n_of_m_that_one_gives(spec, mode):
  rng = np.random.default_rng(0)
  weights = {"w": np.round(rng.normal(size=(64, 32)), 1).astype("f4")}
  tx = sparsejax.progressive_pruning(0.5, steps=2, every=1, pattern=NM(2, 4))

  def train(params):
    state, update = tx.init(params), jax.jit(tx.update)
    masks = []
    for _ in range(2):
      _, state = update(params, state, params)
      masks.append(np.asarray(state.masks["w"]))
    return masks

  mesh = jax.make_mesh((8,), ("data",), axis_types=(mode,))
  with jax.set_mesh(mesh):
    sharded = jax.tree.map(lambda w: jax.device_put(w, NamedSharding(mesh, spec)), weights)
    masks = train(sharded)
  np.testing.assert_array_equal(masks, train(jax.tree.map(jnp.asarray, weights)))


def test_weights_that_are_kept_return_to_their_group_once_they_are_the_largest():
  tx = sparsejax.gradual_pruning(lambda count: 0.5, every=1, pattern=NM(2, 4), keep_weights=True)
  weights = np.float32([[4], [3], [2], [1]])
  state = tx.init({"w": weights})
  for w in (weights, weights[::-1], weights):
    _, state = tx.update({"w": w}, state, {"w": w})
    np.testing.assert_array_equal(state.masks["w"], w > 2)


def test_of_equal_gradients_the_first_of_a_group_grow():
  params = {"w": jnp.array([[0.0], [0.0], [1.0], [0.0]])}
  tx = sparsejax.dynamic_sparse_training(
    SGD, masks={"w": params["w"] > 0}, fraction=1.0, every=1, pattern=NM(1, 4)
  )
  _, state = tx.update(params, tx.init(params), {"w": params["w"]}, grad={"w": 0 * params["w"]})
  np.testing.assert_array_equal(state.masks["w"][:, 0], [True, False, False, False])


def test_what_is_pruned_takes_no_place_in_its_group_whatever_it_scores():
  params = {"w": make_params()["dense"]}
  tx = sparsejax.gradual_pruning(
    lambda count: jnp.float32([0.25, 0.5])[count],
    every=1,
    criterion="random",
    key=KEY,
    pattern=NM(2, 4),
  )
  state = tx.init(params)
  for _ in range(2):
    _, state = tx.update(params, state, params)
  patterns.check(state.masks, NM(2, 4))


def test_lanes_of_vmap_have_the_masks_of_n_of_m_that_each_has_alone():
  tx = transformations(NM(2, 4))["progressive"]
  lanes = jnp.stack([make_params(seed)["dense"] for seed in range(3)])

  def masks(w):
    return tx.update({"w": w}, tx.init({"w": w}), {"w": w})[1].masks["w"]

  np.testing.assert_array_equal(jax.vmap(masks)(lanes), jnp.stack([masks(w) for w in lanes]))


def test_given_masks_of_channels_are_as_sparse_as_their_channels():
  params = {"w": jnp.ones((8, 4))}
  options = dict(sparsity=0.5, every=1, fraction=0.1, steps=2, pattern=Channels())
  # Of the four channels, two are to go in the end; each has eight weights.
  masks = {"w": jnp.broadcast_to(jnp.arange(4) >= 2, (8, 4))}
  state = sparsejax.granet(SGD, masks=masks, **options).init(params)
  np.testing.assert_array_equal(state.masks["w"], masks["w"])
  masks = {"w": jnp.zeros((8, 4), bool)}
  with pytest.raises(ValueError, match="starts with 4 pruned and is to end with 2"):
    sparsejax.granet(SGD, masks=masks, **options).init(params)


def test_a_traced_sparsity_prunes_no_more_than_may_go():
  params = make_params()
  tx = sparsejax.gradual_pruning(lambda count: 0.9, every=1, pattern=NM(2, 4))
  _, state = tx.update(params, tx.init(params), params)
  patterns.check(sparsejax.get_masks(state, params), NM(2, 4))


@pytest.mark.parametrize(
  "pattern,match",
  [
    (NM(2, 5), r"'conv': NM\(n=2, m=5, axis=-2\) needs axis 2 of a kernel of shape"),
    (NM(2, 4, axis=2), r"'dense': a kernel of shape \(16, 24\) has no axis 2"),
    (Blocks((3, 3)), r"'conv': Blocks\(shape=\(3, 3\)\) needs axis 2 .* to be a multiple of 3"),
    (Blocks((1, 1, 1)), r"'dense': .* does not fit a kernel of shape \(16, 24\)"),
    (Channels(axis=3), r"'dense': a kernel of shape \(16, 24\) has no axis 3"),
    (Channels(axis=-3), r"'dense': a kernel of shape \(16, 24\) has no axis -3"),
  ],
)
def test_a_pattern_that_does_not_fit_is_an_error_that_names_the_leaf(pattern, match):
  params = make_params()
  link = sparsejax.one_shot_pruning(0.1, at=0, pattern=pattern)
  wrapper = sparsejax.rigl(SGD, sparsity=0.1, end=9, key=KEY, pattern=pattern)
  masks = jax.tree.map(lambda p: jnp.ones(p.shape, bool), params)
  of_masks = sparsejax.rigl(SGD, masks=masks, end=9, pattern=pattern)
  for init in (link.init, wrapper.init, of_masks.init):
    with pytest.raises(ValueError, match=match):
      init(params)
  with pytest.raises(ValueError, match=match):
    sparsejax.masks_from_scores(params, 0.1, pattern=pattern)


def test_more_pruning_than_a_pattern_allows_is_an_error():
  params = make_params()
  tx = sparsejax.one_shot_pruning(0.6, at=0, pattern=NM(2, 4))
  with pytest.raises(ValueError, match=r"no more than 0\.5 of a layer can be pruned"):
    tx.update(params, tx.init(params), params)
  with pytest.raises(ValueError, match="share it out uniformly"):
    sparsejax.masks_from_scores(params, 0.5, allocation="erk", pattern=NM(2, 4))


def test_a_sparsity_that_leaves_no_channel_is_an_error_or_warned_of():
  params, said = {"kernel": jnp.ones((4, 4))}, "none of the 4 prunable weights would be left"
  with pytest.raises(ValueError, match=said):
    sparsejax.masks_from_scores(params, 0.95, pattern=Channels())
  with pytest.warns(UserWarning, match=said):
    sparsejax.one_shot_pruning(0.95, at=0, pattern=Channels()).init(params)


@pytest.mark.parametrize(
  ("options", "pattern"),
  [
    (dict(redistribute=lambda leaf: 1.0), NM(2, 4)),
    (dict(exact_growth=False), NM(2, 4)),
    (dict(exact_growth=False), Blocks((2, 2))),
  ],
)
def test_what_would_grow_elsewhere_is_an_error(options, pattern):
  with pytest.raises(ValueError, match=r"grows there|for single weights"):
    sparsejax.dynamic_sparse_training(
      SGD, sparsity=0.5, fraction=0.3, every=1, grow="random", key=KEY, pattern=pattern, **options
    )


def test_set_drops_a_fraction_of_each_sign_and_keeps_n_of_m():
  params = make_params()
  tx = sparsejax.sparse_evolutionary_training(
    SGD, sparsity=0.5, every=1, allocation="uniform", key=KEY, pattern=NM(2, 4)
  )
  state = tx.init(params)
  before = sparsejax.get_masks(state, params)
  params = sparsejax.apply_masks(params, before)
  nothing = jax.tree.map(jnp.zeros_like, params)
  _, state = tx.update(nothing, state, params)
  after = sparsejax.get_masks(state, params)
  patterns.check(after, NM(2, 4))
  for name in ("conv", "dense"):
    weight, mask = np.asarray(params[name]), np.asarray(before[name])
    expected = np.zeros_like(mask)
    number = round(np.float32(0.3) * mask.sum())
    positive = round(np.float32((weight > 0).sum() / mask.sum()) * number)
    for sign, count in ((1, positive), (-1, number - positive)):
      size = np.where(mask & (sign * weight > 0), sign * weight, np.inf)
      expected.flat[np.argsort(size, axis=None, kind="stable")[:count]] = True
    gone = mask & ~np.asarray(after[name])
    # Some of what was dropped grows again at once.
    assert gone.any() and not (gone & ~expected).any()


@pytest.mark.parametrize(
  "make",
  [
    lambda: sparsejax.sparse_evolutionary_training(
      SGD, sparsity=0.5, every=1, key=KEY, pattern=Channels()
    ),
    lambda: sparsejax.dynamic_sparse_training(
      SGD,
      sparsity=0.5,
      fraction=0.3,
      every=1,
      key=KEY,
      pattern=NM(2, 4),
      drop="each_sign",
      ramp=lambda count: 1.0,
    ),
    lambda: sparsejax.one_shot_pruning(0.5, at=0, criterion="each_sign", pattern=NM(2, 4)),
  ],
)
def test_dropping_of_each_sign_is_not_for_what_a_pattern_decides(make):
  with pytest.raises(ValueError, match=r"each_sign.* says which single weights go, which"):
    make()


@pytest.mark.parametrize("pattern", [Channels(), Blocks((2, 2))], ids=str)
def test_of_blocks_and_channels_no_criterion_is_told_how_many_weights_go(pattern):
  tx = sparsejax.dynamic_sparse_training(
    SGD,
    sparsity=0.5,
    fraction=0.3,
    every=1,
    drop=lambda leaf: jnp.abs(leaf.weight) * leaf.count,
    key=KEY,
    pattern=pattern,
  )
  params = make_params()
  with pytest.raises(ValueError, match="a pattern has its say"):
    tx.update(params, tx.init(params), params)


@pytest.mark.parametrize("pattern", ["2:4", (2, 4), Channels])
def test_what_is_no_pattern_is_an_error(pattern):
  match = "pattern must be one of sparsejax.patterns"
  with pytest.raises(ValueError, match=match):
    sparsejax.one_shot_pruning(0.5, at=0, pattern=pattern)
  with pytest.raises(ValueError, match=match):
    sparsejax.rigl(SGD, sparsity=0.5, every=1, end=5, key=KEY, pattern=pattern)
  with pytest.raises(ValueError, match=match):
    sparsejax.masks_from_scores(make_params(), 0.5, pattern=pattern)


def test_an_allocation_is_by_the_shapes_of_kernels_whatever_is_pruned_together():
  seen = []

  def allocation(shapes, density):
    seen.extend(shapes)
    return [density] * len(shapes)

  params = make_params()
  options = dict(allocation=allocation, pattern=Channels())
  sparsejax.masks_from_scores(params, 0.5, **options)
  tx = sparsejax.one_shot_pruning(0.5, at=0, **options)
  tx.update(params, tx.init(params), params)
  assert set(seen) == {(3, 3, 8, 12), (16, 24)}
  masks = sparsejax.masks_from_scores(params, 0.5, allocation="erk", pattern=Channels())
  densities = sparsejax.allocation.densities([(3, 3, 8, 12), (16, 24)], 0.5, "erk")
  for name, channels, density in zip(("conv", "dense"), (12, 24), densities):
    kept = np.asarray(masks[name]).reshape(-1, channels).any(axis=0).sum()
    assert kept == round(density * channels)


def test_n_of_m_tells_scores_apart_that_are_denormal():
  scores = jnp.array([3e-40, 1e-40, 1.0, 2.0])[:, None]
  masks = sparsejax.masks_from_scores({"w": scores}, 0.25, pattern=NM(2, 4))
  np.testing.assert_array_equal(masks["w"][:, 0], [True, False, True, True])


def test_scores_that_are_nan_stay_as_far_as_n_of_m_can():
  scores = np.array([1.0, 2.0, 3.0, 4.0, np.nan, np.nan, np.nan, 1.0])
  for prune in (
    lambda p: sparsejax.masks_from_scores(p, 0.5, pattern=NM(2, 4)),
    lambda p: masks_of_one_shot(p, NM(2, 4)),
  ):
    masks = prune({"a": jnp.asarray(scores, jnp.float32)[:, None]})
    patterns.check(masks, NM(2, 4))
    np.testing.assert_array_equal(masks["a"][:4, 0], [False, False, True, True])
    assert not masks["a"][7, 0]
  scores = jnp.array([jnp.nan, jnp.nan, jnp.inf, jnp.inf])[:, None]
  masks = sparsejax.masks_from_scores({"a": scores}, 0.25, pattern=NM(1, 2))
  np.testing.assert_array_equal(masks["a"][:, 0], [True, True, False, True])


def masks_of_one_shot(params, pattern):
  tx = sparsejax.one_shot_pruning(0.5, at=0, pattern=pattern)
  _, state = tx.update(params, tx.init(params), params)
  return sparsejax.get_masks(state, params)


@pytest.mark.parametrize(
  "make",
  [
    lambda: NM(4, 4),
    lambda: NM(0, 4),
    lambda: NM(2, 4, axis=0.5),
    lambda: Blocks((0, 2)),
    lambda: Blocks(4),
    lambda: Channels(None),
  ],
)
def test_an_impossible_pattern_is_an_error(make):
  with pytest.raises(ValueError, match=r"must be|less than"):
    make()


def test_the_shape_of_a_block_may_be_a_list():
  assert Blocks([2, 4]) == Blocks((2, 4)) and hash(Blocks([2, 4])) == hash(Blocks((2, 4)))


def test_the_checker_names_the_leaf():
  masks = {"a": {"kernel": jnp.ones((4, 4), bool).at[2:].set(False)}}
  patterns.check(masks, NM(2, 4))
  patterns.check(masks, NM(2, 4, axis=-1), prunable=lambda path, leaf: False)
  with pytest.raises(ValueError, match="the mask of 'a/kernel' does not have the pattern NM"):
    patterns.check(masks, NM(2, 4, axis=-1))
  with pytest.raises(ValueError, match=r"does not have the pattern NM\(n=1, m=4"):
    patterns.check(masks, NM(1, 4))
  patterns.check(masks, Blocks((2, 2)))
  with pytest.raises(ValueError, match="'a/kernel' does not have the pattern Channels"):
    patterns.check(masks, Channels())
  with pytest.raises(ValueError, match="masks must be boolean, but 'a/kernel' has dtype float32"):
    patterns.check(jax.tree.map(jnp.float32, masks), NM(2, 4))
