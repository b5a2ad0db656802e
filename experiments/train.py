"""Trains one run of a recipe.

    python -m experiments.train [RECIPE] [options]

Writes to the run's folder: `metrics.jsonl`, a line per epoch; checkpoints; and at the end
`result.json`, `summary.txt` and `plot.png`. The same command run again resumes at the last
checkpoint, on this machine or on another, with bit-identical results on a CPU, and on a GPU with
--deterministic.
"""

import dataclasses
import difflib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import tqdm
import tyro

import sparsejax
from experiments import checkpoints, commands, data, plots, recipes, records, training
from experiments.recipes import RECIPES, Recipe

DEFAULT_RECIPE = "lenet300-digits"
_DETERMINISM_FLAG = "--xla_gpu_deterministic_ops=true"


@dataclasses.dataclass(frozen=True)
class Run:
  """A recipe, a seed, and where things lie."""

  recipe: Recipe
  name: tyro.conf.Suppress[str]
  seed: int = 42
  """Decides initialisation, split, order and augmentation."""
  data_dir: pathlib.Path | None = None
  """Directory of the data set; see the README."""
  out: pathlib.Path | None = None
  """The run's folder; by default runs/RECIPE/seedSEED, or runs/RECIPE-smoke/seedSEED."""
  checkpoint_every: int = 10
  """Epochs from one checkpoint to the next; there is always one at the end."""
  time_limit: float = math.inf
  """Seconds, compilation included, after which no epoch may end: the run stops before that with a
  checkpoint, from which the same command resumes. It always trains one epoch."""
  device: Literal["any", "cpu", "gpu", "tpu"] = "any"
  """What to train on; it is an error if there is none."""
  deterministic: bool = False
  """Whether a GPU has to give the same bits each time, which is slower. A CPU always does."""
  smoke: bool = False
  """Whether to train only a narrow version of the network on 512 images for two epochs."""

  def __post_init__(self):
    commands.check_fields(
      self,
      {
        "seed": (self.seed >= 0, "at least 0"),
        "checkpoint_every": (self.checkpoint_every >= 1, "at least 1"),
        "time_limit": (self.time_limit > 0, "positive"),
      },
    )

  @property
  def folder(self) -> pathlib.Path:
    name = f"{self.name}-smoke" if self.smoke else self.name
    return self.out or pathlib.Path("runs") / name / f"seed{self.seed}"


def train(run: Run) -> dict[str, Any] | None:
  """Trains a run to its end or its time limit, from its last checkpoint if there is one.

  Returns:
    The contents of its `result.json`; None if it stopped at the time limit.

  Raises:
    ValueError: if the folder holds a run with other settings, if the recipe does not fit the data,
      or if there is no such device as is asked for.
  """
  deadline = time.perf_counter() + run.time_limit
  if run.smoke:
    smoke = recipes.smoke(run.recipe)
    run = dataclasses.replace(run, recipe=smoke, out=run.folder, smoke=False)
  if run.deterministic and _DETERMINISM_FLAG not in os.environ.get("XLA_FLAGS", ""):
    raise ValueError("deterministic=True has come too late: call set_determinism first")
  recipe = run.recipe
  config = {"recipe": run.name, "seed": run.seed, **dataclasses.asdict(recipe)}
  device = _find_device(run.device)
  provenance = records.provenance()
  with records.open_folder(run.folder, config), jax.default_device(device):
    path = run.folder / "result.json"
    if path.exists():
      result = records.read_json(path)
      print(f"This run is finished.\n{records.describe_result(recipe, result)}")
      return result
    trainer = training.make_trainer(recipe, data.load(recipe.data, run.data_dir), run.seed)
    compiling = time.perf_counter()
    state = jax.block_until_ready(trainer.init())
    epoch_fn = trainer.compile_epoch()
    compile_seconds = time.perf_counter() - compiling
    records.replace_file(run.folder / "config.json", records.to_json(config))
    state, metrics = _train_epochs(run, trainer, epoch_fn, state, deadline)
    if len(metrics) < recipe.epochs:
      print(
        f"\nStopped at the time limit after {len(metrics)} of {recipe.epochs} epochs: the same"
        " command resumes."
      )
      return None
    summary = sparsejax.summary(state.params, training.get_masks(recipe, state))
    result = {
      **records.make_result(
        config,
        metrics,
        summary,
        test_accuracy=float(trainer.evaluate(state, trainer.test).accuracy),
        compile_seconds=compile_seconds,
      ),
      "deterministic": run.deterministic,
      **provenance,
    }
    (run.folder / "summary.txt").write_text(f"{summary}\n")
    title = f"{run.name}, seed {run.seed}: {result['test_accuracy']:.2f} % test accuracy"
    plots.plot_run(run.folder / "plot.png", title, metrics, summary)
    # Last of all: with it a run is finished.
    records.replace_file(path, records.to_json(result))
  print(f"\n{summary}\n\n{records.describe_result(recipe, result)}\nresults in {run.folder}")
  return result


