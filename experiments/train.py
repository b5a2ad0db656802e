"""Trains one run of a recipe.

    python -m experiments.train [RECIPE] [options]

Writes to the run's folder: `metrics.jsonl`, a line per epoch; checkpoints; and at the end
`result.json`, `summary.txt` and `plot.png`. The same command run again resumes at the last
checkpoint, on this machine or on another, with bit-identical results on a CPU, and on a GPU with
--deterministic.
"""

import contextlib
import dataclasses
import difflib
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import tqdm
import tyro

import sparsejax
from experiments import checkpoints, data, plots, recipes, training
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
    requirements = {
      "seed": (self.seed >= 0, "at least 0"),
      "checkpoint_every": (self.checkpoint_every >= 1, "at least 1"),
      "time_limit": (self.time_limit > 0, "positive"),
    }
    for name, (holds, text) in requirements.items():
      if not holds:
        raise ValueError(f"{name}={getattr(self, name)} must be {text}")

  @property
  def folder(self) -> pathlib.Path:
    return self.out or pathlib.Path("runs") / self.name / f"seed{self.seed}"


def train(run: Run) -> dict[str, Any] | None:
  """Trains a run to its end or its time limit, from its last checkpoint if there is one.

  Returns:
    The contents of its `result.json`; None if it stopped at the time limit.

  Raises:
    ValueError: if the folder holds a run with other settings, if there are fewer images than a
      batch takes, or if there is no such device as is asked for.
  """
  started = time.perf_counter()
  recipe = recipes.smoke(run.recipe) if run.smoke else run.recipe
  config = {"recipe": run.name, "seed": run.seed, **dataclasses.asdict(recipe)}
  _check_folder(run.folder, config)
  if (run.folder / "result.json").exists():
    result = json.loads((run.folder / "result.json").read_text())
    print(f"This run is finished.\n{_verdict(run, result)}")
    return result
  device = _find_device(run.device)
  dataset = data.load(recipe.data, run.data_dir)
  with jax.default_device(device):
    trainer = training.make_trainer(recipe, dataset, run.seed)
    compiling = time.perf_counter()
    state = jax.block_until_ready(trainer.init())
    epoch_fn = trainer.compile_epoch()
    compile_seconds = time.perf_counter() - compiling
    run.folder.mkdir(parents=True, exist_ok=True)
    _write(run.folder / "config.json", json.dumps(config, indent=2) + "\n")
    state, metrics = _train_epochs(run, recipe, trainer, epoch_fn, state, started + run.time_limit)
    if len(metrics) < recipe.epochs:
      print(
        f"\nStopped at the time limit after {len(metrics)} of {recipe.epochs} epochs: the same"
        " command resumes."
      )
      return None
    test = trainer.evaluate(state, trainer.test)

  summary = sparsejax.summary(state.params, training.get_masks(recipe, state))
  result = {
    "config": config,
    "test_accuracy": 100 * float(test.accuracy),
    "best_test_accuracy": _best_test_accuracy(recipe, metrics),
    "pool": summary.pool.parameters,
    "pruned": summary.pool.parameters - summary.pool.active,
    "sparsity": summary.pool.sparsity,
    "collapsed_in_epoch": _collapsed_in_epoch(metrics),
    "layers": [
      {"name": row.name, "parameters": row.parameters, "active": row.active}
      for row in summary.layers
    ],
    "seconds": {"compile": compile_seconds, "train": sum(m["seconds"] for m in metrics)},
    "device": device.device_kind,
    "deterministic": run.deterministic,
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
  run: Run,
  recipe: Recipe,
  trainer: training.Trainer,
  epoch_fn: Callable[..., Any],
  state: training.TrainState,
  deadline: float,
) -> tuple[training.TrainState, list[dict[str, Any]]]:
  """Trains from the last checkpoint on; returns the last state and the metrics of all epochs."""
  with checkpoints.open_checkpoints(run.folder / "checkpoints") as saved:
    first, state = saved.restore_latest(state)
    metrics = _read_metrics(run.folder, first)
    longest = 0.0
    with (
      (run.folder / "metrics.jsonl").open("a") as log,
      tqdm.tqdm(total=recipe.epochs, initial=first, desc=run.name, unit="epoch") as bar,
    ):
      for epoch in range(first, recipe.epochs):
        started = time.perf_counter()
        state, trained = jax.block_until_ready(epoch_fn(state, trainer.train))
        seconds = time.perf_counter() - started
        line = _describe_epoch(recipe, trainer, epoch, state, trained, seconds)
        if line["collapsed"] != bool(metrics and metrics[-1]["collapsed"]):
          news = "collapsed: its output is the same for every image"
          news = news if line["collapsed"] else "recovered"
          bar.write(f"{run.name}, seed {run.seed}, epoch {epoch}: the network has {news}")
        metrics.append(line)
        print(json.dumps(line), file=log, flush=True)
        bar.update()
        bar.set_postfix(
          loss=f"{trained.loss:.3f}",
          accuracy=f"{line['validation_accuracy'] or line['train_accuracy']:.2%}",
          sparsity=f"{line['sparsity']:.2%}",
        )
        longest = max(longest, time.perf_counter() - started)
        # An epoch may take somewhat longer than any before, and the checkpoint takes its time too.
        late = time.perf_counter() + 1.5 * longest > deadline
        if (epoch + 1) % run.checkpoint_every == 0 or epoch + 1 == recipe.epochs or late:
          saved.save(epoch + 1, state)
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
  line = {
    "epoch": epoch,
    "loss": loss if math.isfinite(loss) else None,
    "train_accuracy": float(trained.accuracy),
    "validation_accuracy": None,
    "sparsity": sparsity,
    "seconds": seconds,
  }
  if trainer.held_out.labels.size:
    watched = trainer.validate(state, trainer.held_out)
    line["validation_accuracy"] = float(watched.accuracy)
  else:
    watched = trainer.validate(state, jax.tree.map(lambda x: x[:1000], trainer.train))
  # With all units dead, or NaN. A few networks come back from the former.
  line["collapsed"] = not math.isfinite(loss) or bool(watched.constant)
  if sparsity > recipe.best_above:
    line["test_accuracy"] = float(trainer.evaluate(state, trainer.test).accuracy)
  return line


