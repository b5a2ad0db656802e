"""Dynamic sparse training against slow NumPy versions of what its documentation says."""

import fractions
import functools
import inspect
import math

import flax
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import sparsejax
from sparsejax import allocation, counts, criteria, foresight, rules

CALLS = 18
SHAPES = {
  "conv/bias": (3,),
  "conv/kernel": (2, 2, 2, 3),
  "hidden/bias": (7,),
  "hidden/kernel": (5, 7),
  "out/kernel": (7, 4),
}
POOL = [name for name in SHAPES if name.endswith("kernel")]
SIZE = sum(math.prod(SHAPES[name]) for name in POOL)
ONE = {"bias": (4,), "kernel": (6, 8)}
SGD = optax.sgd(0.1, momentum=0.9)
FRACTIONS = np.linspace(0.6, 0.2, CALLS + 1, dtype=np.float32)


def draw(shapes, *leading, seed=0):
  generator = np.random.default_rng(seed)
  return {
    name: generator.normal(size=(*leading, *shape)).astype(np.float32)
    for name, shape in shapes.items()
  }


def draw_masks(shapes, density=0.5, seed=1):
  """Full masks, of each kernel exactly that density."""
  generator = np.random.default_rng(seed)
  masks = {}
  for name, shape in shapes.items():
    places = generator.permutation(math.prod(shape)).reshape(shape)
    masks[name] = places < density * places.size if len(shape) > 1 else np.ones(shape, bool)
  return masks


def jit(function):
  """Compiled for one run on tiny arrays: what takes time is the compiler's optimization."""
  return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def train(tx, params, gradients, follow=lambda params, state: None):
  """Weights, full masks and what is to be followed after each call, given the gradients."""

  def call(carry, gradients):
    params, state = carry
    updates, state = tx.update(gradients, state, params)
    params = optax.apply_updates(params, updates)
    masks = sparsejax.get_masks(state, params)
    return (params, state), (params, masks, follow(params, state))

  @jit
  def run(params, gradients):
    return jax.lax.scan(call, (params, tx.init(params)), gradients)[1]

  return jax.tree.map(np.asarray, run(params, gradients))


def call_once(tx, params, gradients):
  """The weights and the masks after one call, and the state of the inner optimizer."""

  @jit
  def call(params, gradients):
    updates, state = tx.update(gradients, tx.init(params), params)
    params = optax.apply_updates(params, updates)
    return params, sparsejax.get_masks(state, params), state.inner

  return jax.tree.map(np.asarray, call(params, gradients))


def apply(masks, tree):
  return {name: np.where(masks[name], tree[name], np.float32(0)) for name in tree}


def changes(start, masks):
  """The numbers of the calls at which masks change, from 0."""
  before = {name: np.concatenate([start[name][None], masks[name]]) for name in masks}
  return [
    call
    for call in range(len(next(iter(masks.values()))))
    if any(np.any(leaf[call] != leaf[call + 1]) for leaf in before.values())
  ]


def grid(begin, every, end, calls):
  return [c for c in calls if (c >= begin and (c - begin) % every == 0 and c <= end) or c == end]


# The slow version of a whole training.


def rounded(fraction, n, rounding="nearest"):
  """The exact product, rounded; Python rounds ties to even."""
  product = fractions.Fraction(float(np.float32(fraction))) * int(n)
  return {"nearest": round, "up": math.ceil, "down": math.floor}[rounding](product)


def share_slowly(total, capacity, weights):
  """Proportional shares; what the full cannot take goes to the others, remainders to the first."""
  full = {name for name in capacity if capacity[name] == 0}
  while True:
    rest = total - sum(capacity[name] for name in full)
    weight = sum(weights[name] for name in capacity if name not in full)
    share = {
      name: capacity[name] if name in full else rest * weights[name] / weight for name in capacity
    }
    overfull = {name for name in capacity if share[name] >= capacity[name]}
    if overfull <= full:
      break
    full |= overfull
  share = {name: int(share[name]) for name in share}
  for name in share:
    share[name] += min(capacity[name] - share[name], total - sum(share.values()))
  return share


def change_slowly(count, masks, weights, gradient, momentum, options):
  """New masks, and where weights have been active all the time."""
  survivors = masks
  if options.get("ramp") is not None:
    initial, way = options["initial"], np.float32(options["ramp"](count))
    target = np.float32(initial + (options["sparsity"] - initial) * way)
    kept = round((1 - fractions.Fraction(float(target))) * SIZE)
    if way == 1:
      kept = round((1 - options["sparsity"]) * SIZE)
    active = sum(int(mask.sum()) for mask in masks.values())
    pruned = reference.select_smallest(
      {name: np.abs(weights[name]) for name in masks}, max(active - kept, 0), among=masks
    )
    masks = survivors = {name: masks[name] & ~pruned[name] for name in masks}
  active = {name: masks[name].sum() for name in masks}
  rounding = options.get("rounding", "nearest")
  k = {name: rounded(FRACTIONS[count], active[name], rounding) for name in masks}
  if options.get("drop_globally"):
    k = rounded(FRACTIONS[count], sum(active.values()), rounding)
  dropped = reference.select_smallest(
    {name: np.abs(weights[name]) for name in masks}, k, among=masks
  )
  kept = {name: masks[name] & ~dropped[name] for name in masks}
  k = {name: int(dropped[name].sum()) for name in masks}
  if options.get("redistribute") is not None:
    capacity = {name: kept[name].size - int(kept[name].sum()) for name in masks}
    means = {name: np.abs(momentum[name][masks[name]]).mean(dtype=np.float64) for name in masks}
    k = share_slowly(sum(k.values()), capacity, means)
  score = momentum if options.get("grow") == "momentum" else gradient
  grown = reference.select_smallest(
    {name: -np.abs(score[name]) for name in masks}, k, among={n: ~kept[n] for n in masks}
  )
  masks = {name: kept[name] | grown[name] for name in masks}
  return masks, {name: masks[name] & survivors[name] for name in masks}


def train_slowly(weights, masks, gradients, options):
  """SGD with momentum and weight decay under masks that change; weights, masks and momentum."""
  everywhere = {name: np.ones(SHAPES[name], bool) for name in SHAPES}
  masks = {name: masks[name] for name in POOL}
  weights = apply(everywhere | masks, weights)
  momentum = {name: np.zeros_like(leaf) for name, leaf in weights.items()}
  after_step, mode = options.get("after_step", False), options.get("moments", "masked")
  begin, end = options.get("begin", 0), options.get("end", CALLS + 1)
  history = []

  def step(weights, momentum, gradient, masks):
    gradient = gradient if mode == "kept" else apply(everywhere | masks, gradient)
    rest = np.float32(0.9)
    decayed = {n: gradient[n] + np.float32(0.01) * weights[n] for n in weights}
    momentum = {n: rest * momentum[n] + decayed[n] for n in weights}
    return {n: weights[n] - np.float32(0.1) * momentum[n] for n in weights}, momentum

  for call in range(CALLS):
    gradient = {name: gradients[name][call] for name in gradients}
    count = call + 1 if after_step else call
    is_due = count in grid(begin, options["every"], end, [count])
    if after_step:
      weights, momentum = step(weights, momentum, gradient, masks)
      weights = apply(everywhere | masks, weights)
    old, survivors = masks, masks
    if is_due:
      masks, survivors = change_slowly(count, old, weights, gradient, momentum, options)
    weights = apply(everywhere | survivors, weights)
    if mode == "masked":
      momentum = apply(everywhere | survivors, momentum)
    if mode == "reset":
      stays = {name: survivors[name] | ~masks[name] for name in masks}
      momentum = apply(everywhere | stays, momentum)
    if not after_step and not (is_due and options.get("skip_step")):
      weights, momentum = step(weights, momentum, gradient, masks)
      weights = apply(everywhere | masks, weights)
    history.append((weights, everywhere | masks, momentum))
  return jax.tree.map(lambda *leaves: np.stack(leaves), *history)


