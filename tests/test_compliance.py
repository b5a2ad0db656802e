"""What every transformation has to go through: the cases are those of tests/cases.py."""

import functools
import re

import cases
import compiling
import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sparsejax

DTYPES = {"f16": jnp.float16, "bf16": jnp.bfloat16, "f32": jnp.float32}


def each(table):
  return pytest.mark.parametrize("case", table, ids=lambda case: case.name)


every_case = each(cases.CASES)
every_traced_case = each(cases.TRACED)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def predict(params, x):
  x = lax.conv_general_dilated(
    x, params["conv"]["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  x = jnp.tanh(x + params["conv"]["bias"]).mean((1, 2))
  x = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
  return x @ params["out"]["kernel"] + params["out"]["bias"]


def make_data(dtype=jnp.float32):
  generator = np.random.default_rng(1)
  x = generator.normal(size=(32, 4, 4, 8))
  return jnp.asarray(x, dtype), jnp.asarray(np.tanh(x.mean((1, 2)) * 4), dtype)


def loss_of(params, batch):
  x, y = batch
  return jnp.mean(jnp.square(predict(params, x) - y).astype(jnp.float32))


def train(optimizer, params, *, calls=cases.CALLS, gradient_dtype=None, spoiled=-1):
  """Losses, parameters and masks after each call, trained inside one jitted `lax.scan`."""
  state = optimizer.init(params)
  # A training may start sparse.
  params = sparsejax.apply_masks(params, sparsejax.get_masks(state, params))
  batch = make_data(jax.tree.leaves(params)[0].dtype)

  def call(carry, number):
    params, state = carry
    loss, gradients = jax.value_and_grad(loss_of)(params, batch)
    gradients = jax.tree.map(lambda g: jnp.where(number == spoiled, jnp.nan, g), gradients)
    gradients = optax.tree.cast(gradients, gradient_dtype)
    updates, state = optimizer.update(gradients, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), (loss, params, sparsejax.get_masks(state, params))

  @jax.jit
  def run(params, state):
    return lax.scan(call, (params, state), jnp.arange(calls))

  _, history = run(params, state)
  return history


def make_replay(calls=cases.CALLS, seed=0, shapes=None):
  """Parameters and updates for each call, which depend on nothing that is under test."""
  generator = np.random.default_rng(seed)
  params = cases.make_params() if shapes is None else shapes

  def draw(leaf):
    return jnp.asarray(generator.normal(size=(calls, *leaf.shape)), leaf.dtype)

  return jax.tree.map(draw, params), jax.tree.map(draw, params)


def replay(optimizer, weights, updates, **extra_args):
  """Masks and emitted updates of each call where the parameters are given, not trained."""

  def call(state, given):
    params, updates = given
    emitted, state = optimizer.update(updates, state, params, **extra_args)
    return state, (sparsejax.get_masks(state, params), emitted)

  state = optimizer.init(jax.tree.map(lambda leaf: leaf[0], weights))
  return lax.scan(call, state, (weights, updates))[1]


jitted_replay = jax.jit(replay, static_argnums=0)
replay_as_users = jax.jit(replay, static_argnums=0, compiler_options=compiling.AS_USERS)


def last(history):
  return jax.tree.map(lambda leaf: leaf[-1], history)


def assert_exact_zeros(params, masks):
  """All bits of every pruned weight are zero: not small, not -0, not a denormal."""
  for leaf, mask in zip(jax.tree.leaves(params), jax.tree.leaves(masks), strict=True):
    leaf, mask = np.asarray(leaf), np.asarray(mask)
    pruned = leaf[~mask]
    assert not pruned.view(f"u{pruned.itemsize}").any()


def assert_trees_equal(left, right):
  """Bitwise, dtypes and structure included."""
  assert jax.tree.structure(left) == jax.tree.structure(right)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True
  ):
    assert a.dtype == b.dtype, path
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def signature(tree):
  """Everything of a tree that jit looks at, besides the values."""
  leaves, structure = jax.tree.flatten(tree)
  return structure, [(leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)) for leaf in leaves]


# Training


@each(cases.CASES + cases.VARIANTS)
def test_training_in_a_scan_ends_at_the_sparsity_asked_with_exact_zeros_after_every_step(case):
  params = cases.make_params()
  losses, history, masks = train(case.optimizer(params), params)
  assert np.isfinite(losses).all()
  assert losses[-1] < losses[0]
  assert_exact_zeros(history, masks)
  case.check(cases.kernels(last(masks)))


@each([case for case in cases.CASES if case.link is not sparsejax.rigl])  # It skips steps.
@pytest.mark.parametrize("layer", ["conv", "hidden", "out"])
def test_biases_are_never_pruned(case, layer):
  params = cases.make_params()
  masks, emitted = _given_masks(case)
  assert np.asarray(masks[layer]["bias"]).all()
  np.testing.assert_array_equal(emitted[layer]["bias"], make_replay()[1][layer]["bias"])
  assert masks[layer]["bias"].shape[1:] == params[layer]["bias"].shape


@functools.cache
def _given_masks(case):
  return jitted_replay(case.build(cases.make_params()), *make_replay())


@each(cases.LINKS)
def test_kept_weights_get_their_updates_bit_for_bit(case):
  masks, emitted = _given_masks(case)
  weights, updates = make_replay()
  expected = jax.tree.map(lambda m, p, u: np.where(m, u, -p), masks, weights, updates)
  assert_trees_equal(emitted, expected)


