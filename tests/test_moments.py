"""What becomes of the moments of any inner optimizer, and which of its arrays are moments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax
from sparsejax import moments
from sparsejax.trees import is_masked_node

CALLS = 8
SHAPES = {"big": {"kernel": (6, 5), "bias": (5,)}, "small": {"kernel": (2, 2, 1, 3)}}
LABELS = {"big": "a", "small": "b"}
KERNELS = ("big", "small")


def draw(*leading, seed=0):
  generator = np.random.default_rng(seed)
  return jax.tree.map(
    lambda shape: generator.normal(size=(*leading, *shape)).astype(np.float32),
    SHAPES,
    is_leaf=lambda node: isinstance(node, tuple),
  )


def pool(tree):
  """The kernels, with `optax.MaskedNode()` for the bias."""
  return {**tree, "big": {**tree["big"], "bias": optax.MaskedNode()}}


def partition(**transforms):
  return optax.partition(transforms, LABELS)


def masked(inner):
  return optax.chain(optax.masked(inner, {"big": True, "small": False}), optax.sgd(0.1))


def multi_steps(inner):
  return optax.MultiSteps(inner, 2).gradient_transformation()


# How many moments there are of the kernels "big" and "small".
OPTIMIZERS = {
  "sgd": (optax.sgd(0.1), 0, 0),
  "momentum": (optax.sgd(0.1, momentum=0.9), 1, 1),
  "nesterov": (optax.sgd(0.1, momentum=0.9, nesterov=True), 1, 1),
  "adam": (optax.adam(0.1), 2, 2),
  "adam with mu in half precision": (optax.adam(0.1, mu_dtype=jnp.bfloat16), 2, 2),
  "adamw": (optax.adamw(0.1, weight_decay=0.1), 2, 2),
  "lion": (optax.lion(0.1), 1, 1),
  # The second kernel is too small to be factored.
  "adafactor": (optax.adafactor(0.1, min_dim_size_to_factor=4), 0, 1),
  "adafactor, not factored": (optax.adafactor(0.1, momentum=0.9), 2, 2),
  "muon": (optax.contrib.muon(0.1), 1, 2),
  "novograd": (optax.novograd(0.1), 1, 1),
  "chain": (
    optax.chain(
      optax.clip_by_global_norm(1.0), optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9)
    ),
    1,
    1,
  ),
  "inject_hyperparams": (optax.inject_hyperparams(optax.adam)(learning_rate=0.1), 2, 2),
  "partition": (partition(a=optax.adam(0.1), b=optax.sgd(0.1, momentum=0.9)), 2, 1),
  "masked": (masked(optax.adam(0.1)), 2, 0),
  "MultiSteps": (multi_steps(optax.adam(0.1)), 3, 3),
  "apply_if_finite": (optax.apply_if_finite(optax.adam(0.1), 3), 2, 2),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def moments_of(state):
  """All floating-point arrays in a state that have the shape of a kernel, with its name."""
  found = []
  for leaf in jax.tree.leaves(state):
    for name in KERNELS:
      is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
      if is_float and leaf.shape[-len(SHAPES[name]["kernel"]) :] == SHAPES[name]["kernel"]:
        found.append((name, np.asarray(leaf, np.float32)))
  return found


def jit(function):
  """Compiled for one run on tiny arrays: what takes time is the compiler's optimization."""
  return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


MASKS = jax.tree.map(lambda x: x > -0.2, draw(CALLS, seed=1))
MASKS["big"]["bias"][:] = True
DUE = np.arange(CALLS) % 3 != 1


