"""How far criteria agree: what they would drop of one network, and where they lead.

Structural similarity as in Fantastic Weights (arXiv 2306.12230): the Jaccard index of the sets of
weights that two criteria drop from the same state, and that of the masks that trainings end with
which differ in the criterion alone.
"""

import functools
import itertools
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tqdm

import sparsejax
from experiments import data, records, training
from experiments import train as train_lib
from experiments.augment import normalize
from experiments.models import MODELS
from experiments.run import Run
from sparsejax import criteria

PyTree = Any
_FRACTION = 0.5


def measure(runs: Mapping[str, Run], deadline: float = math.inf) -> dict[str, Any] | None:
  """Trains a network with each criterion, and compares them.

  Args:
    runs: by the name of the criterion that weights are dropped by, otherwise alike.
    deadline: by `time.perf_counter`, after which no epoch begins.

  Returns:
    What goes into a JSON: under "dropped" the Jaccard indices of what two criteria drop, half of
    the active weights of each layer, from the networks after each quarter of the first run, and
    under "final masks" those of the masks after all runs; each overall and by layer. None if the
    deadline came first.
  """
  (name, first), *_ = runs.items()
  dropped, final = [], {}
  for criterion, run in runs.items():
    recipe = run.recipe
    dataset = data.load(recipe.data, run.data_dir)
    trainer = training.make_trainer(recipe, dataset, run.seed)
    epoch_fn, state = trainer.compile_epoch(), trainer.init()
    for epoch in tqdm.trange(recipe.epochs, desc=criterion, unit="epoch"):
      if time.perf_counter() > deadline:
        return None
      state, _ = epoch_fn(state, trainer.train)
      if criterion == name and (epoch + 1) % (recipe.epochs // 4) == 0:
        sets = _dropped_by_each(run, dataset, trainer, state, [*runs, "random"])
        dropped.append({"epoch": epoch, **_compare(sets)})
    final[criterion] = sparsejax.get_masks(state.opt_state, state.params)
  return {
    "config": train_lib.make_config(first),
    "fraction": _FRACTION,
    "dropped": dropped,
    "final masks": _compare(final),
    **records.provenance(),
  }


def _dropped_by_each(
  run: Run,
  dataset: data.Dataset,
  trainer: training.Trainer,
  state: training.TrainState,
  names: list[str],
) -> dict[str, PyTree]:
  """What each criterion drops of a network, True where it does, by the gradient of one batch."""
  model = MODELS[run.recipe.model](classes=dataset.classes, width=run.recipe.width)
  index = slice(run.recipe.batch_size)
  pixels = trainer.train.pixels[trainer.train.index[index]]
  images = normalize(pixels, mean=dataset.mean, std=dataset.std)
  labels = trainer.train.labels[index]

  def loss(params):
    variables = {"params": params, "batch_stats": state.batch_stats}
    logits, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))

  gradient = jax.grad(loss)(state.params)
  masks = sparsejax.get_masks(state.opt_state, state.params)

  def dropped_of_leaf(path, weight, mask, gradient, criterion):
    if not sparsejax.is_kernel(path, weight):
      return jnp.zeros_like(mask)
    k = round(_FRACTION * int(mask.sum()))
    leaf = criteria.Leaf(
      weight, mask, gradient=gradient, key=jax.random.key(weight.size), count=jnp.uint32(k)
    )
    return sparsejax.select_smallest(criterion(leaf), k, among=mask)

  return {
    name: jax.tree_util.tree_map_with_path(
      functools.partial(dropped_of_leaf, criterion=criteria.BY_NAME[name]),
      state.params,
      masks,
      gradient,
    )
    for name in names
  }


def _compare(masks: Mapping[str, PyTree]) -> dict[str, Any]:
  """The Jaccard index of each pair of masks, overall and by layer."""
  pairs = []
  for a, b in itertools.combinations(masks, 2):
    overlap = sparsejax.overlap(masks[a], masks[b])
    pairs.append(
      {
        "pair": [a, b],
        "overall": float(overlap.overall),
        "layers": {name: float(value) for name, value in overlap.per_layer.items()},
      }
    )
  return {"pairs": pairs}