@each(cases.LINKS)
def test_pruned_weights_stay_pruned(case):
  for mask in jax.tree.leaves(_given_masks(case)[0]):
    assert not (np.asarray(mask[1:]) & ~np.asarray(mask[:-1])).any()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=["f16", "bf16"])
@each(cases.named("progressive"))
def test_training_in_half_precision_has_exact_zeros_after_every_step(case, dtype):
  params = cases.make_params(dtype=dtype)
  losses, history, masks = train(case.optimizer(params), params)
  assert losses[-1] < losses[0]
  assert {leaf.dtype for leaf in jax.tree.leaves(history)} == {jnp.dtype(dtype)}
  assert_exact_zeros(history, masks)
  case.check(cases.kernels(last(masks)))


@functools.cache
def _apply_mask(dtype, update_dtype):
  def emit(weights, updates, mask):
    link = sparsejax.fixed_masks({"kernel": mask})
    params = {"kernel": weights}
    emitted, _ = link.update({"kernel": updates}, link.init(params), params)
    return emitted["kernel"], optax.apply_updates(params, emitted)["kernel"]

  return jax.jit(emit)


@pytest.mark.parametrize("update_dtype", DTYPES.values(), ids=DTYPES.keys())
@every_dtype
@hypothesis.settings(max_examples=25)
@hypothesis.given(bits=hnp.arrays(np.uint32, (2, 3, 4)), mask=hnp.arrays(bool, (3, 4)))
def test_any_weight_plus_its_update_is_zero_where_masked(dtype, update_dtype, bits, mask):
  # Any finite weight, denormals and the largest included, against any update, NaN included.
  weights = bits[0].astype(f"u{jnp.dtype(dtype).itemsize}").view(dtype)
  with np.errstate(over="ignore", invalid="ignore"):  # Signalling NaNs, and casts to infinity.
    weights = np.where(np.isfinite(weights), weights, np.ones_like(weights))
    updates = bits[1].view(np.float32).astype(update_dtype)
  emitted, after = _apply_mask(dtype, update_dtype)(weights, updates, mask)
  assert emitted.dtype == jnp.promote_types(dtype, update_dtype)
  assert after.dtype == dtype
  assert_exact_zeros(after, mask)
  np.testing.assert_array_equal(
    np.asarray(emitted)[mask].astype(np.float32), updates[mask].astype(np.float32)
  )


# Calling conventions


@each(cases.named("progressive", "dynamic"))
def test_masks_and_updates_do_not_depend_on_how_much_the_compiler_optimizes(case):
  link = case.build(cases.make_params())
  assert_trees_equal(replay_as_users(link, *make_replay()), _given_masks(case))


@every_case
def test_unexpected_extra_arguments_are_accepted_and_change_nothing(case):
  params = cases.make_params()
  link = case.build(params)
  extra = dict(value=jnp.float32(1.0), value_fn=loss_of, unexpected="text")

  def program(**extra):
    def call(params):
      return link.update(params, link.init(params), params, **extra)

    # That it is the same program says more than that it has the same results, and is not compiled.
    return jax.jit(call).lower(params).as_text()

  assert program() == program(**extra)


@every_case
def test_a_step_can_be_traced_where_types_are_never_promoted(case):
  params = cases.make_params()
  # The schedules of optax are promoted.
  changes = {"fraction": 0.3} if case.name in ("dynamic", "rigl") else {}
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  mixed = params | {next(iter(params)): half[next(iter(params))]}
  with jax.numpy_dtype_promotion("strict"):
    for weights in (params, mixed):
      link = case.build(weights, **changes)
      jax.jit(link.update).lower(weights, link.init(weights), weights)


@every_case
def test_runs_can_be_traced_side_by_side_in_a_shard_map(case):
  params = cases.make_params()
  link = case.build(params)
  lanes = jax.tree.map(lambda x: jnp.stack([x] * 8), (params, link.init(params)))
  step = jax.vmap(lambda params, state: link.update(params, state, params))
  mesh = jax.make_mesh((8,), ("run",), axis_types=(AxisType.Auto,))
  jax.jit(jax.shard_map(step, mesh=mesh, in_specs=P("run"), out_specs=P("run"))).lower(*lanes)


@functools.cache
def _donating_step(case):
  optimizer = case.optimizer(cases.make_params())
  traces = []

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state, gradients):
    traces.append(None)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  return optimizer, step, traces


@every_case
def test_the_second_call_does_not_recompile(case):
  optimizer, step, traces = _donating_step(case)
  params, gradients = cases.make_params(), cases.make_params(1)
  state = optimizer.init(params)
  for _ in range(3):
    params, state = step(params, state, gradients)
  assert len(traces) == 1


@pytest.fixture
def compilations():
  """A list that grows by one with each compilation."""
  found = []

  def listen(event, seconds, **_):
    if event.endswith("backend_compile_duration"):
      found.append(seconds)

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield found
  jax.monitoring.unregister_event_duration_listener(listen)


