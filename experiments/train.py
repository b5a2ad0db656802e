"""Trains one run of a recipe.

    python -m experiments.train [RECIPE] [options]

Writes to the run's folder: `metrics.jsonl`, a line per epoch; checkpoints; and at the end
`result.json`, `summary.txt` and `plot.png`. The same command run again resumes at the last
checkpoint, on this machine or on another, with bit-identical results on CPUs of one kind with as
many cores, and on a GPU with --deterministic.

Several processes train one run together with --distributed:

    python -m experiments.train [RECIPE] --distributed --coordinator HOST:PORT --processes 4 \
      --process I --mesh data=4,model=2
"""

import contextlib
import dataclasses
import difflib
import json
import os
import sys
import time
from typing import Any, TypeVar

import jax
import tyro
from jax.sharding import Mesh

import sparsejax
from experiments import (
  commands,
  data,
  distributed,
  imagenet,
  methods,
  plots,
  records,
  streaming,
  training,
)
from experiments.cycles import train_cycles
from experiments.recipe import Recipe, smoke
from experiments.recipes import RECIPES
from experiments.run import Run

Options = TypeVar("Options")

DEFAULT_RECIPE = "lenet300-digits"
_DETERMINISM_FLAG = "--xla_gpu_deterministic_ops=true"


def train(run: Run) -> dict[str, Any] | None:
  """Trains a run to its end or its time limit, from its last checkpoint if there is one.

  Returns:
    The contents of its `result.json`; None if it stopped at the time limit.

  Raises:
    ValueError: if the folder holds a run with other settings, if the recipe does not fit the data,
      if there are no such devices as are asked for, or if processes disagree.
  """
  deadline = time.perf_counter() + run.time_limit
  if run.smoke:
    run = dataclasses.replace(run, recipe=smoke(run.recipe), out=run.folder, smoke=False)
  if run.deterministic and _DETERMINISM_FLAG not in os.environ.get("XLA_FLAGS", ""):
    raise ValueError("deterministic=True has come too late: call set_determinism first")
  recipe = run.recipe
  config = make_config(run)
  device = find_device(run.device)
  distributed.check_agreement(config | _what_all_agree_on(run))
  mesh = None
  if run.mesh or run.distributed.enabled:
    mesh = distributed.make_mesh(run.mesh, jax.devices(device.platform))
  provenance = records.provenance()
  with contextlib.ExitStack() as stack:
    distributed.from_first(lambda: stack.enter_context(records.open_folder(run.folder, config)))
    stack.enter_context(jax.default_device(device))
    path = run.folder / "result.json"
    result = distributed.from_first(lambda: records.read_result(path) if path.exists() else None)
    if result is not None:
      _say(f"This run is finished.\n{records.describe_result(recipe, result)}")
      return result
    trainer = make_trainer(run, mesh)
    compiling = time.perf_counter()
    state = jax.block_until_ready(trainer.init())
    epoch_fn = trainer.compile_epoch()
    compile_seconds = time.perf_counter() - compiling
    if distributed.is_first():
      records.replace_file(run.folder / "config.json", records.to_json(config))
    state, metrics = train_cycles(run, trainer, epoch_fn, state, deadline)
    if len(metrics) < recipe.total_epochs:
      _say(
        f"\nStopped at the time limit after {len(metrics)} of {recipe.total_epochs} epochs: the"
        " same command resumes."
      )
      return None
    summary, result = finish(run, trainer, state, metrics, compile_seconds, provenance)
  _say(f"\n{summary}\n\n{records.describe_result(recipe, result)}\nresults in {run.folder}")
  return result


def _what_all_agree_on(run: Run) -> dict[str, Any]:
  """The options that are no part of the config, but have to be the same in all processes."""
  own = {"recipe", "name", "seed", "data_dir", "workers", "distributed"}
  return {
    field.name: getattr(run, field.name)
    for field in dataclasses.fields(run)
    if field.name not in own
  }


def _say(text: str) -> None:
  if distributed.is_first():
    print(text)


def make_trainer(run: Run, mesh: Mesh | None) -> training.Trainer:
  """Prepares a run on its data, in memory or streamed."""
  dataset = data.load(run.recipe.data, run.data_dir)
  if isinstance(dataset, imagenet.Imagenet):
    return streaming.make_trainer(run.recipe, dataset, run.seed, workers=run.workers, mesh=mesh)
  return training.make_trainer(run.recipe, dataset, run.seed, mesh=mesh)


