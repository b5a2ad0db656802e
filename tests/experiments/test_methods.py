import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax
from experiments import baselines, data, methods, training
from experiments.recipes import RECIPES
from experiments.tables import TABLES

DIGITS = RECIPES["lenet300-digits"]


def foresight(score, **changes):
  return dataclasses.replace(DIGITS, foresight=score, prune_epochs=0, train_images=300, **changes)


def first_state(recipe, seed=0):
  trainer = training.make_trainer(recipe, data.load("digits"), seed=seed)
  return trainer, trainer.init()


def masks_of(state):
  masks = sparsejax.get_masks(state.opt_state, state.params)
  return {name: np.asarray(layer["kernel"]) for name, layer in masks.items()}


@pytest.mark.parametrize("score", baselines.FORESIGHT)
def test_weights_that_are_pruned_before_training_are_zero_from_its_first_step_on(score):
  trainer, state = first_state(foresight(score))
  masks = masks_of(state)
  assert sum(mask.sum() for mask in masks.values()) == 5_020
  # The weights that are left are those of the dense network.
  _, dense = first_state(dataclasses.replace(DIGITS, sparsity=0.0, train_images=300))
  for name, mask in masks.items():
    kernel = np.asarray(dense.params[name]["kernel"])
    np.testing.assert_array_equal(state.params[name]["kernel"], np.where(mask, kernel, 0))
  state, metrics = trainer.compile_epoch()(state, trainer.train)
  assert metrics.sparsity == pytest.approx(0.9)
  for name, mask in masks.items():
    np.testing.assert_array_equal(state.params[name]["kernel"] != 0, mask)


def test_random_masks_follow_the_seed():
  recipe = foresight("random")
  first, again, other = (masks_of(first_state(recipe, seed)[1]) for seed in (0, 0, 1))
  np.testing.assert_array_equal(first["Dense_1"], again["Dense_1"])
  assert np.any(first["Dense_1"] != other["Dense_1"])


def scores_by_hand(method):
  """Scores of the last layer of LeNet-300-100 on the batch that SNIP and GraSP look at."""
  trainer, state = first_state(dataclasses.replace(DIGITS, sparsity=0.0, train_images=300))
  pixels = (
    np.asarray(trainer.train.pixels[trainer.train.index[: DIGITS.batch_size]], np.float64) / 255
  )
  digits = data.load("digits")
  labels = np.asarray(trainer.train.labels[: DIGITS.batch_size])
  x = jnp.asarray((pixels - digits.mean) / digits.std, jnp.float32).reshape(len(pixels), -1)
  for name in ("Dense_0", "Dense_1"):
    x = jnp.maximum(x @ state.params[name]["kernel"] + state.params[name]["bias"], 0)
  last = state.params["Dense_2"]["kernel"]

  def loss(kernel, temperature):
    logits = (x @ kernel + state.params["Dense_2"]["bias"]) / temperature
    return -jnp.mean(jax.nn.log_softmax(logits)[np.arange(len(labels)), labels])

  if method == "snip":
    return np.abs(last * jax.grad(loss)(last, 1.0))
  # All else being constant, this is the part of the score that comes from this layer alone.
  gradient = jax.grad(loss)(last, 200.0)
  return last * jnp.einsum("ijkl,kl", jax.hessian(loss)(last, 200.0), gradient)


def test_snip_looks_at_one_batch_of_images_as_they_are():
  mask = masks_of(first_state(foresight("snip"))[1])["Dense_2"]
  scores = np.asarray(scores_by_hand("snip"))
  assert 0 < mask.sum() < mask.size
  assert scores[mask].min() > scores[~mask].max()


def test_grasp_looks_at_softened_logits(monkeypatch):
  # With the last layer alone to be pruned, the flow of the gradient is that to it.
  model_kernels = sparsejax.is_kernel
  seen = {}
  scored = methods.foresight.grasp

  def grasp(loss, params, batches):
    only_last = lambda path, leaf: model_kernels(path, leaf) and path[0].key == "Dense_2"
    seen.update(scored(loss, params, batches, prunable=only_last))
    return scored(loss, params, batches)

  monkeypatch.setattr(methods.foresight, "grasp", grasp)
  first_state(foresight("grasp"))
  expected = np.asarray(scores_by_hand("grasp"))
  scale = np.abs(expected).max()
  np.testing.assert_allclose(seen["Dense_2"]["kernel"] / scale, expected / scale, atol=1e-4)


