"""Whole trainings by other people's code, reproduced; `oracles/README.md` says whose.

Each is built from public options. Where an original has a quirk (see the comments), the test asks
for what the original does: the numbers of weights that it keeps, say.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_oracles import load

import sparsejax
from sparsejax import Rule, criteria, rules

EVERY, STEPS = 5, 40
POOL = 288  # Weights of the three kernels.
ACTIVE_AT = {  # GraNet's K, weights that its cubic asks for after 5, 10 and 15 steps.
  "granet_s2s": (77, 43, 30),
  "granet_d2s": (138, 61, 32),
  "gmp": (138, 61, 32),
  "granet_imagenet_s2s": (94, 68, 58),
}
INITIAL = {"granet_s2s": 0.5, "granet_d2s": 0.0, "gmp": 0.0, "granet_imagenet_s2s": 0.5}
cosine = optax.cosine_decay_schedule(0.5, STEPS, alpha=0.01)


@functools.cache
def shared():
  return load("trajectories_shared.npz")


def torch_sgd(nesterov=True):
  return optax.chain(
    optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9, nesterov=nesterov)
  )


def by_name(arrays, prefix, suffix=""):
  """The arrays `prefix + name + suffix` by name."""
  return {
    key.removeprefix(prefix).removesuffix(suffix): array
    for key, array in arrays.items()
    if key.startswith(prefix) and key.endswith(suffix)
  }


def initial_masks(arrays, run):
  kernels = by_name(arrays, f"{run}/mask/", "/init")
  return {
    name: kernels[name].astype(bool) if name in kernels else np.ones(weight.shape, bool)
    for name, weight in by_name(shared(), "W0/").items()
  }


def train(optimizer, masks, weights, gradients):
  """Weights, masks and first moments after each call, from masked weights and given gradients."""
  params = jax.tree.map(jnp.where, masks, weights, jax.tree.map(np.zeros_like, weights))

  def call(carry, gradients):
    params, state = carry
    updates, state = optimizer.update(gradients, state, params)
    params = optax.apply_updates(params, updates)
    trace = optax.tree.get(state.inner, "trace")
    return (params, state), (params, sparsejax.get_masks(state, params), trace)

  run = jax.jit(lambda params: jax.lax.scan(call, (params, optimizer.init(params)), gradients)[1])
  return jax.tree.map(np.asarray, run(params))


def assert_is_trajectory(arrays, run, optimizer):
  """Masks identical at all steps, weights and momentum to 1e-5 where they are stored."""
  masks = initial_masks(arrays, run)
  params, found, trace = train(
    optimizer, masks, by_name(shared(), "W0/"), by_name(shared(), "grads/")
  )
  for name, steps in by_name(arrays, f"{run}/mask/", "/steps").items():
    np.testing.assert_array_equal(found[name], steps.astype(bool), name)
  for name in params:
    for what, values in (("w", params), ("momentum_buffer", trace)):
      for step, stored in by_name(arrays, f"{run}/{what}/{name}/t").items():
        if int(step):
          np.testing.assert_allclose(values[name][int(step) - 1], stored, atol=1e-5, rtol=1e-5)


# GraNet


@pytest.mark.parametrize("run", ACTIVE_AT)
def test_granet_is_that_of_its_authors(run):
  arrays = load("trajectories_granet.npz")
  on_imagenet = "imagenet" in run
  # The threshold on CIFAR is strict, so that one weight less is left than was asked for; and the
  # cubic stops one update before its end.
  kept = [k - (not on_imagenet) for k in ACTIVE_AT[run]]
  sparsity, initial = 1 - kept[-1] / POOL, INITIAL[run]
  way = jnp.array([(1 - k / POOL - initial) / (sparsity - initial) for k in kept])
  optimizer = sparsejax.dynamic_sparse_training(
    torch_sgd(nesterov=not on_imagenet),
    sparsity=sparsity,
    initial=initial,
    ramp=lambda count: jnp.where(count < 15, way[(count // EVERY) - 1], 1.0),
    masks=initial_masks(arrays, run),
    fraction=0.0 if run == "gmp" else cosine,
    every=EVERY,
    begin=EVERY,
    rounding="up",
    after_step=True,
  )
  assert_is_trajectory(arrays, run, optimizer)


# Fantastic Weights: its optimizer sees the dense gradient and keeps all momentum.


def fantastic(arrays, run, drop, **options):
  options = (
    dict(
      grow=lambda leaf: jnp.abs(leaf.gradient) + 1e-6,
      fraction=cosine,
      begin=EVERY,
      after_step=True,
    )
    | options
  )
  return sparsejax.dynamic_sparse_training(
    torch_sgd(),
    sparsity=None,
    masks=initial_masks(arrays, run),
    drop=drop,
    every=EVERY,
    rounding="up",
    moments="kept",
    **options,
  )


def of_each_call(uniform, index):
  """A criterion that takes its scores from arrays, at an index that follows from the call."""

  def score(leaf, calls):
    (of_leaf,) = (u for u in uniform.values() if u.shape[1:] == leaf.weight.shape)
    return jnp.asarray(of_leaf)[index(calls)]

  return criteria.Criterion(
    init=lambda weight: jnp.int32(0),
    update=lambda leaf, calls: calls + 1,
    score=score,
    forget=False,
  )


def test_dropping_by_magnitude_after_the_step_is_that_of_fantastic_weights():
  arrays, run = load("trajectories_fw.npz"), "fw_magnitude_gradient"
  assert_is_trajectory(arrays, run, fantastic(arrays, run, criteria.magnitude))


def test_random_growth_of_a_random_number_is_that_of_fantastic_weights():
  arrays, run = load("trajectories_fw.npz"), "fw_magnitude_random"
  uniform = {name: 1 - u for name, u in by_name(shared(), "uniform/").items()}
  grow = of_each_call(uniform, lambda calls: calls // EVERY - 1)
  # In the place of the library's own random numbers.
  stage = rules.drop_and_grow(criteria.magnitude, grow, cosine, rounding="up", exact_growth=False)
  assert_is_trajectory(arrays, run, by_a_rule(arrays, run, rules.from_criteria(stage, grow=grow)))


def by_a_rule(arrays, run, rule):
  masks = initial_masks(arrays, run)
  return sparsejax.masked_updates(
    rule,
    due=lambda count: count % EVERY == 0,
    inner=torch_sgd(),
    after_step=True,
    moments="kept",
    initial_masks=lambda params, pool: jax.tree_util.tree_map_with_path(
      lambda path, _: masks[path[0].key], pool
    ),
  )


@pytest.mark.parametrize(
  ("run", "drop"),
  [
    ("fw_mest_gradient", criteria.mest()),
    ("fw_snip_gradient", lambda leaf: criteria.snip(leaf) + 1e-5),
  ],
)
def test_dropping_before_the_step_is_that_of_fantastic_weights(run, drop):
  arrays = load("trajectories_fw.npz")
  optimizer = fantastic(
    arrays,
    run,
    drop,
    # The fifth call has seen four steps, but its fraction is that of the fifth.
    begin=EVERY - 1,
    fraction=lambda count: cosine(count + 1),
    after_step=False,
  )
  assert_is_trajectory(arrays, run, optimizer)


def test_dropping_of_each_sign_is_that_of_fantastic_weights():
  arrays, run = load("trajectories_fw.npz"), "fw_set_fixed_gradient"

  def stage(call):
    # Half of each sign, rounded up: one more than the criterion drops where their number is odd.
    rate = cosine(call.count)
    active = jax.tree.map(jnp.sum, call.masks)
    half = jax.tree.map(lambda a: jnp.ceil(jnp.ceil(rate * a) / 2).astype(jnp.int32), active)
    size = jax.tree.map(jnp.abs, call.params)
    kept = call.masks
    for sign in (1, -1):
      side = jax.tree.map(lambda m, w, s=sign: m & (s * w > 0), call.masks, call.params)
      dropped = sparsejax.select_smallest(size, half, among=side)
      kept = jax.tree.map(lambda k, d: k & ~d, kept, dropped)
    number = jax.tree.map(lambda a, k: a - jnp.sum(k), active, kept)
    score = jax.tree.map(lambda g: -(jnp.abs(g) + 1e-6), call.grad)
    grown = sparsejax.select_smallest(score, number, among=jax.tree.map(jnp.logical_not, kept))
    return jax.tree.map(jnp.logical_or, kept, grown)

  assert_is_trajectory(arrays, run, by_a_rule(arrays, run, Rule((stage,))))


# RigL's code base


def rigl_code_base(run, calls, **options):
  """Compares with a run of RigL's code base, which leaves dropped weights in their variable."""
  arrays = load("trajectories_rigl.npz")
  weights, masks = by_name(arrays, "W0/"), by_name(arrays, "mask0/")
  masks = jax.tree.map(lambda m: m.astype(bool), masks)
  optimizer = sparsejax.dynamic_sparse_training(
    optax.sgd(0.1, momentum=0.9, nesterov=True),
    sparsity=None,
    masks=masks,
    rounding="down",
    moments="reset",
    **options,
  )
  params, found, trace = train(optimizer, masks, weights, by_name(arrays, "grads/"))
  for name in weights:
    stored = arrays[f"{run}/mask/{name}"].astype(bool)
    np.testing.assert_array_equal(found[name], stored, name)
    active = stored[calls]
    np.testing.assert_allclose(
      params[name][calls], arrays[f"{run}/w/{name}"] * active, atol=1e-5, rtol=1e-5
    )
    np.testing.assert_allclose(
      trace[name][calls] * active, arrays[f"{run}/momentum/{name}"] * active, atol=1e-5, rtol=1e-5
    )


