import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax
from sparsejax import criteria


@pytest.fixture
def params():
  rng = np.random.default_rng(0)
  return {
    "dense": {"kernel": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32), "bias": jnp.ones(5)},
    "out": {"kernel": jnp.asarray(rng.normal(size=(5, 4)), jnp.float32), "bias": jnp.ones(4)},
  }


def test_a_rule_of_ones_own_sees_the_call_and_decides(params):
  seen = []

  def rule(call):
    seen.append(jax.tree.structure(call.params))
    assert call.params["dense"]["bias"] == optax.MaskedNode()
    return jax.tree.map(lambda p, m: m & (p > 0) & (call.count == 3), call.params, call.masks)

  tx = sparsejax.masked_updates(rule, due=lambda count: count == 3)
  state = tx.init(params)
  for call in range(5):
    updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    masks = sparsejax.get_masks(state, params)
    want = params["dense"]["kernel"] > 0 if call >= 3 else jnp.ones((6, 5), bool)
    np.testing.assert_array_equal(masks["dense"]["kernel"], want)
    np.testing.assert_array_equal(updates["dense"]["bias"], 1.0)
  assert set(seen) == {jax.tree.structure(state.masks)}


def test_a_rule_that_revives_weights_may_do_so(params):
  tx = sparsejax.masked_updates(
    lambda call: jax.tree.map(lambda m: jnp.full_like(m, call.count % 2 == 0), call.masks),
    due=lambda count: True,
  )
  state = tx.init(params)
  for call in range(4):
    _, state = tx.update(params, state, params)
    sparsity = sparsejax.sparsity(sparsejax.get_masks(state, params))
    assert float(sparsity) == (0.0 if call % 2 == 0 else 1.0)


def test_the_key_of_a_call_depends_on_the_key_and_the_call_alone(params):
  drawn = []

  def rule(call):
    jax.debug.callback(lambda x: drawn.append(float(x)), jax.random.uniform(call.key))
    return call.masks

  tx = sparsejax.masked_updates(rule, due=lambda count: count != 1, key=jax.random.key(3))
  state = tx.init(params)
  for _ in range(3):
    _, state = tx.update(params, state, params)
  jax.effects_barrier()
  want = [jax.random.uniform(jax.random.fold_in(jax.random.key(3), c)) for c in (0, 2)]
  np.testing.assert_allclose(drawn, want, rtol=1e-6)


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_random_pruning_takes_keys_of_both_kinds_and_differs_between_them(params, make_key):
  def masks(seed):
    tx = sparsejax.one_shot_pruning(0.5, at=0, criterion=criteria.random, key=make_key(seed))
    _, state = tx.update(params, tx.init(params), params)
    return sparsejax.get_masks(state, params)["dense"]["kernel"]

  np.testing.assert_array_equal(masks(0), masks(0))
  assert np.any(masks(0) != masks(1))


def test_random_scores_are_uniform_and_differ_between_leaves():
  leaf = criteria.Leaf(jnp.zeros((100, 100)), jnp.ones((100, 100), bool), _key=jax.random.key(0))
  scores = criteria.random(leaf)
  np.testing.assert_allclose(np.quantile(scores, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.02)
  tree = {"a": jnp.zeros((50, 50)), "b": jnp.zeros((50, 50))}
  tx = sparsejax.one_shot_pruning(0.5, at=0, criterion=criteria.random, key=jax.random.key(0))
  _, state = tx.update(tree, tx.init(tree), tree)
  assert np.any(state.masks["a"] != state.masks["b"])


def test_a_criterion_that_returns_anything_but_scores_is_an_error(params):
  for criterion in (lambda leaf: jnp.sum(leaf.weight), lambda leaf: leaf.weight > 0):
    tx = sparsejax.one_shot_pruning(0.5, at=0, criterion=criterion)
    with pytest.raises(ValueError, match="one floating-point score for each weight"):
      tx.update(params, tx.init(params), params)


def test_an_equal_criterion_prunes_what_magnitude_prunes(params):
  # Magnitude takes a path of its own that never writes the scores.
  def masks(criterion):
    tx = sparsejax.one_shot_pruning(0.6, at=0, criterion=criterion)
    return tx.update(params, tx.init(params), params)[1].masks

  chex.assert_trees_all_equal(masks(criteria.magnitude), masks(lambda leaf: jnp.abs(leaf.weight)))


def test_training_can_be_differentiated_through(params):
  tx = optax.chain(optax.sgd(0.1), sparsejax.progressive_pruning(0.5, steps=2, every=1))

  def trained(scale):
    p, state = params, tx.init(params)
    for _ in range(2):
      grads = jax.tree.map(lambda x: scale * x, p)
      updates, state = tx.update(grads, state, p)
      p = optax.apply_updates(p, updates)
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(p))

  slope = (trained(1.01) - trained(0.99)) / 0.02
  np.testing.assert_allclose(jax.grad(trained)(1.0), slope, rtol=1e-2)


def test_integer_weights_cannot_be_pruned():
  with pytest.raises(ValueError, match="'codes' has dtype int32"):
    sparsejax.one_shot_pruning(0.5, at=0).init({"codes": jnp.zeros((2, 2), jnp.int32)})


def test_leaves_that_are_too_large_to_index_are_an_error():
  huge = {"kernel": jax.ShapeDtypeStruct((2**16, 2**16), jnp.bfloat16)}
  with pytest.raises(ValueError, match="fewer than 2"):
    jax.eval_shape(sparsejax.one_shot_pruning(0.5, at=0).init, huge)


def test_fixed_masks_are_matched_by_name_and_only_those_of_a_group_are_needed(params):
  masks = sparsejax.masks_from_scores(params, 0.5)
  frozen = flax.core.freeze(params)
  state = sparsejax.fixed_masks(masks).init(frozen)
  chex.assert_trees_all_equal(sparsejax.get_masks(state, frozen), flax.core.freeze(masks))

  tx = optax.partition(
    {"pruned": sparsejax.fixed_masks(masks), "free": optax.sgd(0.1)},
    {"dense": "pruned", "out": "free"},
  )
  _, state = tx.update(params, tx.init(params), params)
  found = sparsejax.get_masks(state, params)
  chex.assert_trees_all_equal(found["dense"], masks["dense"])
  assert jnp.all(found["out"]["kernel"])
  with pytest.raises(ValueError, match="the parameters have 'new', but the masks have not"):
    sparsejax.fixed_masks(masks).init({**params, "new": jnp.ones((2, 2))})
  with pytest.raises(ValueError, match="the masks have 'out/bias', but the parameters have not"):
    sparsejax.fixed_masks(masks).init({**params, "out": {"kernel": params["out"]["kernel"]}})


def test_fixed_masks_must_be_boolean(params):
  with pytest.raises(ValueError, match="masks must be boolean, but 'dense/bias' has dtype float32"):
    sparsejax.fixed_masks(params)


def test_a_mask_update_writes_no_scores_and_no_positions_to_memory():
  tx = optax.chain(optax.sgd(0.1, momentum=0.9), sparsejax.one_shot_pruning(0.9, at=0))
  tree = {str(i): jnp.zeros((256, 512 + i)) for i in range(4)}
  size = sum(p.size for p in tree.values())

  def step(params, state):
    updates, state = tx.update(params, state, params)
    return optax.apply_updates(params, updates), state

  step = jax.jit(step, donate_argnums=(0, 1))
  compiled = step.lower(tree, tx.init(tree)).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * size
