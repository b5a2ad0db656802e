"""When masks change, how many weights are pruned, and on which weights that is decided."""

import fractions
import functools
import re
from typing import NamedTuple

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from jax import lax

import sparsejax


def run_masks(link, weights):
  """The masks of each call, when call `c` gets `weights` at `c`."""

  def call(state, params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    _, state = link.update(zeros, state, params)
    return state, sparsejax.get_masks(state, params)

  state = link.init(jax.tree.map(lambda leaf: leaf[0], weights))
  return lax.scan(call, state, weights)[1]


def masks_of(link, weights):
  """The same as NumPy arrays."""
  return jax.tree.map(np.asarray, jax.jit(functools.partial(run_masks, link))(weights))


def draw_weights(calls, shapes, seed=0):
  generator = np.random.default_rng(seed)
  return {
    name: generator.normal(size=(calls, *shape)).astype(np.float32)
    for name, shape in shapes.items()
  }


def pruned(masks):
  """How many weights each call leaves pruned."""
  return sum((~mask).sum(tuple(range(1, mask.ndim))) for mask in masks.values()).tolist()


def counts_to_masks(counts, weights):
  """The slow version: the smallest active magnitudes of the whole tree, to reach each count."""
  masks = {name: np.ones(leaf.shape[1:], bool) for name, leaf in weights.items()}
  history = {name: [] for name in weights}
  for call, count in enumerate(counts):
    already = sum(int((~mask).sum()) for mask in masks.values())
    magnitudes = {name: np.abs(leaf[call]) for name, leaf in weights.items()}
    drop = reference.select_smallest(magnitudes, count - already, among=masks)
    masks = {name: masks[name] & ~drop[name] for name in masks}
    for name in masks:
      history[name].append(masks[name])
  return {name: np.stack(leaves) for name, leaves in history.items()}


def assert_masks_equal(got, expected):
  assert got.keys() == expected.keys()
  for name in got:
    np.testing.assert_array_equal(got[name], expected[name], name)


# When, and how many: progressive_pruning

POOL = {"a": (7, 9), "b": (2, 5, 7)}  # 133 weights: an odd pool, halves of which are ties.
TOTAL = 133


def ramp(calls, sparsity, *, steps, every, begin=0, initial=0.0, total=TOTAL):
  """The closed form: how many of the pool are pruned after each call, in float64."""
  counts = []
  for call in range(calls):
    last = max((c for c in range(begin, min(call + 1, begin + steps), every)), default=None)
    if last is None:
      counts.append(0)
      continue
    elapsed = min(last + every, begin + steps) - begin
    target = initial + (sparsity - initial) * elapsed / steps if elapsed < steps else sparsity
    counts.append(total - round((1 - target) * total))
  return counts


RAMPS = {
  "on the grid": dict(sparsity=0.729, steps=12, every=3),
  "at every call": dict(sparsity=0.9, steps=7, every=1),
  "off the grid": dict(sparsity=0.8, steps=10, every=4),
  "after begin": dict(sparsity=0.7, steps=9, every=3, begin=4),
  "off the grid after begin": dict(sparsity=0.61, steps=8, every=5, begin=3),
  "from an initial sparsity": dict(sparsity=0.98, steps=12, every=2, begin=1, initial=0.5),
  "with an interval longer than the ramp": dict(sparsity=0.37, steps=3, every=50, begin=2),
  "to nothing": dict(sparsity=0.0, steps=4, every=2),
  "to nearly everything": dict(sparsity=0.999, steps=6, every=2),
  "with ties of rounding": dict(sparsity=0.5, steps=2, every=1, initial=0.5),
}
_NOTHING_LEFT = pytest.mark.filterwarnings("ignore:so sparse, none of the 133")
every_ramp = pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=[_NOTHING_LEFT] if name == "to nearly everything" else [])
    for name in RAMPS
  ],
)


@functools.cache
def _ramp_masks(name):
  weights = draw_weights(18, {**POOL, "bias": (40,)})
  return masks_of(sparsejax.progressive_pruning(**RAMPS[name]), weights), weights


@every_ramp
def test_progressive_pruning_follows_the_closed_form_at_every_call(name):
  masks, _ = _ramp_masks(name)
  assert pruned(masks) == ramp(18, **RAMPS[name])
  assert masks["bias"].all()