@each([case for case in cases.CASES if case.name in ("progressive", "granet", "random", "set")])
def test_outside_of_jit_masks_and_updates_are_the_same_and_nothing_is_compiled_twice(
  case, compilations
):
  link = case.build(cases.make_params())
  weights, updates = make_replay()

  def run():
    state = link.init(jax.tree.map(lambda leaf: leaf[0], weights))
    for call in range(cases.CALLS):
      params, given = jax.tree.map(lambda leaf, call=call: leaf[call], (weights, updates))
      emitted, state = link.update(given, state, params)
      yield sparsejax.get_masks(state, params), emitted

  found = list(run())
  assert_trees_equal(jax.tree.map(lambda *leaves: jnp.stack(leaves), *found), _given_masks(case))
  compilations.clear()
  list(run())
  assert not compilations


def test_functions_of_masks_compile_nothing_twice(compilations):
  scores, others = (jax.tree.map(jnp.abs, cases.make_params(seed)) for seed in (0, 1))

  def run():
    masks = sparsejax.masks_from_scores(scores, 0.7, allocation="erk")
    sparsejax.sparsity(masks)
    sparsejax.overlap(masks, sparsejax.masks_from_scores(others, 0.7))
    sparsejax.apply_masks(scores, masks)
    return str(sparsejax.summary(scores, masks))

  first = run()
  compilations.clear()
  assert run() == first
  assert not compilations


@every_case
@pytest.mark.filterwarnings("error:Some donated buffers were not usable")
def test_parameters_and_state_can_be_donated(case):
  optimizer, step, _ = _donating_step(case)
  params, gradients = cases.make_params(), cases.make_params(1)
  state = optimizer.init(params)
  for _ in range(2):
    before = jax.tree.leaves((params, state))
    params, state = step(params, state, gradients)
    assert all(leaf.is_deleted() for leaf in before)
  assert np.isfinite(cases.kernels(params)["conv/kernel"]).all()


@every_case
def test_donating_the_state_leaves_the_parameters_and_arguments_alive(case):
  params = cases.make_params()
  arguments = case.arguments(params)
  link = case.link(**arguments)
  consume = jax.jit(lambda state: jax.tree.map(jnp.copy, state), donate_argnums=0)
  state = link.init(params)
  consume(state)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
  given = [x for x in jax.tree.leaves((params, arguments)) if isinstance(x, jax.Array)]
  assert not any(leaf.is_deleted() for leaf in given)
  assert_trees_equal(consume(link.init(params)).masks, case.build(params).init(params).masks)


@every_case
@every_dtype
def test_dtypes_and_structure_of_the_state_are_stable_through_a_cond(case, dtype):
  params = cases.make_params(dtype=dtype)
  optimizer = case.optimizer(params)

  def maybe(flag, params, state):
    def update():
      return optimizer.update(params, state, params)

    # Tracing checks that both branches agree, weak types included.
    updates, state = lax.cond(flag, update, lambda: (params, state))
    return updates, state

  state = optimizer.init(params)
  updates, after = jax.eval_shape(maybe, True, params, state)
  assert signature(after) == signature(state)
  assert signature(updates) == signature(params)


@every_case
def test_the_state_holds_an_int32_count_and_masks_of_prunable_leaves_only(case):
  params = cases.make_params()
  state = case.build(params).init(params)
  assert isinstance(state, sparsejax.MaskedUpdatesState)
  assert (state.count.shape, state.count.dtype, int(state.count)) == ((), jnp.int32, 0)
  for layer in params:
    if case in cases.SELECTING:
      assert state.masks[layer]["bias"] == optax.MaskedNode()
    assert state.masks[layer]["kernel"].shape == params[layer]["kernel"].shape
    assert state.masks[layer]["kernel"].dtype == jnp.bool_
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))


@every_case
def test_init_works_on_shapes_alone(case):
  params = cases.make_params()
  shapes = jax.eval_shape(lambda: params)
  link = case.build(params)
  expected = signature(link.init(params))
  assert signature(link.init(shapes)) == expected
  assert signature(jax.eval_shape(link.init, params)) == expected
  assert signature(jax.eval_shape(link.init, shapes)) == expected


@every_case
def test_map_params_finds_the_masks(case):
  params = cases.make_params()
  for transformation in (case.build(params), case.optimizer(params)):
    state = transformation.init(params)
    labels = optax.tree.map_params(
      transformation, lambda _: "params", state, transform_non_params=lambda _: "other"
    )
    for leaf, label in zip(jax.tree.leaves(state), jax.tree.leaves(labels), strict=True):
      is_like_params = leaf.dtype == jnp.bool_ or jnp.issubdtype(leaf.dtype, jnp.floating)
      assert label == ("params" if is_like_params else "other")
    assert jax.tree.leaves(labels).count("params") >= 3


@every_case
def test_update_without_params_says_that_it_needs_them(case):
  params = cases.make_params()
  link = case.build(params)
  with pytest.raises(ValueError, match="params"):
    link.update(params, link.init(params))


@every_case
def test_an_empty_tree_passes(case):
  link = case.build({})
  state = link.init({})
  updates, after = link.update({}, state, {})
  assert updates == {}
  assert signature(after) == signature(state)
  assert int(after.count) == 1


@each(cases.SELECTING)
def test_a_tree_with_nothing_to_prune_is_an_error(case):
  params = {"scale": jnp.ones(3), "offset": jnp.zeros(3)}
  with pytest.raises(ValueError, match="prunable"):
    case.build(params).init(params)