def test_milestones_at_one_step_count_each():
  recipe = dataclasses.replace(DIGITS, milestones=(1.0, 1.1, 2.0))
  rate = methods.make_learning_rate(recipe, steps_per_epoch=2)
  found = [float(rate(step)) / recipe.learning_rate for step in (1, 3, 5)]
  np.testing.assert_allclose(found, [1, 0.01, 0.001], rtol=1e-5)


def test_a_second_cosine_begins_where_the_training_before_fine_tuning_ends():
  recipe = RECIPES["lenet300-mnist-98-e40-one-shot"]
  rate = methods.make_learning_rate(recipe, steps_per_epoch=418)
  for epoch in range(40):
    done, length = (epoch, 24) if epoch < 24 else (epoch - 24, 16)
    expected = 0.05 * (1 + np.cos(np.pi * done / length)) / 2
    for count in (418 * epoch, 418 * epoch + 417):
      assert float(rate(jnp.int32(count))) == pytest.approx(expected, rel=1e-5)


def test_runs_along_a_cubic_ramp_side_by_side_prune_as_many_weights_as_alone():
  recipe = dataclasses.replace(RECIPES["lenet300-mnist-98-e40-gmp"], initial_sparsity=0.05)
  sparsities, key = (0.789, 0.98), jax.random.key(0)
  params = {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((100, 100)))}

  def pruned(update, state):
    def step(state, _):
      _, state = update(params, state, params)
      return state, jnp.sum(~sparsejax.get_masks(state, params)["kernel"])

    return jax.lax.scan(step, state, length=40)[1]

  make = functools.partial(methods.make_optimizer, recipe, 2, key, sparsities=sparsities)
  # The update is one and the same, whatever the state's index.
  lane = lambda index: pruned(make(index=1).update, make(index=index).init(params))
  lanes = jax.jit(jax.vmap(lane))(jnp.arange(2))
  for sparsity, counts in zip(sparsities, lanes):
    own = methods.make_optimizer(dataclasses.replace(recipe, sparsity=sparsity), 2, key)
    alone = jax.jit(pruned, static_argnums=0)(own.update, own.init(params))
    assert counts.tolist() == alone.tolist()
    assert counts[-1] == round(10_000 * sparsity)


@pytest.mark.parametrize(
  ("method", "sparsities"),
  [
    # After each of the first 20 epochs of 40; the ramp has 16.
    ("progressive", [0.98 * min(epoch + 1, 16) / 16 for epoch in range(20)]),
    ("gmp", [0.98 * (1 - (1 - min(epoch, 16) / 16) ** 3) for epoch in range(20)]),
    ("gmp-original", [0.98 * (1 - (1 - min(epoch, 16) / 16) ** 3) for epoch in range(20)]),
    ("one-shot", [0.0] * 20),
  ],
)
def test_the_ramps_of_methods_that_prune_during_training(method, sparsities):
  recipe = RECIPES[f"lenet300-mnist-98-e40-{method}"]
  tx = methods.make_pruning(recipe, 2, recipe.sparsity)
  params = {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((100, 100)))}
  state, update, found = tx.init(params), jax.jit(tx.update), []
  for _ in range(40):
    for _ in range(2):
      updates, state = update({"kernel": jnp.zeros((100, 100))}, state, params)
      params = optax.apply_updates(params, updates)
    found.append(float(sparsejax.sparsity(sparsejax.get_masks(state, params))))
  np.testing.assert_allclose(found[:20], sparsities, atol=1e-4)
  if method == "one-shot":
    assert found[23:25] == [0.0, pytest.approx(0.98)]
  assert found[-1] == pytest.approx(0.98)