def test_the_closed_form_itself_is_the_published_ramp():
  # Epochs of 5 calls, 4 of them: s(e) = s0 + (s - s0) (e + 1) / E from the start of epoch e.
  counts = ramp(25, 0.7, steps=20, every=5, initial=0.1)
  targets = [0.25, 0.4, 0.55, 0.7, 0.7]
  assert counts[::5] == [TOTAL - round((1 - s) * TOTAL) for s in targets]
  assert counts == sorted(counts)


@every_ramp
def test_decisions_use_the_weights_as_passed_to_the_call(name):
  masks, weights = _ramp_masks(name)
  pool = {layer: weights[layer] for layer in POOL}
  expected = counts_to_masks(ramp(18, **RAMPS[name]), pool)
  assert_masks_equal({layer: masks[layer] for layer in POOL}, expected)


def test_lanes_of_several_sparsities_follow_the_closed_form_of_floats():
  # Along these ramps shares of 1,000 weights are often half a weight, which single precision does
  # not see.
  sparsities, options = (0.98, 0.5, 0.7, 0.9, 0.3), dict(steps=40, every=1, begin=2)
  weights = draw_weights(43, {"a": (25, 40)})

  def lane(index):
    sparsity = sparsejax.OneOf(sparsities, index)
    return run_masks(sparsejax.progressive_pruning(sparsity, **options), weights)["a"]

  masks = jax.jit(jax.vmap(lane))(jnp.arange(5, dtype=jnp.int8))
  expected = [ramp(43, sparsity, **options, total=1000) for sparsity in sparsities]
  assert np.sum(~np.asarray(masks), axis=(2, 3)).tolist() == expected


def test_half_a_weight_rounds_the_kept_ones_to_even():
  for size, expected in {3: 1, 5: 3, 7: 3, 9: 5}.items():
    params = {"kernel": jnp.arange(1.0, size + 1).reshape(1, size)}
    link = sparsejax.one_shot_pruning(0.5, at=0)
    _, state = link.update(params, link.init(params), params)
    kept = sparsejax.get_masks(state, params)["kernel"].sum()
    assert (int(size - kept), int(kept)) == (expected, size - expected)


def test_numpy_integers_are_accepted_for_calls():
  link = sparsejax.progressive_pruning(0.5, steps=np.int64(4), every=np.int32(2), begin=np.int64(1))
  masks = masks_of(link, draw_weights(6, POOL))
  assert pruned(masks) == ramp(6, 0.5, steps=4, every=2, begin=1)


def test_sparsities_per_leaf_ramp_in_proportion():
  sparsities = {"a": 0.9, "b": 0.4}
  weights = draw_weights(9, POOL)
  masks = masks_of(sparsejax.progressive_pruning(sparsities, steps=6, every=2, begin=1), weights)
  for name, sparsity in sparsities.items():
    size = masks[name][0].size
    targets = [0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1, 1, 1]
    expected = [size - round((1 - sparsity * target) * size) for target in targets]
    assert pruned({name: masks[name]}) == expected


# When, and how many: gradual_pruning and one_shot_pruning


def exact_count(sparsity, total):
  """N - round((1 - s) N) for the exact value of a float32, half to even."""
  return total - round((1 - fractions.Fraction(float(np.float32(sparsity)))) * total)


def scheduled(calls, table, *, every, begin=0, end=None):
  """How many are pruned after each call, for a table of sparsities by absolute call number."""
  counts, count = [], 0
  for call in range(calls):
    due = call >= begin and (call - begin) % every == 0 and (end is None or call <= end)
    if due or call == end:
      count = max(count, exact_count(table[call], TOTAL))
    counts.append(count)
  return counts


RISING = np.linspace(0.03, 0.95, 20).astype(np.float32)
GRIDS = {
  "at every call": dict(every=1),
  "on a grid without end": dict(every=3),
  "after begin": dict(every=4, begin=5),
  "to an end on the grid": dict(every=3, begin=2, end=11),
  "to an end off the grid": dict(every=3, begin=2, end=12),
  "to an end before the first interval is over": dict(every=10, begin=3, end=5),
}
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())


@every_grid
def test_gradual_pruning_evaluates_its_schedule_at_the_absolute_call_number(grid):
  link = sparsejax.gradual_pruning(lambda count: jnp.asarray(RISING)[count], **grid)
  weights = draw_weights(20, POOL)
  masks = masks_of(link, weights)
  counts = scheduled(20, RISING, **grid)
  assert pruned(masks) == counts
  assert_masks_equal(masks, counts_to_masks(counts, weights))