@functools.cache
def train(name, mode, after_step=False):
  """Masks drawn beforehand change at some calls.

  Returns:
    Of each call the masks before and after it, the state of the inner optimizer, and that of the
    bare one, which gets the same weights, and gradients that are masked where its are.
  """
  inner = OPTIMIZERS[name][0]

  def rule(call):
    number = call.count - after_step
    return jax.tree.map(lambda m: m[number], pool(jax.tree.map(jnp.asarray, MASKS)))

  tx = sparsejax.masked_updates(
    rule,
    due=lambda count: jnp.asarray(DUE)[count - after_step],
    inner=inner,
    moments=mode,
    after_step=after_step,
  )

  def call(carry, gradients):
    params, state, bare = carry
    before = sparsejax.get_masks(state, params)
    updates, state = tx.update(gradients, state, params)
    after = sparsejax.get_masks(state, params)
    seen = params if after_step else sparsejax.apply_masks(params, after)
    active = before if after_step else after
    shown = gradients if mode == "kept" else sparsejax.apply_masks(gradients, active)
    bare = inner.update(shown, bare, seen)[1]
    params = optax.apply_updates(params, updates)
    return (params, state, bare), (before, after, state.inner, bare)

  @jit
  def run(params, gradients):
    return jax.lax.scan(call, (params, tx.init(params), inner.init(params)), gradients)[1]

  return jax.tree.map(np.asarray, run(draw(), draw(CALLS, seed=2)))


@every_optimizer
def test_moments_are_found_wherever_an_optimizer_keeps_them(name):
  inner, *expected = OPTIMIZERS[name]
  state = inner.init(draw())
  ones = jax.tree.map(lambda x: np.ones(x.shape, bool), draw())
  marked = moments.map_moments(lambda x, x0, m: jnp.full_like(x, 7), state, state, pool(ones))
  found = [kernel for kernel, x in moments_of(marked) if np.all(x == 7)]
  assert [found.count(kernel) for kernel in KERNELS] == expected
  # Everything else is as it was.
  before, after = (jax.tree.leaves(tree) for tree in (state, marked))
  assert sum(bool(jnp.any(x != y)) for x, y in zip(before, after, strict=True)) == sum(expected)
  dtypes = functools.partial(jax.tree.map, lambda x: x.dtype)
  assert dtypes(marked) == dtypes(state)


SOME = ("momentum", "adam", "partition")


@pytest.mark.parametrize(
  "name, after_step", [(name, False) for name in OPTIMIZERS] + [(name, True) for name in SOME]
)
def test_masked_moments_are_zero_wherever_a_weight_is_inactive(name, after_step):
  _, masks, states, _ = train(name, "masked", after_step)
  found = moments_of(states)
  assert [[n for n, _ in found].count(n) for n in KERNELS] == list(OPTIMIZERS[name][1:])
  for kernel, moment in found:
    mask = masks[kernel]["kernel"]
    # Adafactor adds 1e-30 of its own.
    assert (np.abs(moment[~mask]) <= (1e-30 if "adafactor" in name else 0)).all()
    assert (np.abs(moment[mask]) > 1e-20).any()


@pytest.mark.parametrize("mode", ["masked", "reset"])
@pytest.mark.parametrize("name", SOME)
def test_what_grows_after_the_step_has_moments_of_zero(name, mode):
  before, masks, states, _ = train(name, mode, True)
  for kernel, moment in moments_of(states):
    grown = masks[kernel]["kernel"] & ~before[kernel]["kernel"]
    assert grown.any() and not moment[grown].any()


@every_optimizer
def test_kept_moments_are_those_of_the_bare_optimizer(name):
  _, _, states, bare = train(name, "kept")
  for x, y in zip(jax.tree.leaves(states), jax.tree.leaves(bare), strict=True):
    np.testing.assert_allclose(
      np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=1e-5, atol=1e-6
    )


