import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import sparsejax
from experiments import augment, data, methods, training
from experiments.models import MODELS, lenet
from experiments.recipes import RECIPES

DIGITS = RECIPES["lenet300-digits"]


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
  recipe = dataclasses.replace(
    DIGITS, learning_rate=0.0, sparsity=0.0, augmentation=augment.Augmentation()
  )
  digits = data.load("digits")
  trainer = training.make_trainer(recipe, digits, seed=0)
  assert trainer.train.labels.size % recipe.batch_size
  state = trainer.init()
  pixels = (np.asarray(trainer.train.pixels[trainer.train.index]) / 255 - digits.mean) / digits.std
  logits = lenet.LeNet300(classes=10).apply({"params": state.params}, pixels)
  losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, trainer.train.labels)
  accuracy = np.mean(np.argmax(logits, axis=-1) == trainer.train.labels)
  state, metrics = trainer.compile_epoch()(state, trainer.train)
  assert int(state.step) == trainer.steps_per_epoch
  np.testing.assert_allclose(metrics.loss, np.mean(losses), rtol=1e-5)
  np.testing.assert_allclose(metrics.accuracy, accuracy, atol=1e-6)


def test_what_does_not_fill_a_batch_can_be_dropped():
  recipe = dataclasses.replace(DIGITS, drop_last=True, sparsity=0.0)
  trainer = training.make_trainer(recipe, data.load("digits"), seed=0)
  state, metrics = trainer.compile_epoch()(trainer.init(), trainer.train)
  assert trainer.train.labels.size == 1283
  assert int(state.step) == trainer.steps_per_epoch == 10
  assert 0 < float(metrics.accuracy) * 1280 == pytest.approx(round(float(metrics.accuracy) * 1280))


def test_only_so_many_training_images_are_used_and_none_need_be_held_out():
  recipe = dataclasses.replace(DIGITS, train_images=300, validation=0.0)
  trainer = training.make_trainer(recipe, data.load("digits"), seed=0)
  assert trainer.train.labels.size == 300
  assert trainer.held_out.labels.size == 0


def test_a_batch_that_is_larger_than_the_data_is_an_error():
  recipe = dataclasses.replace(DIGITS, batch_size=1300)
  with pytest.raises(ValueError, match="batch_size=1300 must not exceed"):
    training.make_trainer(recipe, data.load("digits"), seed=0)


