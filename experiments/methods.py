"""How a recipe optimizes and prunes: its optimizer, its masks, and its lottery tickets."""

import collections
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import sparsejax
from experiments.recipe import Recipe
from sparsejax import foresight, lottery
from sparsejax.lottery import Round, Ticket

_AFTER_STEP = {
  "set": sparsejax.sparse_evolutionary_training,
  "snfs": sparsejax.snfs,
}

PyTree = Any
Variables = dict[str, PyTree]
Sparsity = float | sparsejax.OneOf

# Wang et al., 2020: the logits are divided by it.
_GRASP_TEMPERATURE = 200


def make_optimizer(
  recipe: Recipe,
  steps_per_epoch: int,
  key: jax.Array,
  masks: PyTree | None = None,
  *,
  sparsities: tuple[float, ...] = (),
  index: int | jax.Array = 0,
  steady: bool = False,
) -> optax.GradientTransformation:
  """SGD as published, and the pruning after it or around it.

  Args:
    recipe: whose.
    steps_per_epoch: number of optimizer steps.
    key: for what is drawn at random: the weights that are active at the start, or grow.
    masks: those that its state starts with, where they are made before training and do not change
      during it. Its `update` does not depend on them.
    sparsities: of runs side by side, in place of the recipe's own, which is 0 only if all are.
    index: which of them is that of its state. Its `update` does not depend on it.
    steady: whether a ramp's `update` leaves the masks of the same states as they are.
  """
  make = functools.partial(_make_optimizer, recipe, steps_per_epoch, key, masks, steady)
  if not sparsities:
    return make(recipe.sparsity)
  return optax.inject_hyperparams(lambda index: make(sparsejax.OneOf(sparsities, index)))(index)


def _make_optimizer(
  recipe: Recipe,
  steps_per_epoch: int,
  key: jax.Array,
  masks: PyTree | None,
  steady: bool,
  sparsity: Sparsity,
) -> optax.GradientTransformation:
  sgd = optax.chain(
    optax.clip_by_global_norm(recipe.clip_norm) if recipe.clip_norm else optax.identity(),
    optax.add_decayed_weights(
      recipe.weight_decay, _is_decayed(recipe.undecayed) if recipe.undecayed else None
    ),
    optax.sgd(
      make_learning_rate(recipe, steps_per_epoch),
      momentum=recipe.momentum,
      nesterov=recipe.nesterov,
    ),
  )
  if has_fixed_masks(recipe):
    return optax.chain(sgd, sparsejax.fixed_masks(masks))
  if recipe.dynamic.method != "none":
    return make_dynamic(recipe, sgd, steps_per_epoch, key, sparsity)
  if not recipe.sparsity:
    return sgd
  if steady:
    return optax.chain(sgd, _make_steady(recipe.keep_weights))
  return optax.chain(sgd, make_pruning(recipe, steps_per_epoch, sparsity))


def _make_steady(keep_weights: bool) -> optax.GradientTransformationExtraArgs:
  """What `make_pruning` makes, at calls at which no masks are due."""
  return sparsejax.masked_updates(
    lambda call: call.masks, due=lambda count: False, keep_weights=keep_weights
  )


def _is_decayed(undecayed: str) -> Callable[[PyTree], PyTree]:
  """A function from parameters to whether each has weight decay."""

  def is_decayed(path, _):
    return not re.search(undecayed, jax.tree_util.keystr(path, simple=True, separator="/"))

  return functools.partial(jax.tree_util.tree_map_with_path, is_decayed)