def test_a_falling_schedule_never_revives_a_weight():
  table = np.float32([0.5, 0.2, 0.6, 0.1, 0.0, 0.9, 0.9, 0.3])
  link = sparsejax.gradual_pruning(lambda count: jnp.asarray(table)[count], every=1)
  masks = masks_of(link, draw_weights(8, POOL))
  assert pruned(masks) == scheduled(8, table, every=1)


def test_a_polynomial_schedule_gives_zhu_and_guptas_cubic():
  # s(t) = s + (s0 - s) (1 - (t - t0) / n)^3 of "To prune, or not to prune" (2017).
  schedule = optax.polynomial_schedule(0.1, 0.8, 3, transition_steps=12, transition_begin=2)
  masks = masks_of(sparsejax.gradual_pruning(schedule, every=2, begin=2), draw_weights(20, POOL))
  counts = [0, 0]
  for call in range(2, 20):
    elapsed = min((call - 2) // 2 * 2, 12)
    counts.append(TOTAL - round((1 - (0.8 - 0.7 * (1 - elapsed / 12) ** 3)) * TOTAL))
  assert pruned(masks) == counts


def test_a_schedule_may_return_a_python_float():
  masks = masks_of(sparsejax.gradual_pruning(lambda count: 0.5, every=2), draw_weights(3, POOL))
  assert pruned(masks) == [67, 67, 67]


def test_a_criterion_is_told_how_many_weights_of_a_layer_go_besides_those_that_are_gone():
  # Positive weights come first, and of each sign as many are to go at each call.
  weights = np.float32([*range(1, 11), *range(-1, -11, -1)]).reshape(4, 5)
  link = sparsejax.gradual_pruning(
    lambda count: jnp.float32([0.2, 0.4, 0.6])[count],
    every=1,
    criterion="each_sign",
    allocation="uniform",
  )
  masks = masks_of(link, {"w": np.stack([weights] * 3)})
  for call, most in enumerate((2, 4, 6)):
    np.testing.assert_array_equal(masks["w"][call], np.abs(weights) > most)


@pytest.mark.parametrize("at", [0, 1, 5])
def test_one_shot_pruning_prunes_at_its_call_only(at):
  weights = draw_weights(8, POOL)
  masks = masks_of(sparsejax.one_shot_pruning(0.7, at=at), weights)
  counts = [0] * at + [TOTAL - round((1 - 0.7) * TOTAL)] * (8 - at)
  assert pruned(masks) == counts
  assert_masks_equal(masks, counts_to_masks(counts, weights))


@pytest.mark.parametrize(
  ("link", "counts"),
  [
    (sparsejax.progressive_pruning(0.85, initial=0.3, steps=3, every=1), [5, 7, 8, 8]),
    (sparsejax.progressive_pruning(jnp.float32(0.95), initial=0.35, steps=1, every=1), [9, 9]),
    (sparsejax.one_shot_pruning(sparsejax.OneOf((0.2, 0.5), 0), at=0), [2, 2, 2]),
  ],
  ids=["a float", "an array", "one of several"],
)
def test_a_ramp_ends_at_its_sparsity_without_rounding_errors_and_stays_there(link, counts):
  assert pruned(masks_of(link, draw_weights(len(counts), {"a": (2, 5)}))) == counts


# How many, for a traced sparsity

SIZES = (1, 3, 64, 133, 100003)


@functools.cache
def _count_traced(size):
  """Pruned weights of a pool of one kernel, with the sparsity as an argument of the program."""
  params = {"kernel": jnp.linspace(0.5, 1.0, size).reshape(1, size)}

  def count(sparsity):
    link = sparsejax.one_shot_pruning(sparsity, at=0)
    _, state = link.update(params, link.init(params), params)
    return size - jnp.sum(sparsejax.get_masks(state, params)["kernel"])

  return jax.jit(count)


@hypothesis.settings(max_examples=200)
@hypothesis.given(
  size=st.sampled_from(SIZES),
  sparsity=st.floats(0, 1, exclude_max=True, width=32),
  numerator=st.integers(0, 200_000),
  ulps=st.integers(-2, 2),
  near_tie=st.booleans(),
)
def test_a_traced_sparsity_prunes_exactly_its_float32_share(
  size, sparsity, numerator, ulps, near_tie
):
  if near_tie:
    # At, or some units in the last place beside, a share that rounds either way.
    sparsity = np.float32((numerator % size + 0.5) / size)
    toward = np.float32(np.inf if ulps > 0 else -np.inf)
    for _ in range(abs(ulps)):
      sparsity = np.nextafter(sparsity, toward)
    sparsity = np.clip(sparsity, np.float32(0), np.nextafter(np.float32(1), np.float32(0)))
  sparsity = np.float32(sparsity)
  assert int(_count_traced(size)(sparsity)) == exact_count(sparsity, size)


@pytest.mark.parametrize("size", [8, 64])
def test_a_traced_sparsity_rounds_half_a_weight_to_even(size):
  # (1 - s) N is exactly k + 1/2.
  for kept in (0, 1, 2, size // 2, size - 1):
    sparsity = np.float32(1 - (kept + 0.5) / size)
    expected = size - (kept + 1 if kept % 2 else kept)
    assert int(_count_traced(size)(sparsity)) == expected == exact_count(sparsity, size)


def test_a_float32_cannot_count_this_pool_but_a_traced_sparsity_does():
  rows, columns, sparsity = 3, 2**23 + 1, np.float32(0.3)
  size = rows * columns
  assert size - round(float((np.float32(1) - sparsity) * np.float32(size))) != (
    exact_count(sparsity, size)
  )
  params = {"kernel": jnp.broadcast_to(jnp.bfloat16(1), (rows, columns))}

  @jax.jit
  def count(params, state, sparsity):
    _, state = sparsejax.one_shot_pruning(sparsity, at=0).update(params, state, params)
    return (~sparsejax.get_masks(state, params)["kernel"]).sum()

  # The state is an argument, or XLA would count its constant masks while it compiles.
  state = sparsejax.one_shot_pruning(0.5, at=0).init(params)
  assert int(count(params, state, sparsity)) == exact_count(sparsity, size)


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("traced", [False, True], ids=["a Python float", "traced"])
def test_a_pool_beyond_32_bits_of_leaves_beyond_31_can_be_compiled(traced, allocation):
  leaf = jax.ShapeDtypeStruct((2**16, 2**15 + 2**14), jnp.bfloat16)

  def prune(params, sparsity):
    sparsity = sparsity if traced else 0.7
    link = sparsejax.progressive_pruning(sparsity, steps=10, every=2, allocation=allocation)
    updates, state = link.update(params, link.init(params), params)
    return updates, sparsejax.get_masks(state, params)

  params = {"first": leaf, "second": leaf}
  updates, masks = jax.eval_shape(prune, params, jnp.float32(0.7))
  assert {(u.shape, u.dtype) for u in updates.values()} == {(leaf.shape, leaf.dtype)}
  assert {(m.shape, m.dtype) for m in masks.values()} == {(leaf.shape, jnp.dtype(bool))}


@pytest.mark.parametrize("sparsity", [0.1, 0.37, 0.729])
def test_a_traced_sparsity_follows_the_ramp(sparsity):
  weights = draw_weights(12, POOL)

  @jax.jit
  def run(weights, sparsity):
    link = sparsejax.progressive_pruning(sparsity, steps=8, every=3, begin=2)

    def call(state, params):
      _, state = link.update(params, state, params)
      return state, sparsejax.get_masks(state, params)

    return lax.scan(call, link.init({name: leaf[0] for name, leaf in weights.items()}), weights)[1]

  masks = {name: np.asarray(leaf) for name, leaf in run(weights, jnp.float32(sparsity)).items()}
  # The pool is small: no target of these is within a float32's error of half a weight.
  assert pruned(masks) == ramp(12, sparsity, steps=8, every=3, begin=2)


# Monotone, whatever the weights

SEQUENCE = 6  # Calls.
SMALL = {"a": (3, 4), "b": (2, 2, 3), "bias": (3,)}
MONOTONE = {
  "progressive": lambda: sparsejax.progressive_pruning(0.8, steps=5, every=2, initial=0.1),
  "uniform": lambda: sparsejax.progressive_pruning(0.8, steps=5, every=1, allocation="uniform"),
  "erk": lambda: sparsejax.progressive_pruning(0.8, steps=5, every=1, allocation="erk"),
  "per leaf": lambda: sparsejax.progressive_pruning(
    {"a": 0.5, "b": 0.75, "bias": 0.0}, steps=5, every=1
  ),
  "gradual": lambda: sparsejax.gradual_pruning(
    lambda count: jnp.float32([0.4, 0.2, 0.6, 0.1, 0.8, 0.5])[count], every=1
  ),
  "one shot": lambda: sparsejax.one_shot_pruning(0.6, at=2),
}
FINAL = {  # Pruned weights of the leaves "a" and "b" at the end; None where ties decide.
  "progressive": (None, None, 19),
  "uniform": (10, 10, 20),
  "erk": (10, 10, 20),  # 3 + 4 = 2 + 2 + 3: equal densities.
  "per leaf": (6, 9, 15),
  "gradual": (None, None, 19),
  "one shot": (None, None, 14),
}


@functools.cache
def _monotone_run(name):
  link = MONOTONE[name]()

  def call(state, given):
    params, updates = given
    updates, state = link.update(updates, state, params)
    return state, (sparsejax.get_masks(state, params), optax.apply_updates(params, updates))

  @jax.jit
  def run(weights, updates):
    state = link.init({name: leaf[0] for name, leaf in weights.items()})
    return lax.scan(call, state, (weights, updates))[1]

  return run


def _sequences():
  # Few values and both zeros: almost every threshold is a tie.
  values = st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1e-40, 1.0, 2.0, 3.5])
  return st.fixed_dictionaries(
    {
      name: hnp.arrays(np.float32, (SEQUENCE, *shape), elements=values)
      for name, shape in SMALL.items()
    }
  )