def test_labels_are_smoothed():
  recipe = dataclasses.replace(
    DIGITS,
    learning_rate=0.0,
    sparsity=0.0,
    label_smoothing=0.1,
    augmentation=augment.Augmentation(),
  )
  digits = data.load("digits")
  trainer = training.make_trainer(recipe, digits, seed=0)
  state = trainer.init()
  pixels = (np.asarray(trainer.train.pixels[trainer.train.index]) / 255 - digits.mean) / digits.std
  logits = np.asarray(lenet.LeNet300(classes=10).apply({"params": state.params}, pixels))
  log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
  of_label = np.take_along_axis(log_p, np.asarray(trainer.train.labels)[:, None], axis=-1)
  # As torch defines it: a tenth is spread over all classes, the right one included.
  expected = -(0.9 * of_label.mean() + 0.1 * log_p.mean())
  _, metrics = trainer.compile_epoch()(state, trainer.train)
  np.testing.assert_allclose(metrics.loss, expected, rtol=1e-5)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_the_optimizer_is_sgd_with_coupled_decay_and_a_cosine_by_epochs(nesterov, clip_norm):
  recipe = dataclasses.replace(
    DIGITS, sparsity=0.0, epochs=3, learning_rate=0.1, nesterov=nesterov, clip_norm=clip_norm
  )
  tx = methods.make_optimizer(recipe, steps_per_epoch=2, key=jax.random.key(0))
  rng = np.random.default_rng(0)
  params = {"kernel": rng.standard_normal((3, 2)).astype(np.float32)}
  expected, buffer = params["kernel"].astype(np.float64), np.zeros((3, 2))
  state = tx.init(params)
  for step in range(6):
    gradient = rng.standard_normal((3, 2)).astype(np.float32)
    updates, state = tx.update({"kernel": gradient}, state, params)
    params = optax.apply_updates(params, updates)
    rate = 0.1 / 2 * (1 + np.cos(np.pi * (step // 2) / 3))
    norm = np.linalg.norm(gradient)
    assert norm > 1
    decayed = (gradient / norm if clip_norm else gradient) + 5e-4 * expected
    buffer = 0.9 * buffer + decayed
    expected = expected - rate * (decayed + 0.9 * buffer if nesterov else buffer)
    np.testing.assert_allclose(params["kernel"], expected, rtol=1e-5, atol=1e-6)


def test_weight_decay_spares_what_is_named():
  recipe = dataclasses.replace(DIGITS, sparsity=0.0, undecayed="(^|/)norm[12]/", momentum=0.0)
  tx = methods.make_optimizer(recipe, steps_per_epoch=2, key=jax.random.key(0))
  params = {name: {"scale": jnp.ones(3)} for name in ("norm1", "shortcut_norm1")}
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  np.testing.assert_array_equal(updates["norm1"]["scale"], 0)
  np.testing.assert_allclose(updates["shortcut_norm1"]["scale"], -DIGITS.learning_rate * 5e-4)
  with pytest.raises(ValueError, match=r"undecayed='\(' must be a regular expression"):
    dataclasses.replace(DIGITS, undecayed="(")


def test_a_warm_up_multiplies_the_first_epochs_of_a_cosine():
  cosine = methods.make_learning_rate(DIGITS, steps_per_epoch=10)
  rate = methods.make_learning_rate(dataclasses.replace(DIGITS, warmup_epochs=3), 10)
  for count, share in ((0, 1 / 4), (9, 1 / 4), (10, 2 / 4), (29, 3 / 4), (30, 1), (500, 1)):
    assert float(rate(count)) == pytest.approx(share * float(cosine(count)), rel=1e-6)


def test_the_learning_rate_of_vgg19_falls_and_rises_again():
  rate = methods.make_learning_rate(RECIPES["vgg19-cifar10-98"], steps_per_epoch=390)
  for epoch in (0, 1, 25, 49, 50, 51, 99, 100, 101, 250, 399):
    # The closed form of torch's CosineAnnealingLR(T_max=50, eta_min=1e-4).
    expected = 1e-4 + (0.1 - 1e-4) * (1 + np.cos(np.pi * epoch / 50)) / 2
    for count in (390 * epoch, 390 * epoch + 389):
      assert float(rate(jnp.int32(count))) == pytest.approx(expected, rel=1e-4)


def test_the_plain_cosine_of_vgg19_ends_at_the_final_learning_rate():
  rate = methods.make_learning_rate(RECIPES["vgg19-cifar10-98-cosine"], steps_per_epoch=390)
  for epoch in (0, 200, 399):
    expected = 1e-4 + (0.1 - 1e-4) * (1 + np.cos(np.pi * epoch / 400)) / 2
    assert float(rate(jnp.int32(390 * epoch))) == pytest.approx(expected, rel=1e-4)


def test_the_ramp_of_vgg19_is_the_published_one():
  recipe = RECIPES["vgg19-cifar10-98"]
  tx = methods.make_pruning(recipe, 1, recipe.sparsity)
  params = {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((100, 1000)))}
  update = jax.jit(tx.update)
  state, pruned = tx.init(params), []
  for _ in range(recipe.epochs):
    updates, state = update({"kernel": jnp.zeros((100, 1000))}, state, params)
    params = optax.apply_updates(params, updates)
    pruned.append(int((params["kernel"] == 0).sum()))
  # Epochs are counted from 1, as published.
  expected = [
    0 if epoch < 10 else 100_000 * (0.5 + 0.48 * (min(epoch, 300) - 10) / 290)
    for epoch in range(1, 401)
  ]
  # The schedule is optax's, in float32.
  np.testing.assert_allclose(pruned, expected, atol=0.51)
  assert pruned[299:] == [98_000] * 101


class Small(nn.Module):
  """A convolution, batch normalisation and dropout."""

  classes: int
  width: float = 1.0
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, images, train=False):
    x = nn.Conv(4, (3, 3), strides=2, dtype=self.dtype)(images)
    x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
    x = nn.Dropout(0.5, deterministic=not train)(x.reshape(len(x), -1))
    return nn.Dense(self.classes)(x)


@pytest.fixture
def small(monkeypatch):
  monkeypatch.setitem(MODELS, "small", Small)
  return dataclasses.replace(DIGITS, model="small", epochs=2, prune_epochs=2, train_images=300)


def test_steps_called_one_by_one_make_the_epoch_that_one_program_makes(small, monkeypatch):
  trainer = training.make_trainer(small, data.load("digits"), seed=0)
  assert trainer.train.labels.size % small.batch_size
  called, of_calls = trainer.compile_epoch()(trainer.init(), trainer.train)
  monkeypatch.setattr(training, "_has_convolutions", lambda *_: False)
  other = training.make_trainer(small, data.load("digits"), seed=0)
  scanned, of_scan = other.compile_epoch()(other.init(), other.train)
  assert trainer.steps_are_calls and not other.steps_are_calls
  chex.assert_trees_all_close(called.params, scanned.params, rtol=1e-4, atol=1e-5)
  chex.assert_trees_all_close(of_calls, of_scan, rtol=1e-4)
  assert int(called.step) == 3


def test_images_augmented_before_an_epoch_are_those_augmented_in_its_steps(monkeypatch):
  recipe = dataclasses.replace(
    DIGITS, epochs=2, prune_epochs=2, train_images=300, batch_size=64, width=0.1
  )

  def train():
    trainer = training.make_trainer(recipe, data.load("digits"), seed=0)
    assert trainer.train.labels.size == 4 * 64 + 11
    epoch = trainer.compile_epoch()
    state, _ = epoch(trainer.init(), trainer.train)
    return epoch(state, trainer.train)

  in_steps, of_steps = train()
  monkeypatch.setattr(training, "_is_on_cpu", lambda array: False)
  # One of the full batches is left over.
  monkeypatch.setattr(training, "_PREPARED_TOGETHER", 3)
  ahead, of_ahead = train()
  chex.assert_trees_all_close(in_steps.params, ahead.params, rtol=1e-4, atol=1e-5)
  chex.assert_trees_all_close(of_steps, of_ahead, rtol=1e-4)


def test_only_networks_with_convolutions_are_called_step_by_step(small):
  trainer = training.make_trainer(small, data.load("digits"), seed=0)
  state = jax.eval_shape(trainer.init)
  variables = {"params": state.params, "batch_stats": state.batch_stats}
  assert training._has_convolutions(Small(classes=10), variables, trainer.train)
  trainer = training.make_trainer(DIGITS, data.load("digits"), seed=0)
  variables = {"params": jax.eval_shape(trainer.init).params}
  assert not training._has_convolutions(lenet.LeNet300(classes=10), variables, trainer.train)


def test_training_keeps_running_statistics_and_evaluation_uses_them(small):
  trainer = training.make_trainer(small, data.load("digits"), seed=0)
  before = trainer.init()
  np.testing.assert_array_equal(before.batch_stats["BatchNorm_0"]["mean"], 0)
  expected = trainer.evaluate(before, trainer.test)
  state, _ = trainer.compile_epoch()(trainer.init(), trainer.train)
  assert np.all(state.batch_stats["BatchNorm_0"]["mean"] != 0)
  # Evaluation changes nothing, and knows no dropout.
  assert trainer.evaluate(before, trainer.test) == expected
  other = state.replace(batch_stats=jax.tree.map(lambda x: 100 * x, state.batch_stats))
  assert trainer.evaluate(other, trainer.test) != trainer.evaluate(state, trainer.test)


def test_sparsity_rises_linearly_with_the_epochs_to_the_published_one():
  recipe = dataclasses.replace(DIGITS, epochs=5, prune_epochs=3, sparsity=0.9)
  trainer = training.make_trainer(recipe, data.load("digits"), seed=0)
  state, reached = trainer.init(), []
  epoch = trainer.compile_epoch()
  for _ in range(recipe.epochs):
    state, metrics = epoch(state, trainer.train)
    zeros = sum(int(jnp.sum(p == 0)) for p in jax.tree.leaves(state.params) if p.ndim == 2)
    reached.append(zeros)
    np.testing.assert_allclose(metrics.sparsity, zeros / 50_200, atol=1e-6)
  assert reached == [50_200 - round((1 - s) * 50_200) for s in (0.3, 0.6, 0.9, 0.9, 0.9)]


def test_a_network_with_dead_units_is_seen_as_constant():
  trainer = training.make_trainer(DIGITS, data.load("digits"), seed=0)
  state = trainer.init()
  assert not trainer.evaluate(state, trainer.test).constant
  params = state.params
  dead = {**params, "Dense_1": jax.tree.map(lambda p: -jnp.abs(p) - 1, params["Dense_1"])}
  assert trainer.evaluate(state.replace(params=dead), trainer.test).constant


def test_masks_of_a_dense_run_are_full():
  recipe = dataclasses.replace(DIGITS, sparsity=0.0)
  trainer = training.make_trainer(recipe, data.load("digits"), seed=0)
  state = trainer.init()
  assert float(sparsejax.sparsity(methods.get_masks(recipe, state.opt_state, state.params))) == 0.0
