import collections
from typing import Any, NamedTuple

import chex
import compiling
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

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


def test_a_rule_observes_what_the_step_leaves_of_active_weights_and_zero_elsewhere(params):
  before, pruned = (jax.tree.map(lambda p, k=k: p > k, params) for k in (-0.5, 0.0))
  rule = sparsejax.Rule(
    (lambda call: jax.tree.map(lambda m, p: m & p, call.masks, of_kernels(pruned)),),
    init=lambda pool: pool,
    observe=lambda call: call.params,
    forget=lambda call: jax.tree.map(lambda x, m: jnp.where(m, x, 7), call.statistics, call.masks),
  )
  # Inactive weights are not zero at first, and gradients would move them.
  tx = sparsejax.masked_updates(
    rule,
    due=lambda count: count == 2,
    inner=optax.sgd(0.5),
    after_step=True,
    moments="kept",
    initial_masks=lambda params, pool: of_kernels(before),
  )
  state = tx.init(params)
  chex.assert_trees_all_equal(state.statistics, of_kernels(params))
  gradient = jax.tree.map(jnp.ones_like, params)
  for elsewhere in (0, 7):  # At the second call, masks change.
    _, state = tx.update(gradient, state, params)
    expected = jax.tree.map(lambda p, m, x=elsewhere: np.where(m, p - 0.5, x), params, before)
    chex.assert_trees_all_equal(state.statistics, of_kernels(expected))
  expected = jax.tree.map(jnp.logical_and, before, pruned)
  chex.assert_trees_all_equal(state.masks, of_kernels(expected))


def of_kernels(tree):
  """The tree with `optax.MaskedNode()` for biases."""
  return {name: {**layer, "bias": optax.MaskedNode()} for name, layer in tree.items()}


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
  leaf = criteria.Leaf(jnp.zeros((100, 100)), jnp.ones((100, 100), bool), key=jax.random.key(0))
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


@pytest.mark.parametrize("dtype", ["int32", "float8_e4m3fn"])
def test_weights_of_other_types_cannot_be_pruned(dtype):
  with pytest.raises(ValueError, match=f"'codes' has dtype {dtype}, but only weights of"):
    sparsejax.one_shot_pruning(0.5, at=0).init({"codes": jnp.zeros((2, 2), dtype)})


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
  compiled = step.lower(tree, tx.init(tree)).compile(compiling.AS_USERS)
  assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * size


def test_masks_from_scores_can_be_used_in_a_rule(params):
  def rule(call):
    kept = sparsejax.masks_from_scores(jax.tree.map(jnp.abs, call.params), 0.5)
    return jax.tree.map(jnp.logical_and, call.masks, kept)

  tx = sparsejax.masked_updates(rule, due=lambda count: count == 0)
  _, state = tx.update(params, tx.init(params), params)
  assert float(sparsejax.sparsity(sparsejax.get_masks(state, params))) == 0.5


def test_masks_that_a_rule_returns_have_to_fit(params):
  tx = sparsejax.masked_updates(
    lambda call: jax.tree.map(lambda m: m[0], call.masks), due=lambda count: True
  )
  numbers = sparsejax.masked_updates(
    lambda call: jax.tree.map(lambda m: m.astype(jnp.uint8), call.masks), due=lambda count: True
  )
  for update in (lambda tx: tx.update, lambda tx: jax.jit(tx.update)):
    with pytest.raises(ValueError, match="the masks that the rule returns"):
      update(tx)(params, tx.init(params), params)
    with pytest.raises(ValueError, match=r"masks must be boolean, but '.*' has dtype uint8"):
      update(numbers)(params, numbers.init(params), params)