CALLS = [0, 1, 4, 5, 6, 7, 11, 12, 13, 17, 18, 23]
rigl_cosine = optax.cosine_decay_schedule(0.3, 18)


def test_rigl_is_that_of_its_authors():
  # The original does not count the calls at which masks change.
  rigl_code_base(
    "rigl_cosine",
    CALLS,
    fraction=lambda call: rigl_cosine(call - call // 6),
    every=6,
    end=18,
    skip_step=True,
  )


def test_set_is_that_of_rigls_code_base():
  uniform = by_name(load("trajectories_rigl.npz"), "uniform/")
  rigl_code_base(
    "set_constant",
    CALLS,
    grow=of_each_call(uniform, lambda calls: calls - 1),
    fraction=0.3,
    every=EVERY,
    begin=1,
    end=16,
    after_step=True,
  )


def test_growth_by_an_average_gradient_is_that_of_rigls_code_base():
  average = criteria.Criterion(
    init=jnp.zeros_like,
    update=lambda leaf, mean: 0.9 * mean + 0.1 * leaf.gradient,
    score=lambda leaf, mean: jnp.abs(mean),
    forget=False,
  )
  rigl_code_base(
    "snfs_simple",
    CALLS,
    grow=average,
    fraction=rigl_cosine,
    every=EVERY,
    begin=1,
    end=16,
    after_step=True,
  )