@pytest.mark.parametrize("name", MONOTONE)
@hypothesis.settings(max_examples=30)
@hypothesis.given(weights=_sequences(), updates=_sequences())
def test_masks_are_monotone_and_counts_exact_for_any_sequence_of_weights(name, weights, updates):
  masks, after = jax.tree.map(np.asarray, _monotone_run(name)(weights, updates))
  for leaf, mask in masks.items():
    assert not (mask[1:] & ~mask[:-1]).any()
    assert not after[leaf][~mask].view(np.uint32).any()
  assert masks["bias"].all()
  a, b = (int((~masks[leaf][-1]).sum()) for leaf in ("a", "b"))
  expected = FINAL[name]
  assert a + b == expected[2]
  assert expected[0] is None or (a, b) == expected[:2]


@hypothesis.settings(max_examples=30)
@hypothesis.given(weights=_sequences())
def test_ties_go_by_leaf_then_by_index(weights):
  masks, _ = jax.tree.map(np.asarray, _monotone_run("progressive")(weights, weights))
  pool = {name: weights[name] for name in ("a", "b")}
  counts = []
  for call in range(SEQUENCE):
    elapsed = min(call // 2 * 2 + 2, 5)
    counts.append(24 - round((1 - (0.1 + 0.7 * elapsed / 5)) * 24))
  expected = counts_to_masks(counts, pool)
  assert_masks_equal({name: masks[name] for name in pool}, expected)


# The published rule


class PublishedRule:
  """Progressive magnitude pruning as its authors do it, in NumPy: mask, masked step, mask.

  The mask multiplies the weights before the forward pass, the gradients after the backward pass and
  the weights after SGD with momentum and coupled weight decay. It changes at the start of an epoch.
  """

  def __init__(self, weights, *, sparsity, epochs, learning_rate, momentum, weight_decay):
    self.weights = {name: leaf.copy() for name, leaf in weights.items()}
    self.masks = {name: np.ones(leaf.shape, bool) for name, leaf in weights.items()}
    self.buffers = {name: np.zeros_like(leaf) for name, leaf in weights.items()}
    self.sparsity, self.epochs = sparsity, epochs
    self.learning_rate = np.float32(learning_rate)
    self.momentum, self.weight_decay = np.float32(momentum), np.float32(weight_decay)

  def start_epoch(self, epoch):
    sparsity = self.sparsity * min(epoch + 1, self.epochs) / self.epochs
    pool = [name for name, leaf in self.weights.items() if leaf.ndim > 1]
    active = np.concatenate([np.abs(self.weights[name][self.masks[name]]) for name in pool])
    total = sum(self.weights[name].size for name in pool)
    kept = min(round((1 - sparsity) * total), active.size)
    threshold = np.sort(active)[active.size - kept]
    for name in pool:
      self.masks[name] &= np.abs(self.weights[name]) >= threshold
    self._apply_masks()

  def step(self, gradient):
    for name, leaf in gradient(self.weights).items():
      leaf = np.where(self.masks[name], leaf, np.float32(0))
      leaf = leaf + self.weight_decay * self.weights[name]
      self.buffers[name] = leaf + self.momentum * self.buffers[name]
      self.weights[name] = self.weights[name] - self.learning_rate * self.buffers[name]
    self._apply_masks()

  def _apply_masks(self):
    for name, mask in self.masks.items():
      self.weights[name] = np.where(mask, self.weights[name], np.float32(0))


class Problem(NamedTuple):
  """Noisy quadratics, one a weight: a kept weight's gradient does not depend on the masked ones."""

  curvature: dict
  minimum: dict
  noise: dict

  def gradient(self, weights, call):
    return {
      name: self.curvature[name] * (weights[name] - self.minimum[name]) + self.noise[name][call]
      for name in weights
    }


EPOCHS, EPOCH_LENGTH, PRUNING_EPOCHS = 7, 4, 5
NETWORK = {"conv": (3, 3, 2, 5), "dense": (23, 7), "bias": (7,)}


@pytest.mark.parametrize("sparsity", [0.7, 0.729, 0.95])
def test_progressive_pruning_is_the_published_rule_mask_by_mask_and_update_by_update(sparsity):
  calls = EPOCHS * EPOCH_LENGTH
  curvature, minimum, start = (
    {name: leaf[0] for name, leaf in draw_weights(1, NETWORK, seed).items()} for seed in range(3)
  )
  problem = Problem(
    {name: np.abs(leaf) for name, leaf in curvature.items()},
    minimum,
    draw_weights(calls, NETWORK, seed=3),
  )
  rates = dict(learning_rate=0.05, momentum=0.9, weight_decay=5e-2)
  published = PublishedRule(start, sparsity=sparsity, epochs=PRUNING_EPOCHS, **rates)
  optimizer = optax.chain(
    optax.add_decayed_weights(rates["weight_decay"]),
    optax.sgd(rates["learning_rate"], momentum=rates["momentum"]),
    sparsejax.progressive_pruning(
      sparsity, steps=PRUNING_EPOCHS * EPOCH_LENGTH, every=EPOCH_LENGTH
    ),
  )

  @jax.jit
  def step(params, state, gradients):
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, sparsejax.get_masks(state, params)

  params, state = jax.tree.map(jnp.asarray, start), optimizer.init(start)
  for call in range(calls):
    if call % EPOCH_LENGTH == 0:
      published.start_epoch(call // EPOCH_LENGTH)
    before = {name: np.asarray(leaf) for name, leaf in params.items()}
    params, state, masks = step(params, state, problem.gradient(before, call))
    published.step(lambda weights, call=call: problem.gradient(weights, call))
    assert_masks_equal(jax.tree.map(np.asarray, masks), published.masks)
    for name in params:
      # The same sums in float32; a compiler may only fuse multiplications with additions.
      np.testing.assert_allclose(params[name], published.weights[name], rtol=1e-4, atol=1e-6)
      pruned_bits = np.asarray(params[name])[~published.masks[name]].view(np.uint32)
      assert not pruned_bits.any()
  total = sum(masks[name].size for name in ("conv", "dense"))
  kept = sum(int(masks[name].sum()) for name in ("conv", "dense"))
  assert kept == round((1 - sparsity) * total)


# Errors


def progressive(sparsity=0.5, steps=10, every=2, **arguments):
  return sparsejax.progressive_pruning(sparsity, steps=steps, every=every, **arguments)


def gradual(every=2, **arguments):
  return sparsejax.gradual_pruning(lambda count: 0.5, every=every, **arguments)


def one_shot(sparsity=0.5, at=3, **arguments):
  return sparsejax.one_shot_pruning(sparsity, at=at, **arguments)


def from_scores(sparsity=0.5, **arguments):
  return sparsejax.masks_from_scores({"kernel": jnp.ones((2, 2))}, sparsity, **arguments)


BAD_SPARSITIES = [-0.1, 1.0, 1.5, float("nan"), float("inf")]


@pytest.mark.parametrize("value", BAD_SPARSITIES)
@pytest.mark.parametrize("function", [progressive, one_shot, from_scores])
def test_a_sparsity_outside_of_zero_to_one_is_an_error_that_shows_it(function, value):
  with pytest.raises(ValueError, match=re.escape(str(value))):
    function(sparsity=value)


@pytest.mark.parametrize("value", BAD_SPARSITIES)
def test_an_initial_sparsity_outside_of_zero_to_one_is_an_error_that_shows_it(value):
  with pytest.raises(ValueError, match=re.escape(str(value))):
    progressive(initial=value)


@pytest.mark.parametrize("value", BAD_SPARSITIES)
def test_a_sparsity_of_a_leaf_outside_of_zero_to_one_is_an_error_that_shows_it(value):
  params = {"a": jnp.ones((2, 3)), "b": jnp.ones((4, 4))}
  with pytest.raises(ValueError, match=re.escape(str(value))):
    progressive(sparsity={"a": 0.5, "b": value}).init(params)


def test_a_leaf_whose_sparsity_is_below_the_initial_one_is_an_error_that_names_it():
  params = {"a": jnp.ones((2, 3)), "b": jnp.ones((4, 4)), "bias": jnp.ones(4)}
  with pytest.raises(ValueError, match=r"the sparsity of 'b', got 0\.3 and 0\.2"):
    progressive(sparsity={"a": 0.5, "b": 0.2}, initial=0.3).init(params)
  # What is never pruned has no ramp.
  progressive(sparsity={"a": 0.5, "b": 0.3, "bias": 0.0}, initial=0.3).init(params)


@pytest.mark.parametrize(
  "function,argument,value",
  [
    (progressive, "every", 0),
    (progressive, "every", -3),
    (progressive, "every", 2.5),
    (progressive, "steps", 0),
    (progressive, "steps", -5),
    (progressive, "steps", 10.5),
    (progressive, "begin", -1),
    (progressive, "begin", 0.5),
    (gradual, "every", 0),
    (gradual, "every", -3),
    (gradual, "every", 1.5),
    (gradual, "begin", -1),
    (gradual, "begin", 2.5),
    (gradual, "end", 7.5),
    (gradual, "end", -4),
    (one_shot, "at", -1),
    (one_shot, "at", 1.5),
  ],
)
def test_a_call_number_that_makes_no_sense_is_an_error_that_shows_it(function, argument, value):
  with pytest.raises(ValueError, match=re.escape(str(value))) as caught:
    function(**{argument: value})
  assert argument in str(caught.value)


@pytest.mark.parametrize("begin,end", [(8, 8), (9, 8)])
def test_a_begin_that_is_not_before_end_is_an_error_that_shows_both(begin, end):
  with pytest.raises(ValueError, match=str(begin)) as caught:
    gradual(begin=begin, end=end)
  assert str(end) in str(caught.value)


@pytest.mark.parametrize("function", [progressive, gradual, one_shot, from_scores])
def test_an_unknown_allocation_is_an_error_that_names_the_known_ones(function):
  with pytest.raises(ValueError, match="zzz") as caught:
    function(allocation="zzz")
  for known in ("global", "uniform", "er", "erk"):
    assert re.search(rf"\b{known}\b", str(caught.value))


@pytest.mark.parametrize(
  "typed,meant", [("gobal", "global"), ("unifrom", "uniform"), ("erkk", "erk")]
)
def test_a_mistyped_allocation_is_an_error_with_a_suggestion(typed, meant):
  with pytest.raises(ValueError, match=typed) as caught:
    progressive(allocation=typed)
  # Once among the known ones, once as the suggestion.
  assert len(re.findall(rf"\b{meant}\b", str(caught.value))) == 2


@pytest.mark.parametrize("function", [progressive, gradual, one_shot])
def test_a_random_criterion_without_key_is_an_error(function):
  with pytest.raises(ValueError, match="key"):
    function(criterion=sparsejax.criteria.random)


@pytest.mark.parametrize(
  "tree,named",
  [
    ({"a": 0.5}, "b"),
    ({"a": 0.5, "b": 0.5, "unforeseen": 0.5}, "unforeseen"),
    ({"a": 0.5, "b": {"nested": 0.5}}, "b"),
    ({"a": 0.5, "b": 0.5, "bias": 0.5}, "bias"),
  ],
)
def test_a_tree_of_sparsities_that_does_not_match_is_an_error_that_names_the_path(tree, named):
  params = {"a": jnp.ones((2, 3)), "b": jnp.ones((4, 4)), "bias": jnp.ones(4)}
  with pytest.raises(ValueError, match=rf"\b{named}\b"):
    progressive(sparsity=tree).init(params)
  with pytest.raises(ValueError, match=rf"\b{named}\b"):
    sparsejax.masks_from_scores(params, tree)