def test_masks_of_other_shapes_are_not_broadcast(params):
  state = sparsejax.one_shot_pruning(0.5, at=0).init({"kernel": jnp.ones((1, 4))})
  with pytest.raises(ValueError, match=r"'kernel' has shape \(1, 4\) in the masks"):
    sparsejax.get_masks(state, {"kernel": jnp.ones((3, 4))})
  with pytest.raises(ValueError, match="'w' has shape"):
    sparsejax.apply_masks({"w": jnp.ones((2, 3))}, {"w": jnp.ones(3, bool)})


def test_masks_are_matched_by_name_in_any_order():
  masks = {"a": jnp.zeros((2, 2), bool), "b": jnp.ones((2, 2), bool)}
  swapped = collections.OrderedDict(b=masks["b"], a=masks["a"])
  assert float(sparsejax.overlap(masks, swapped).overall) == 1.0
  params = collections.OrderedDict(b=jnp.ones((2, 2)), a=jnp.ones((2, 2)))
  rows = {row.name: row.active for row in sparsejax.summary(params, masks).layers}
  assert rows == {"a": 0, "b": 4}


def test_masks_of_other_types_are_not_counted():
  masks = {"a": jnp.full((2, 2), 255, jnp.uint8)}
  for function in (sparsejax.sparsity, lambda m: sparsejax.summary(m, m)):
    with pytest.raises(ValueError, match="'a' has dtype uint8"):
      function(masks)


def test_fixed_masks_leave_counters_and_leaves_without_a_mask_alone(params):
  tree = {**params, "steps": jnp.int32(3)}
  masks = sparsejax.masks_from_scores(params, 0.5)
  masks = {**masks, "steps": jnp.bool_(True)}
  state = sparsejax.fixed_masks(masks).init(tree)
  assert state.masks["steps"] == optax.MaskedNode()
  # Masks lifted from a state have MaskedNode where nothing is pruned.
  pruning = sparsejax.one_shot_pruning(0.5, at=0)
  _, before = pruning.update(params, pruning.init(params), params)
  after = sparsejax.fixed_masks(before.masks).init(params)
  chex.assert_trees_all_equal(after.masks, before.masks)


def test_a_mask_is_not_lost_to_a_layer_without_one_whose_name_begins_alike():
  mask = jnp.array([[True, False], [False, True]])
  tx = sparsejax.fixed_masks({"dense1": optax.MaskedNode(), "dense10": {"kernel": mask}})
  params = {name: {"kernel": jnp.ones((2, 2))} for name in ("dense1", "dense10")}
  updates, _ = tx.update(params, tx.init(params), params)
  np.testing.assert_array_equal(updates["dense10"]["kernel"], jnp.where(mask, 1, -1))
  np.testing.assert_array_equal(updates["dense1"]["kernel"], 1)


def test_fixed_masks_that_prune_what_is_no_weight_are_an_error(params):
  tree = {**params, "steps": jnp.int32(3)}
  masks = {**sparsejax.masks_from_scores(params, 0.5), "steps": jnp.bool_(False)}
  with pytest.raises(ValueError, match="the masks prune 'steps', which is not prunable"):
    sparsejax.fixed_masks(masks).init(tree)


def test_masks_of_a_link_inside_of_a_wrapper_are_found_too():
  params = {"kernel": jnp.ones((2, 2))}
  outer, inner = ({"kernel": np.array(m)} for m in ([[True] * 2, [False] * 2], [[True, False]] * 2))
  tx = sparsejax.static_sparse_training(
    optax.chain(optax.sgd(0.1), sparsejax.fixed_masks(inner)), masks=outer
  )
  state = tx.init(params)
  found = sparsejax.get_masks(state, params)["kernel"]
  np.testing.assert_array_equal(found, [[True, False], [False, False]])