def _best_test_accuracy(recipe: Recipe, metrics: list[dict[str, Any]]) -> dict[str, Any] | None:
  """The epoch of the best test accuracy, where a recipe asks for it."""
  tested = [line for line in metrics if "test_accuracy" in line]
  if not tested:
    return None
  best = max(tested, key=lambda line: line["test_accuracy"])
  return {
    "test_accuracy": 100 * best["test_accuracy"],
    "epoch": best["epoch"],
    "of_epochs_above_sparsity": recipe.best_above,
  }


def _find_device(kind: str) -> jax.Device:
  """The first device of a kind."""
  try:
    return jax.devices(None if kind == "any" else kind)[0]
  except RuntimeError as error:
    found = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    raise ValueError(f"device={kind} is asked for, but JAX finds only: {found}") from error


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
  empty = [layer["name"] for layer in result["layers"] if not layer["active"]]
  if empty:
    lines.insert(1, f"WARNING: no active weight is left in {', '.join(empty)}")
  if (best := result["best_test_accuracy"]) is not None:
    lines.insert(
      1,
      f"best test accuracy {best['test_accuracy']:.2f} % after epoch {best['epoch']}, chosen by the"
      f" test set among those above {best['of_epochs_above_sparsity']:.0%} sparsity",
    )
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
    if run.deterministic:
      # Read when JAX first looks for devices.
      flags = os.environ.get("XLA_FLAGS", "")
      os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    train(run)


def _describe_recipe(recipe: Recipe) -> str:
  pruned = f"{recipe.sparsity:.1%} pruned" if recipe.sparsity else "dense"
  return f"{recipe.model} on {recipe.data}, {recipe.epochs} epochs, {pruned}"


if __name__ == "__main__":
  main()