def calls_that_change_masks(recipe, steps_per_epoch):
  """The numbers of the calls of `update`, from 1 on, at which weights are dropped and grow."""
  sgd = optax.sgd(0.1, momentum=0.9)
  tx = methods.make_dynamic(recipe, sgd, steps_per_epoch, jax.random.key(0), recipe.sparsity)
  rng = np.random.default_rng(0)
  params = {"kernel": jnp.asarray(rng.standard_normal((100, 100)), jnp.float32)}
  state, update, found = tx.init(params), jax.jit(tx.update), []
  masks = sparsejax.get_masks(state, params)["kernel"]
  params = {"kernel": jnp.where(masks, params["kernel"], 0)}
  for call in range(1, recipe.epochs * steps_per_epoch + 1):
    gradient = {"kernel": jnp.asarray(rng.standard_normal((100, 100)), jnp.float32)}
    updates, state = update(gradient, state, params)
    params = optax.apply_updates(params, updates)
    before, masks = masks, sparsejax.get_masks(state, params)["kernel"]
    if np.any(before != masks):
      found.append(call)
  return found


@pytest.mark.parametrize(
  ("name", "every", "expected"),
  [
    # Of 40 steps. What grew at call 40, or at call 39 before a step that is left out, would not
    # take a step of its own.
    ("lenet300-mnist-98-e40-granet-sparse", 0, range(2, 40, 2)),
    ("lenet300-mnist-98-e40-granet-sparse", 6, range(6, 40, 6)),
    ("lenet300-mnist-98-e40-set", 0, range(2, 40, 2)),
    ("lenet300-mnist-98-e40-set", 7, range(7, 40, 7)),
    ("lenet300-mnist-98-e40-snfs", 8, range(8, 40, 8)),
    ("lenet300-mnist-98-e40-rigl", 0, range(1, 30, 2)),
    ("lenet300-mnist-98-e40-rigl", 7, range(1, 30, 7)),
    ("lenet300-mnist-98-e40-rigl", 100, [1]),
    ("lenet300-mnist-e20-magnitude-gradient", 7, range(7, 40, 7)),
    ("lenet300-mnist-e20-mest-random", 7, range(7, 40, 7)),
    ("lenet300-mnist-e20-mest-random", 8, range(8, 40, 8)),
  ],
)
def test_masks_change_on_the_grid_alone_and_leave_a_step_for_what_grows(name, every, expected):
  recipe = RECIPES[name]
  recipe = dataclasses.replace(
    recipe,
    epochs=20,
    prune_epochs=min(recipe.prune_epochs, 10),
    sparsity=0.9,
    dynamic=dataclasses.replace(recipe.dynamic, every=every),
  )
  assert calls_that_change_masks(recipe, 2) == list(expected)


@pytest.mark.parametrize(
  ("name", "said"),
  [
    (
      "lenet300-mnist-98-e40-set",
      "every=33 must be smaller: no change of the masks is in 20 steps",
    ),
    ("lenet300-mnist-98-e40-granet", "of the ramp, step 18, and the last of 20 steps"),
  ],
)
def test_masks_that_cannot_change_in_time_are_an_error(name, said):
  recipe = RECIPES[name]
  recipe = dataclasses.replace(
    recipe,
    epochs=10,
    prune_epochs=min(recipe.prune_epochs, 9),
    dynamic=dataclasses.replace(recipe.dynamic, every=33 if "set" in name else 7),
  )
  with pytest.raises(ValueError, match=said):
    calls_that_change_masks(recipe, 2)


def test_masks_may_stop_to_change_before_the_first_step():
  recipe = RECIPES["lenet300-mnist-98-e40-rigl"]
  recipe = dataclasses.replace(
    recipe, epochs=2, dynamic=dataclasses.replace(recipe.dynamic, stop=1e-4)
  )
  assert calls_that_change_masks(recipe, 2) == [1]


