"""The jitted epoch: data on the device, augmentation and optimizer steps in one scan.

Only networks with convolutions are called step by step on a CPU: see `compile_epoch`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training import train_state

import sparsejax
from experiments.augment import augment, normalize
from experiments.data import Dataset
from experiments.models import MODELS
from experiments.recipes import Recipe


class TrainState(train_state.TrainState):
  """Parameters, optimizer state, step count, and the running statistics of batch normalisation."""

  batch_stats: Any


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
    compile_epoch: compiles and returns the function (state, training images) -> (state,
      EpochMetrics). It uses the state's buffers for its result.
    evaluate: (state, images) -> Evaluation, on the images as they are.
    validate: (state, images) -> Evaluation, on augmented images, the same ones each time.
    train: training images.
    held_out: validation images; there may be none.
    test: test images, for the end.
  """

  steps_per_epoch: int
  init: Callable[[], TrainState]
  compile_epoch: Callable[[], Callable[..., tuple[TrainState, EpochMetrics]]]
  evaluate: Callable[..., Evaluation]
  validate: Callable[..., Evaluation]
  train: Images
  held_out: Images
  test: Images


def make_trainer(recipe: Recipe, dataset: Dataset, seed: int, *, unroll: int = 1) -> Trainer:
  """Prepares a run.

  Args:
    recipe: what to train.
    dataset: on what.
    seed: decides initialisation, split, order, augmentation and dropout.
    unroll: so many steps of an epoch are written out in one turn of its loop.

  Raises:
    ValueError: if there are fewer training images than are asked for or than a batch takes, or if
      they are too small for the network.
  """
  init_key, data_key, held_out_key = jax.random.split(jax.random.key(seed), 3)
  split = np.random.default_rng(seed).permutation(len(dataset.train_labels))
  if recipe.train_images > len(split):
    raise ValueError(f"train_images={recipe.train_images} are more than there are, {len(split)}")
  if recipe.train_images:
    split = split[: recipe.train_images]
  held_out = round(recipe.validation * len(split))
  count, batch = len(split) - held_out, recipe.batch_size
  if batch > count:
    raise ValueError(f"batch_size={batch} must not exceed the number of training images, {count}")
  full, rest = divmod(count, batch)
  rest = 0 if recipe.drop_last else rest
  steps = full + (rest > 0)

  def images(pixels, labels, index=slice(None)):
    return Images(jnp.asarray(pixels[index]), jnp.asarray(labels[index], jnp.int32))

  train = images(dataset.train_images, dataset.train_labels, split[held_out:])
  model = MODELS[recipe.model](
    classes=dataset.classes, width=recipe.width, dtype=jnp.dtype(recipe.dtype)
  )
  _check_fit(model, recipe, train)
  normalized = functools.partial(normalize, mean=dataset.mean, std=dataset.std)
  augmented = functools.partial(augment, augmentation=recipe.augmentation, mean=dataset.mean)

  @jax.jit
  def init():
    variables = model.init(init_key, jnp.zeros([1, *dataset.train_images.shape[1:]]))
    return TrainState.create(
      apply_fn=None,
      params=variables["params"],
      batch_stats=variables.get("batch_stats", {}),
      tx=make_optimizer(recipe, steps),
    )

  def begin(step):
    """The key of an epoch, and the order of its images."""
    order_key, step_key = jax.random.split(jax.random.fold_in(data_key, step // steps))
    return step_key, jax.random.permutation(order_key, count)

  def train_step(state, train, key, index):
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
    pixels = normalized(augmented(augment_key, train.pixels[index]))
    labels = train.labels[index]
    targets = optax.smooth_labels(jax.nn.one_hot(labels, dataset.classes), recipe.label_smoothing)

    def loss(params):
      logits, updates = model.apply(
        {"params": params, "batch_stats": state.batch_stats},
        pixels,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": dropout_key},
      )
      losses = optax.losses.softmax_cross_entropy(logits, targets)
      return jnp.mean(losses), (logits, updates.get("batch_stats", {}))

    (value, (logits, batch_stats)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    correct = jnp.sum(jnp.argmax(logits, axis=-1) == labels)
    state = state.apply_gradients(grads=grads, batch_stats=batch_stats)
    return state, jnp.array([value * labels.size, correct])

  def end(state, sums):
    loss, accuracy = sums / (full * batch + rest)
    return EpochMetrics(loss, accuracy, sparsejax.sparsity(get_masks(recipe, state)))

  @functools.partial(jax.jit, donate_argnums=0)
  def epoch(state, train):
    key, order = begin(state.step)
    state, sums = jax.lax.scan(
      lambda state, index: train_step(state, train, key, index),
      state,
      order[: full * batch].reshape(full, batch),
      unroll=unroll,
    )
    sums = jnp.sum(sums, axis=0)
    if rest:
      state, of_the_rest = train_step(state, train, key, order[full * batch :])
      sums += of_the_rest
    return state, end(state, sums)

  def compile_epoch():
    state = jax.eval_shape(init)
    on_cpu = all(device.platform == "cpu" for device in train.labels.devices())
    if not (on_cpu and _has_convolutions(model, state, train)):
      return epoch.lower(state, train).compile()
    # XLA's CPU backend runs gradients of convolutions 40 times slower in a loop than outside of one
    # (https://github.com/jax-ml/jax/issues/12868), so there each step is a call from Python.
    key, order = jax.eval_shape(begin, state.step)
    step = jax.jit(train_step, donate_argnums=0)
    step_of = {
      size: step.lower(state, train, key, jax.ShapeDtypeStruct([size], order.dtype)).compile()
      for size in {batch, rest} - {0}
    }
    first = jax.jit(begin).lower(state.step).compile()
    last = jax.jit(end).lower(state, jax.ShapeDtypeStruct([2], jnp.float32)).compile()

    def epoch_of_calls(state, train):
      key, order = first(state.step)
      sums = jnp.zeros(2)
      for start in range(0, full * batch + rest, batch):
        index = order[start : min(start + batch, full * batch + rest)]
        state, of_step = step_of[index.size](state, train, key, index)
        sums += of_step
      return state, last(state, sums)

    return epoch_of_calls

  def evaluate(state, images, augmented):
    # In batches of a thousand, so that no network needs memory for all images at once.
    size = images.labels.size
    batches = -(-size // 1000)
    index = jnp.pad(jnp.arange(size), (0, batches * 1000 - size)).reshape(batches, 1000)

    def logits_of_batch(inputs):
      index, key = inputs
      pixels = normalized(augmented(key, images.pixels[index]))
      return model.apply({"params": state.params, "batch_stats": state.batch_stats}, pixels)

    keys = jax.random.split(held_out_key, batches)
    out = jax.lax.map(logits_of_batch, (index, keys)).reshape(-1, dataset.classes)[:size]
    return Evaluation(
      accuracy=jnp.mean(jnp.argmax(out, axis=-1) == images.labels),
      constant=jnp.all(out == out[0]),
    )

  return Trainer(
    steps_per_epoch=steps,
    init=init,
    compile_epoch=compile_epoch,
    evaluate=jax.jit(lambda state, images: evaluate(state, images, lambda key, x: x)),
    # As published: the validation images pass through the augmentation too.
    validate=jax.jit(lambda state, images: evaluate(state, images, augmented)),
    train=train,
    held_out=images(dataset.train_images, dataset.train_labels, split[:held_out]),
    test=images(dataset.test_images, dataset.test_labels),
  )


def _check_fit(model: nn.Module, recipe: Recipe, train: Images) -> None:
  """Raises a ValueError if nothing of an image reaches the end of the network."""
  shape = train.pixels.shape[1:]
  try:
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros([1, *shape]))
    empty = any(0 in leaf.shape for leaf in jax.tree.leaves(variables))
  except ZeroDivisionError:
    empty = True
  if empty:
    raise ValueError(
      f"model={recipe.model} needs larger images than those of {recipe.data}, {shape}"
    )


def _has_convolutions(model: nn.Module, state: TrainState, train: Images) -> bool:
  variables = {"params": state.params, "batch_stats": state.batch_stats}
  pixels = jax.ShapeDtypeStruct([1, *train.pixels.shape[1:]], jnp.float32)
  return "conv_general_dilated" in str(jax.make_jaxpr(model.apply)(variables, pixels))


def make_optimizer(recipe: Recipe, steps_per_epoch: int) -> optax.GradientTransformation:
  """SGD as published, and the pruning after it."""
  links = [
    optax.clip_by_global_norm(recipe.clip_norm) if recipe.clip_norm else optax.identity(),
    optax.add_decayed_weights(recipe.weight_decay),
    optax.sgd(
      make_learning_rate(recipe, steps_per_epoch),
      momentum=recipe.momentum,
      nesterov=recipe.nesterov,
    ),
  ]
  if recipe.sparsity:
    links.append(make_pruning(recipe, steps_per_epoch))
  return optax.chain(*links)


def make_learning_rate(recipe: Recipe, steps_per_epoch: int) -> optax.Schedule:
  """A cosine that changes from epoch to epoch, and rises again after half a period."""
  half = recipe.half_period or recipe.epochs
  floor = recipe.final_learning_rate / recipe.learning_rate if recipe.learning_rate else 0.0
  cosine = optax.cosine_decay_schedule(recipe.learning_rate, half, alpha=floor)

  def learning_rate(count):
    epoch = count // steps_per_epoch
    return cosine(half - jnp.abs(half - epoch % (2 * half)))

  return learning_rate


def make_pruning(recipe: Recipe, steps_per_epoch: int) -> optax.GradientTransformationExtraArgs:
  """The recipe's ramp, with a change of the masks at the start of each of its epochs."""
  begin, steps = recipe.prune_begin * steps_per_epoch, recipe.prune_epochs * steps_per_epoch
  if recipe.ramp == "progressive":
    return sparsejax.progressive_pruning(
      recipe.sparsity,
      steps=steps,
      every=steps_per_epoch,
      begin=begin,
      initial=recipe.initial_sparsity,
    )
  ramp = optax.linear_schedule(recipe.initial_sparsity, recipe.sparsity, steps, begin)
  return sparsejax.gradual_pruning(ramp, every=steps_per_epoch, begin=begin, end=begin + steps)


def get_masks(recipe: Recipe, state: TrainState) -> Any:
  """The masks of a run; of a dense one, True everywhere."""
  if recipe.sparsity:
    return sparsejax.get_masks(state.opt_state, state.params)
  return jax.tree.map(lambda p: jnp.ones_like(p, dtype=bool), state.params)