def cubic(count):
  return 1 - (1 - min(count / 10, 1)) ** 3


# A ramp over 10 calls, with changes at calls off its end.
RAMP = dict(ramp=cubic, sparsity=0.7, initial=0.2)
REDISTRIBUTED = dict(redistribute=criteria.mean_momentum)
RUNS = {
  "before": dict(every=3, begin=2, end=16),
  "after": dict(every=3, after_step=True, rounding="up"),
  "rigl": dict(every=4, skip_step=True, moments="reset", rounding="down", end=14),
  "global": dict(every=3, moments="kept", drop_globally=True),
  "snfs": dict(every=3, after_step=True, moments="kept", grow="momentum", **REDISTRIBUTED),
  "granet": dict(every=3, begin=3, after_step=True, **RAMP | dict(initial=0.0)),
  "ramp": dict(every=4, moments="reset", drop_globally=True, rounding="up", end=13, **RAMP),
  "skip": dict(every=3, begin=1, skip_step=True, drop_globally=True, **REDISTRIBUTED),
  "all": dict(every=4, after_step=True, moments="reset", rounding="down", **RAMP, **REDISTRIBUTED),
}
every_run = pytest.mark.parametrize("name", RUNS)


@functools.cache
def run(name):
  """The masks to start with; then weights, masks and momentum of each call: found and expected."""
  options = RUNS[name]
  density = 1 - options["initial"] if "ramp" in options else 0.5
  masks = draw_masks(SHAPES, density)
  weights, gradients = draw(SHAPES), draw(SHAPES, CALLS, seed=2)
  passed = dict(sparsity=None) | options
  if "ramp" in options:
    passed["ramp"] = lambda count: jnp.array([cubic(c) for c in range(CALLS + 1)])[count]
  tx = sparsejax.dynamic_sparse_training(
    optax.chain(optax.add_decayed_weights(0.01), SGD),
    fraction=lambda count: jnp.asarray(FRACTIONS)[count],
    masks=None if density == 1 else masks,
    **passed,
  )
  follow = lambda params, state: optax.tree.get(state.inner, "trace")
  found = train(tx, apply(masks, weights), gradients, follow)
  return masks, found, train_slowly(weights, masks, gradients, options)


@every_run
def test_masks_weights_and_momentum_are_those_of_the_slow_version_at_every_call(name):
  _, found, expected = run(name)
  for leaf in SHAPES:
    np.testing.assert_array_equal(found[1][leaf], expected[1][leaf], leaf)
    for what in (0, 2):
      np.testing.assert_allclose(found[what][leaf], expected[what][leaf], 1e-6, 1e-6, err_msg=leaf)


@every_run
def test_inactive_weights_are_exactly_zero_after_every_call(name):
  _, (weights, masks, _), _ = run(name)
  for leaf in SHAPES:
    assert not weights[leaf][~masks[leaf]].any()


@every_run
def test_masks_change_when_they_are_due_and_at_no_other_call(name):
  start, (_, masks, _), _ = run(name)
  options = RUNS[name]
  later = int(options.get("after_step", False))
  numbers = range(later, CALLS + later)
  due = grid(options.get("begin", 0), options["every"], options.get("end", CALLS + 1), numbers)
  assert changes(start, masks) == [count - later for count in due]


@every_run
def test_as_many_weights_stay_active_as_are_asked_for(name):
  start, (_, masks, _), _ = run(name)
  active = np.array([masks[leaf].reshape(CALLS, -1).sum(1) for leaf in POOL])
  options = RUNS[name]
  if "ramp" in options:
    assert active.sum(0)[-1] == round(0.3 * SIZE)
    assert np.all(np.diff(active.sum(0)) <= 0)
  elif "redistribute" in options:
    assert set(active.sum(0)) == {sum(start[leaf].sum() for leaf in POOL)}
    assert np.any(np.diff(active) != 0)
  else:
    assert all(set(of_leaf) == {start[leaf].sum()} for leaf, of_leaf in zip(POOL, active))


def test_a_ramp_follows_its_schedule_and_ends_at_the_first_change_after_it():
  _, (_, masks, _), _ = run("granet")
  pruned = SIZE - sum(masks[leaf].reshape(CALLS, -1).sum(1) for leaf in POOL)
  # Changes after 3, 6, 9 and 12 calls; the ramp is 10 calls long.
  for count in (3, 6, 9):
    expected = SIZE - round((1 - 0.7 * cubic(count)) * SIZE)
    assert set(pruned[count - 1 : count + 2]) == {expected}
  assert set(pruned[11:]) == {SIZE - round(0.3 * SIZE)}


# How many


@pytest.mark.parametrize("rounding", ["nearest", "up", "down"])
def test_exactly_the_rounded_fraction_of_each_layer_changes(rounding):
  # As a float32, 0.1 is more than a tenth: of 25 weights more than 2.5, of 10 more than 1.
  table = [0.5, 0.1, 0.3, 0.25, 0.02, 0.7, 0.9, 1.0, 0.0, 0.1]
  shapes = {"a": (6, 10), "b": (4, 10)}
  start = {"a": np.arange(60).reshape(6, 10) < 25, "b": np.arange(40).reshape(4, 10) < 10}
  tx = sparsejax.dynamic_sparse_training(
    optax.sgd(0.1),
    sparsity=None,
    masks=start,
    fraction=lambda count: jnp.array(table)[count],
    every=1,
    rounding=rounding,
  )

  def update(gradients, state, params):
    # Nothing that is dropped grows again.
    inactive = jax.tree.map(jnp.logical_not, sparsejax.get_masks(state, params))
    return tx.update(sparsejax.apply_masks(gradients, inactive), state, params)

  tx_against = optax.GradientTransformation(tx.init, update)
  _, masks, _ = train(tx_against, draw(shapes), draw(shapes, len(table)))
  for name in shapes:
    before = np.concatenate([start[name][None], masks[name][:-1]])
    grown = (masks[name] & ~before).reshape(len(table), -1).sum(1)
    assert grown.tolist() == [rounded(f, start[name].sum(), rounding) for f in table]


def test_a_ramp_brings_each_layer_to_the_sparsity_of_its_own():
  sparsities = {"a": 0.9, "b": 0.35}
  shapes = {"a": (5, 7), "b": (4, 9)}
  tx = sparsejax.dynamic_sparse_training(
    SGD,
    sparsity=sparsities,
    ramp=optax.linear_schedule(0.0, 1.0, 5),
    fraction=0.3,
    every=2,
    end=5,
  )
  _, masks, _ = train(tx, draw(shapes), draw(shapes, 7))
  for name, s in sparsities.items():
    active = masks[name].reshape(7, -1).sum(1)
    size = masks[name][0].size
    first, second, final = (round((1 - s * way) * size) for way in (0.4, 0.8, 1))
    assert active.tolist() == [size, size, first, first, second, final, final]


def test_a_ramp_ends_at_the_final_sparsity_also_where_what_grows_is_redistributed():
  shapes = {"a": (5, 7), "b": (4, 9)}
  tx = sparsejax.dynamic_sparse_training(
    SGD,
    sparsity=0.6,
    initial=0.3,
    ramp=optax.linear_schedule(0.0, 1.0, 6),
    allocation="uniform",
    redistribute=lambda leaf: jnp.float32(leaf.weight.shape[0]),
    fraction=0.5,
    every=2,
    key=jax.random.key(0),
  )
  _, masks, _ = train(tx, draw(shapes), draw(shapes, 16))
  active = sum(masks[name].reshape(16, -1).sum(1) for name in shapes)
  assert set(active[6:]) == {round(0.4 * 71)}


# When


@hypothesis.given(st.integers(0, 12), st.integers(1, 9), st.none() | st.integers(0, 25))
def test_masks_are_due_from_begin_each_time_after_every_calls_and_at_the_end(begin, every, length):
  end = None if length is None else begin + length
  calls = np.arange(50)
  found = calls[rules.on_grid(begin, every, end)(calls)]
  expected = list(range(begin, (49 if end is None else min(end, 49)) + 1, every))
  if end is not None:
    expected = sorted({*expected, end})
  assert found.tolist() == expected