@pytest.mark.parametrize("pack", [False, True])
def test_masks_are_found_for_parameters_in_another_container(pack):
  model = nnx.Linear(8, 16, rngs=nnx.Rngs(0))
  pruning = sparsejax.one_shot_pruning(0.5, at=0, pack=pack)
  optimizer = nnx.Optimizer(model, optax.chain(optax.sgd(0.1), pruning), wrt=nnx.Param)
  optimizer.update(model, nnx.state(model, nnx.Param))
  expected = sparsejax.get_masks(optimizer.opt_state, nnx.state(model, nnx.Param))
  found = sparsejax.get_masks(optimizer.opt_state, model)
  assert sparsejax.sparsity(found) == sparsejax.sparsity(expected) == 0.5
  chex.assert_trees_all_equal(jax.tree.leaves(found), jax.tree.leaves(expected))


@pytest.mark.parametrize("pack", [False, True])
def test_leaves_of_one_name_are_an_error_before_training(pack):
  kernel = jnp.arange(1.0, 9.0).reshape(2, 4)
  params = {"a/b": kernel, "a": {"b": kernel[:1]}}
  # Also where one of them is not pruned: masks are found by name.
  pruning = sparsejax.one_shot_pruning(
    0.5, at=0, pack=pack, prunable=lambda path, leaf: len(path) == 1
  )
  with pytest.raises(ValueError, match="two leaves have the name 'a/b': rename one of them"):
    optax.chain(optax.sgd(0.1), pruning).init(params)


class Heads(NamedTuple):
  query: Any
  key: Any
  value: Any


def test_a_field_of_the_name_value_is_pruned_like_others():
  params = {"heads": Heads(*(jax.random.normal(jax.random.key(i), (4, 4)) for i in range(3)))}
  masks = sparsejax.masks_from_scores(params, 0.5)
  names = [row.name for row in sparsejax.summary(params, masks).layers]
  assert names == ["heads/query", "heads/key", "heads/value"]

  def is_no_value(path, leaf):
    return "value" not in jax.tree_util.keystr(path)

  tx = sparsejax.one_shot_pruning(0.5, at=0, prunable=is_no_value)
  _, state = tx.update(params, tx.init(params), params)
  found = sparsejax.get_masks(state, params)["heads"]
  assert found.value.all() and found.query.sum() + found.key.sum() == 16
  # Where the field belongs to another group, and where it has no mask.
  labels = {"heads": Heads("sparse", "sparse", "dense")}
  groups = {"sparse": sparsejax.fixed_masks(masks), "dense": optax.sgd(0.1)}
  in_groups = optax.partition(groups, labels)
  some = {"heads": masks["heads"]._replace(value=optax.MaskedNode())}
  for tx in (in_groups, sparsejax.fixed_masks(some)):
    found = sparsejax.get_masks(tx.init(params), params)["heads"]
    assert found.value.all()
    np.testing.assert_array_equal(found.query, masks["heads"].query)


class WithStatistics(NamedTuple):
  value: Any
  statistics: Any


@pytest.mark.parametrize("statistics", [{}, (), None])
def test_a_field_beside_an_empty_one_has_its_name_too(statistics):
  params = {"layer": WithStatistics(jnp.arange(1.0, 9.0).reshape(2, 4), statistics)}
  tx = sparsejax.one_shot_pruning(0.5, at=0)
  _, state = tx.update(params, tx.init(params), params)
  more = {"layer": params["layer"]._replace(statistics={"mean": jnp.ones(3)})}
  assert sparsejax.get_masks(state, more)["layer"].value.sum() == 4


def test_parameters_without_a_name_are_called_the_array():
  with pytest.raises(ValueError, match=r"False for each of the array of shape \[5\]"):
    sparsejax.one_shot_pruning(0.5, at=0).init(jnp.ones(5))
  with pytest.raises(ValueError, match="the array has dtype int32, but only weights of float16, "):
    sparsejax.one_shot_pruning(0.5, at=0).init(jnp.ones((5, 5), jnp.int32))
  with pytest.raises(ValueError, match=r"the array has shape \(2, 3\) in the masks, but \(3, 2\)"):
    sparsejax.apply_masks(jnp.ones((3, 2)), jnp.ones((2, 3), bool))


