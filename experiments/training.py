"""The jitted epoch: data on the device, augmentation and optimizer steps in one scan."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state

import sparsejax
from experiments import augment
from experiments.data import Dataset
from experiments.recipes import MODELS, Recipe


class Images(NamedTuple):
  """A set of labelled images on the device."""

  pixels: jax.Array  # shape=(count, height, width, channels), dtype=uint8
  labels: jax.Array  # shape=(count,), dtype=int32


class EpochMetrics(NamedTuple):
  """What one epoch of training says of itself; scalars."""

  loss: jax.Array
  accuracy: jax.Array
  sparsity: jax.Array  # of the prunable weights, at the end of the epoch


class Evaluation(NamedTuple):
  """What a network does on a set of images; scalars."""

  accuracy: jax.Array  # in [0, 1]
  constant: jax.Array  # whether its output is the same for every image: its units are dead


@dataclasses.dataclass(frozen=True)
class Trainer:
  """A recipe on a data set with a seed: its jitted functions and its first state.

  Attributes:
    steps_per_epoch: number of optimizer steps.
    init: returns the state before the first epoch.
    epoch: (state, training images) -> (state, EpochMetrics). It uses the state's buffers for its
      result.
    evaluate: (params, images) -> Evaluation, on the images as they are.
    validate: (params, images) -> Evaluation, on augmented images, the same ones each time.
    train: training images.
    held_out: validation images.
    test: test images, for the end.
  """

  steps_per_epoch: int
  init: Callable[[], train_state.TrainState]
  epoch: Callable[..., Any]
  evaluate: Callable[..., Evaluation]
  validate: Callable[..., Evaluation]
  train: Images
  held_out: Images
  test: Images


def make_trainer(recipe: Recipe, dataset: Dataset, seed: int) -> Trainer:
  """Prepares a run."""
  init_key, data_key, held_out_key = jax.random.split(jax.random.key(seed), 3)
  order = np.random.default_rng(seed).permutation(len(dataset.train_labels))
  held_out = round(recipe.validation * len(order))

  def images(pixels, labels, index=slice(None)):
    return Images(jnp.asarray(pixels[index]), jnp.asarray(labels[index], jnp.int32))

  train = images(dataset.train_images, dataset.train_labels, order[held_out:])
  count, batch = train.labels.size, recipe.batch_size
  steps = -(-count // batch)
  model = MODELS[recipe.model](classes=dataset.classes)
  mean, std = (np.array(x, np.float32) * 255 for x in (dataset.mean, dataset.std))

  def logits(params, pixels):
    return model.apply({"params": params}, (pixels.astype(jnp.float32) - mean) / std)

  def augmented(key, pixels):
    if not recipe.rotation and not recipe.translation:
      return pixels
    return augment.rotate_and_translate(
      key, pixels, degrees=recipe.rotation, fraction=recipe.translation
    )

  def init():
    params = model.init(init_key, jnp.zeros([1, *train.pixels.shape[1:]]))["params"]
    return train_state.TrainState.create(
      apply_fn=None, params=params, tx=make_optimizer(recipe, steps)
    )

  @functools.partial(jax.jit, donate_argnums=0)
  def epoch(state, train):
    key = jax.random.fold_in(data_key, state.step // steps)
    order_key, augment_key = jax.random.split(key)
    order = jax.random.permutation(order_key, count)
    # The last step has fewer images: it is filled up with images of no weight.
    order = jnp.pad(order, (0, steps * batch - count)).reshape(steps, batch)
    weights = (jnp.arange(steps * batch) < count).astype(jnp.float32).reshape(steps, batch)

    def step(state, inputs):
      index, weight, key = inputs
      pixels, labels = augmented(key, train.pixels[index]), train.labels[index]

      def loss(params):
        out = logits(params, pixels)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(out, labels)
        return jnp.sum(losses * weight) / jnp.sum(weight), out

      (value, out), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
      correct = jnp.sum((jnp.argmax(out, axis=-1) == labels) * weight)
      return state.apply_gradients(grads=grads), (value * jnp.sum(weight), correct)

    keys = jax.random.split(augment_key, steps)
    state, (losses, correct) = jax.lax.scan(step, state, (order, weights, keys))
    sparsity = sparsejax.sparsity(get_masks(recipe, state))
    return state, EpochMetrics(jnp.sum(losses) / count, jnp.sum(correct) / count, sparsity)

  def evaluate(params, images, augmented):
    # In batches of a thousand, so that no network needs memory for all images at once.
    size = images.labels.size
    batches = -(-size // 1000)
    index = jnp.pad(jnp.arange(size), (0, batches * 1000 - size)).reshape(batches, 1000)

    def logits_of_batch(inputs):
      index, key = inputs
      return logits(params, augmented(key, images.pixels[index]))

    keys = jax.random.split(held_out_key, batches)
    out = jax.lax.map(logits_of_batch, (index, keys)).reshape(-1, dataset.classes)[:size]
    return Evaluation(
      accuracy=jnp.mean(jnp.argmax(out, axis=-1) == images.labels),
      constant=jnp.all(out == out[0]),
    )

  return Trainer(
    steps_per_epoch=steps,
    init=jax.jit(init),
    epoch=epoch,
    evaluate=jax.jit(lambda params, images: evaluate(params, images, lambda key, x: x)),
    # As published: the validation images pass through the augmentation too.
    validate=jax.jit(lambda params, images: evaluate(params, images, augmented)),
    train=train,
    held_out=images(dataset.train_images, dataset.train_labels, order[:held_out]),
    test=images(dataset.test_images, dataset.test_labels),
  )


def make_optimizer(recipe: Recipe, steps_per_epoch: int) -> optax.GradientTransformation:
  """SGD as published, and the pruning after it."""
  cosine = optax.cosine_decay_schedule(recipe.learning_rate, recipe.epochs)
  links = [
    optax.add_decayed_weights(recipe.weight_decay),
    optax.sgd(lambda count: cosine(count // steps_per_epoch), momentum=recipe.momentum),
  ]
  if recipe.sparsity:
    links.append(
      sparsejax.progressive_pruning(
        recipe.sparsity, steps=recipe.prune_epochs * steps_per_epoch, every=steps_per_epoch
      )
    )
  return optax.chain(*links)


def get_masks(recipe: Recipe, state: train_state.TrainState) -> Any:
  """The masks of a run; of a dense one, True everywhere."""
  if recipe.sparsity:
    return sparsejax.get_masks(state.opt_state, state.params)
  return jax.tree.map(lambda p: jnp.ones_like(p, dtype=bool), state.params)