KEY = jax.random.key(3)
METHODS = {
  "dynamic": (
    sparsejax.dynamic_sparse_training,
    dict(fraction=1.0, begin=3, every=4, end=9),
    [3, 7, 9],
  ),
  "after the step": (
    sparsejax.dynamic_sparse_training,
    dict(fraction=1.0, every=4, after_step=True),
    [3, 7, 11],
  ),
  "rigl": (sparsejax.rigl, dict(fraction=1.0, every=4, end=9), [0, 4, 8, 9]),
  "rigl by default": (sparsejax.rigl, dict(every=4, end=9), [0, 4]),
  "set": (sparsejax.sparse_evolutionary_training, dict(fraction=1.0, every=4, end=10), [3, 7, 9]),
  "snfs": (sparsejax.snfs, dict(fraction=1.0, every=5), [4, 9]),
  "granet": (
    sparsejax.granet,
    dict(fraction=1.0, initial=0.2, steps=5, every=3, begin=2, end=12),
    [4, 7, 10, 11],
  ),
  "static": (sparsejax.static_sparse_training, dict(), []),
}


@functools.cache
def method(name):
  """What a method starts with; weights, masks and momentum of each call."""
  make, options, _ = METHODS[name]
  tx = make(SGD, sparsity=0.6, key=KEY, **options)
  params = draw(ONE)
  masks = sparsejax.get_masks(tx.init(params), params)
  params = jax.tree.map(np.asarray, sparsejax.apply_masks(params, masks))
  follow = lambda params, state: optax.tree.get(state.inner, "trace")
  found = train(tx, params, draw(ONE, 13, seed=5), follow)
  return params, jax.tree.map(np.asarray, masks), found


@pytest.mark.parametrize("name", METHODS)
def test_each_method_changes_masks_at_the_calls_that_it_says(name):
  _, start, (_, masks, _) = method(name)
  assert changes(start, masks) == METHODS[name][2]


@pytest.mark.parametrize("name", METHODS)
def test_each_method_ends_at_the_sparsity_asked_with_exact_zeros(name):
  _, _, (weights, masks, _) = method(name)
  assert masks["kernel"][-1].sum() == round(0.4 * 48)
  assert not weights["kernel"][~masks["kernel"]].any()
  assert masks["bias"].all()


def test_rigl_makes_no_step_when_masks_change():
  params, start, (weights, masks, momentum) = method("rigl")
  before = np.concatenate([params["bias"][None], weights["bias"][:-1]])
  stands_still = np.all(weights["bias"] == before, axis=1)
  # Also at the end, where the fraction may have come to nothing.
  assert np.flatnonzero(stands_still).tolist() == [0, 4, 8, 9]
  both = start["kernel"] & masks["kernel"][0]
  np.testing.assert_array_equal(weights["kernel"][0], np.where(both, params["kernel"], 0))
  grown = masks["kernel"][4] & ~masks["kernel"][3]
  assert not momentum["kernel"][4][grown].any()


def test_rigl_lets_the_fraction_fall_along_a_cosine():
  tx = sparsejax.rigl(SGD, sparsity=0.5, end=12, every=4, key=KEY)
  params, gradients = draw(ONE), draw(ONE, 13, seed=5)

  def update(gradients, state, params):
    inactive = jax.tree.map(jnp.logical_not, sparsejax.get_masks(state, params))
    return tx.update(sparsejax.apply_masks(gradients, inactive), state, params)

  _, masks, _ = train(optax.GradientTransformation(tx.init, update), params, gradients)
  before = np.concatenate([np.asarray(tx.init(params).masks["kernel"])[None], masks["kernel"][:-1]])
  grown = (masks["kernel"] & ~before).reshape(13, -1).sum(1)
  expected = [int(0.15 * (1 + math.cos(math.pi * c / 12)) * 24) for c in (0, 4, 8, 12)]
  assert grown[::4].tolist() == expected


