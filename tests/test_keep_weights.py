"""Gradual pruning in its original form: pruned weights keep their values and may return."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax

RAMP = optax.polynomial_schedule(0.0, 0.75, power=3, transition_steps=12)


def problem():
  rng = np.random.default_rng(0)
  params = {"kernel": rng.standard_normal((16, 8)), "bias": rng.standard_normal(8)}
  return (
    jax.tree.map(lambda p: p.astype(np.float32), params),
    rng.standard_normal((64, 16)).astype(np.float32),
    rng.standard_normal((64, 8)).astype(np.float32),
  )


def sparse_loss(params, state, x, y):
  weights = sparsejax.apply_masks(params, sparsejax.get_masks(state, params))
  return jnp.mean((x @ weights["kernel"] + weights["bias"] - y) ** 2)


def reference(steps, *, learning_rate, momentum, decay, every, end):
  """Zhu & Gupta's masked layers in NumPy: the mask multiplies the weights in the forward pass."""
  params, x, y = problem()
  kernel, bias = (params[name].astype(np.float64) for name in ("kernel", "bias"))
  mask = np.ones(kernel.shape, bool)
  moments, masks = [np.zeros_like(kernel), np.zeros_like(bias)], []
  for call in range(steps):
    error = 2 * (x @ (kernel * mask) + bias - y) / y.size
    gradients = [mask * (x.T @ error) + decay * kernel, error.sum(0) + decay * bias]
    if call <= end and call % every == 0:
      sparsity = np.float32(RAMP(call))
      kept = round(float(1 - np.float64(sparsity)) * kernel.size)
      order = np.argsort(-np.abs(kernel.ravel()), kind="stable")
      mask = np.zeros(kernel.size, bool)
      mask[order[:kept]] = True
      mask = mask.reshape(kernel.shape)
    moments = [momentum * m + g for m, g in zip(moments, gradients, strict=True)]
    kernel, bias = kernel - learning_rate * moments[0], bias - learning_rate * moments[1]
    masks.append(mask)
  return kernel, bias, masks