@every_optimizer
def test_statistics_without_the_shape_of_a_weight_are_left_to_the_optimizer(name):
  _, _, states, bare = train(name, "masked")
  shapes = [SHAPES[kernel]["kernel"] for kernel in KERNELS]
  for x, y in zip(jax.tree.leaves(states), jax.tree.leaves(bare), strict=True):
    if x.shape[1:] not in shapes:
      np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_reset_moments_of_dropped_weights_fade_and_are_zero_when_they_grow():
  before, masks, states, _ = train("momentum", "reset")
  gradients = draw(CALLS, seed=2)
  for kernel in KERNELS:
    momentum = np.zeros(SHAPES[kernel]["kernel"], np.float32)
    for call in range(CALLS):
      old, new = before[kernel]["kernel"][call], masks[kernel]["kernel"][call]
      momentum[new & ~old] = 0
      momentum = 0.9 * momentum + np.where(new, gradients[kernel]["kernel"][call], 0)
      found = optax.tree.get(states, "trace")[kernel]["kernel"][call]
      np.testing.assert_allclose(found, momentum, 1e-6, 1e-6)
    assert np.any(found[~new] != 0)


def test_masked_moments_start_with_the_gradient_of_the_call_at_which_a_weight_grows():
  before, masks, states, _ = train("momentum", "masked")
  for kernel in KERNELS:
    grown = masks[kernel]["kernel"] & ~before[kernel]["kernel"]
    found = optax.tree.get(states, "trace")[kernel]["kernel"]
    np.testing.assert_allclose(found[grown], draw(CALLS, seed=2)[kernel]["kernel"][grown], 1e-6)


@every_optimizer
def test_every_optimizer_trains_at_the_sparsity_asked_to_a_finite_loss(name):
  target = draw(seed=4)
  tx = sparsejax.dynamic_sparse_training(
    OPTIMIZERS[name][0],
    sparsity=0.5,
    allocation="uniform",
    fraction=0.3,
    every=2,
    prunable=lambda path, leaf: leaf.shape == SHAPES["big"]["kernel"],
    key=jax.random.key(0),
  )

  def loss_of(params):
    return sum(
      jnp.sum((x - y) ** 2) for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(target))
    )

  def call(carry, _):
    params, state = carry
    loss, gradients = jax.value_and_grad(loss_of)(params)
    updates, state = tx.update(gradients, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), (loss, sparsejax.get_masks(state, params), params)

  @jit
  def run(params):
    state = tx.init(params)
    params = sparsejax.apply_masks(params, sparsejax.get_masks(state, params))
    return jax.lax.scan(call, (params, state), None, 20)[1]

  loss, masks, params = jax.tree.map(np.asarray, run(draw()))
  assert np.isfinite(loss).all() and loss[-1] < loss[0]
  mask = masks["big"]["kernel"]
  assert np.all(mask.sum((1, 2)) == 15)
  assert not params["big"]["kernel"][~mask].any()
  assert masks["small"]["kernel"].all()


@pytest.mark.parametrize("mode", ["masked", "reset", "kept"])
def test_a_gradient_that_is_passed_is_masked_for_the_inner_optimizer_as_updates_are(mode):
  def update(updates, state, params=None, *, grad, **extra_args):
    return updates, jax.tree.map(jnp.sum, (updates, grad))

  params, masks = draw(), jax.tree.map(lambda m: m[0], MASKS)
  inner = optax.GradientTransformationExtraArgs(
    lambda params: jax.tree.map(lambda p: jnp.zeros([]), (params, params)), update
  )
  tx = sparsejax.masked_updates(
    lambda call: call.masks,
    due=lambda count: False,
    inner=inner,
    moments=mode,
    initial_masks=lambda params, _: pool(jax.tree.map(jnp.asarray, masks)),
  )
  twice = jax.tree.map(lambda p: 2 * p, params)
  _, state = tx.update(params, tx.init(params), params, grad=twice)
  seen = params if mode == "kept" else jax.tree.map(np.multiply, params, masks)
  for factor, sums in zip((1, 2), state.inner):
    for found, leaf in zip(jax.tree.leaves(sums), jax.tree.leaves(seen), strict=True):
      np.testing.assert_allclose(found, factor * leaf.sum(), rtol=1e-5, atol=1e-5)