def test_set_drops_the_same_fraction_of_each_sign():
  signs = np.where(np.arange(48).reshape(6, 8) % 4 < 3, 1, -1)
  params = {"kernel": np.abs(draw(ONE)["kernel"]) * signs.astype(np.float32)}
  masks = {"kernel": np.arange(48).reshape(6, 8) < 32}
  tx = sparsejax.sparse_evolutionary_training(
    optax.sgd(0.0), sparsity=None, masks=masks, fraction=0.25, every=1, key=KEY
  )
  weights, found, _ = call_once(tx, params, params)
  # Of 24 positive and 8 negative weights; some may grow again at once.
  for sign, active in ((1, 24), (-1, 8)):
    among = masks["kernel"] & (signs == sign)
    smallest = reference.select_smallest(np.abs(params["kernel"]), active // 4, among=among)
    assert np.all(found["kernel"][among & ~smallest])
  assert found["kernel"].sum() == 32
  assert np.any(found["kernel"] != masks["kernel"])
  assert not weights["kernel"][~masks["kernel"]].any()


# Values


def one_call(**options):
  """One call at which all active weights are dropped, and half of what grows is new."""
  params, masks = draw(ONE), draw_masks(ONE)
  gradients = draw(ONE, seed=7)
  tx = sparsejax.dynamic_sparse_training(
    optax.chain(optax.add_decayed_weights(0.1), optax.sgd(1.0)),
    sparsity=None,
    masks=masks,
    fraction=1.0,
    every=1,
    **options,
  )
  old, gradient = masks["kernel"], gradients["kernel"]
  new = reference.select_smallest(-np.abs(gradient), old.sum())
  assert (new & old).any() and (new & ~old).any()
  found, found_masks, _ = call_once(tx, params, gradients)
  np.testing.assert_array_equal(found_masks["kernel"], new)
  step = -(gradient + 0.1 * np.where(old, params["kernel"], 0))
  return old, new, params["kernel"], step, found["kernel"]


def test_what_grows_after_the_step_starts_at_zero_and_what_is_regrown_goes_on():
  old, new, weight, step, found = one_call(after_step=True)
  assert not found[~old].any()
  assert not found[~new].any()
  np.testing.assert_allclose(found[old & new], (weight + step)[old & new], 1e-6, 1e-6)


def test_what_grows_before_the_step_has_the_update_as_its_first_value():
  old, new, weight, step, found = one_call()
  assert not found[~new].any()
  np.testing.assert_allclose(found[new & ~old], step[new & ~old], 1e-6, 1e-6)
  np.testing.assert_allclose(found[old & new], (weight + step)[old & new], 1e-6, 1e-6)


def test_what_grows_in_place_of_a_step_starts_at_zero_and_what_is_regrown_keeps_its_value():
  old, new, weight, _, found = one_call(skip_step=True)
  np.testing.assert_array_equal(found, np.where(old & new, weight, 0))


@pytest.mark.parametrize("order", ["after_step", "skip_step"])
def test_what_a_ramp_prunes_and_grows_again_starts_at_zero(order):
  params = draw(ONE)
  # The smallest weights have the largest gradients, and would go on if they were kept.
  gradients = jax.tree.map(lambda x: np.sign(x) * 1e-3 / np.abs(x), params)
  tx = sparsejax.dynamic_sparse_training(
    SGD,
    sparsity=0.5,
    ramp=lambda count: jnp.float32(1.0),
    fraction=1.0,
    every=1,
    **{order: True},
  )
  weights, masks, inner = call_once(tx, params, gradients)
  smallest = reference.select_smallest(np.abs(params["kernel"]), 24)
  np.testing.assert_array_equal(masks["kernel"], smallest)
  assert not weights["kernel"].any()
  assert not optax.tree.get(inner, "trace")["kernel"].any()


def test_what_a_ramp_prunes_has_no_magnitude_to_grow_by():
  # The smaller the gradient, the larger the weight.
  weight = np.arange(12.0, 0.0, -1.0, dtype=np.float32).reshape(3, 4)
  tx = sparsejax.dynamic_sparse_training(
    SGD,
    sparsity=0.5,
    ramp=lambda count: jnp.float32(1.0),
    drop="gradient",
    grow="magnitude",
    fraction=0.5,
    every=1,
  )
  _, masks, _ = call_once(tx, {"w": weight}, {"w": 13 - weight})
  # Of those left three are dropped, and grow again: they alone are not zero.
  np.testing.assert_array_equal(masks["w"], weight <= 6)


def test_a_fraction_of_nothing_trains_under_the_masks_it_starts_with():
  params, masks, gradients = draw(ONE), draw_masks(ONE), draw(ONE, 6, seed=2)
  dynamic = sparsejax.dynamic_sparse_training(
    SGD, sparsity=None, masks=masks, fraction=0.0, every=1
  )
  static = optax.chain(SGD, sparsejax.fixed_masks(masks))
  found, found_masks, _ = train(dynamic, apply(masks, params), gradients)
  expected, _, _ = train(static, apply(masks, params), gradients)
  assert np.all(found_masks["kernel"] == masks["kernel"])
  np.testing.assert_allclose(found["kernel"], expected["kernel"], 1e-6, 1e-6)


def test_each_stage_of_a_rule_sees_the_masks_and_weights_that_the_one_before_leaves():
  first = draw_masks(ONE)["kernel"]
  stages = (
    lambda call: {"kernel": call.masks["kernel"] & first},
    lambda call: {"kernel": call.masks["kernel"] & (call.params["kernel"] != 0)},
    lambda call: {"kernel": call.masks["kernel"] | (call.params["kernel"] != 0)},
  )
  tx = sparsejax.masked_updates(sparsejax.Rule(stages), due=lambda count: True, inner=SGD)
  params = {"kernel": draw(ONE)["kernel"]}
  _, masks, _ = call_once(tx, params, params)
  np.testing.assert_array_equal(masks["kernel"], first)


# Ties, and what is no number


def grown_by(gradient, k, weight=None):
  """The mask after one call of a kernel of 3 x 4 whose first half is active."""
  start = np.arange(12).reshape(3, 4) < 6
  weight = np.arange(1.0, 13.0, dtype=np.float32).reshape(3, 4) if weight is None else weight
  return start, _grown_by(start, weight, np.float32(gradient), np.float32(k / 6))


@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def _grown_by(start, weight, gradient, fraction):
  tx = sparsejax.dynamic_sparse_training(
    optax.sgd(0.1), sparsity=None, masks={"w": start}, fraction=lambda count: fraction, every=1
  )
  params = {"w": weight}
  _, state = tx.update({"w": gradient}, tx.init(params), params)
  return state.masks["w"]


@pytest.mark.parametrize("k", range(7))
def test_with_gradients_of_zero_as_many_grow_lowest_index_first(k):
  start, mask = grown_by(np.zeros((3, 4)), k)
  # The k smallest weights are the first k, and then the first among the candidates.
  np.testing.assert_array_equal(mask, start)
  weight = np.arange(12.0, 0.0, -1.0, dtype=np.float32).reshape(3, 4)
  start, mask = grown_by(np.zeros((3, 4)), k, weight)
  expected = np.r_[np.arange(6) < 6 - k, np.zeros(6, bool)]
  expected[np.flatnonzero(~expected)[:k]] = True
  np.testing.assert_array_equal(mask.ravel(), expected)


def test_a_gradient_that_is_passed_says_where_to_grow_and_the_updates_do_not():
  masks = {"w": np.arange(12).reshape(3, 4) < 6}
  params = {"w": np.float32(masks["w"])}
  tx = sparsejax.dynamic_sparse_training(
    optax.sgd(0.1), sparsity=None, masks=masks, fraction=0.5, every=1
  )
  growing = {"w": np.arange(12, dtype=np.float32).reshape(3, 4)}
  _, state = tx.update({"w": growing["w"][::-1]}, tx.init(params), params, grad=growing)
  # Of equal weights the first three are dropped, and the last three have the largest gradients.
  assert np.flatnonzero(state.masks["w"]).tolist() == [3, 4, 5, 9, 10, 11]


def test_gradients_that_are_nan_grow_last():
  gradient = np.zeros((3, 4))
  gradient[0, :3], gradient[1, 2:], gradient[2, 0] = np.nan, np.nan, np.nan
  # Candidates are 0 to 2, dropped, and 6 to 11; those with a number are 9, 10 and 11.
  _, mask = grown_by(gradient, 3)
  assert np.flatnonzero(mask).tolist() == [3, 4, 5, 9, 10, 11]
  gradient[2, 1] = np.nan
  _, mask = grown_by(gradient, 3)
  assert np.flatnonzero(mask).tolist() == [0, 3, 4, 5, 10, 11]


def test_weights_that_are_nan_are_dropped_last():
  weight = np.arange(1.0, 13.0, dtype=np.float32).reshape(3, 4)
  weight[0, :2], weight[0, 2] = np.nan, np.inf
  gradient = np.where(np.arange(12) < 6, 0, 1).reshape(3, 4)
  _, mask = grown_by(gradient, 3, weight)
  assert np.flatnonzero(mask).tolist() == [0, 1, 2, 6, 7, 8]
  _, mask = grown_by(gradient, 5, weight)
  assert np.flatnonzero(mask).tolist() == [1, 6, 7, 8, 9, 10]


# How what grows is shared out among layers

LAYERS = 5
counted = st.lists(st.integers(0, 2**20), min_size=LAYERS, max_size=LAYERS)
weighted = st.lists(
  st.sampled_from([0, 1]) | st.floats(1e-3, 1e3), min_size=LAYERS, max_size=LAYERS
)


@jax.jit
def share_out(number, capacity, weights):
  words = [counts.widen(x) for x in (number, capacity)]
  shared = rules.shared_out(*words, weights)
  return shared.high, shared.low


def shared(number, capacity, weights):
  words = [jnp.array(x, jnp.uint32) for x in (number, capacity)]
  high, low = share_out(*words, jnp.array(weights, jnp.float32))
  return [int(h) * 2**32 + int(x) for h, x in zip(high, low)]


@hypothesis.given(counted, counted, weighted)
def test_shares_have_the_same_sum_and_none_exceeds_what_its_layer_takes(number, room, weights):
  capacity = [n + r for n, r in zip(number, room)]
  found = shared(number, capacity, weights)
  assert sum(found) == sum(number)
  assert all(0 <= x <= c for x, c in zip(found, capacity))


@hypothesis.given(counted, weighted)
def test_shares_are_proportional_where_there_is_room(number, weights):
  hypothesis.assume(any(weights))
  found = shared(number, [2**23] * LAYERS, weights)
  for x, w in zip(found, weights):
    assert abs(x - sum(number) * w / sum(weights)) <= LAYERS


@hypothesis.given(counted, counted, weighted)
def test_what_full_layers_cannot_take_goes_to_the_others_in_proportion(number, room, weights):
  weights = [w + 1e-3 for w in weights]
  capacity = dict(enumerate(n + r for n, r in zip(number, room)))
  expected = share_slowly(sum(number), capacity, dict(enumerate(weights)))
  found = shared(number, list(capacity.values()), weights)
  for i, x in enumerate(found):
    assert abs(x - expected[i]) <= LAYERS + 1e-5 * sum(number)


@hypothesis.given(counted, weighted)
def test_layers_that_are_all_full_stay_as_they_are(number, weights):
  assert shared(number, number, weights) == number


def test_weights_that_are_no_proportion_count_as_zero():
  weights = [np.nan, np.inf, -1.0, 0.0, 2.0]
  assert shared([10] * LAYERS, [100] * LAYERS, weights) == [0, 0, 0, 0, 50]
  assert sum(shared([10] * LAYERS, [20] * LAYERS, weights)) == 50
  assert shared([10] * LAYERS, [20] * LAYERS, weights)[4] == 20
  assert sum(shared([10] * LAYERS, [20] * LAYERS, [0.0] * LAYERS)) == 50


def test_shares_of_counts_beyond_32_bits_add_up():
  number = [2**32 - 1, 2**31, 5, 2**32 - 7, 0]
  capacity = [2**32 - 1] * LAYERS
  found = shared(number, capacity, [1.0, 2.0, 3.0, 4.0, 5.0])
  assert sum(found) == sum(number)
  assert max(found) < 2**32
  assert found[0] < found[1] < found[2] < found[3]


# Growth of each candidate by itself


def test_growth_that_is_not_exact_has_the_number_as_its_mean():
  masks = draw_masks(ONE)
  params = draw(ONE)

  @jax.vmap
  def number(key):
    tx = sparsejax.dynamic_sparse_training(
      optax.sgd(0.1),
      sparsity=None,
      masks=masks,
      grow="random",
      fraction=0.5,
      every=1,
      exact_growth=False,
      key=key,
    )
    _, state = tx.update(params, tx.init(params), params)
    return jnp.sum(state.masks["kernel"])

  active = np.asarray(jit(number)(jax.random.split(jax.random.key(0), 600)))
  # Each of 36 candidates with a probability of a third.
  assert abs(active.mean() - 24) < 4 * np.sqrt(8 / 600)
  np.testing.assert_allclose(active.std(), np.sqrt(8), rtol=0.15)


def test_what_grows_at_random_does_not_depend_on_what_was_dropped_at_random():
  params = draw({"kernel": (20, 20)})
  masks = draw_masks({"kernel": (20, 20)})

  @jit
  def regrown(key):
    tx = sparsejax.dynamic_sparse_training(
      optax.sgd(0.1), masks=masks, drop="random", grow="random", fraction=0.5, every=1, key=key
    )
    _, state = tx.update(params, tx.init(params), params)
    return jnp.sum(state.masks["kernel"] & masks["kernel"]) - 100

  # Of 300 candidates 100 have just been dropped, and 100 grow: a third of either.
  found = [int(regrown(jax.random.key(seed))) for seed in range(5)]
  assert abs(np.mean(found) - 100 / 3) < 8


def test_growth_that_is_not_exact_is_for_random_growth_only():
  with pytest.raises(ValueError, match="random"):
    sparsejax.dynamic_sparse_training(
      SGD, sparsity=0.5, fraction=0.3, every=2, exact_growth=False, grow="gradient", key=KEY
    )


# The masks to start with


def start_of(params=None, make=sparsejax.static_sparse_training, key=KEY, **options):
  params = draw(SHAPES) if params is None else params
  masks = sparsejax.get_masks(make(SGD, key=key, **options).init(params), params)
  return jax.tree.map(np.asarray, masks)


def kept(masks):
  return [int(masks[name].sum()) for name in POOL]


@pytest.mark.parametrize("name", ["erk", "er", "uniform"])
@pytest.mark.parametrize("sparsity", [0.3, 0.55, 0.9])
def test_each_layer_starts_with_its_share(name, sparsity):
  masks = start_of(allocation=name, sparsity=sparsity)
  shapes = [SHAPES[layer] for layer in POOL]
  densities = allocation.densities(shapes, 1 - sparsity, name)
  assert kept(masks) == [round(d * math.prod(s)) for d, s in zip(densities, shapes)]
  assert all(masks[layer].all() for layer in SHAPES if layer not in POOL)


def test_each_method_has_the_allocation_of_its_authors_by_default():
  for make, name, options in (
    (sparsejax.rigl, "erk", dict(end=5)),
    (sparsejax.sparse_evolutionary_training, "er", dict(every=2)),
    (sparsejax.snfs, "uniform", dict(every=2, fraction=0.5)),
    (sparsejax.static_sparse_training, "erk", dict()),
  ):
    masks = start_of(make=make, sparsity=0.5, **options)
    assert kept(masks) == kept(start_of(allocation=name, sparsity=0.5))
  masks = start_of(make=sparsejax.granet, sparsity=0.8, initial=0.5, steps=4, every=2, fraction=0.5)
  assert kept(masks) == kept(start_of(allocation="erk", sparsity=0.5))
  masks = start_of(make=sparsejax.granet, sparsity=0.8, steps=4, every=2, fraction=0.5, key=None)
  assert kept(masks) == [math.prod(SHAPES[layer]) for layer in POOL]


def test_each_method_has_the_published_numbers_and_moments_by_default():
  for function, published in (
    (sparsejax.granet, dict(initial=0.0, moments="masked")),
    (sparsejax.rigl, dict(every=100, moments="reset")),
    (sparsejax.sparse_evolutionary_training, dict(fraction=0.3)),
    (sparsejax.lottery.iterative_pruning, dict(rate=0.2, rewind_to=0)),
  ):
    parameters = inspect.signature(function).parameters
    assert {name: parameters[name].default for name in published} == published


@pytest.mark.parametrize(
  ("make", "options"),
  [
    (sparsejax.granet, dict(sparsity=0.5, initial=0.5, steps=1)),
    (sparsejax.snfs, dict()),
  ],
)
def test_granet_and_snfs_round_up_what_they_drop(make, options):
  weights = np.arange(1.0, 21.0, dtype=np.float32).reshape(4, 5)
  masks, gradient = {"kernel": weights <= 10}, {"kernel": np.float32(weights > 10)}
  tx = make(optax.sgd(0.0, momentum=0.9), masks=masks, every=1, fraction=0.11, **options)
  _, found, _ = call_once(tx, apply(masks, {"kernel": weights}), gradient)
  # Not 1.1 of 10 active weights, but 2: the two smallest give way to the first inactive ones.
  assert np.flatnonzero(found["kernel"]).tolist() == list(range(2, 12))


def test_a_global_start_keeps_the_largest_magnitudes_without_a_key():
  params = draw(SHAPES)
  masks = start_of(params, allocation="global", sparsity=0.6, key=None)
  magnitudes = {name: np.abs(params[name]) for name in POOL}
  expected = reference.keep_largest(magnitudes, round(0.4 * SIZE))
  for name in POOL:
    np.testing.assert_array_equal(masks[name], expected[name])


def test_a_tree_of_sparsities_gives_each_layer_its_own_at_random():
  sparsity = {"conv/kernel": 0.25, "hidden/kernel": 0.8, "out/kernel": 0.5}
  masks = start_of(sparsity=sparsity, allocation="global")
  assert kept(masks) == [round((1 - s) * math.prod(SHAPES[n])) for n, s in sparsity.items()]
  largest = reference.keep_largest(np.abs(draw(SHAPES)["out/kernel"]), 14)
  assert np.any(masks["out/kernel"] != largest)


def test_different_keys_draw_different_masks_and_layers_differ():
  shapes = {"a": (6, 6), "b": (6, 6)}
  first, again, other = (
    start_of(draw(shapes), sparsity=0.5, key=jax.random.key(seed)) for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(first["a"], again["a"])
  assert np.any(first["a"] != other["a"])
  assert np.any(first["a"] != first["b"])


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_the_key_lives_in_the_state(make_key):
  params = draw(ONE)
  key = make_key(8)
  tx = sparsejax.dynamic_sparse_training(SGD, sparsity=0.5, fraction=0.3, every=2, key=key)
  state = tx.init(params)
  assert state.key.dtype == key.dtype and jnp.all(state.key == key)
  masks = start_of(params, sparsity=0.5, key=jax.random.key(8))
  np.testing.assert_array_equal(state.masks["kernel"], masks["kernel"])


def test_training_can_start_from_masks_made_by_scores():
  params = draw(SHAPES)
  scores = foresight.snip(
    lambda params, batch: sum(jnp.sum((x * batch) ** 3) for x in params.values()), params, 0.5
  )
  masks = sparsejax.masks_from_scores(scores, 0.5)
  found = start_of(params, make=sparsejax.rigl, sparsity=None, masks=masks, end=4, key=None)
  for name in SHAPES:
    np.testing.assert_array_equal(found[name], masks[name])
  # As many in each layer, but anywhere.
  sparsities = {name: 1 - float(np.mean(masks[name])) for name in POOL}
  drawn = sparsejax.masks_from_scores(foresight.random(params, KEY), sparsities)
  found = start_of(params, make=sparsejax.rigl, sparsity=None, masks=drawn, end=4, key=None)
  assert kept(found) == kept(masks)
  assert np.any(found["out/kernel"] != masks["out/kernel"])


# Bad input


PLAIN = dict(inner=SGD, sparsity=0.5, fraction=0.3, every=2, key=KEY)
SOME_MASKS = draw_masks(SHAPES)
BAD = {
  "fraction above 1": (dict(fraction=1.5), r"fraction .* in \[0, 1\], .*, got 1.5"),
  "fraction below 0": (dict(fraction=-0.1), r"fraction .* in \[0, 1\], .*, got -0.1"),
  "fraction that is NaN": (dict(fraction=float("nan")), "fraction .* got nan"),
  "fraction that is a word": (dict(fraction="0.3"), "fraction .* got '0.3'"),
  "fraction that is a truth": (dict(fraction=True), "fraction .* got True"),
  "unknown drop": (dict(drop="magnitud"), "drop 'magnitud' .did you mean 'magnitude'"),
  "unknown grow": (dict(grow="weight"), "grow 'weight'.* use one of .*'gradient'"),
  "masks with a sparsity": (dict(masks=SOME_MASKS), "pass sparsity=None"),
  "neither": (dict(sparsity=None), r"pass a sparsity in \[0, 1\); or, .* pass `masks`"),
  "masks with a ramp to nowhere": (
    dict(sparsity=None, masks=SOME_MASKS, ramp=lambda count: 1.0),
    "pass `masks`, and no ramp",
  ),
  "masks of numbers": (
    dict(sparsity=None, masks=draw(SHAPES)),
    "masks must be boolean, but 'conv/bias' has dtype float32",
  ),
  "initial without ramp": (dict(initial=0.2), "initial=0.2 .* ramp"),
  "initial above sparsity": (
    dict(initial=0.7, ramp=lambda count: 1.0),
    "initial must not exceed the sparsity, got 0.7 and 0.5",
  ),
  "initial that is an array": (
    dict(initial=jnp.float32(0.2), ramp=lambda count: 1.0),
    "initial must be a Python number, got Array",
  ),
  "sparsity of 1": (dict(sparsity=1.0), r"sparsity .* in \[0, 1\), got 1.0"),
  "two orders": (dict(skip_step=True, after_step=True), "pass after_step or skip_step"),
  "unknown moments": (dict(moments="foo"), "'masked', 'reset', 'kept'.* got 'foo'"),
  "unknown rounding": (dict(rounding="foo"), "'nearest', 'up', 'down'.* got 'foo'"),
  "unknown allocation": (dict(allocation="erq"), "unknown allocation 'erq' .did you mean"),
  "unknown allocation of the ramp": (
    dict(ramp=lambda count: 1.0, ramp_allocation="unifrm"),
    "unknown allocation 'unifrm' .did you mean 'uniform'",
  ),
  "no optimizer": (dict(inner=0.1), "inner must be an optimizer, .* got 0.1"),
  "a ramp by layer with redistribution": (
    dict(
      sparsity=0.6,
      ramp=optax.linear_schedule(0.0, 1.0, 6),
      ramp_allocation="uniform",
      redistribute=lambda leaf: 1.0,
    ),
    "would both decide how sparse a layer is",
  ),
  "end before begin": (dict(begin=5, end=4), "never change: first at call 5, but not after end=4"),
  "every 0": (dict(every=0), "every must be at least 1"),
  "end of a half": (dict(end=9.5), "end must be an integer, got 9.5"),
  "begin before the first call": (dict(begin=-1), "begin must be at least 0"),
  "a ramp that is a number": (dict(ramp=1.0), "ramp must be a function, got 1.0"),
  "redistribution by a number": (
    dict(redistribute=1.0),
    "redistribute must be a function, got 1.0",
  ),
  "begin of a half": (dict(begin=0.5), "begin must be an integer, got 0.5"),
  "no key": (dict(key=None), "pass key="),
  "no key for random growth": (
    dict(key=None, sparsity=None, masks=SOME_MASKS, grow="random"),
    "random needs a key",
  ),
}


@pytest.mark.parametrize("name", BAD)
def test_arguments_that_make_no_sense_are_an_error_that_says_why(name):
  changed, message = BAD[name]
  with pytest.raises(ValueError, match=message):
    sparsejax.dynamic_sparse_training(**PLAIN | changed)


def test_named_methods_check_their_arguments():
  with pytest.raises(
    ValueError, match="ramp of sparsity ends at 8, after the last change at end=7"
  ):
    sparsejax.granet(SGD, sparsity=0.5, steps=6, begin=2, every=1, end=7, fraction=0.3)
  with pytest.raises(ValueError, match="steps must be at least 1"):
    sparsejax.granet(SGD, sparsity=0.5, steps=0, every=1, fraction=0.3)
  with pytest.raises(ValueError, match="end must be at least 1"):
    sparsejax.rigl(SGD, sparsity=0.5, end=0, key=KEY)
  for make, options in (
    (sparsejax.static_sparse_training, dict()),
    (sparsejax.rigl, dict(end=5)),
    (sparsejax.snfs, dict(every=2, fraction=0.5)),
    (sparsejax.sparse_evolutionary_training, dict(every=2)),
    (sparsejax.granet, dict(initial=0.1, steps=2, every=2, fraction=0.5)),
  ):
    with pytest.raises(ValueError, match=r"pass key=jax.random.key\(seed\)"):
      make(SGD, sparsity=0.5, **options)
    with pytest.raises(ValueError, match=r"sparsity .* in \[0, 1\), got 1.5"):
      make(SGD, sparsity=1.5, key=KEY, **options)


def test_static_training_needs_a_sparsity():
  with pytest.raises(ValueError, match="sparsity"):
    sparsejax.static_sparse_training(SGD, sparsity=None, key=KEY).init(draw(ONE))


def test_an_inner_optimizer_cannot_be_none():
  with pytest.raises(ValueError, match="inner must be an optimizer"):
    sparsejax.dynamic_sparse_training(**PLAIN | dict(inner=None))


def test_the_options_of_a_wrapper_need_something_to_wrap():
  build = functools.partial(
    sparsejax.masked_updates, lambda call: call.masks, due=lambda count: True
  )
  for options in (dict(after_step=True), dict(skip_step=True)):
    with pytest.raises(ValueError, match="inner optimizer: pass one"):
      build(**options)
  with pytest.raises(ValueError, match="keep_weights"):
    build(inner=SGD, keep_weights=True)
  with pytest.raises(ValueError, match="inner must be an optimizer"):
    build(inner=optax.sgd)
  with pytest.raises(ValueError, match="moments must be one of"):
    build(inner=SGD, moments="dropped")


def trace(updates=None, **changed):
  """One call, traced only."""
  tx = sparsejax.dynamic_sparse_training(**PLAIN | changed)
  params = draw(SHAPES)
  return jax.eval_shape(
    lambda p: tx.update(p if updates is None else updates(p), tx.init(p), p), params
  )


def test_growth_by_momentum_without_momentum_is_an_error_that_names_what_is_missing():
  match = "keeps a first moment .*'conv/kernel' there is none in its state .*EmptyState"
  with pytest.raises(ValueError, match=match):
    trace(inner=optax.sgd(0.1), grow="momentum", moments="kept")
  with pytest.raises(ValueError, match=match):
    trace(inner=optax.sgd(0.1), redistribute=criteria.mean_momentum)
  with pytest.raises(ValueError, match="ScaleByRmsState"):
    trace(inner=optax.rmsprop(0.1), grow="momentum", moments="kept")


def test_dropping_of_each_sign_is_not_for_layers_that_compete():
  for options in (dict(drop_globally=True), dict(ramp=lambda count: 1.0)):
    with pytest.raises(ValueError, match="drop in each layer"):
      trace(drop="each_sign", **options)


def test_updates_that_are_missing_are_an_error_that_names_the_path():
  with pytest.raises(ValueError, match="'conv/kernel', but the updates have not"):
    trace(lambda p: {**p, "conv/kernel": None})
  with pytest.raises(ValueError, match="'out/kernel', but the updates have not"):
    trace(lambda p: {n: x for n, x in p.items() if n != "out/kernel"})
  with pytest.raises(ValueError, match=r"masks and the updates .*structure"):
    trace(lambda p: {n: x for n, x in p.items() if n != "conv/bias"})
  tx = sparsejax.dynamic_sparse_training(**PLAIN)
  params = draw(ONE)
  with pytest.raises(ValueError, match="'kernel', but the updates have not"):
    tx.update(None, tx.init(params), params)


def test_masks_of_another_network_are_an_error_that_names_the_path():
  build = functools.partial(sparsejax.rigl, SGD, sparsity=None, end=3)
  with pytest.raises(ValueError, match="'other/kernel'"):
    build(masks={**SOME_MASKS, "other/kernel": np.ones((2, 2), bool)}).init(draw(SHAPES))
  with pytest.raises(ValueError, match="'out/kernel', but the masks have not"):
    build(masks={n: m for n, m in SOME_MASKS.items() if n != "out/kernel"}).init(draw(SHAPES))
  with pytest.raises(ValueError, match="'out/kernel' has shape"):
    build(masks={**SOME_MASKS, "out/kernel": np.ones((4, 7), bool)}).init(draw(SHAPES))


def test_a_tree_of_sparsities_of_another_network_is_an_error():
  with pytest.raises(ValueError, match="none for 'hidden/kernel'"):
    start_of(sparsity={"conv/kernel": 0.5, "out/kernel": 0.5})


# Composition


def test_half_precision_weights_have_exact_zeros():
  for options in (dict(after_step=True), dict(drop_globally=True)):
    half = functools.partial(jax.tree.map, lambda x: x.astype(jnp.bfloat16))
    params, gradients = half(draw(ONE)), half(draw(ONE, 9, seed=3))
    tx = sparsejax.dynamic_sparse_training(**PLAIN | options)
    weights, masks, _ = train(tx, params, gradients)
    assert weights["kernel"].dtype == jnp.bfloat16
    assert np.all(masks["kernel"].reshape(9, -1).sum(1) == 24)
    assert not weights["kernel"][~masks["kernel"]].any()


def test_a_training_that_is_stopped_and_resumed_continues_bit_for_bit():
  tx = sparsejax.dynamic_sparse_training(
    **PLAIN
    | dict(inner=optax.adam(0.1), drop=criteria.running_snip(0.7), grow="random", after_step=True)
    | dict(key=jax.random.PRNGKey(5), every=3)
  )

  def call(carry, gradients):
    params, state = carry
    updates, state = tx.update(gradients, state, params)
    return (optax.apply_updates(params, updates), state), None

  run = jit(lambda carry, gradients: jax.lax.scan(call, carry, gradients)[0])
  params, gradients = draw(ONE), draw(ONE, 10, seed=3)
  # The first part ends between two changes.
  parts = [jax.tree.map(lambda x, i=i: x[i : i + 5], gradients) for i in (0, 5)]
  middle = run((params, tx.init(params)), parts[0])
  expected = run(middle, parts[1])
  stored = flax.serialization.to_bytes(middle)
  restored = flax.serialization.from_bytes((params, tx.init(params)), stored)
  for resumed in (restored, jax.tree.map(np.array, middle)):
    found = run(resumed, parts[1])
    jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert np.any(expected[1].masks["kernel"] != middle[1].masks["kernel"])


def test_masks_of_what_is_not_prunable_are_an_error():
  masks = jax.tree.map(lambda w: w > w.mean() - 9 * (w.ndim > 1), draw(SHAPES))
  tx = sparsejax.dynamic_sparse_training(**PLAIN | dict(sparsity=None, masks=masks))
  with pytest.raises(ValueError, match="prune 'conv/bias', which is not prunable"):
    tx.init(draw(SHAPES))


@pytest.mark.parametrize("criterion", [sparsejax.criteria.momentum, lambda leaf: leaf.moment])
@pytest.mark.parametrize("mode", ["masked", "reset"])
def test_growth_by_momentum_needs_that_of_inactive_weights(criterion, mode):
  tx = sparsejax.dynamic_sparse_training(**PLAIN | dict(grow=criterion, moments=mode))
  params = draw(SHAPES)
  with pytest.raises(ValueError, match='with moments="kept"'):
    tx.update(params, tx.init(params), params)


def test_a_line_search_inside_gets_the_gradient():
  params = draw(SHAPES)
  loss = lambda params: sum(jnp.sum(w**2) for w in jax.tree.leaves(params))
  inner = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5))
  tx = sparsejax.dynamic_sparse_training(**PLAIN | dict(inner=inner))
  gradient = jax.grad(loss)(params)
  updates, state = tx.update(
    gradient, tx.init(params), params, value=loss(params), grad=gradient, value_fn=loss
  )
  new = optax.apply_updates(params, updates)
  for mask, w in zip(jax.tree.leaves(sparsejax.get_masks(state, params)), jax.tree.leaves(new)):
    assert not np.asarray(w)[~np.asarray(mask)].any()


