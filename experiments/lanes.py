"""Runs that differ in seed and sparsity alone, trained side by side as one compiled program.

It is the epoch of one run under two `jax.vmap`s, over sparsity and over seed; all lanes share the
images. The sparsity is data: each lane's state has the index of its own, from which come exactly as
many pruned weights as in a run of its own (see `sparsejax.OneOf`).
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import pathlib
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import tqdm

from experiments import checkpoints, commands, cycles, data, records, training
from experiments import train as train_lib
from experiments.recipe import Recipe
from experiments.run import Run
from experiments.training import Images


def check_fit(recipe: Recipe) -> None:
  """Raises a ValueError that names the field by which runs of a recipe cannot be lanes."""
  commands.check_fields(recipe, _requirements(recipe))


def fit_in_lanes(recipe: Recipe) -> bool:
  """Whether runs of a recipe can be trained side by side."""
  return all(holds for holds, _ in _requirements(recipe).values())


def _requirements(recipe: Recipe) -> dict[str, tuple[bool, str]]:
  return {
    "cycles": (recipe.cycles == 1, "1 for runs side by side"),
    "data": (
      recipe.data != "imagenet2012",
      "images in memory, not a stream, for runs side by side",
    ),
  }


def in_grids(runs: Sequence[Run], size: int) -> list[list[Run]]:
  """Splits runs of one recipe into sets of all combinations of some sparsities and some seeds.

  Args:
    runs: that differ in seed and sparsity.
    size: the most runs in a set.
  """
  seeds_of = {}
  for run in runs:
    seeds_of.setdefault(run.recipe.sparsity, {})[run.seed] = run
  rows_of = {}
  for row in seeds_of.values():
    rows_of.setdefault(tuple(row), []).append(row)
  grids = []
  for seeds, rows in rows_of.items():
    for i in range(0, len(seeds), size):
      some = seeds[i : i + size]
      height = size // len(some)
      for j in range(0, len(rows), height):
        grids.append([row[seed] for row in rows[j : j + height] for seed in some])
  return grids


def find_sets(
  runs: Sequence[Run], missing: Sequence[Run], folder: pathlib.Path, size: int
) -> dict[pathlib.Path, list[Run]]:
  """The sets in which runs of one recipe are trained, each by the folder of its checkpoints.

  Args:
    runs: that differ in seed and sparsity.
    missing: those of them that have no result.
    folder: for the folders of all sets.
    size: the most runs in a new set.

  Returns:
    The sets, no run in two of them: what was begun together, if all of it is among the runs, and
    the rest of what is missing.
  """
  left, sets = set(map(_place, missing)), {}
  begun = _begun(runs, folder) if left else {}
  # Of sets that share runs, the one that is to give most.
  for own, together in sorted(begun.items(), key=lambda item: -len(left & {*map(_place, item[1])})):
    is_shared = any(run in others for run in together for others in sets.values())
    if not is_shared and not left.isdisjoint(places := set(map(_place, together))):
      sets[own] = together
      left -= places
  for together in in_grids([run for run in missing if _place(run) in left], size):
    places = " ".join(f"{sparsity} {seed}" for sparsity, seed in map(_place, together))
    sets[folder / f"{zlib.crc32(places.encode()):08x}"] = together
  return sets


def _begun(runs: Sequence[Run], folder: pathlib.Path) -> dict[pathlib.Path, list[Run]]:
  """The sets that were begun of these runs and no others, each by its folder."""
  begun = {}
  for path in sorted(folder.glob("*/config.json")):
    config = records.read_json(path)
    axes = [config.get(key) for key in ("sparsity", "seed")]
    places = list(itertools.product(*axes)) if all(isinstance(x, list) for x in axes) else []
    together = [run for place in places for run in runs if _place(run) == place]
    is_whole = 0 < len(together) == len(places)
    if is_whole and not records.find_differences(config, _config(together)):
      begun[path.parent] = together
  return begun


def _config(runs: Sequence[Run]) -> dict[str, Any]:
  """What goes into the `config.json` of a set of runs."""
  sparsities, seeds = (list(dict.fromkeys(axis)) for axis in zip(*_check_grid(runs)))
  return train_lib.make_config(runs[0]) | {"sparsity": sparsities, "seed": seeds}


def train_lanes(
  runs: Sequence[Run], folder: pathlib.Path, time_limit: float = math.inf
) -> list[dict[str, Any]] | None:
  """Trains runs to their end or the time limit, from the last checkpoint if there is one.

  Each ends with the masks that it would have if it were trained alone, as far as its gradients have
  the same bits; and after each epoch it has exactly as many pruned weights. On a CPU, networks with
  convolutions are trained one after the other.

  Args:
    runs: all combinations of some sparsities and some seeds, that differ in nothing else but their
      folders.
    folder: for the checkpoints of all of them.
    time_limit: seconds, compilation included, after which no epoch may end.

  Returns:
    The contents of each `result.json`, whose seconds are shares of the time of all; one that is
    there already stays. None if the time limit came first.

  Raises:
    ValueError: if the runs are others, or of a recipe that does not fit in lanes, or if the folder,
      or that of a run, holds other ones.
  """
  deadline = time.perf_counter() + time_limit
  grid = _check_grid(runs)
  config = _config(runs)
  sparsities, seeds = tuple(config["sparsity"]), tuple(config["seed"])
  # It prunes if any of them does.
  recipe, first = max((run.recipe for run in runs), key=lambda r: r.sparsity), runs[0]
  dataset = data.load(recipe.data, first.data_dir)
  provenance = records.provenance()
  with contextlib.ExitStack() as stack:
    stack.enter_context(records.open_folder(folder, config))
    stack.enter_context(jax.default_device(train_lib.find_device(first.device)))
    # On the device once, for all lanes.
    dataset = dataclasses.replace(
      dataset,
      train_images=jnp.asarray(dataset.train_images),
      test_images=jnp.asarray(dataset.test_images),
    )
    trainers = [
      training.make_trainer(recipe, dataset, seed, sparsities=sparsities) for seed in seeds
    ]
    trainer = trainers[0]
    if trainer.steps_are_calls:
      print(
        f"{recipe.model} has convolutions, which XLA's CPU backend runs far slower in a loop: the"
        f" {len(runs)} runs are trained one after the other."
      )
      return _one_after_the_other(runs, deadline)
    for run in runs:
      stack.enter_context(records.open_folder(run.folder, train_lib.make_config(run)))
    compiling = time.perf_counter()
    # The optimizer is a part of each state; that of one does for all.
    state = _stack(
      [
        _stack([of_seed.init(index).replace(tx=trainer.tx) for of_seed in trainers])
        for index in range(len(sparsities))
      ]
    )
    state = jax.block_until_ready(state)
    train = _stack_images([of_seed.train for of_seed in trainers])
    epoch_fn = jax.jit(_in_lanes(trainer.epoch), donate_argnums=0)
    epoch_fn = epoch_fn.lower(state, train).compile()
    compile_seconds = time.perf_counter() - compiling
    held_out = _stack_images([of_seed.held_out for of_seed in trainers])
    some = _stack_images([of_seed.train.first(1000) for of_seed in trainers])
    validate = jax.jit(_in_lanes(trainer.validate))

    def describe(epoch, state, trained, seconds):
      """The lines of an epoch, as `cycles` makes them of one run."""
      size = trainer.held_out.size
      found = validate(state, held_out) if size else None
      # A few images may have the same output by chance.
      watched = found if size >= 100 else validate(state, some)
      device = next(iter(state.step.devices()))
      lines = []
      for lane in range(len(runs)):
        mine = functools.partial(_lane, lane=lane)
        constant = bool(mine(watched).constant)
        line = cycles.make_line(
          epoch, mine(trained), found and mine(found), constant, seconds, device
        )
        if line["sparsity"] > recipe.best_above:
          line["test_accuracy"] = float(trainer.evaluate(mine(state), trainer.test).accuracy)
        lines.append(line)
      return lines

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
        metrics.append(describe(epoch, state, trained, seconds))
        bar.update()
        longest = max(longest, time.perf_counter() - started)
        if len(metrics) % first.checkpoint_every == 0 or len(metrics) == recipe.epochs:
          saved.save(state, metrics)
    provenance |= {"lanes": len(runs)}
    results = {}
    for lane, (place, run) in enumerate(grid.items()):
      if (path := run.folder / "result.json").exists():
        results[place] = records.read_result(path)
        continue
      config = records.to_json(train_lib.make_config(run))
      records.replace_file(run.folder / "config.json", config)
      lines = [of_epoch[lane] for of_epoch in metrics]
      text = "".join(json.dumps(line) + "\n" for line in lines)
      records.replace_file(run.folder / "metrics.jsonl", text)
      _, results[place] = train_lib.finish(
        run, trainer, _lane(state, lane), lines, compile_seconds / len(runs), provenance
      )
    return [results[_place(run)] for run in runs]


def _place(run: Run) -> tuple[float, int]:
  return run.recipe.sparsity, run.seed


def _check_grid(runs: Sequence[Run]) -> dict[tuple[float, int], Run]:
  """The runs by sparsity and seed, in the order of lanes.

  Raises:
    ValueError: if they differ in more than that and their folders, or are not all combinations.
  """
  first, *others = [
    dataclasses.replace(run, seed=0, out=None, recipe=runs[0].recipe) for run in runs
  ]
  recipe, *recipes = [dataclasses.asdict(run.recipe) | {"sparsity": None} for run in runs]
  if any(run != first for run in others) or any(each != recipe for each in recipes):
    raise ValueError("lanes must differ in seed, sparsity and folder alone")
  check_fit(runs[0].recipe)
  found = {_place(run): run for run in runs}
  grid = list(itertools.product(*(dict.fromkeys(axis) for axis in zip(*found))))
  if len(found) < len(runs) or len(found) < len(grid):
    raise ValueError(
      f"lanes must be all combinations of some sparsities and some seeds, each once, got"
      f" {list(map(_place, runs))}"
    )
  return {place: found[place] for place in grid}


def _one_after_the_other(runs: Sequence[Run], deadline: float) -> list[dict[str, Any]] | None:
  results = []
  for run in runs:
    left = deadline - time.perf_counter()
    result = train_lib.train(dataclasses.replace(run, time_limit=left)) if left > 0 else None
    if result is None:
      return None
    results.append(result)
  return results


def _in_lanes(function: Callable[[Any, Images], Any]) -> Callable[[Any, Images], Any]:
  """A function of a state and images, for states by sparsity and seed and for images by seed."""
  images = Images(pixels=None, index=0, labels=0, key=0)
  return jax.vmap(jax.vmap(function, (0, images)), (0, None))


def _stack(trees: Sequence[Any]) -> Any:
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _stack_images(sets: Sequence[Images]) -> Images:
  """Sets of images of one data set, whose pixels stand for all."""
  stacked = _stack([images._replace(pixels=None) for images in sets])
  return stacked._replace(pixels=sets[0].pixels)


def _lane(tree: Any, lane: int) -> Any:
  """What belongs to one lane, counted through seeds first."""
  return jax.tree.map(lambda leaf: leaf[divmod(lane, leaf.shape[1])], tree)