# find_moments


def found_in(inner, tree=None):
  """A state of random numbers, and the moments that are found in it."""
  params = draw() if tree is None else tree
  generator = np.random.default_rng(5)
  state = jax.tree.map(
    lambda x: jnp.asarray(generator.random(x.shape), x.dtype), inner.init(params)
  )
  ones = jax.tree.map(lambda x: np.ones(np.shape(x), bool), params)
  return state, moments.find_moments(state, pool(ones) if tree is None else ones)


def test_the_moments_of_adam_are_paired():
  for inner in (
    optax.adam(0.1),
    optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    optax.chain(optax.clip(1.0), optax.adamw(0.1)),
    optax.apply_if_finite(optax.adam(0.1), 3),
    multi_steps(optax.adam(0.1)),
  ):
    state, found = found_in(inner)
    mu, nu = optax.tree.get(state, "mu"), optax.tree.get(state, "nu")
    assert len(found) == 2
    for kernel, (first, second) in zip(KERNELS, found):
      np.testing.assert_array_equal(first, mu[kernel]["kernel"])
      np.testing.assert_array_equal(second, nu[kernel]["kernel"])


@pytest.mark.parametrize(
  ("inner", "first_name", "second_name"),
  [
    (optax.adan(0.1), "m", "n"),
    (optax.contrib.ademamix(0.1), "m1", "nu"),
    (optax.contrib.prodigy(0.1), "exp_avg", "exp_avg_sq"),
    (optax.contrib.momo(0.1), "exp_avg", None),
  ],
)
def test_moments_are_found_by_the_names_of_other_optimizers(inner, first_name, second_name):
  state, found = found_in(inner)
  for kernel, (first, second) in zip(KERNELS, found, strict=True):
    np.testing.assert_array_equal(first, optax.tree.get(state, first_name)[kernel]["kernel"])
    if second_name is None:
      assert second is None
    else:
      np.testing.assert_array_equal(second, optax.tree.get(state, second_name)[kernel]["kernel"])


def test_momentum_has_no_second_moment():
  for inner in (optax.sgd(0.1, momentum=0.9), optax.lion(0.1), optax.rmsprop(0.1, momentum=0.9)):
    state, found = found_in(inner)
    first = optax.tree.get(state, "trace", optax.tree.get(state, "mu"))
    for kernel, (moment, second) in zip(KERNELS, found):
      np.testing.assert_array_equal(moment, first[kernel]["kernel"])
      assert second is None


def test_a_second_moment_for_each_layer_is_none_of_a_weight():
  _, found = found_in(optax.novograd(0.1))
  assert [second for _, second in found] == [None, None]


def test_the_moments_of_each_group_are_found():
  inner = partition(a=optax.adam(0.1), b=optax.sgd(0.1, momentum=0.9))
  state, ((first, second), (other, none)) = found_in(inner)
  groups = state.inner_states
  np.testing.assert_array_equal(first, optax.tree.get(groups["a"], "mu")["big"]["kernel"])
  np.testing.assert_array_equal(second, optax.tree.get(groups["a"], "nu")["big"]["kernel"])
  np.testing.assert_array_equal(other, optax.tree.get(groups["b"], "trace")["small"]["kernel"])
  assert none is None


def test_the_moments_of_muon_are_found_in_its_groups():
  state, ((first, second), (other, beside)) = found_in(optax.contrib.muon(0.1))
  assert first.shape == SHAPES["big"]["kernel"] and second is None
  assert other.shape == beside.shape == SHAPES["small"]["kernel"]
  groups = state.inner_states
  np.testing.assert_array_equal(first, optax.tree.get(groups["muon"], "mu")["big"]["kernel"])
  np.testing.assert_array_equal(beside, optax.tree.get(groups["adam"], "nu")["small"]["kernel"])