def test_leaves_that_would_have_to_become_denser_are_an_error():
  params = draw(SHAPES)
  sparsities = jax.tree.map(lambda w: 0.3 if w.ndim > 1 else 0.0, params)
  tx = sparsejax.granet(
    SGD, sparsity=sparsities, initial=0.5, steps=4, every=1, fraction=0.1, key=KEY
  )
  for init in (tx.init, jax.jit(tx.init)):
    with pytest.raises(ValueError, match=r"starts with .* pruned and is to end with .* returns"):
      init(params)


def test_of_an_odd_number_the_positive_weights_give_one_more():
  weight = jnp.array([1.0, 2.0, 3.0, -1.0, -2.0, -3.0])
  leaf = criteria.Leaf(weight, jnp.ones(6, bool), count=jnp.uint32(3))
  np.testing.assert_array_equal(criteria.each_sign(leaf) == 0, [1, 1, 0, 1, 0, 0])
  # Where there are too few of one sign, the other makes up for it.
  leaf = criteria.Leaf(jnp.abs(weight), weight > 0, count=jnp.uint32(2))
  np.testing.assert_array_equal(criteria.each_sign(leaf) == 0, [1, 1, 0, 0, 0, 0])


def test_a_weight_of_zero_counts_as_positive():
  weight = jnp.array([0.0, 0.0, 1.0, -1.0, -2.0, -3.0])
  leaf = criteria.Leaf(weight, jnp.ones(6, bool), count=jnp.uint32(2))
  np.testing.assert_array_equal(criteria.each_sign(leaf), [0, 1, 1, 0, 1, 1])