def test_a_state_without_masks_has_no_memory_of_masks_either(params):
  masks = sparsejax.masks_from_scores(params, 0.5)
  with pytest.raises(ValueError, match="no masks in this optimizer state"):
    sparsejax.summary(params, masks, opt_state=params)


def test_arguments_that_are_swapped_or_no_functions_are_errors(params):
  tx = sparsejax.one_shot_pruning(0.5, at=0)
  with pytest.raises(ValueError, match=r"call update\(updates, state, params\), got dict"):
    tx.update(params, params, tx.init(params))
  rule, due = lambda call: call.masks, lambda count: True
  with pytest.raises(ValueError, match="due must be a function, got 100"):
    sparsejax.masked_updates(rule, due=100)
  with pytest.raises(ValueError, match="prunable must be a function, got 'kernel'"):
    sparsejax.masked_updates(rule, due=due, prunable="kernel")
  with pytest.raises(ValueError, match="stages of a Rule must be a sequence"):
    sparsejax.masked_updates(sparsejax.Rule(rule), due=due)
  with pytest.raises(ValueError, match=r"sequence of one function or more, got \(\)"):
    sparsejax.masked_updates(sparsejax.Rule(()), due=due)
  with pytest.raises(ValueError, match="a stage of the rule must be a function, got 3"):
    sparsejax.masked_updates(3, due=due)


def test_a_ramp_may_begin_at_the_last_call_that_can_be_counted(params):
  tx = sparsejax.one_shot_pruning(0.5, at=2**31 - 1)
  state = tx.init(params)._replace(count=jnp.int32(2**31 - 1))
  _, state = tx.update(params, state, params)
  assert sparsejax.sparsity(sparsejax.get_masks(state, params)) == pytest.approx(0.5, abs=1e-2)


def test_small_numpy_integers_do_not_overflow(params):
  tx = sparsejax.progressive_pruning(0.5, steps=np.int16(250), every=np.uint8(200))
  state = tx.init(params)
  update = jax.jit(tx.update)
  for _ in range(250):
    _, state = update(params, state, params)
  assert float(sparsejax.sparsity(sparsejax.get_masks(state, params))) == 0.5
  with pytest.raises(ValueError, match="below 2\\*\\*31"):
    sparsejax.progressive_pruning(0.5, steps=2**31, every=1)


def test_a_full_tree_of_sparsities_serves_the_groups_of_a_partition(params):
  tree = jax.tree.map(lambda p: 0.5 if p.ndim == 2 else 0.0, params)
  link = sparsejax.one_shot_pruning(tree, at=0)
  tx = optax.partition({"a": link, "b": link}, {"dense": "a", "out": "b"})
  _, state = tx.update(params, tx.init(params), params)
  assert float(sparsejax.sparsity(sparsejax.get_masks(state, params))) == 0.5


def test_an_initial_sparsity_has_to_be_a_number_known_beforehand():
  for initial in (jnp.float32(0.1), None, [0.1]):
    with pytest.raises(ValueError, match="initial"):
      sparsejax.progressive_pruning(0.5, steps=4, every=2, initial=initial)
  with pytest.raises(ValueError, match="initial must not exceed the sparsity"):
    sparsejax.progressive_pruning(0.5, steps=4, every=2, initial=0.6)


def test_a_key_that_is_none_is_an_error():
  for key, shown in ((42, "42"), (jnp.ones(2), "Array"), (jnp.ones((), jnp.uint32), "Array")):
    with pytest.raises(ValueError, match=f"key must be one random key, got {shown}"):
      sparsejax.one_shot_pruning(0.5, at=0, criterion=criteria.random, key=key)


def test_a_schedule_of_many_numbers_is_an_error(params):
  tx = sparsejax.gradual_pruning(lambda count: jnp.zeros(2), every=1)
  with pytest.raises(ValueError, match="schedule must return one real number"):
    tx.update(params, tx.init(params), params)