def test_moments_are_found_in_trees_of_other_kinds():
  for tree in (np.ones((3, 4)), [np.ones((3, 4)), np.ones((2, 5))], (np.ones((3, 4)),)):
    tree = jax.tree.map(jnp.asarray, tree)
    state, found = found_in(optax.chain(optax.clip(1.0), optax.adam(0.1)), tree)
    for like, (first, second), mu in zip(
      jax.tree.leaves(tree), found, jax.tree.leaves(optax.tree.get(state, "mu")), strict=True
    ):
      assert first.shape == second.shape == like.shape
      np.testing.assert_array_equal(first, mu)


def test_a_layer_without_a_moment_is_an_error_that_names_it():
  with pytest.raises(ValueError, match="'small/kernel' there is none"):
    found_in(masked(optax.adam(0.1)))
  with pytest.raises(ValueError, match="'big/kernel' there is none"):
    found_in(optax.sgd(0.1))
  with pytest.raises(ValueError, match="'big/kernel' there is none"):
    found_in(optax.adafactor(0.1, min_dim_size_to_factor=4))


# map_moments


def test_a_function_of_moments_gets_the_leaf_of_each_tree():
  params = draw()
  state = optax.adam(0.1).init(params)
  ones, twos = (jax.tree.map(lambda x, c=c: np.full(x.shape, c), params) for c in (1.0, 2.0))
  fresh = jax.tree.map(lambda x: x - 1, state)
  new = moments.map_moments(
    lambda x, x0, a, b: 2 * x - x0 - 1 + a + 10 * b, state, fresh, pool(ones), pool(twos)
  )
  for moment in (new[0].mu, new[0].nu):
    for kernel in KERNELS:
      assert np.all(moment[kernel]["kernel"] == 21)
    assert not moment["big"]["bias"].any()
  assert new[0].count == 0
  assert not any(map(is_masked_node, jax.tree.leaves(new, is_leaf=is_masked_node)))


def test_integers_of_each_weight_are_no_moments():
  numbers = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.int8), draw())
  state = {"steps": numbers, "trace": draw()}
  ones = jax.tree.map(lambda x: np.ones(x.shape, bool), draw())
  new = moments.map_moments(lambda x, x0, m: x + 1, state, state, pool(ones))
  for kernel in KERNELS:
    assert not new["steps"][kernel]["kernel"].any()
    np.testing.assert_array_equal(
      new["trace"][kernel]["kernel"], state["trace"][kernel]["kernel"] + 1
    )


def test_nodes_of_other_groups_stay_in_place():
  inner = partition(a=optax.adam(0.1), b=optax.sgd(0.1, momentum=0.9))
  state = inner.init(draw())
  ones = jax.tree.map(lambda x: np.ones(x.shape, bool), draw())
  new = moments.map_moments(lambda x, x0, m: x + 1, state, state, pool(ones))
  assert jax.tree.structure(new) == jax.tree.structure(state)
  assert [x.shape for x in jax.tree.leaves(new)] == [x.shape for x in jax.tree.leaves(state)]


def test_weights_grow_with_moments_as_at_first_where_these_are_not_zero():
  # Rprop's step sizes could never leave zero.
  params = {"kernel": jax.random.normal(jax.random.key(0), (6, 8))}
  tx = sparsejax.dynamic_sparse_training(
    optax.rprop(0.1), sparsity=0.5, fraction=0.5, every=1, begin=2, end=2, key=jax.random.key(1)
  )
  state = tx.init(params)
  first = sparsejax.get_masks(state, params)["kernel"]
  params = sparsejax.apply_masks(params, {"kernel": first})
  update = jax.jit(tx.update)
  gradient = {"kernel": jax.random.normal(jax.random.key(2), (6, 8))}
  for _ in range(8):
    updates, state = update(gradient, state, params)
    params = optax.apply_updates(params, updates)
  grown = sparsejax.get_masks(state, params)["kernel"] & ~first
  assert grown.any()
  assert (params["kernel"][grown] != 0).all()
