"""Trains one run of a recipe.

    python -m experiments.train [RECIPE] [options]

Writes to the run's folder: `metrics.jsonl`, a line per epoch; checkpoints; and at the end
`result.json`, `summary.txt` and `plot.png`. The same command run again resumes at the last
checkpoint, with bit-identical results on the same machine.
"""

import contextlib
import dataclasses
import difflib
import importlib.metadata
import itertools
import json
import math
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
import tqdm
import tyro
from flax.training import train_state

import sparsejax
from experiments import data, plots, training
from experiments.recipes import RECIPES, Recipe

DEFAULT_RECIPE = "lenet300-digits"


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
  """The run's folder; by default runs/RECIPE/seedSEED."""
  checkpoint_every: int = 10
  """Epochs from one checkpoint to the next; there is always one at the end."""

  def __post_init__(self):
    if self.seed < 0 or self.checkpoint_every < 1:
      raise ValueError(
        f"seed={self.seed} must not be negative and checkpoint_every={self.checkpoint_every} must"
        " be at least 1."
      )

  @property
  def folder(self) -> pathlib.Path:
    return self.out or pathlib.Path("runs") / self.name / f"seed{self.seed}"


def train(run: Run) -> dict[str, Any]:
  """Trains a run to its end, from its last checkpoint if there is one.

  Returns:
    The contents of its `result.json`.

  Raises:
    ValueError: if the folder holds a run with other settings.
  """
  config = {"recipe": run.name, "seed": run.seed, **dataclasses.asdict(run.recipe)}
  _check_folder(run.folder, config)
  if (run.folder / "result.json").exists():
    result = json.loads((run.folder / "result.json").read_text())
    print(f"This run is finished.\n{_verdict(run, result)}")
    return result
  dataset = data.load(run.recipe.data, run.data_dir)
  trainer = training.make_trainer(run.recipe, dataset, run.seed)
  started = time.perf_counter()
  state = trainer.init()
  epoch_fn = trainer.epoch.lower(state, trainer.train).compile()
  compile_seconds = time.perf_counter() - started
  run.folder.mkdir(parents=True, exist_ok=True)
  _write(run.folder / "config.json", json.dumps(config, indent=2) + "\n")
  state, metrics = _train_epochs(run, trainer, epoch_fn, state)

  summary = sparsejax.summary(state.params, training.get_masks(run.recipe, state))
  test = trainer.evaluate(state.params, trainer.test)
  result = {
    "config": config,
    "test_accuracy": 100 * float(test.accuracy),
    "pool": summary.pool.parameters,
    "pruned": summary.pool.parameters - summary.pool.active,
    "sparsity": summary.pool.sparsity,
    "collapsed_in_epoch": _collapsed_in_epoch(metrics),
    "layers": [
      {"name": row.name, "parameters": row.parameters, "active": row.active}
      for row in summary.layers
    ],
    "seconds": {"compile": compile_seconds, "train": sum(m["seconds"] for m in metrics)},
    **_provenance(),
  }
  _write(run.folder / "result.json", json.dumps(result, indent=2) + "\n")
  _write(run.folder / "summary.txt", f"{summary}\n")
  plots.plot_run(
    run.folder / "plot.png",
    f"{run.name}, seed {run.seed}: {result['test_accuracy']:.2f} % test accuracy",
    metrics,
    summary,
  )
  print(f"\n{summary}\n\n{_verdict(run, result)}")
  return result


def _train_epochs(
  run: Run, trainer: training.Trainer, epoch_fn: Callable[..., Any], state: train_state.TrainState
) -> tuple[train_state.TrainState, list[dict[str, Any]]]:
  """Trains from the last checkpoint on; returns the last state and the metrics of all epochs."""
  epochs = run.recipe.epochs
  options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
  with ocp.CheckpointManager((run.folder / "checkpoints").absolute(), options=options) as saved:
    first = saved.latest_step() or 0
    if first:
      state = saved.restore(first, args=ocp.args.StandardRestore(state))
    metrics = _read_metrics(run.folder, first)
    with (
      (run.folder / "metrics.jsonl").open("a") as log,
      tqdm.tqdm(total=epochs, initial=first, desc=run.name, unit="epoch") as bar,
    ):
      for epoch in range(first, epochs):
        started = time.perf_counter()
        state, trained = jax.block_until_ready(epoch_fn(state, trainer.train))
        seconds = time.perf_counter() - started
        line = _describe_epoch(
          epoch, trained, trainer.validate(state.params, trainer.held_out), seconds
        )
        if line["collapsed"] != bool(metrics and metrics[-1]["collapsed"]):
          news = "collapsed: its output is the same for every image"
          news = news if line["collapsed"] else "recovered"
          bar.write(f"{run.name}, seed {run.seed}, epoch {epoch}: the network has {news}")
        metrics.append(line)
        print(json.dumps(line), file=log, flush=True)
        bar.update()
        bar.set_postfix(
          loss=f"{trained.loss:.3f}",
          validation=f"{line['validation_accuracy']:.2%}",
          sparsity=f"{line['sparsity']:.2%}",
        )
        if (epoch + 1) % run.checkpoint_every == 0 or epoch + 1 == epochs:
          saved.save(epoch + 1, args=ocp.args.StandardSave(state))
  return state, metrics