def finish(
  run: Run,
  trainer: training.Trainer,
  state: training.TrainState,
  metrics: list[dict[str, Any]],
  compile_seconds: float,
  provenance: dict[str, Any],
) -> tuple[sparsejax.Summary, dict[str, Any]]:
  """Writes the results of a run into its folder: a summary, a picture, and `result.json`."""
  masks = methods.get_masks(run.recipe, state.opt_state, state.params)
  masks = distributed.place(masks, distributed.everywhere(trainer.mesh))
  summary = sparsejax.summary(state.params, masks)
  result = {
    **records.make_result(
      make_config(run),
      metrics,
      summary,
      test_accuracy=float(trainer.evaluate(state, trainer.test).accuracy),
      compile_seconds=compile_seconds,
    ),
    "deterministic": run.deterministic,
    **provenance,
    # Of the last session.
    "processes": jax.process_count(),
    "mesh": trainer.mesh and dict(trainer.mesh.shape),
  }

  def write():
    records.replace_file(run.folder / "summary.txt", f"{summary}\n")
    title = f"{run.name}, seed {run.seed}: {result['test_accuracy']:.2f} % test accuracy"
    plots.plot_run(run.folder / "plot.png", title, metrics, summary)
    # Last of all: with it a run is finished.
    records.replace_file(run.folder / "result.json", records.to_json(result))
    return result

  return summary, distributed.from_first(write)


def make_config(run: Run) -> dict[str, Any]:
  """What decides the outcome of a run, as it is read again: with lists in place of tuples."""
  config = {"recipe": run.name, "seed": run.seed, **dataclasses.asdict(run.recipe)}
  return json.loads(records.to_json(config))


def find_device(kind: str) -> jax.Device:
  """The first device of a kind that this process has."""
  try:
    return jax.local_devices(backend=None if kind == "any" else kind)[0]
  except (RuntimeError, AssertionError) as error:
    raise ValueError(f"device={kind} is asked for, but JAX finds none: {error}") from error


def set_determinism(deterministic: bool) -> None:
  """Asks XLA for the same bits each time on a GPU; read when JAX first looks for devices."""
  if deterministic:
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} {_DETERMINISM_FLAG}".strip()


def parse(
  options: type[Options], command: str, description: str, args: list[str] | None
) -> Options:
  """Reads the options of a command whose first argument is a recipe.

  Args:
    options: what to make of a recipe and its name; its other fields are the options.
    command: name of its module.
    description: what it does, in a sentence.
    args: of the command; by default those of this process.
  """
  prog = f"python -m experiments.{command}"
  args = sys.argv[1:] if args is None else args
  if args and args[0] in ("-h", "--help"):
    width = max(map(len, RECIPES))
    lines = [f"usage: {prog} [RECIPE] [OPTIONS]", "", description, ""]
    lines += [f"{prog} RECIPE --help shows its options. Without a recipe: {DEFAULT_RECIPE}.", ""]
    lines += [f"  {name:{width}}  {_describe_recipe(recipe)}" for name, recipe in RECIPES.items()]
    print("\n".join(lines))
    sys.exit()
  if not args or args[0].startswith("-"):
    if named := [arg for arg in args if arg in RECIPES]:
      sys.exit(f"The recipe comes first: {named[0]} ...")
    args = [DEFAULT_RECIPE, *args]
  name, *args = args
  if name not in RECIPES:
    close = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.3)
    hint = f" Did you mean {close[0]}?" if close else ""
    sys.exit(f"Unknown recipe {name}.{hint} There are:\n  " + "\n  ".join(RECIPES))
  return tyro.cli(
    options,
    default=options(RECIPES[name], name),
    prog=f"{prog} {name}",
    description=f"{description} {name}: {_describe_recipe(RECIPES[name])}.",
    args=args,
    config=(tyro.conf.OmitArgPrefixes,),
  )


def main(args: list[str] | None = None) -> None:
  with commands.errors_as_messages(resumes=True):
    run = parse(Run, "train", "Trains one run of a recipe.", args)
    set_determinism(run.deterministic)
    distributed.start(run.distributed)
    try:
      train(run)
    except jax.errors.JaxRuntimeError as error:
      if run.distributed.enabled:
        error.add_note("If another process has ended: the same commands resume all of them.")
      raise


def _describe_recipe(recipe: Recipe) -> str:
  epochs = f"{recipe.epochs} epochs"
  if recipe.cycles > 1:
    return f"{recipe.model} on {recipe.data}, {recipe.cycles} cycles of {epochs}, pruned in between"
  pruned = f"{recipe.sparsity:.1%} pruned" if recipe.sparsity else "dense"
  before = f" before, by {recipe.foresight}" if recipe.foresight != "none" else ""
  return f"{recipe.model} on {recipe.data}, {epochs}, {pruned}{before}"


if __name__ == "__main__":
  main()