def test_the_original_form_is_that_of_masked_layers_step_by_step():
  options = dict(learning_rate=0.3, momentum=0.9, decay=0.02)
  kernel, bias, masks = reference(30, **options, every=3, end=24)
  params, x, y = problem()
  tx = optax.chain(
    optax.add_decayed_weights(options["decay"]),
    optax.sgd(options["learning_rate"], momentum=options["momentum"]),
    sparsejax.gradual_pruning(RAMP, every=3, end=24, keep_weights=True),
  )

  @jax.jit
  def step(params, state):
    updates, state = tx.update(jax.grad(sparse_loss)(params, state, x, y), state, params)
    return optax.apply_updates(params, updates), state

  state, returned = tx.init(params), 0
  for expected in masks:
    before = np.asarray(sparsejax.get_masks(state, params)["kernel"])
    params, state = step(params, state)
    mask = np.asarray(sparsejax.get_masks(state, params)["kernel"])
    np.testing.assert_array_equal(mask, expected)
    returned += np.sum(mask & ~before)
  np.testing.assert_allclose(params["kernel"], kernel, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(params["bias"], bias, rtol=1e-4, atol=1e-6)
  assert returned > 0  # Or else this would test nothing of it.
  assert np.all(params["kernel"] != 0)


def test_a_falling_schedule_brings_weights_back():
  params = {"kernel": jnp.arange(1.0, 11.0).reshape(2, 5)}
  tx = sparsejax.gradual_pruning(optax.linear_schedule(0.8, 0.2, 3), every=1, keep_weights=True)
  state, counts = tx.init(params), []
  for _ in range(4):
    updates, state = tx.update({"kernel": jnp.zeros((2, 5))}, state, params)
    params = optax.apply_updates(params, updates)
    counts.append(int(sparsejax.get_masks(state, params)["kernel"].sum()))
  assert counts == [2, 4, 6, 8]
  np.testing.assert_array_equal(params["kernel"], np.arange(1.0, 11.0).reshape(2, 5))


def test_updates_pass_as_they_are():
  params = {"kernel": jnp.ones((2, 5)), "bias": jnp.ones(5)}
  updates = jax.tree.map(lambda p: 3 * p, params)
  tx = sparsejax.masked_updates(
    lambda call: jax.tree.map(jnp.zeros_like, call.masks), due=lambda count: True, keep_weights=True
  )
  found, state = tx.update(updates, tx.init(params), params)
  assert not np.any(state.masks["kernel"])
  for name, update in updates.items():
    np.testing.assert_array_equal(found[name], update)


def tx(**changes):
  options = dict(schedule=optax.constant_schedule(0.5), every=2, keep_weights=True) | changes
  return optax.chain(optax.sgd(0.1, momentum=0.9), sparsejax.gradual_pruning(**options))


def test_lanes_that_are_due_at_different_calls_are_those_of_single_runs():
  kernels = jax.random.normal(jax.random.key(0), (3, 6, 7))
  pruning = tx()

  def state_of(kernel, calls):
    state = pruning.init({"kernel": kernel})
    return optax.tree.set(state, count=calls)

  def masks(kernel, calls):
    params, state = {"kernel": kernel}, state_of(kernel, calls)
    return pruning.update(params, state, params)[1][1].masks["kernel"]

  calls = jnp.arange(3)
  together = jax.jit(jax.vmap(masks))(kernels, calls)
  assert [int((~mask).sum()) for mask in together] == [21, 0, 21]
  for i in range(3):
    np.testing.assert_array_equal(together[i], masks(kernels[i], calls[i]))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_updates_and_state_keep_their_types_in_a_loop(dtype):
  params = {"kernel": jax.random.normal(jax.random.key(0), (6, 7), dtype)}

  def call(carry, _):
    params, state = carry
    updates, state = tx().update(jax.tree.map(jnp.ones_like, params), state, params)
    return (optax.apply_updates(params, updates), state), None

  (after, state), _ = jax.lax.scan(call, (params, tx().init(params)), length=5)
  assert after["kernel"].dtype == dtype
  assert int((~state[1].masks["kernel"]).sum()) == 21


def test_accumulated_gradients_give_the_masks_of_whole_ones():
  params = {"kernel": jax.random.normal(jax.random.key(0), (6, 7))}
  gradient = {"kernel": jnp.ones((6, 7))}
  whole, steps = tx(), optax.MultiSteps(tx(), 3)
  state, accumulated = whole.init(params), steps.init(params)
  expected, found = params, params
  for _ in range(4):
    updates, state = whole.update(gradient, state, expected)
    expected = optax.apply_updates(expected, updates)
    for _ in range(3):
      updates, accumulated = steps.update(gradient, accumulated, found)
      found = optax.apply_updates(found, updates)
  np.testing.assert_allclose(found["kernel"], expected["kernel"], rtol=1e-6)
  masks = [sparsejax.get_masks(s, params)["kernel"] for s in (state, accumulated)]
  np.testing.assert_array_equal(*masks)


def test_masks_on_eight_devices_are_those_on_one():
  mesh = jax.make_mesh((8,), ("x",))
  kernel = jax.random.normal(jax.random.key(0), (16, 24))
  spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
  masks = []
  for params in ({"kernel": kernel}, {"kernel": jax.device_put(kernel, spec)}):
    _, state = jax.jit(tx().update)(params, tx().init(params), params)
    masks.append(state[1].masks["kernel"])
  np.testing.assert_array_equal(*masks)
  assert masks[1].sharding.is_equivalent_to(spec, 2)


def test_a_running_average_is_of_pruned_weights_too_so_that_they_return():
  pruning = sparsejax.gradual_pruning(
    optax.constant_schedule(0.5),
    every=1,
    keep_weights=True,
    criterion=sparsejax.criteria.running_magnitude(0.5),
  )
  before, after = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[100.0, 200.0], [3.0, 4.0]])
  state = pruning.init({"kernel": before})
  for kernel, rows in ((before, [False, True]), (after, [True, False])):
    _, state = pruning.update({"kernel": kernel}, state, {"kernel": kernel})
    np.testing.assert_array_equal(state.masks["kernel"][:, 0], rows)