def _describe_epoch(
  epoch: int, trained: training.EpochMetrics, validation: training.Evaluation, seconds: float
) -> dict[str, Any]:
  """The line of an epoch in `metrics.jsonl`."""
  loss = float(trained.loss)
  return {
    "epoch": epoch,
    "loss": loss if math.isfinite(loss) else None,
    "train_accuracy": float(trained.accuracy),
    "validation_accuracy": float(validation.accuracy),
    "sparsity": float(trained.sparsity),
    "seconds": seconds,
    # With all units dead, or NaN. A few networks come back from the former.
    "collapsed": not math.isfinite(loss) or bool(validation.constant),
  }


def _check_folder(folder: pathlib.Path, config: dict[str, Any]) -> None:
  """Raises a ValueError if the folder holds another run."""
  path = folder / "config.json"
  before = json.loads(path.read_text()) if path.exists() else config
  changed = [
    f"{key}={before.get(key)}" for key in config | before if config.get(key) != before.get(key)
  ]
  if changed:
    raise ValueError(
      f"{folder} holds a run with {', '.join(changed)}: choose another folder, or remove this one."
    )


def _read_metrics(folder: pathlib.Path, epochs: int) -> list[dict[str, Any]]:
  """The lines of the epochs before a checkpoint; drops those after it from the file."""
  path = folder / "metrics.jsonl"
  lines = path.read_text().splitlines()[:epochs] if path.exists() else []
  _write(path, "".join(line + "\n" for line in lines))
  return [json.loads(line) for line in lines]


def _write(path: pathlib.Path, text: str) -> None:
  """Replaces a file as a whole."""
  temporary = path.with_name(path.name + ".new")
  temporary.write_text(text)
  temporary.replace(path)


def _provenance() -> dict[str, Any]:
  packages = ("sparsejax", "jax", "jaxlib", "flax", "optax", "numpy")
  git = subprocess.run(
    ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"],
    cwd=pathlib.Path(__file__).parent,
    capture_output=True,
    text=True,
    check=False,
  )
  return {
    "device": jax.devices()[0].device_kind,
    "commit": git.stdout.strip() or None,
    "versions": {
      "python": platform.python_version(),
      **{package: importlib.metadata.version(package) for package in packages},
    },
  }


def _collapsed_in_epoch(metrics: list[dict[str, Any]]) -> int | None:
  """The epoch from which on a run was dead, if it was so at the end."""
  dead = itertools.takewhile(lambda line: line["collapsed"], reversed(metrics))
  return min((line["epoch"] for line in dead), default=None)


def _verdict(run: Run, result: dict[str, Any]) -> str:
  lines = [
    f"test accuracy {result['test_accuracy']:.2f} % (last epoch), {result['pruned']:,} of"
    f" {result['pool']:,} weights pruned",
    f"{result['seconds']['train']:.1f} s of training after {result['seconds']['compile']:.1f} s of"
    f" compilation; results in {run.folder}",
  ]
  if result["collapsed_in_epoch"] is not None:
    lines.insert(0, f"This run COLLAPSED in epoch {result['collapsed_in_epoch']}.")
  return "\n".join(lines)


@contextlib.contextmanager
def errors_as_messages() -> Iterator[None]:
  """Ends a command with a message where the user can mend what is wrong."""
  try:
    yield
  except (data.DataNotFound, ValueError) as error:
    sys.exit(f"error: {error}")
  except KeyboardInterrupt:
    sys.exit("interrupted: the same command resumes at the last checkpoint")


def main(args: list[str] | None = None) -> None:
  args = sys.argv[1:] if args is None else args
  if not args or (args[0].startswith("-") and args[0] not in ("-h", "--help")):
    args = [DEFAULT_RECIPE, *args]
  elif not args[0].startswith("-") and args[0] not in RECIPES:
    close = difflib.get_close_matches(args[0], RECIPES, n=1, cutoff=0.3)
    hint = f" Did you mean {close[0]}?" if close else ""
    sys.exit(f"Unknown recipe {args[0]}.{hint} There are:\n  " + "\n  ".join(RECIPES))
  with errors_as_messages():
    run = tyro.extras.overridable_config_cli(
      {name: (_describe_recipe(recipe), Run(recipe, name)) for name, recipe in RECIPES.items()},
      prog="python -m experiments.train",
      description="Trains one run of a recipe. RECIPE --help shows its options. Without a recipe:"
      f" {DEFAULT_RECIPE}.",
      args=args,
      config=(tyro.conf.OmitArgPrefixes,),
    )
    train(run)


def _describe_recipe(recipe: Recipe) -> str:
  pruned = f"{recipe.sparsity:.1%} pruned" if recipe.sparsity else "dense"
  return f"{recipe.model} on {recipe.data}, {recipe.epochs} epochs, {pruned}"


if __name__ == "__main__":
  main()