@every_case
@pytest.mark.parametrize("change", ["surplus", "missing", "shape"])
def test_params_of_another_structure_are_an_error_that_names_the_path(case, change):
  params = cases.make_params()
  link = case.build(params)
  other = dict(params)
  if change == "surplus":
    other["unforeseen"] = {"kernel": jnp.ones((2, 2))}
  elif change == "missing":
    del other["hidden"]
  else:
    other["hidden"] = params["hidden"] | {"kernel": params["hidden"]["kernel"][1:]}
  named = "unforeseen" if change == "surplus" else "hidden"
  with pytest.raises(ValueError, match=f"{named}/"):
    link.update(other, link.init(params), other)


@each(cases.named("per_leaf", "fixed"))
@pytest.mark.parametrize("change", ["surplus", "missing"])
def test_an_argument_of_another_structure_is_an_error_that_names_the_path(case, change):
  params = cases.make_params()
  other = dict(params)
  if change == "surplus":
    other["unforeseen"] = {"kernel": jnp.ones((2, 2))}
  else:
    del other["hidden"]
  link = case.build(other)
  named = "unforeseen" if change == "surplus" else "hidden"
  with pytest.raises(ValueError, match=f"{named}/"):
    link.init(params)


def test_a_criterion_that_asks_for_the_gradient_gets_it_from_grad_and_raises_without_it():
  params, updates, gradients = (cases.make_params(seed) for seed in range(3))
  link = sparsejax.one_shot_pruning(
    0.5, at=0, criterion=lambda leaf: jnp.abs(leaf.weight * leaf.gradient)
  )
  state = link.init(params)
  with pytest.raises(ValueError, match="grad"):
    link.update(updates, state, params)
  _, state = link.update(updates, state, params, grad=gradients)
  masks = cases.kernels(sparsejax.get_masks(state, params))
  w, g = cases.kernels(params), cases.kernels(gradients)
  score = {name: np.abs(w[name] * g[name]) for name in w}
  threshold = np.median(np.concatenate([s.ravel() for s in score.values()]))
  for name, mask in masks.items():
    np.testing.assert_array_equal(mask, score[name] > threshold)


# Inside optax's wrappers


@each(cases.named("progressive", "per_leaf", "random", "fixed"))
def test_multi_steps_gives_the_masks_of_the_accumulated_steps(case):
  weights, updates = make_replay()
  link = case.build(last(weights))
  repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, 3, axis=0), (weights, updates))
  masks, emitted = jitted_replay(optax.MultiSteps(link, 3), *repeated)
  final = jax.tree.map(lambda leaf: leaf[2::3], (masks, emitted))
  assert_trees_equal(final, _given_masks(case))
  for leaf in jax.tree.leaves(emitted):
    assert not np.asarray(leaf[0::3]).any()
    assert not np.asarray(leaf[1::3]).any()
  for leaf in jax.tree.leaves(masks):
    np.testing.assert_array_equal(leaf[3::3], leaf[2:-1:3])
    np.testing.assert_array_equal(leaf[4::3], leaf[2:-2:3])


def _group(params):
  """The parameters as a transformation sees them that has "conv" masked out."""
  return params | {"conv": optax.MaskedNode()}


def _shrink_conv(weights):
  # A threshold over the whole network would take these weights first.
  return weights | {"conv": jax.tree.map(lambda leaf: leaf * 1e-3, weights["conv"])}


@every_case
def test_under_partition_a_link_sees_its_own_group_only(case):
  weights, updates = make_replay()
  weights = _shrink_conv(weights)
  labels = {"conv": "dense", "hidden": "sparse", "out": "sparse"}
  transforms = {"dense": optax.identity(), "sparse": case.build(_group(last(weights)))}
  masks, emitted = jitted_replay(optax.partition(transforms, labels), weights, updates)
  assert_trees_equal(emitted["conv"], updates["conv"])
  final = cases.kernels(last(masks))
  assert final.pop("conv/kernel").all()
  case.check(final)


@each(cases.named("progressive", "per_leaf", "fixed"))
def test_under_masked_a_link_sees_the_unmasked_leaves_only(case):
  weights, updates = make_replay()
  weights = _shrink_conv(weights)
  link = case.build(_group(last(weights)))
  optimizer = optax.masked(link, {"conv": False, "hidden": True, "out": True})
  masks, emitted = jitted_replay(optimizer, weights, updates)
  assert_trees_equal(emitted["conv"], updates["conv"])
  final = cases.kernels(last(masks))
  assert final.pop("conv/kernel").all()
  case.check(final)


@each([case for case in cases.CASES if case.link is not sparsejax.gradual_pruning])
def test_injected_hyperparameters_prune_like_plain_ones(case):
  static = sparsejax.static_args(case.link)
  assert "sparsity" not in static
  params = cases.make_params()
  injected = optax.inject_hyperparams(case.link, static_args=static)
  optimizer = injected(**case.arguments(params))
  masks, _ = jitted_replay(optimizer, *make_replay())
  assert_trees_equal(masks, _given_masks(case)[0])


