"""Runs that differ in seed and sparsity alone, trained side by side as one compiled program."""

import dataclasses
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import tqdm

from experiments import checkpoints, cycles, data, records, training
from experiments import train as train_lib
from experiments.recipe import Recipe
from experiments.run import Run
from experiments.training import Images


def fit_in_lanes(recipe: Recipe) -> bool:
  """Whether runs of this recipe may have a sparsity of their own each.

  They may if only the masks that they start with depend on it, and no ramp does; and if the images
  are in memory.
  """
  is_simple = recipe.cycles == 1 and recipe.best_above == 1 and recipe.data != "imagenet2012"
  return is_simple and not recipe.has_ramp


def train_lanes(
  runs: Sequence[Run], folder: pathlib.Path, time_limit: float = math.inf
) -> list[dict[str, Any]] | None:
  """Trains runs to their end or the time limit, from the last checkpoint if there is one.

  Each ends with the masks that it would have if it were trained alone, as far as its gradients have
  the same bits. On a CPU, networks with convolutions are trained one after the other.

  Args:
    runs: that differ in seed, in the sparsity of their recipe, and in their folders.
    folder: for the checkpoints of all of them.
    time_limit: seconds, compilation included, after which no epoch may end.

  Returns:
    The contents of each `result.json`, whose seconds are shares of the time of all; None if the
    time limit came first.

  Raises:
    ValueError: if the runs differ in more than that, or if the folder holds other ones.
  """
  deadline = time.perf_counter() + time_limit
  _check_alike(runs)
  recipe, first = runs[0].recipe, runs[0]
  dataset = data.load(recipe.data, first.data_dir)
  config = {"lanes": [train_lib.make_config(run) for run in runs]}
  provenance = records.provenance()
  with records.open_folder(folder, config), jax.default_device(train_lib.find_device(first.device)):
    # On the device once, for all lanes.
    dataset = dataclasses.replace(
      dataset,
      train_images=jnp.asarray(dataset.train_images),
      test_images=jnp.asarray(dataset.test_images),
    )
    trainers = [training.make_trainer(run.recipe, dataset, run.seed) for run in runs]
    if trainers[0].steps_are_calls:
      return _one_after_the_other(runs, deadline)
    compiling = time.perf_counter()
    # The optimizer is a part of each state; that of one does for all.
    states = [trainer.init().replace(tx=trainers[0].tx) for trainer in trainers]
    state = jax.block_until_ready(_stack(states))
    train = _stack_images([trainer.train for trainer in trainers])
    held_out = _stack_images([trainer.held_out for trainer in trainers])
    over = (0, Images(pixels=None, index=0, labels=0, key=0))
    epoch_fn = jax.jit(jax.vmap(trainers[0].epoch, over), donate_argnums=0)
    epoch_fn = epoch_fn.lower(state, train).compile()
    validate = jax.jit(jax.vmap(trainers[0].validate, over))
    compile_seconds = time.perf_counter() - compiling
    records.replace_file(folder / "config.json", records.to_json(config))
    longest = 0.0
    with (
      checkpoints.open_checkpoints(folder / "checkpoints") as saved,
      tqdm.tqdm(total=recipe.epochs, desc=f"{first.name}, {len(runs)} lanes", unit="epoch") as bar,
    ):
      state, metrics = saved.restore_latest(state)
      bar.update(len(metrics))
      for epoch in range(len(metrics), recipe.epochs):
        started = time.perf_counter()
        # Each session trains one epoch at least.
        if longest and started + 1.5 * longest > deadline:
          if len(metrics) not in saved.epochs:
            saved.save(state, metrics)
          return None
        state, trained = jax.block_until_ready(epoch_fn(state, train))
        seconds = (time.perf_counter() - started) / len(runs)
        found = validate(state, held_out)
        device = next(iter(state.step.devices()))
        metrics.append(
          [
            cycles.make_line(epoch, each, evaluation, bool(evaluation.constant), seconds, device)
            for each, evaluation in zip(_unstack(trained), _unstack(found))
          ]
        )
        bar.update()
        longest = max(longest, time.perf_counter() - started)
        if len(metrics) % first.checkpoint_every == 0:
          saved.save(state, metrics)
    results = []
    for i, (run, trainer, of_run) in enumerate(zip(runs, trainers, _unstack(state))):
      run.folder.mkdir(parents=True, exist_ok=True)
      lines = [of_epoch[i] for of_epoch in metrics]
      _, result = train_lib.finish(
        run, trainer, of_run, lines, compile_seconds / len(runs), provenance | {"lanes": len(runs)}
      )
      results.append(result)
    return results


def _check_alike(runs: Sequence[Run]) -> None:
  """Raises a ValueError if runs differ in more than seed, sparsity and folder."""
  first, *others = [
    dataclasses.replace(run, seed=0, out=None, recipe=runs[0].recipe) for run in runs
  ]
  recipe, *recipes = [dataclasses.asdict(run.recipe) | {"sparsity": None} for run in runs]
  if any(run != first for run in others) or any(each != recipe for each in recipes):
    raise ValueError("lanes must differ in seed, sparsity and folder alone")
  sparsities = {run.recipe.sparsity for run in runs}
  if len(sparsities) > 1 and not fit_in_lanes(runs[0].recipe):
    raise ValueError("lanes of one program must have the same sparsity where a ramp leads to it")


def _one_after_the_other(runs: Sequence[Run], deadline: float) -> list[dict[str, Any]] | None:
  results = []
  for run in runs:
    left = deadline - time.perf_counter()
    result = train_lib.train(dataclasses.replace(run, time_limit=left)) if left > 0 else None
    if result is None:
      return None
    results.append(result)
  return results


def _stack(trees: Sequence[Any]) -> Any:
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _stack_images(sets: Sequence[Images]) -> Images:
  """Sets of images of one data set, whose pixels stand for all."""
  stacked = _stack([images._replace(pixels=None) for images in sets])
  return stacked._replace(pixels=sets[0].pixels)


def _unstack(tree: Any) -> list[Any]:
  count = len(jax.tree.leaves(tree)[0])
  return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(count)]