def make_learning_rate(recipe: Recipe, steps_per_epoch: int) -> optax.Schedule:
  """The falling learning rate, and its first epochs, in which it rises."""
  falling = _make_falling_rate(recipe, steps_per_epoch)
  if not recipe.warmup_epochs:
    return falling

  def rate(count):
    share = (count // steps_per_epoch + 1) / (recipe.warmup_epochs + 1)
    return falling(count) * jnp.minimum(share, 1.0)

  return rate


def _make_falling_rate(recipe: Recipe, steps_per_epoch: int) -> optax.Schedule:
  """Steps down, or a cosine that changes from epoch to epoch, may rise again, or start anew."""
  if recipe.milestones:
    steps = collections.Counter(round(m * steps_per_epoch) for m in recipe.milestones)
    factors = {step: recipe.milestone_factor**times for step, times in steps.items()}
    return optax.piecewise_constant_schedule(recipe.learning_rate, factors)
  floor = recipe.final_learning_rate / recipe.learning_rate if recipe.learning_rate else 0.0

  def cosine_over(epochs):
    half = recipe.half_period or epochs
    cosine = optax.cosine_decay_schedule(recipe.learning_rate, half, alpha=floor)
    return lambda epoch: cosine(half - jnp.abs(half - epoch % (2 * half)))

  by_epoch = cosine_over(recipe.restart_epoch or recipe.epochs)
  if restart := recipe.restart_epoch:
    by_epoch = optax.join_schedules([by_epoch, cosine_over(recipe.epochs - restart)], [restart])
  return lambda count: by_epoch(count // steps_per_epoch)


def make_dynamic(
  recipe: Recipe,
  sgd: optax.GradientTransformation,
  steps_per_epoch: int,
  key: jax.Array,
  sparsity: Sparsity,
) -> optax.GradientTransformationExtraArgs:
  """The recipe's sparse training around its SGD."""
  dynamic = recipe.dynamic
  every = dynamic.every or steps_per_epoch
  total = recipe.epochs * steps_per_epoch
  stop = max(1, round(dynamic.stop * total))
  start = dict(sparsity=sparsity, allocation=dynamic.allocation, key=key)
  if dynamic.method == "static":
    return sparsejax.static_sparse_training(sgd, **start)
  floor = dynamic.last_fraction / dynamic.fraction if dynamic.fraction else 0.0
  fraction = optax.cosine_decay_schedule(dynamic.fraction, stop, floor)

  def when(begin, *, after_step):
    # To the last change after which a whole step is left, so that what grows still learns. Calls
    # count from 1 where masks change after the step, and else from 0.
    last = min(stop, total - 1 if after_step else total - 2)
    if last < begin:
      raise ValueError(f"every={every} must be smaller: no change of the masks is in {total} steps")
    return dict(every=every, end=last - (last - begin) % every, fraction=fraction)

  if dynamic.method == "granet":
    begin, steps = recipe.prune_begin * steps_per_epoch, recipe.prune_epochs * steps_per_epoch
    changes = when(begin + every, after_step=True)
    if changes["end"] < begin + steps:
      raise ValueError(
        f"every={every} must be smaller: no change of the masks is between the end of the ramp,"
        f" step {begin + steps}, and the last of {total} steps"
      )
    return sparsejax.granet(
      sgd, initial=recipe.initial_sparsity, begin=begin, steps=steps, **changes, **start
    )
  if dynamic.method == "rigl":
    return sparsejax.rigl(sgd, **when(0, after_step=False), **start)
  if dynamic.method in _AFTER_STEP:
    return _AFTER_STEP[dynamic.method](sgd, **when(every, after_step=True), **start)
  # As in Fantastic Weights: what needs the gradient is decided where it was taken, before the step;
  # as many weights are dropped as their fraction, rounded up; and the optimizer goes on with the
  # momentum of all weights.
  by_weight = dynamic.drop in ("magnitude", "each_sign", "random")
  begin = every if by_weight else every - 1
  return sparsejax.dynamic_sparse_training(
    sgd,
    drop=dynamic.drop,
    grow=dynamic.grow,
    begin=begin,
    after_step=by_weight,
    moments="kept",
    rounding="up",
    **when(begin, after_step=by_weight),
    **start,
  )


def make_pruning(
  recipe: Recipe, steps_per_epoch: int, sparsity: Sparsity
) -> optax.GradientTransformationExtraArgs:
  """The recipe's ramp, with a change of the masks at the start of each of its epochs."""
  begin, steps = recipe.prune_begin * steps_per_epoch, recipe.prune_epochs * steps_per_epoch
  if recipe.ramp == "progressive":
    return sparsejax.progressive_pruning(
      sparsity,
      steps=steps,
      every=steps_per_epoch,
      begin=begin,
      initial=recipe.initial_sparsity,
    )
  power = {"linear": 1, "cubic": 3}[recipe.ramp]

  def ramp_to(final):
    return optax.polynomial_schedule(recipe.initial_sparsity, final, power, steps, begin)

  def ramp(count):
    if isinstance(sparsity, sparsejax.OneOf):
      return sparsity.pick(lambda final: ramp_to(final)(count))
    return ramp_to(sparsity)(count)

  return sparsejax.gradual_pruning(
    ramp, every=steps_per_epoch, begin=begin, end=begin + steps, keep_weights=recipe.keep_weights
  )


def has_fixed_masks(recipe: Recipe) -> bool:
  """Whether masks are made before training, or between two trainings."""
  return recipe.foresight != "none" or recipe.cycles > 1


def get_masks(recipe: Recipe, opt_state: PyTree, params: PyTree) -> PyTree:
  """The masks of a run; of a dense one, True everywhere."""
  if recipe.sparsity or has_fixed_masks(recipe) or recipe.dynamic.method != "none":
    return sparsejax.get_masks(opt_state, params)
  return full_masks(params)


def full_masks(params: PyTree) -> PyTree:
  return jax.tree.map(lambda p: jnp.ones_like(p, dtype=bool), params)


def make_initial_masks(
  recipe: Recipe,
  model: nn.Module,
  variables: Variables,
  batch: tuple[jax.Array, jax.Array],
  key: jax.Array,
) -> PyTree:
  """The masks that a recipe trains under from the start.

  Args:
    recipe: whose.
    model: the network.
    variables: its initial parameters and running statistics.
    batch: normalised images and their labels, as SNIP and GraSP look at them.
    key: for dropout, and for random masks.

  Returns:
    A full boolean tree like the parameters: True everywhere, if the recipe does not prune before
    training.
  """
  params, stats = variables["params"], variables["batch_stats"]
  # Whatever training computes in: methods should differ in their scores, not in their rounding.
  model = model.clone(dtype=jnp.float32)

  def loss(params, batch, temperature=1):
    images, labels = batch
    logits, _ = model.apply(
      {"params": params, "batch_stats": stats},
      images,
      train=True,
      mutable=["batch_stats"],
      rngs={"dropout": key},
    )
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits / temperature, labels)
    return jnp.mean(losses)

  def softened_loss(params, batch):
    return loss(params, batch, _GRASP_TEMPERATURE)

  def positive_logits(params, images):
    return model.apply({"params": params, "batch_stats": jax.tree.map(jnp.abs, stats)}, images)

  if recipe.foresight == "none":
    return full_masks(params)
  if recipe.foresight == "synflow":
    ones = jnp.ones_like(batch[0][:1])
    return foresight.synflow(positive_logits, params, ones, recipe.sparsity)
  scores = {
    "magnitude": lambda: foresight.magnitude(params),
    "random": lambda: foresight.random(params, key),
    "snip": lambda: foresight.snip(loss, params, batch),
    "grasp": lambda: foresight.grasp(softened_loss, params, [batch]),
  }[recipe.foresight]()
  return sparsejax.masks_from_scores(scores, recipe.sparsity)


def iterative_pruning(
  recipe: Recipe,
  train: Callable[[Ticket], Mapping[int, Variables]],
  variables: Variables,
  *,
  classes: int,
  steps_per_epoch: int,
  last: Round | None,
) -> Iterator[Round]:
  """The cycles of a recipe, of which a plain training has one.

  What is trained, pruned and rewound are parameters and running statistics together.

  Args:
    recipe: whose.
    train: see `sparsejax.lottery.iterative_pruning`.
    variables: initial parameters and running statistics.
    classes: number of units of the last layer.
    steps_per_epoch: number of optimizer steps.
    last: the round to go on from.
  """
  rate = recipe.prune_rate
  if recipe.prune_scope == "layer":
    kernels = [
      (path, leaf)
      for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
      if sparsejax.is_kernel(path, leaf)
    ]
    rates = {path: recipe.prune_rate for path, _ in kernels}
    last_layer = [path for path, leaf in kernels if leaf.shape[-1] == classes][-1]
    rates[last_layer] = recipe.prune_rate_output
    rate = jax.tree_util.tree_map_with_path(lambda path, _: rates.get(path, 0.0), variables)
  return lottery.iterative_pruning(
    train,
    variables,
    rounds=recipe.cycles,
    rate=rate,
    rewind_to=recipe.rewind_epoch * steps_per_epoch,
    rewind_weights=recipe.rewind_weights,
    last=last,
  )