@each([case for case in cases.TRACED if case in cases.LINKS])
def test_an_injected_sparsity_can_be_changed_without_recompiling(case):
  params = cases.make_params()
  injected = optax.inject_hyperparams(case.link, static_args=sparsejax.static_args(case.link))
  optimizer = injected(**case.arguments(params))
  traces = []

  @jax.jit
  def run(state):
    traces.append(None)

    def call(state, params):
      _, state = optimizer.update(params, state, params)
      return state, sparsejax.get_masks(state, params)

    return lax.scan(call, state, make_replay()[0])[1]

  pruned = []
  for sparsity in (0.25, 0.5):
    state = optimizer.init(params)
    state.hyperparams["sparsity"] = jnp.full_like(state.hyperparams["sparsity"], sparsity)
    masks = cases.kernels(last(run(state)))
    pruned.append(sum((~mask).sum() for mask in masks.values()))
  # Layerwise allocations round per layer.
  assert pruned == pytest.approx([128, 256], abs=1.5)
  assert len(traces) == 1


@every_case
def test_apply_if_finite_skips_a_spoiled_call_and_keeps_exact_zeros(case):
  # With float32 updates for bfloat16 parameters, the harder combination of the two.
  params = cases.make_params(dtype=jnp.bfloat16)
  sgd = optax.sgd(0.1, momentum=0.9, accumulator_dtype=jnp.float32)
  optimizer = optax.apply_if_finite(optax.chain(sgd, case.build(params)), 5)
  _, history, masks = train(
    optimizer, params, calls=cases.CALLS + 1, gradient_dtype=jnp.float32, spoiled=3
  )
  for leaf in jax.tree.leaves((history, masks)):
    np.testing.assert_array_equal(leaf[3], leaf[2])
  assert_exact_zeros(history, masks)
  case.check(cases.kernels(last(masks)))


# Training states of Flax


@each(cases.named("progressive", "random", "fixed"))
def test_a_flax_train_state_keeps_exact_zeros(case):
  params, batch = cases.make_params(), make_data()
  state = train_state.TrainState.create(apply_fn=predict, params=params, tx=case.optimizer(params))

  @jax.jit
  def step(state):
    return state.apply_gradients(grads=jax.grad(loss_of)(state.params, batch))

  for _ in range(cases.CALLS):
    state = step(state)
  masks = sparsejax.get_masks(state.opt_state, state.params)
  assert_exact_zeros(state.params, masks)
  case.check(cases.kernels(masks))


class Network(nnx.Module):
  """The same shapes and names as the tree of parameters."""

  def __init__(self, rngs):
    self.conv = nnx.Conv(8, 8, (2, 2), padding="VALID", rngs=rngs)
    self.hidden = nnx.Linear(8, 16, rngs=rngs)
    self.out = nnx.Linear(16, 8, rngs=rngs)

  def __call__(self, x):
    x = jnp.tanh(self.conv(x)).mean((1, 2))
    return self.out(jnp.tanh(self.hidden(x)))


@every_case
def test_an_nnx_optimizer_keeps_exact_zeros(case):
  model = Network(nnx.Rngs(0))
  x, y = make_data()
  optimizer = nnx.Optimizer(model, case.optimizer(nnx.state(model, nnx.Param)), wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer):
    gradients = nnx.grad(lambda model: jnp.mean(jnp.square(model(x) - y)))(model)
    optimizer.update(model, gradients)

  for _ in range(cases.CALLS):
    step(model, optimizer)
  params = nnx.state(model, nnx.Param)
  masks = sparsejax.get_masks(optimizer.opt_state, params)
  assert jax.tree.structure(masks) == jax.tree.structure(params)
  assert_exact_zeros(params, masks)
  case.check(cases.kernels(masks))
  pure = sparsejax.get_masks(nnx.as_pure(optimizer.opt_state), nnx.as_pure(params))
  assert jax.tree.structure(pure) == jax.tree.structure(nnx.as_pure(params))
  for left, right in zip(jax.tree.leaves(masks), jax.tree.leaves(pure), strict=True):
    np.testing.assert_array_equal(left, right)


def test_a_predicate_gets_the_same_paths_from_nnx_at_init_and_at_update():
  model = Network(nnx.Rngs(0))
  seen = set()

  def prunable(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    seen.add(name)
    return name.endswith("kernel")

  link = sparsejax.one_shot_pruning(0.5, at=0, prunable=prunable)
  params = nnx.state(model, nnx.Param)
  state = link.init(params)
  names = {f"{name}/{leaf}" for name in cases.SHAPES for leaf in ("kernel", "bias")}
  assert seen == names
  pure = nnx.as_pure(params)
  _, state = link.update(pure, nnx.as_pure(state), pure)
  assert seen == names
  masks = cases.kernels(sparsejax.get_masks(state, pure))
  assert sum((~mask).sum() for mask in masks.values()) == 256


# get_masks


def _random_masks(seed):
  generator = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: jnp.asarray(generator.random(leaf.shape) < (0.5 if leaf.ndim > 1 else 2.0)),
    cases.make_params(),
  )