def _train_epochs(
  run: Run,
  trainer: training.Trainer,
  epoch_fn: Callable[..., Any],
  state: training.TrainState,
  deadline: float,
) -> tuple[training.TrainState, list[dict[str, Any]]]:
  """Trains from the last checkpoint on; returns the last state and the metrics of all epochs."""
  epochs = run.recipe.epochs
  with checkpoints.open_checkpoints(run.folder / "checkpoints") as saved:
    state, metrics = saved.restore_latest(state)
    log_path = run.folder / "metrics.jsonl"
    records.replace_file(log_path, "".join(json.dumps(line) + "\n" for line in metrics))
    longest = 0.0
    with (
      log_path.open("a") as log,
      tqdm.tqdm(total=epochs, initial=len(metrics), desc=run.name, unit="epoch") as bar,
    ):
      for epoch in range(len(metrics), epochs):
        started = time.perf_counter()
        state, trained = jax.block_until_ready(epoch_fn(state, trainer.train))
        seconds = time.perf_counter() - started
        line = _describe_epoch(run.recipe, trainer, epoch, state, trained, seconds)
        if line["collapsed"] != bool(metrics and metrics[-1]["collapsed"]):
          news = "collapsed: its output is the same for every image"
          news = news if line["collapsed"] else "recovered"
          bar.write(f"{run.name}, seed {run.seed}, epoch {epoch}: the network has {news}")
        metrics.append(line)
        print(json.dumps(line), file=log, flush=True)
        bar.update()
        validation = line["validation_accuracy"]
        bar.set_postfix(
          loss=f"{trained.loss:.3f}",
          validation="-" if validation is None else f"{validation:.2%}",
          sparsity=f"{line['sparsity']:.2%}",
        )
        longest = max(longest, time.perf_counter() - started)
        # An epoch may take somewhat longer than any before, and the checkpoint takes its time too.
        late = time.perf_counter() + 1.5 * longest > deadline
        if (epoch + 1) % run.checkpoint_every == 0 or epoch + 1 == epochs or late:
          saved.save(state, metrics)
        if late:
          break
  return state, metrics


def _describe_epoch(
  recipe: Recipe,
  trainer: training.Trainer,
  epoch: int,
  state: training.TrainState,
  trained: training.EpochMetrics,
  seconds: float,
) -> dict[str, Any]:
  """The line of an epoch in `metrics.jsonl`."""
  loss, sparsity = float(trained.loss), float(trained.sparsity)
  size = trainer.held_out.labels.size
  held_out = trainer.validate(state, trainer.held_out) if size else None
  if size >= 100:
    watched = held_out
  else:  # A few images may have the same output by chance.
    watched = trainer.validate(state, jax.tree.map(lambda x: x[:1000], trainer.train))
  line = {
    "epoch": epoch,
    "loss": loss if math.isfinite(loss) else None,
    "train_accuracy": float(trained.accuracy),
    "validation_accuracy": held_out and float(held_out.accuracy),
    "sparsity": sparsity,
    "seconds": seconds,
    "device": next(iter(state.step.devices())).device_kind,
    # With all units dead, or NaN. A few networks come back from the former.
    "collapsed": not math.isfinite(loss) or bool(watched.constant),
  }
  if sparsity > recipe.best_above:
    line["test_accuracy"] = float(trainer.evaluate(state, trainer.test).accuracy)
  return line


def _find_device(kind: str) -> jax.Device:
  """The first device of a kind."""
  try:
    return jax.devices(None if kind == "any" else kind)[0]
  except (RuntimeError, AssertionError) as error:
    raise ValueError(f"device={kind} is asked for, but JAX finds none: {error}") from error


def set_determinism(deterministic: bool) -> None:
  """Asks XLA for the same bits each time on a GPU; read when JAX first looks for devices."""
  if deterministic:
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} {_DETERMINISM_FLAG}".strip()


def main(args: list[str] | None = None) -> None:
  args = sys.argv[1:] if args is None else args
  if not args or (args[0].startswith("-") and args[0] not in ("-h", "--help")):
    if named := [arg for arg in args if arg in RECIPES]:
      sys.exit(f"The recipe comes first: {named[0]} ...")
    args = [DEFAULT_RECIPE, *args]
  elif not args[0].startswith("-") and args[0] not in RECIPES:
    close = difflib.get_close_matches(args[0], RECIPES, n=1, cutoff=0.3)
    hint = f" Did you mean {close[0]}?" if close else ""
    sys.exit(f"Unknown recipe {args[0]}.{hint} There are:\n  " + "\n  ".join(RECIPES))
  with commands.errors_as_messages():
    run = tyro.extras.overridable_config_cli(
      {name: (_describe_recipe(recipe), Run(recipe, name)) for name, recipe in RECIPES.items()},
      prog="python -m experiments.train",
      description="Trains one run of a recipe. RECIPE --help shows its options. Without a recipe:"
      f" {DEFAULT_RECIPE}.",
      args=args,
      config=(tyro.conf.OmitArgPrefixes,),
    )
    set_determinism(run.deterministic)
    train(run)


def _describe_recipe(recipe: Recipe) -> str:
  pruned = f"{recipe.sparsity:.1%} pruned" if recipe.sparsity else "dense"
  return f"{recipe.model} on {recipe.data}, {recipe.epochs} epochs, {pruned}"


if __name__ == "__main__":
  main()
