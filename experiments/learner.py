"""A recipe's network and optimizer: the first state, a step on a batch, and what it answers."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training import train_state

import sparsejax
from experiments import methods
from experiments.augment import augment, normalize
from experiments.methods import PyTree, Variables
from experiments.models import MODELS
from experiments.recipe import Recipe


class TrainState(train_state.TrainState):
  """Parameters, optimizer state, step count, and the running statistics of batch normalisation."""

  batch_stats: Any


class EpochMetrics(NamedTuple):
  """What one epoch of training says of itself; scalars."""

  loss: jax.Array
  accuracy: jax.Array
  sparsity: jax.Array  # of the prunable weights, at the end of the epoch


@dataclasses.dataclass(frozen=True)
class Learner:
  """What a recipe does with batches, wherever they come from; pixels are uint8.

  Attributes:
    model: the network.
    variables: shapes of its parameters and running statistics.
    masks: shapes of its masks.
    tx: the optimizer of its states; not the masks and the key that they start with.
    init: (pixels, labels) of a batch as it is, at which some methods look -> the first state; and,
      of several sparsities, the index of its own.
    start: (parameters and running statistics, masks, step) -> state, with a fresh optimizer; and
      that index.
    augment: (key, pixels) -> pixels in [0, 1].
    prepare: (key of the epoch, number of the step, pixels) -> what the network gets in training.
    change_masks: state -> state, before the first step of each epoch: with the masks of that step,
      if they are those of a ramp, which changes them nowhere else. Where pruned weights keep their
      values, the loss of that step is computed under them.
    train_step: (state, prepared pixels, labels, key of the epoch) -> state, and the sums of the
      losses and of the right answers. It keeps the masks of a ramp; given a `tx` too, it makes the
      step of that optimizer.
    end: (state, these sums over an epoch, number of images) -> EpochMetrics.
    network: state -> a function from pixels, uint8 or in [0, 1], to logits.
  """

  model: nn.Module
  variables: Variables
  masks: PyTree
  tx: optax.GradientTransformation
  init: Callable[[jax.Array, jax.Array], TrainState]
  start: Callable[..., TrainState]
  augment: Callable[[jax.Array, jax.Array], jax.Array]
  prepare: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
  change_masks: Callable[[TrainState], TrainState]
  train_step: Callable[..., tuple[TrainState, jax.Array]]
  end: Callable[..., EpochMetrics]
  network: Callable[[TrainState], Callable[[jax.Array], jax.Array]]

  @property
  def state(self) -> TrainState:
    """The shapes of a state."""
    return jax.eval_shape(self.start, self.variables, self.masks, jnp.int32(0))


def make_learner(
  recipe: Recipe,
  image_shape: Sequence[int],
  *,
  classes: int,
  mean: Sequence[float],
  std: Sequence[float],
  steps_per_epoch: int,
  key: jax.Array,
  sparsities: tuple[float, ...] = (),
) -> Learner:
  """Prepares the network and the optimizer of a recipe.

  Args:
    recipe: what to train.
    image_shape: height, width and channels.
    classes: number of classes.
    mean: of each channel, with pixels in [0, 1].
    std: of each channel, with pixels in [0, 1].
    steps_per_epoch: number of optimizer steps.
    key: decides initialisation and the masks at the start.
    sparsities: that states may have, each its own, in place of the recipe's.

  Raises:
    ValueError: if images are too small for the network.
  """
  masks_key = jax.random.fold_in(key, 1)
  model = MODELS[recipe.model](classes=classes, width=recipe.width, dtype=jnp.dtype(recipe.dtype))
  _check_fit(model, recipe, image_shape)
  normalized = functools.partial(normalize, mean=mean, std=std)
  augmented = functools.partial(augment, augmentation=recipe.augmentation, mean=mean)
  optimizer = functools.partial(
    methods.make_optimizer, recipe, steps_per_epoch, sparsities=sparsities
  )

  @jax.jit
  def init_variables(key):
    variables = model.init(key, jnp.zeros([1, *image_shape]))
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}

  abstract_variables = jax.eval_shape(init_variables, key)
  abstract_masks = jax.eval_shape(methods.full_masks, abstract_variables["params"])
  # One and the same in all states, which it is a part of. Masks are none of it, nor are the key and
  # the index.
  tx = optimizer(masks_key, abstract_masks)
  # For steps at which no masks change. In a scan on a GPU, the conditional of the other one makes
  # the host wait at each step, and hands masks on in another layout than XLA gives the weights.
  steady = optimizer(masks_key, abstract_masks, steady=True)

  @jax.jit
  def start_with(key, variables, masks, step, index=0):
    opt_state = optimizer(key, masks, index=index).init(variables["params"])
    # Copies, since an epoch uses up its state.
    return TrainState(
      step=step,
      apply_fn=None,
      params=sparsejax.apply_masks(
        variables["params"], methods.get_masks(recipe, opt_state, variables["params"])
      ),
      tx=tx,
      opt_state=optax.tree.set(opt_state, count=step),
      batch_stats=jax.tree.map(jnp.copy, variables["batch_stats"]),
    )

  start = functools.partial(start_with, masks_key)

  def init(pixels, labels, index=0):
    variables = init_variables(key)
    batch = normalized(pixels), labels
    own = dataclasses.replace(recipe, sparsity=sparsities[index]) if sparsities else recipe
    masks = methods.make_initial_masks(own, model, variables, batch, masks_key)
    return start(variables, masks, 0, index)

  def weights(params, opt_state):
    """What the network computes with."""
    if not recipe.keep_weights:
      return params
    return sparsejax.apply_masks(params, sparsejax.get_masks(opt_state, params))

  def keys_of(key, step):
    """For augmentation and for dropout."""
    return jax.random.split(jax.random.fold_in(key, step))

  def prepare(key, step, pixels):
    augment_key, _ = keys_of(key, step)
    return normalized(augmented(augment_key, pixels)).astype(recipe.dtype)

  def change_masks(state):
    nothing = jax.tree.map(jnp.zeros_like, state.params)
    _, changed = tx.update(nothing, state.opt_state, state.params)
    masks = optax.tree.get(changed, "masks")
    return state.replace(opt_state=optax.tree.set(state.opt_state, masks=masks))

  def train_step(state, inputs, labels, key, tx=steady):
    _, dropout_key = keys_of(key, state.step)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, classes), recipe.label_smoothing)

    def loss(params):
      logits, updates = model.apply(
        {"params": weights(params, state.opt_state), "batch_stats": state.batch_stats},
        inputs,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": dropout_key},
      )
      losses = optax.losses.softmax_cross_entropy(logits, targets)
      return jnp.mean(losses), (logits, updates.get("batch_stats", {}))

    (value, (logits, batch_stats)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    correct = jnp.sum(jnp.argmax(logits, axis=-1) == labels)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    state = state.replace(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      opt_state=opt_state,
      batch_stats=batch_stats,
    )
    return state, jnp.array([value * labels.size, correct])

  def end(state, sums, count):
    loss, accuracy = sums / count
    masks = methods.get_masks(recipe, state.opt_state, state.params)
    return EpochMetrics(loss, accuracy, sparsejax.sparsity(masks))

  def network(state):
    variables = {
      "params": weights(state.params, state.opt_state),
      "batch_stats": state.batch_stats,
    }
    return lambda pixels: model.apply(variables, normalized(pixels))

  return Learner(
    model=model,
    variables=abstract_variables,
    masks=abstract_masks,
    tx=tx,
    init=init,
    start=start,
    augment=augmented,
    prepare=prepare,
    change_masks=change_masks if recipe.prunes_by_epoch else lambda state: state,
    train_step=train_step,
    end=end,
    network=network,
  )


def _check_fit(model: nn.Module, recipe: Recipe, shape: Sequence[int]) -> None:
  """Raises a ValueError if nothing of an image reaches the end of the network."""
  try:
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros([1, *shape]))
    empty = any(0 in leaf.shape for leaf in jax.tree.leaves(variables))
  except ZeroDivisionError:
    empty = True
  if empty:
    raise ValueError(
      f"model={recipe.model} needs larger images than those of {recipe.data}, {tuple(shape)}"
    )