def test_moments_of_zero_are_no_momentum():
  first, second = jnp.array([0.0, 1.0, 2.0]), jnp.array([0.0, 1.0, 1.0])
  leaf = criteria.Leaf(first, jnp.ones(3, bool), moment=lambda: (first, second))
  np.testing.assert_allclose(criteria.momentum(leaf), [0, 1, 2], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize(
  ("name", "weight", "gradient"),
  [
    # Too large for float16: all would be infinite.
    ("reciprocal_sensitivity", np.linspace(1, 2, 8), np.full(8, 2e-6)),
    ("sensitivity", np.full(8, 2e-6), np.linspace(1, 2, 8)),
    # Too close for either: all would be equal.
    ("mest", np.ones(8), np.linspace(1e-4, 2e-4, 8)),
    ("gradient_step", np.ones(8), -np.linspace(1e-4, 2e-4, 8)),
  ],
)
def test_scores_of_half_precision_numbers_are_told_apart(name, weight, gradient, dtype):
  leaf = criteria.Leaf(
    jnp.asarray(weight, dtype), jnp.ones(8, bool), gradient=jnp.asarray(gradient, dtype)
  )
  scores = np.asarray(criteria.BY_NAME[name](leaf), np.float64)
  assert np.isfinite(scores).all() and (np.diff(scores) > 0).all()


@pytest.mark.parametrize("sparsity", [0.729, 0.9])
def test_a_traced_ramp_prunes_as_many_however_it_is_compiled(sparsity):
  params = {"kernel": jnp.zeros((2000, 3000))}

  def masks_of(tx, count):
    _, state = tx.update(params, tx.init(params)._replace(count=count), params)
    return jnp.sum(~state.masks["kernel"])

  ramp = optax.linear_schedule(0.0, 1.0, 7)
  links = (
    lambda s: sparsejax.progressive_pruning(s, steps=7, every=1, initial=0.1),
    lambda s: sparsejax.dynamic_sparse_training(
      SGD, sparsity=s, initial=0.1, ramp=ramp, fraction=0.0, every=1, allocation="global"
    ),
  )
  for link in links:
    at = lambda s, count, link=link: masks_of(link(s), count)
    compiled = jax.jit(at)
    for count in range(1, 7):
      arguments = jnp.float32(sparsity), jnp.int32(count)
      assert at(*arguments) == compiled(*arguments)


def test_a_ramp_in_each_layer_that_starts_beyond_its_end_in_one_is_an_error():
  params = {"a": jnp.ones((100, 100)), "b": jnp.ones((100, 20))}
  options = dict(initial=0.5, steps=4, every=1, fraction=0.0, key=KEY)
  # The start is an allocation of 0.5 to all, by which the larger leaf is sparser than that.
  match = "'a' starts with 6000 pruned and is to end with 5000, but none returns"
  for end in (dict(sparsity={"a": 0.5, "b": 0.5}), dict(sparsity=0.5, ramp_allocation="uniform")):
    with pytest.raises(ValueError, match=match):
      sparsejax.granet(SGD, **end, **options).init(params)
  masks = sparsejax.masks_from_scores(params, 0.5, allocation="erk")
  with pytest.raises(ValueError, match=match):
    sparsejax.granet(SGD, sparsity=0.5, ramp_allocation="uniform", masks=masks, **options).init(
      params
    )
  sparsejax.granet(
    SGD, sparsity=0.5, ramp_allocation="uniform", allocation="uniform", **options
  ).init(params)


def test_a_schedule_that_is_nan_prunes_nothing_however_it_is_shared_out():
  params = draw(SHAPES)
  for kind in ("global", "uniform", "erk"):
    tx = sparsejax.gradual_pruning(lambda count: jnp.nan, every=1, allocation=kind)
    _, state = tx.update(params, tx.init(params), params)
    assert sparsejax.sparsity(sparsejax.get_masks(state, params)) == 0


@pytest.mark.parametrize(
  "make",
  [
    lambda params: sparsejax.one_shot_pruning(0.9999, at=0).init(params),
    lambda params: sparsejax.granet(
      SGD, sparsity=0.9999, steps=4, every=1, fraction=0.1, key=KEY
    ).init(params),
  ],
)
def test_a_sparsity_by_which_nothing_would_be_left_is_warned_of(make):
  with pytest.warns(UserWarning, match="none of the .* prunable weights would be left"):
    make(draw(SHAPES))


@pytest.mark.parametrize(
  ("criterion", "message"),
  [
    (lambda leaf: None, r"got None for 'conv/kernel' of shape \["),
    (lambda leaf: leaf.mask, r"got bool\["),
    (criteria.running_magnitude, "returns a criterion, not scores: call it first"),
    (criteria.mest, "returns a criterion, not scores: call it first"),
  ],
)
def test_what_are_no_scores_is_an_error_that_says_what_was_returned(criterion, message):
  with pytest.raises(ValueError, match=message):
    trace(drop=criterion)


def test_a_decay_of_one_or_more_is_an_error():
  with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1\.5"):
    criteria.running_magnitude(1.5)


def test_a_running_average_of_half_precision_weights_does_not_stand_still():
  leaf = criteria.Leaf(jnp.ones(1, jnp.bfloat16), jnp.ones(1, bool))
  running = criteria.running_magnitude(0.99)
  update = lambda _, mean: running.update(leaf, mean)
  mean = jax.lax.fori_loop(0, 500, update, running.init(leaf.weight))
  np.testing.assert_allclose(mean, 1 - 0.99**500, rtol=1e-4)


def test_a_running_average_starts_anew_when_masks_have_changed():
  tx = sparsejax.one_shot_pruning(0.5, at=1, criterion=criteria.running_magnitude(0.75))
  params = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
  state, update = tx.init(params), jit(tx.update)
  for part in (0.25, 0.0):
    _, state = update(params, state, params)
    np.testing.assert_array_equal(state.statistics["drop"]["kernel"], part * params["kernel"])


def test_masks_that_are_given_are_checked_and_taken_in_a_jitted_init_too():
  params = draw(SHAPES)
  masks = sparsejax.masks_from_scores(params, 0.5)
  tx = sparsejax.static_sparse_training(SGD, masks=masks)
  found = sparsejax.get_masks(jax.jit(tx.init)(params), params)
  assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), found, masks)))
  name = next(name for name, weight in params.items() if weight.ndim < 2)
  spoiled = {**masks, name: jnp.zeros_like(masks[name])}
  tx = sparsejax.static_sparse_training(SGD, masks=spoiled)
  for init in (tx.init, jax.jit(tx.init)):
    with pytest.raises(ValueError, match=f"the masks prune '{name}', which is not prunable"):
      init(params)