FIXED = _random_masks(seed=7)
KERNELS = jax.tree.map(lambda mask: mask.ndim > 1, FIXED)
FIXED_KERNELS = jax.tree.map(lambda keep, m: m if keep else optax.MaskedNode(), KERNELS, FIXED)
WRAPPERS = {
  "the link alone": lambda link, _: link,
  "chain": lambda link, _: optax.chain(optax.sgd(0.1), link),
  "nested chains": lambda link, _: optax.chain(optax.clip(1.0), optax.chain(optax.adam(0.1), link)),
  "named_chain": lambda link, _: optax.named_chain(("sgd", optax.sgd(0.1)), ("prune", link)),
  "partition": lambda _, link: optax.partition(
    {True: optax.chain(optax.adam(0.1), link), False: optax.sgd(0.1)}, KERNELS
  ),
  "masked": lambda _, link: optax.masked(link, KERNELS),
  "MultiSteps": lambda link, _: optax.MultiSteps(optax.chain(optax.sgd(0.1), link), 2),
  "inject_hyperparams": lambda link, _: optax.inject_hyperparams(
    lambda learning_rate: optax.chain(optax.sgd(learning_rate), link)
  )(0.1),
  "apply_if_finite": lambda link, _: optax.apply_if_finite(optax.chain(optax.sgd(0.1), link), 3),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_get_masks_finds_the_masks_inside(wrap):
  optimizer = wrap(sparsejax.fixed_masks(FIXED), sparsejax.fixed_masks(FIXED_KERNELS))
  params = cases.make_params()
  state = optimizer.init(params)
  assert_trees_equal(sparsejax.get_masks(state, params), FIXED)
  _, state = jax.jit(optimizer.update)(params, state, params)
  assert_trees_equal(sparsejax.get_masks(state, params), FIXED)


@every_case
def test_get_masks_gives_boolean_arrays_shaped_like_the_parameters(case):
  params = cases.make_params()
  masks = sparsejax.get_masks(case.optimizer(params).init(params), params)
  assert jax.tree.structure(masks) == jax.tree.structure(params)
  for leaf, mask in zip(jax.tree.leaves(params), jax.tree.leaves(masks), strict=True):
    assert (mask.shape, mask.dtype) == (leaf.shape, jnp.bool_)
    assert case not in cases.LINKS or case not in cases.SELECTING or np.asarray(mask).all()


def test_the_masks_of_two_links_in_a_chain_are_and_ed():
  params, first, second = cases.make_params(), _random_masks(0), _random_masks(1)
  optimizer = optax.chain(sparsejax.fixed_masks(first), sparsejax.fixed_masks(second))
  state = optimizer.init(params)
  masks = sparsejax.get_masks(state, params)
  assert_trees_equal(masks, jax.tree.map(jnp.logical_and, first, second))
  updates, _ = optimizer.update(cases.make_params(1), state, params)
  assert_exact_zeros(optax.apply_updates(params, updates), masks)


def test_the_masks_of_two_groups_are_put_together():
  params = cases.make_params()
  first = sparsejax.fixed_masks(FIXED | {"hidden": optax.MaskedNode(), "out": optax.MaskedNode()})
  second = sparsejax.fixed_masks(FIXED | {"conv": optax.MaskedNode()})
  labels = {"conv": "first", "hidden": "second", "out": "second"}
  optimizer = optax.partition({"first": first, "second": second}, labels)
  assert_trees_equal(sparsejax.get_masks(optimizer.init(params), params), FIXED)


def test_get_masks_without_a_link_in_the_state_is_an_error():
  params = cases.make_params()
  with pytest.raises(ValueError, match=r"(?i)mask"):
    sparsejax.get_masks(optax.adam(0.1).init(params), params)


# Batching


def _masks_over(case, sparsity, key, weights):
  """The masks of each call for a traced sparsity, and a traced key where the case has one."""
  params = cases.make_params()
  changes = {"key": key} if "key" in case.arguments(params) else {}
  link = case.build(params, sparsity=sparsity, **changes)
  return replay(link, weights, weights)[0]


SPARSITIES = np.array([0.05, 0.5, 0.83, 0.95], np.float32)


def test_vmap_over_sparsity_gives_the_masks_of_separate_runs():
  run = functools.partial(_masks_over, cases.named("progressive")[0])
  key, weights = jax.random.key(0), make_replay()[0]
  together = jax.jit(jax.vmap(run, (0, None, None)))(SPARSITIES, key, weights)
  alone = jax.jit(run)
  for lane, sparsity in enumerate(SPARSITIES):
    got = jax.tree.map(lambda leaf, lane=lane: leaf[lane], together)
    assert_trees_equal(got, alone(sparsity, key, weights))


@each(cases.named("progressive", "erk", "random"))
def test_nested_vmap_over_sparsity_and_seed_gives_the_masks_of_separate_runs(case):
  run = functools.partial(_masks_over, case)
  keys = jax.random.split(jax.random.key(0), 2)
  seeds = [make_replay(seed=seed)[0] for seed in range(2)]
  nested = jax.jit(jax.vmap(jax.vmap(run, (0, None, None)), (None, 0, 0)))
  together = nested(SPARSITIES, keys, jax.tree.map(lambda *leaves: jnp.stack(leaves), *seeds))
  alone = jax.jit(run)
  for at in np.ndindex(len(seeds), len(SPARSITIES)):
    got = jax.tree.map(lambda leaf, at=at: leaf[at], together)
    assert_trees_equal(got, alone(SPARSITIES[at[1]], keys[at[0]], seeds[at[0]]))


def _inner_jaxprs(eqn):
  kinds = (jax.extend.core.Jaxpr, jax.extend.core.ClosedJaxpr)
  values = jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: isinstance(x, kinds))
  for value in values:
    if isinstance(value, kinds):
      yield getattr(value, "jaxpr", value)


