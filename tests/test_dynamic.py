"""Dynamic sparse training against slow NumPy versions of what its documentation says."""

import fractions
import functools
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
  """The weights and the masks after one call, and the state."""

  @jit
  def call(params, gradients):
    updates, state = tx.update(gradients, tx.init(params), params)
    params = optax.apply_updates(params, updates)
    return params, sparsejax.get_masks(state, params), state

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
    kept = rounded(1 - float(target), SIZE)
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
  begin, end = options.get("begin", 0), options.get("end", CALLS)
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
    np.testing.assert_array_equal(active, np.array([[start[leaf].sum()] for leaf in POOL]) + 0 * active)


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
  # 0.1 as a float32 is more than 0.1, and 0.1 * 25 more than a half.
  table = [0.5, 0.1, 0.3, 0.25, 0.02, 0.7, 0.9, 1.0, 0.0, 0.1]
  shapes = {"a": (6, 10), "b": (4, 10)}
  masks = {
    "a": np.arange(60).reshape(6, 10) < 25,
    "b": np.arange(40).reshape(4, 10) < 10,
  }
  tx = sparsejax.dynamic_sparse_training(
    optax.sgd(0.1),
    sparsity=None,
    masks=masks,
    fraction=lambda count: jnp.array(table)[count],
    every=1,
    rounding=rounding,
  )
  # So that nothing that is dropped grows again.
  tx = optax.chain(hide_active_gradients(tx), tx)

  def of_inner(gradients, state, params):
    active = sparsejax.get_masks(state, params)
    gradients = jax.tree.map(lambda g, m: jnp.where(m, 0, g), gradients, active)
    return wrapped.update(gradients, state, params)

  wrapped = tx
  del of_inner
  _, found, _ = train(tx, draw(shapes), draw(shapes, len(table)))
  for name, mask in masks.items():
    before = np.concatenate([mask[None], found[name][:-1]])
    grown = (found[name] & ~before).reshape(len(table), -1).sum(1)
    assert grown.tolist() == [rounded(f, mask.sum(), rounding) for f in table]