def test_a_dense_start_asks_no_allocation_and_two_that_round_differently_are_no_fall():
  params = {"a": jnp.ones((4, 5)), "b": jnp.ones((4, 5))}

  def only_below_one(shapes, density):
    assert density < 1
    return [1.2 * density, 0.8 * density]

  options = dict(every=1, fraction=0.0, steps=2)
  sparsejax.gradual_pruning(lambda count: 0.5, every=1, allocation=only_below_one).init(params)
  ramp = dict(allocation=only_below_one, ramp_allocation=only_below_one)
  sparsejax.granet(SGD, sparsity=0.5, **ramp, **options).init(params)
  # Of 150 weights, ERK comes to 17 and a global sparsity to 16.
  tx = sparsejax.granet(SGD, sparsity=0.11, initial=0.11, key=KEY, **options)
  tx.init({"kernel": jnp.ones((10, 15))})


def test_given_masks_that_are_sparser_than_the_end_of_a_ramp_are_an_error():
  params = {"a": jnp.ones((100, 100)), "b": jnp.ones((100, 20))}
  masks = sparsejax.masks_from_scores(params, 0.9, allocation="uniform")
  tx = sparsejax.granet(SGD, sparsity=0.5, masks=masks, every=1, fraction=0.1, steps=2)
  with pytest.raises(ValueError, match="the network starts with 10800 pruned and is to end with 6"):
    tx.init(params)


def test_given_masks_may_be_sparser_than_the_end_of_a_ramp_by_one_weight_and_no_more():
  params = {"w": jnp.ones((4, 5))}

  def start_with(number):
    masks = {"w": np.arange(20).reshape(4, 5) >= number}
    tx = sparsejax.granet(SGD, sparsity=0.5, masks=masks, every=1, fraction=0.1, steps=2)
    return tx.init(params).masks["w"]

  assert np.sum(~start_with(11)) == 11
  with pytest.raises(ValueError, match="starts with 12 pruned and is to end with 10"):
    start_with(12)