def _count(jaxpr, *, inside=False):
  """How many (conds, loops inside a cond, loops outside of any) a jaxpr has, however deep."""
  conds = loops_inside = loops_outside = 0
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    conds += name == "cond"
    if name in ("while", "scan"):
      loops_inside += inside
      loops_outside += not inside
    for inner in _inner_jaxprs(eqn):
      counts = _count(inner, inside=inside or name == "cond")
      conds, loops_inside = conds + counts[0], loops_inside + counts[1]
      loops_outside += counts[2]
  return conds, loops_inside, loops_outside


def _assert_selects_inside_a_cond(function, *arguments, training_loops=0):
  jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
  conds, loops_inside, loops_outside = _count(jaxpr)
  assert conds >= 1
  assert loops_inside >= 1
  assert loops_outside == training_loops


@each(cases.SELECTING)
@pytest.mark.parametrize("levels", [1, 2])
def test_selection_stays_inside_a_cond_with_a_batched_count(case, levels):
  params = cases.make_params()
  link = case.build(params)

  def batch(tree):
    for size in (3, 2)[:levels]:
      tree = jax.tree.map(lambda leaf, n=size: jnp.stack([leaf] * n), tree)
    return tree

  step = functools.reduce(lambda f, _: jax.vmap(f), range(levels), link.update)
  params, state = batch(params), batch(link.init(params))
  assert state.count.ndim == levels
  _assert_selects_inside_a_cond(step, params, state, params)

  def run(state):
    return lax.scan(lambda state, _: (step(params, state, params)[1], None), state, None, 3)[0]

  _assert_selects_inside_a_cond(run, state, training_loops=1)


@every_traced_case
def test_selection_stays_inside_a_cond_under_vmap_over_sparsity_and_seed(case):
  params = cases.make_params()
  start = jax.make_jaxpr(lambda sparsity: case.build(params, sparsity=sparsity).init(params))
  loops = 1 + _count(start(0.5).jaxpr)[2]
  run = jax.vmap(functools.partial(_masks_over, case), (0, None, None))
  key, weights = jax.random.key(0), make_replay()[0]
  _assert_selects_inside_a_cond(run, SPARSITIES, key, weights, training_loops=loops)
  run = jax.vmap(run, (None, 0, 0))
  keys, weights = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), (key, weights))
  _assert_selects_inside_a_cond(run, SPARSITIES, keys, weights, training_loops=loops)


@each(cases.named("progressive", "random", "gradual"))
def test_lanes_at_different_calls_change_their_masks_each_in_its_own_time(case):
  params, updates = cases.make_params(), cases.make_params(1)
  link = case.build(params)
  initial = link.init(params)
  states = [initial._replace(count=jnp.int32(count)) for count in range(cases.CALLS)]
  lanes = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
  batched = jax.jit(jax.vmap(link.update, (None, 0, None)))(updates, lanes, params)
  alone = jax.jit(link.update)
  changed = []
  for lane, state in enumerate(states):
    emitted, after = alone(updates, state, params)
    changed.append(not all(np.asarray(mask).all() for mask in jax.tree.leaves(after.masks)))
    got = jax.tree.map(lambda leaf, lane=lane: leaf[lane], batched)
    assert_trees_equal(got[0], emitted)
    assert_trees_equal(got[1].masks, after.masks)
    assert int(got[1].count) == int(after.count) == lane + 1
  assert 0 < sum(changed) < len(changed)


# Lanes of several sparsities, each of which is to be as if it were alone


CHOICES = (0.37, 0.9)


def _progressive(sparsity):
  return sparsejax.progressive_pruning(sparsity, steps=5, every=2, begin=1)


def _gradual(sparsity):
  def ramp(count, final):
    return optax.polynomial_schedule(0.0, final, 3, transition_steps=5)(count)

  def schedule(count):
    if isinstance(sparsity, float):
      return ramp(count, sparsity)
    return sparsity.pick(functools.partial(ramp, count))

  return sparsejax.gradual_pruning(schedule, every=2, begin=1, end=6)


def _granet(sparsity):
  return sparsejax.granet(optax.identity(), sparsity=sparsity, steps=5, every=2, fraction=0.4)


@pytest.mark.parametrize("make", [_progressive, _gradual, _granet])
def test_a_lane_of_several_sparsities_has_the_masks_of_the_same_updates_alone(make):
  calls, seeds = 7, 2
  generator = np.random.default_rng(0)
  weights = jnp.asarray(generator.normal(size=(calls, seeds, 25, 40)), jnp.float32)
  alone = [jax.jit(make(sparsity).update) for sparsity in CHOICES]
  start = make(0.5).init(weights[0, 0])
  expected = {(i, seed): start for i in range(len(CHOICES)) for seed in range(seeds)}

  def update(index, state, params):
    return make(sparsejax.OneOf(CHOICES, index)).update(params, state, params)[1]

  by_sparsity = jax.vmap(update, (0, 0, None))
  nested = jax.vmap(jax.vmap(update, (None, 0, 0)), (0, 0, None))
  index = jnp.arange(len(CHOICES))
  single = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), start)
  lanes = jax.tree.map(lambda leaf: jnp.stack([leaf] * seeds, axis=1), single)
  compiled = jax.jit(nested).lower(index, lanes, weights[0]).compile(compiling.AS_USERS)
  _assert_selects_in_a_conditional(compiled)
  by_sparsity, changes = jax.jit(by_sparsity), 0
  for params in weights:
    lanes = compiled(index, lanes, params)
    single = by_sparsity(index, single, params[0])
    for (i, seed), state in expected.items():
      _, expected[i, seed] = alone[i](params[seed], state, params[seed])
      masks = np.asarray(expected[i, seed].masks)
      changes += np.any(masks != np.asarray(state.masks))
      np.testing.assert_array_equal(lanes.masks[i, seed], masks)
      if seed == 0:
        np.testing.assert_array_equal(single.masks[i], masks)
  assert changes == 3 * len(expected)