def test_the_number_that_fantastic_weights_drops_is_rounded_up():
  recipe = RECIPES["lenet300-mnist-e20-magnitude-gradient"]
  recipe = dataclasses.replace(
    recipe, dynamic=dataclasses.replace(recipe.dynamic, last_fraction=0.5, every=1)
  )
  tx = methods.make_dynamic(recipe, optax.sgd(0.1), 2, jax.random.key(0), 0.951)
  params = {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((10, 100)))}
  state = tx.init(params)
  before = sparsejax.get_masks(state, params)["kernel"]
  # Nothing that was dropped grows again.
  _, state = tx.update({"kernel": jnp.where(before, 0.0, 1.0)}, state, params)
  after = sparsejax.get_masks(state, params)["kernel"]
  # Half of 49.
  assert (int(before.sum()), int((before & ~after).sum()), int(after.sum())) == (49, 25, 49)


def test_the_network_computes_with_the_masked_weights_where_they_keep_their_values():
  recipe = dataclasses.replace(
    DIGITS, ramp="cubic", prune_epochs=1, epochs=2, keep_weights=True, train_images=300
  )
  trainer, state = first_state(recipe)
  epoch_fn = trainer.compile_epoch()
  for _ in range(2):
    state, metrics = epoch_fn(state, trainer.train)
  masks = sparsejax.get_masks(state.opt_state, state.params)
  assert metrics.sparsity == pytest.approx(0.9)
  assert np.all(state.params["Dense_1"]["kernel"] != 0)
  masked = state.replace(params=sparsejax.apply_masks(state.params, masks))
  found = trainer.evaluate(state, trainer.test)
  assert found.accuracy == trainer.evaluate(masked, trainer.test).accuracy
  # Pruned weights move by weight decay and what is left of their momentum, and by nothing else.
  before = jax.tree.map(np.asarray, state.params)
  trace = jax.tree.map(np.asarray, optax.tree.get(state.opt_state, "trace"))
  after, _ = epoch_fn(state, trainer.train)
  kernel, mask = before["Dense_1"]["kernel"], np.asarray(masks["Dense_1"]["kernel"])
  momentum, expected = trace["Dense_1"]["kernel"], kernel
  rate = methods.make_learning_rate(recipe, trainer.steps_per_epoch)
  for step in range(2 * trainer.steps_per_epoch, 3 * trainer.steps_per_epoch):
    momentum = 0.9 * momentum + recipe.weight_decay * expected
    expected = expected - float(rate(jnp.int32(step))) * momentum
  np.testing.assert_allclose(
    after.params["Dense_1"]["kernel"][~mask], expected[~mask], rtol=1e-5, atol=1e-8
  )


EQUAL = ("data", "model", "width", "dtype", "learning_rate", "augmentation", "batch_size")
EQUAL += ("momentum", "nesterov", "clip_norm", "weight_decay", "label_smoothing", "validation")
EQUAL += ("drop_last", "final_learning_rate", "half_period", "train_images")


BLOCKS = {
  title: block for title, block in TABLES["baselines"].blocks.items() if "progressive" in block
}


@pytest.mark.parametrize("title", BLOCKS)
def test_methods_in_one_block_of_the_table_are_on_equal_terms(title):
  block = BLOCKS[title]
  epochs = int(re.search(r"(\d+) epochs", title)[1])
  (dense,) = block["dense"]
  for label, rows in block.items():
    for row in rows:
      recipe = RECIPES[row.recipe]
      for field in EQUAL:
        assert getattr(recipe, field) == getattr(RECIPES[dense.recipe], field), (row, field)
      if "in all" in title or "in all" in label:
        assert recipe.total_epochs == epochs
      else:
        assert recipe.epochs == epochs


def test_sparsities_in_one_block_are_those_of_progressive_pruning_or_close_to_them():
  assert len(BLOCKS) == len(TABLES["baselines"].blocks) - 1
  for block in BLOCKS.values():
    targets = [RECIPES[row.recipe].sparsity for row in block["progressive"]]
    for label, rows in block.items():
      reached = []
      for recipe, row in ((RECIPES[row.recipe], row) for row in rows):
        cycles = row.cycle or recipe.cycles
        reached.append(recipe.sparsity or 1 - (1 - recipe.prune_rate) ** (cycles - 1))
      if label != "dense":
        np.testing.assert_allclose(reached, targets, atol=0.01)
