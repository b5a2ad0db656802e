"""Training with pruning and without it: single steps, and whole epochs."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from experiments import training
from experiments.benchmark import steps, timing
from experiments.learner import make_learner
from experiments.models import MODELS
from experiments.published import PUBLISHED, Dataset
from experiments.recipe import Recipe
from experiments.recipes import RECIPES

# How many training images each data set has, and their shape.
IMAGES = {
  "digits": (1_442, 8, 8, 1),
  "mnist": (60_000, 28, 28, 1),
  "cifar10": (50_000, 32, 32, 3),
}

# Of dense bfloat16 matrix products, in FLOP/s, as the makers give it.
PEAKS = {
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H200": 989e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
}


# What pruning may add to a step is less than the time of the same step varies by: it takes so many
# times the rounds, and seconds for each variant.
_MORE_ROUNDS = 6
_LIMIT = 60.0


def measure_network(name: str, dtype: str, batch_size: int, *, rounds: int) -> dict[str, Any]:
  """Times steps: augmentation, forward, backward, optimizer and pruning, as a recipe has them.

  The step without pruning is there twice, compiled by itself each time: how much it differs from
  itself is how much this measurement can tell.

  Args:
    name: of a recipe whose sparsity rises along a ramp.
    dtype: in which the network computes.
    batch_size: images in a step; 0: as many as the recipe has.
    rounds: of which there are more, see `_MORE_ROUNDS`.

  Returns:
    A row of raw numbers.
  """
  published = RECIPES[name]
  # A ramp so long that each change prunes some weights more; masks are due at even calls.
  changes = steps.RAMP // 2
  recipe = dataclasses.replace(
    published,
    dtype=dtype,
    batch_size=batch_size or published.batch_size,
    epochs=changes + 1,
    prune_begin=0,
    prune_epochs=changes,
  )
  dense = dataclasses.replace(recipe, sparsity=0.0, initial_sparsity=0.0)
  images, *shape = IMAGES[recipe.data]
  batches = (images - round(published.validation * images)) / published.batch_size
  dataset = random_images(recipe.batch_size, shape)
  (run_dense, compile_dense), (run_again, _), (run, compile_pruned) = (
    _make_step(each, dataset) for each in (dense, dense, recipe)
  )
  idle = steps.idle_calls()
  variants = {
    "dense": lambda: run_dense(idle),
    "again": lambda: run_again(idle),
    **steps.make_variants(run),
  }
  return {
    "recipe": name,
    "tree": recipe.model,
    "dtype": dtype,
    "sparsity": recipe.sparsity,
    "batch_size": recipe.batch_size,
    "steps_an_epoch": math.floor(batches) if published.drop_last else math.ceil(batches),
    "seconds": timing.take_turns(variants, _MORE_ROUNDS * rounds, _LIMIT),
    "dense": {"compile_seconds": compile_dense},
    "pruned": {"compile_seconds": compile_pruned},
  }


def _make_step(recipe: Recipe, dataset: Dataset) -> tuple[Callable[[np.ndarray], Any], list[float]]:
  """A function that makes a step of a given number, in place; and the seconds of compilation."""
  learner = make_learner(
    recipe,
    dataset.train_images.shape[1:],
    classes=dataset.classes,
    mean=dataset.mean,
    std=dataset.std,
    steps_per_epoch=2,
    key=jax.random.key(0),
  )

  def step(state, pixels, labels, key, calls):
    (call,) = calls
    opt_state = optax.tree.set(state.opt_state, count=call)
    state = state.replace(step=call, opt_state=opt_state)
    inputs = learner.prepare(key, call, pixels)
    return learner.train_step(state, inputs, labels, key, tx=learner.tx)

  batch = jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels)
  key = jax.random.key(1)
  program, seconds = timing.compile_afresh(
    step, learner.state, *batch, key, steps.idle_calls(), donate_argnums=0
  )
  held = [learner.init(*batch)]

  def run(calls):
    held[0], sums = program(held[0], *batch, key, calls)
    return sums

  return run, seconds


def measure_epochs(
  name: str, dtype: str, unroll: int, *, images: int, rounds: int
) -> dict[str, Any]:
  """Times whole epochs on random pixels, with the pruning of a recipe and without it.

  Args:
    name: of the recipe.
    dtype: in which the network computes.
    unroll: how many steps are written out in one turn of an epoch's loop.
    images: how many there are; 0: as many as the data set has.
    rounds: see `timing.take_turns`.

  Returns:
    A row of raw numbers.
  """
  recipe = dataclasses.replace(RECIPES[name], dtype=dtype)
  dense = dataclasses.replace(recipe, sparsity=0.0, initial_sparsity=0.0)
  count, *shape = IMAGES[recipe.data]
  dataset = random_images(images or count, shape)
  if recipe.data in PUBLISHED:
    # With these, the program is the very one of a run.
    moments = PUBLISHED[recipe.data]
    dataset = dataclasses.replace(dataset, mean=moments.mean, std=moments.std)
  started = time.perf_counter()
  trainer = training.make_trainer(recipe, dataset, seed=0, unroll=unroll)
  train = _make_epochs(trainer)
  compile_seconds = time.perf_counter() - started
  train_dense = _make_epochs(training.make_trainer(dense, dataset, seed=0, unroll=unroll))
  seconds = timing.take_turns({"pruned": train, "dense": train_dense}, rounds)
  steps_an_epoch, trained = trainer.steps_per_epoch, trainer.train.labels.size
  return {
    "recipe": name,
    "device": jax.devices()[0].device_kind,
    "dtype": dtype,
    "sparsity": recipe.sparsity,
    "unroll": unroll,
    "images": steps_an_epoch * recipe.batch_size if recipe.drop_last else trained,
    "steps_an_epoch": steps_an_epoch,
    "epochs": recipe.epochs,
    "seconds": seconds,
    "compile_seconds": compile_seconds,
    "flops_an_image": 3 * forward_flops(recipe, dataset),
    "peak_flops": PEAKS.get(jax.devices()[0].device_kind) if dtype == "bfloat16" else None,
  }


def _make_epochs(trainer: training.Trainer) -> Callable[[], Any]:
  """A function that trains one more epoch at each call, already called once."""
  epoch = trainer.compile_epoch()
  held = [trainer.init()]

  def train():
    held[0], metrics = epoch(held[0], trainer.train)
    return metrics

  jax.block_until_ready(train())
  return train


def forward_flops(recipe: Recipe, dataset: Dataset) -> int:
  """Multiplications and additions of the layers, for one image.

  A step takes three times that for each, by the usual count.
  """
  model = MODELS[recipe.model](classes=dataset.classes, width=recipe.width)
  flops = []

  def count(call, args, kwargs, context):
    out = call(*args, **kwargs)
    if isinstance(context.module, nn.Conv | nn.Dense) and context.method_name == "__call__":
      kernel = context.module.get_variable("params", "kernel")
      flops.append(2 * kernel.size * math.prod(out.shape[1:-1]))
    return out

  with nn.intercept_methods(count):
    image = jnp.zeros([1, *dataset.train_images.shape[1:]])
    jax.eval_shape(model.init, jax.random.key(0), image)
  return sum(flops)


def random_images(count: int, shape: Sequence[int]) -> Dataset:
  """Random pixels with random labels of ten classes."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (count, *shape), np.uint8)
  labels = rng.integers(0, 10, count).astype(np.int32)
  moments = (0.5,) * shape[-1]
  return Dataset("random pixels", images, labels, images[:1], labels[:1], moments, moments)