def _assert_selects_in_a_conditional(compiled):
  """Asserts that a compiled program has loops, and runs none of them but in one conditional."""
  computations, is_open = {}, []
  for line in compiled.as_text().splitlines():
    if head := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
      computations[head[2]] = body = []
      is_open += [head[2]] * bool(head[1])
    elif computations:
      body.append(line)
  reached, conditionals = [], 0
  while is_open:
    for line in computations[is_open.pop()]:
      if " conditional(" in line:
        conditionals += 1
        continue
      reached.append(line)
      is_open += [name for name in re.findall(r"%([\w.-]+)", line) if name in computations]
  assert conditionals == 1
  assert any(" while(" in line for body in computations.values() for line in body)
  assert not any(" while(" in line for line in reached)


# Packed masks


@every_case
def test_packed_masks_give_the_same_results_bit_for_bit(case):
  weights, updates = make_replay()
  packed = case.build(cases.make_params(), pack=True)
  assert_trees_equal(jitted_replay(packed, weights, updates), _given_masks(case))


@every_case
def test_the_state_holds_a_byte_for_eight_weights_of_the_last_axis_if_packed(case):
  params = cases.make_params()
  state = case.build(params, pack=True).init(params)
  for layer in params:
    mask, shape = state.masks[layer]["kernel"], params[layer]["kernel"].shape
    assert (mask.dtype, mask.shape) == (jnp.uint8, (*shape[:-1], -(-shape[-1] // 8)))


@each(cases.named("progressive", "granet"))
def test_packed_masks_that_do_not_fit_the_parameters_are_an_error_that_names_the_path(case):
  params = cases.make_params()
  state = case.build(params, pack=True).init(params)
  wrong = params | {"hidden": params["hidden"] | {"kernel": jnp.ones((8, 17))}}
  with pytest.raises(ValueError, match="'hidden/kernel' has shape \\(8, 17\\)"):
    case.build(params, pack=True).update(wrong, state, wrong)
  with pytest.raises(ValueError, match="have 'hidden/kernel', but the parameters have not"):
    sparsejax.get_masks(state, {"conv": params["conv"], "out": params["out"]})


# Sharding


def _sharding(mesh, leaf, axis):
  """Over the leading or the trailing one of the leaf's axes that eight devices can share."""
  axes = [i for i, size in enumerate(leaf.shape) if size % 8 == 0]
  spec = [None] * leaf.ndim
  spec[axes[0] if axis == "leading" else axes[-1]] = "devices"
  return NamedSharding(mesh, P(*spec))


def _shardings():
  for case in cases.CASES:
    for mode in (AxisType.Explicit, AxisType.Auto):
      for axis in ("leading", "trailing"):
        # Everything for one case; the others differ in what they compute, not in where.
        if case.name == "progressive" or (mode, axis) == (AxisType.Explicit, "trailing"):
          yield pytest.param(case, mode, axis, id=f"{case.name}-{mode.name}-{axis}")


@pytest.mark.parametrize("case,mode,axis", list(_shardings()))
def test_eight_devices_give_the_masks_of_one_bit_for_bit(case, mode, axis):
  weights, updates = make_replay()
  masks, emitted = _given_masks(case)
  mesh = jax.make_mesh((8,), ("devices",), axis_types=(mode,))
  with jax.set_mesh(mesh):

    def shard(leaf):
      is_tensor = isinstance(leaf, jax.Array) and leaf.ndim > 0
      return jax.device_put(leaf, _sharding(mesh, leaf, axis)) if is_tensor else leaf

    def at(tree, call):
      return jax.tree.map(lambda leaf: leaf[call], tree)

    def sharded_at(tree, call):
      return jax.tree.map(shard, at(tree, call))

    params = sharded_at(weights, 0)
    link = case.link(**jax.tree.map(shard, case.arguments(params)))
    state = link.init(params)
    for layer in params:
      kernel, mask = params[layer]["kernel"], state.masks[layer]["kernel"]
      assert mask.sharding.is_equivalent_to(kernel.sharding, kernel.ndim)
    update = jax.jit(link.update)
    for call in range(cases.CALLS):
      params = sharded_at(weights, call)
      got, state = update(sharded_at(updates, call), state, params)
      assert_trees_equal(sparsejax.get_masks(state, params), at(masks, call))
      assert_trees_equal(got, at(emitted, call))
      for leaf, param in zip(jax.tree.leaves(got), jax.tree.leaves(params), strict=True):
        assert leaf.sharding.is_equivalent_to(param.sharding, param.ndim)
