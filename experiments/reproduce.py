"""Reproduces a table: trains all its runs, then writes the table and a figure.

    python -m experiments.reproduce lenet-mnist --data-dir DIR

Each finished run leaves a JSON in experiments/results/TABLE; runs that have one are not trained
again, and interrupted ones resume.
"""

import dataclasses
import json
import pathlib
import statistics
from typing import Any, Literal

import tyro

from experiments import plots
from experiments import train as train_lib
from experiments.recipes import RECIPES

RESULTS = pathlib.Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Table:
  """A run of each recipe with each seed."""

  recipes: tuple[str, ...]
  seeds: tuple[int, ...] = (42, 123, 456, 789, 999)


TABLES = {
  "lenet-mnist": Table(
    (
      "lenet300-mnist-dense",
      "lenet300-mnist-78.9",
      "lenet300-mnist-78.9-lr0.05",
      "lenet300-mnist-98",
    )
  ),
  # How far seeds spread: eight more of the run that is closest to the limit.
  "lenet-mnist-98-seeds": Table(("lenet300-mnist-98",), seeds=(1, 2, 3, 4, 5, 6, 7, 8)),
  # How far rounding spreads: the same seeds as above under another release of JAX.
  "lenet-mnist-98-jax": Table(("lenet300-mnist-98",)),
}


@dataclasses.dataclass(frozen=True)
class Options:
  """Trains all runs of a table, then writes the table and a figure."""

  table: tyro.conf.Positional[Literal[tuple(TABLES)]]
  """Which one."""
  data_dir: pathlib.Path | None = None
  """Directory of the data set; see the README."""
  results: pathlib.Path = RESULTS
  """Where results go, into a folder for each table."""
  runs: pathlib.Path = pathlib.Path("runs")
  """Where runs go, with their checkpoints."""
  train: bool = True
  """Whether to train the runs that have no result yet."""


def reproduce(options: Options) -> str:
  """Trains what is missing, and writes `table.md` and `figure.png`.

  Returns:
    The table in Markdown.
  """
  folder = options.results / options.table
  table = TABLES[options.table]
  results = {}
  for name in table.recipes:
    results[name] = {}
    for seed in table.seeds:
      path = folder / f"{name}-seed{seed}.json"
      if not path.exists() and options.train:
        out = options.runs / name / f"seed{seed}"
        result = train_lib.train(
          train_lib.Run(RECIPES[name], name, seed, data_dir=options.data_dir, out=out)
        )
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
      if path.exists():
        results[name][seed] = json.loads(path.read_text())
  text = make_table(results, table.seeds)
  if any(results.values()):
    (folder / "table.md").write_text(text)
    plots.plot_table(folder / "figure.png", options.table, results)
  return text


def make_table(results: dict[str, dict[int, dict[str, Any]]], seeds: tuple[int, ...]) -> str:
  """The results of recipes, by seed, as a table in Markdown."""
  lines = [
    "| recipe | pruned | published | mean of all | mean without collapsed | "
    + " | ".join(f"seed {seed}" for seed in seeds)
    + " |",
    "| --- | --- | --- | --- | --- |" + " --- |" * len(seeds),
  ]
  for name, runs in results.items():
    published = RECIPES[name].published
    cells = [
      f"`{name}`",
      " / ".join(sorted({f"{run['pruned']:,} of {run['pool']:,}" for run in runs.values()})) or "-",
      "-" if published is None else f"{published:.2f}",
      _mean([run["test_accuracy"] for run in runs.values()]),
      _mean([r["test_accuracy"] for r in runs.values() if r["collapsed_in_epoch"] is None]),
    ]
    for seed in seeds:
      if seed not in runs:
        cells.append("not run")
        continue
      epoch = runs[seed]["collapsed_in_epoch"]
      collapsed = "" if epoch is None else f" (collapsed in epoch {epoch})"
      cells.append(f"{runs[seed]['test_accuracy']:.2f}{collapsed}")
    lines.append("| " + " | ".join(cells) + " |")
  return (
    "\n".join(lines)
    + "\n\nTest accuracy in per cent, of the last epoch; mean, standard deviation over seeds and"
    " their number. Epochs count from 0.\n"
  )


def _mean(values: list[float]) -> str:
  if not values:
    return "not run"
  spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
  return f"{statistics.mean(values):.2f}{spread} (n = {len(values)})"


def main(args: list[str] | None = None) -> None:
  options = tyro.cli(Options, prog="python -m experiments.reproduce", args=args)
  with train_lib.errors_as_messages():
    print(reproduce(options))


if __name__ == "__main__":
  main()
