import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax
from experiments import data, training
from experiments.models import lenet
from experiments.recipes import RECIPES

DIGITS = RECIPES["lenet300-digits"]


def test_lenet300_has_the_published_number_of_parameters():
  model = lenet.LeNet300(classes=10)
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
  assert sum(p.size for p in jax.tree.leaves(params)) == 266_610


def test_kernels_start_with_kaimings_fan_out_and_biases_at_zero():
  params = lenet.LeNet300(classes=10).init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
  for layer in params.values():
    fan_out = layer["kernel"].shape[1]
    assert np.std(layer["kernel"]) == pytest.approx(np.sqrt(2 / fan_out), rel=0.05)
    assert not np.any(layer["bias"])


def test_the_published_split_leaves_53400_images_for_training():
  pixels, labels = np.zeros((60_000, 28, 28, 1), np.uint8), np.zeros(60_000, np.int32)
  mnist = data.Dataset("mnist", pixels, labels, pixels[:9], labels[:9], (0.1307,), (0.3081,))
  trainer = training.make_trainer(RECIPES["lenet300-mnist-98"], mnist, seed=0)
  assert trainer.train.labels.size == 53_400
  assert trainer.held_out.labels.size == 6_600
  assert trainer.steps_per_epoch == 418


def test_training_and_validation_images_are_disjoint_and_follow_the_seed():
  digits = data.load("digits")
  numbered = dataclasses.replace(digits, train_labels=np.arange(len(digits.train_labels)))
  first, again, other = (training.make_trainer(DIGITS, numbered, seed) for seed in (1, 1, 2))
  everything = np.concatenate([first.train.labels, first.held_out.labels])
  np.testing.assert_array_equal(np.sort(everything), numbered.train_labels)
  np.testing.assert_array_equal(first.train.labels, again.train.labels)
  assert np.any(np.asarray(first.train.labels) != np.asarray(other.train.labels))


def test_an_epoch_sees_each_image_once_with_equal_weight():
  # Without learning, the mean loss of the epoch is the mean over all images, the last ones too.
  recipe = dataclasses.replace(DIGITS, learning_rate=0.0, sparsity=0.0, rotation=0.0)
  digits = data.load("digits")
  trainer = training.make_trainer(recipe, digits, seed=0)
  assert trainer.train.labels.size % recipe.batch_size
  state = trainer.init()
  pixels = (np.asarray(trainer.train.pixels) / 255 - digits.mean) / digits.std
  logits = lenet.LeNet300(classes=10).apply({"params": state.params}, pixels)
  losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, trainer.train.labels)
  accuracy = np.mean(np.argmax(logits, axis=-1) == trainer.train.labels)
  state, metrics = trainer.epoch(state, trainer.train)
  assert int(state.step) == trainer.steps_per_epoch
  np.testing.assert_allclose(metrics.loss, np.mean(losses), rtol=1e-5)
  np.testing.assert_allclose(metrics.accuracy, accuracy, atol=1e-6)


def test_the_optimizer_is_sgd_with_coupled_decay_and_a_cosine_by_epochs():
  recipe = dataclasses.replace(DIGITS, sparsity=0.0, epochs=3, learning_rate=0.1)
  tx = training.make_optimizer(recipe, steps_per_epoch=2)
  rng = np.random.default_rng(0)
  params = {"kernel": rng.standard_normal((3, 2)).astype(np.float32)}
  expected, buffer = params["kernel"].astype(np.float64), np.zeros((3, 2))
  state = tx.init(params)
  for step in range(6):
    gradient = rng.standard_normal((3, 2)).astype(np.float32)
    updates, state = tx.update({"kernel": gradient}, state, params)
    params = optax.apply_updates(params, updates)
    rate = 0.1 / 2 * (1 + np.cos(np.pi * (step // 2) / 3))
    buffer = 0.9 * buffer + gradient + 5e-4 * expected
    expected = expected - rate * buffer
    np.testing.assert_allclose(params["kernel"], expected, rtol=1e-5, atol=1e-6)


def test_sparsity_rises_linearly_with_the_epochs_to_the_published_one():
  recipe = dataclasses.replace(DIGITS, epochs=5, prune_epochs=3, sparsity=0.9)
  trainer = training.make_trainer(recipe, data.load("digits"), seed=0)
  state, reached = trainer.init(), []
  for _ in range(recipe.epochs):
    state, metrics = trainer.epoch(state, trainer.train)
    zeros = sum(int(jnp.sum(p == 0)) for p in jax.tree.leaves(state.params) if p.ndim == 2)
    reached.append(zeros)
    np.testing.assert_allclose(metrics.sparsity, zeros / 50_200, atol=1e-6)
  assert reached == [50_200 - round((1 - s) * 50_200) for s in (0.3, 0.6, 0.9, 0.9, 0.9)]


def test_a_network_with_dead_units_is_seen_as_constant():
  trainer = training.make_trainer(DIGITS, data.load("digits"), seed=0)
  params = trainer.init().params
  assert not trainer.evaluate(params, trainer.test).constant
  dead = {**params, "Dense_1": jax.tree.map(lambda p: -jnp.abs(p) - 1, params["Dense_1"])}
  assert trainer.evaluate(dead, trainer.test).constant


def test_masks_of_a_dense_run_are_full():
  recipe = dataclasses.replace(DIGITS, sparsity=0.0)
  trainer = training.make_trainer(recipe, data.load("digits"), seed=0)
  assert float(sparsejax.sparsity(training.get_masks(recipe, trainer.init()))) == 0.0
