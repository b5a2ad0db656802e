"""Reproduces a table: trains all its runs, then writes the table and a figure.

    python -m experiments.reproduce progressive --data-dir DIR

Each finished run leaves a JSON in experiments/results/runs; runs that have one are not trained
again, and interrupted ones resume. The table and the figure are made of these files alone. What
cannot be trained, for want of its data, is said at the end, and does not stop the others.
"""

import dataclasses
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any, Literal

import jax
import tyro

from experiments import commands, data, lanes, plots, records, similarity
from experiments import train as train_lib
from experiments.recipe import Published
from experiments.recipes import of_row
from experiments.run import Run
from experiments.tables import TABLES, Row, Table

RESULTS = pathlib.Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Options:
  """Trains all runs of a table, then writes the table and a figure."""

  table: tyro.conf.Positional[Literal[tuple(TABLES)]]
  """Which one."""
  recipes: tuple[str, ...] = ()
  """Train only these of its recipes; by default all."""
  seeds: tuple[int, ...] = ()
  """Train only with these of its seeds; by default all."""
  data_dir: pathlib.Path | None = None
  """Directory of the data set; see the README."""
  results: pathlib.Path = RESULTS
  """Where results go."""
  runs: pathlib.Path = pathlib.Path("runs")
  """Where runs go, with their checkpoints."""
  time_limit: float = math.inf
  """Seconds after which no run goes on; the same command resumes."""
  train: bool = True
  """Whether to train the runs that have no result yet."""
  device: Literal["any", "cpu", "gpu", "tpu"] = "any"
  """What to train on; it is an error if there is none."""
  deterministic: bool = False
  """Whether a GPU has to give the same bits each time, which is slower."""

  def __post_init__(self):
    if not self.time_limit > 0:
      raise ValueError(f"time_limit={self.time_limit} must be positive")
    table = TABLES[self.table]
    for name, given, known in (
      ("recipes", self.recipes, table.recipes),
      ("seeds", self.seeds, table.seeds),
    ):
      if unknown := set(given) - set(known):
        raise ValueError(
          f"{name}={sorted(unknown)} are not of the table {self.table}: choose of"
          f" {', '.join(map(str, known))}"
        )


def reproduce(options: Options) -> tuple[str, list[str]]:
  """Trains what is missing, and writes the table and the figure.

  Returns:
    The table in Markdown, and what kept recipes from being trained.
  """
  table = TABLES[options.table]
  deadline = time.perf_counter() + options.time_limit
  commands.check_writable("results", options.results, options.results)
  failures = _train_missing(options, table, deadline) if options.train else []
  text = make_table(options.table, options.results)
  records.replace_file(options.results / f"{options.table}.md", text)
  results = _read_results(table, options.results)
  recipes = {row: of_row(row) for row in table.rows}
  plots.plot_table(options.results / f"{options.table}.png", table, recipes, results)
  if table.compared:
    is_complete = all(len(found) == len(table.seeds) for found in results.values())
    _compare_criteria(options, table, deadline if options.train and is_complete else None)
  if table.by_cost:
    plots.plot_costs(options.results / f"{options.table}-cost.png", table, recipes, results)
  return text, failures


def _compare_criteria(options: Options, table: Table, deadline: float | None) -> None:
  """Measures how far criteria agree, unless it is or there is no deadline, and draws it."""
  path = options.results / f"{options.table}-similarity.json"
  runs = {name: _make_run(options, row, table.seeds[0]) for name, row in table.compared.items()}
  if not path.exists() and deadline is not None and time.perf_counter() < deadline:
    with jax.default_device(train_lib.find_device(options.device)):
      if (found := similarity.measure(runs, deadline)) is not None:
        records.replace_file(path, records.to_json(found))
  if path.exists():
    found, (first, *_) = records.read_json(path), runs.values()
    records.check_config(path, found["config"], train_lib.make_config(first))
    plots.plot_similarity(path.with_suffix(".png"), found)


def _train_missing(options: Options, table: Table, deadline: float) -> list[str]:
  """Trains the runs that have no result; returns what kept recipes from being trained."""
  failures = []
  for name in options.recipes or table.recipes:
    try:
      for folder, runs in _missing_runs(options, table, name).items():
        left = deadline - time.perf_counter()
        if left <= 0:
          break
        if len(runs) == 1:
          results = [train_lib.train(dataclasses.replace(runs[0], time_limit=left))]
        else:
          results = lanes.train_lanes(runs, folder, left)
          if results is None:
            print("\nStopped at the time limit: the same command resumes.")
            continue
        for run, result in zip(runs, results):
          path = _path(options.results, run.folder.parent.name, run.seed)
          if result is not None and not path.exists():
            path.parent.mkdir(exist_ok=True)
            records.replace_file(path, records.to_json(result))
    except data.DataNotFound as error:
      failures.append(f"{name}: {error}")
  return failures


def _missing_runs(options: Options, table: Table, name: str) -> dict[pathlib.Path, list[Run]]:
  """The runs of a recipe that have no result, and those of their sets; see `lanes.find_sets`."""
  runs = [
    _make_run(options, row, seed)
    for row in {row.name: row for row in table.rows if row.recipe == name}.values()
    for seed in options.seeds or table.seeds
  ]
  missing = [
    run for run in runs if not _path(options.results, run.folder.parent.name, run.seed).exists()
  ]
  size = table.lanes if runs and lanes.fit_in_lanes(runs[0].recipe) else 1
  return lanes.find_sets(runs, missing, options.runs / f"{name}-lanes", size)


def _make_run(options: Options, row: Row, seed: int) -> Run:
  return Run(
    of_row(row),
    row.recipe,
    seed,
    data_dir=options.data_dir,
    out=options.runs / row.name / f"seed{seed}",
    device=options.device,
    deterministic=options.deterministic,
  )


def make_table(name: str, folder: pathlib.Path) -> str:
  """A table in Markdown of the results in a folder."""
  table = TABLES[name]
  results = _read_results(table, folder)
  text = ""
  for title, series in table.blocks.items():
    rows = [row for rows in series.values() for row in rows]
    any_published = any(of_row(row).published for row in rows)
    header = ["recipe", "pruned", "training cycles", "total epochs"]
    header += ["published"] * any_published + ["ours", "hardware", "time of a run"]
    lines = [header + [f"seed {seed}" for seed in table.seeds]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
      lines.append(_describe_row(row, results[row], table.seeds, any_published))
    text += f"### {title}\n\n" if len(table.blocks) > 1 else ""
    text += "".join("| " + " | ".join(line) + " |\n" for line in lines) + "\n"
  return (
    f"{text}Test accuracy in per cent, of the last epoch unless it says otherwise: mean, standard"
    " deviation over seeds and their number. The time is that of training, without compilation,"
    " validation, and pruning before it. Epochs count from 0, cycles from 1.\n"
  )


def _describe_row(
  row: Row, runs: dict[int, dict[str, Any]], seeds: Sequence[int], any_published: bool
) -> list[str]:
  """The cells of a row."""
  recipe, done = of_row(row), list(runs.values())
  return [
    f"`{row.name}`" + (f", after cycle {row.cycle}" if row.cycle else ""),
    different([f"{run['pruned']:,} of {run['pool']:,}" for run in done]),
    str(row.cycle or recipe.cycles),
    str(recipe.epochs_after(row.cycle or recipe.cycles)),
    *([_published(recipe.published)] if any_published else []),
    describe_accuracy(done),
    different([run["device"] for run in done]),
    f"{statistics.mean(run['seconds']['train'] for run in done):,.0f} s" if done else "-",
    *(describe_seed(runs.get(seed)) for seed in seeds),
  ]


def _read_results(table: Table, folder: pathlib.Path) -> dict[Row, dict[int, dict[str, Any]]]:
  """What there is, by row and seed; a ValueError if it is of another recipe."""
  results = {row: {} for row in table.rows}
  for row, found in results.items():
    for seed in table.seeds:
      if (path := _path(folder, row.name, seed)).exists():
        result = records.read_result(path)
        config = {"recipe": row.recipe, "seed": seed, **dataclasses.asdict(of_row(row))}
        records.check_config(path, result["config"], config)
        found[seed] = result | (result["cycles"][row.cycle - 1] if row.cycle else {})
  return results


def _path(folder: pathlib.Path, name: str, seed: int) -> pathlib.Path:
  return folder / "runs" / f"{name}-seed{seed}.json"


def _published(published: Published | None) -> str:
  if published is None:
    return "-"
  spread = "" if published.spread is None else f" ± {published.spread:.2f}"
  best = ", best epoch" if published.epoch == "best" else ""
  time = "" if published.seconds is None else f", {published.seconds:,.0f} s"
  return f"{published.accuracy:.2f}{spread} (n = {published.runs}{best}{time})"


def describe_accuracy(runs: list[dict[str, Any]]) -> str:
  """The mean over runs, and that of runs which did not collapse where some did."""
  means = [_mean([run["test_accuracy"] for run in runs])]
  alive = [run["test_accuracy"] for run in runs if run["collapsed_in_epoch"] is None]
  if len(alive) < len(runs):
    means.append(f"without collapsed ones {_mean(alive)}")
  best = [run["best_test_accuracy"] for run in runs if run["best_test_accuracy"]]
  if best:
    means.append(f"best epoch {_mean([each['test_accuracy'] for each in best])}")
  return "; ".join(means)


def _mean(values: list[float]) -> str:
  if not values:
    return "not run"
  spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
  return f"{statistics.mean(values):.2f}{spread} (n = {len(values)})"


def describe_seed(run: dict[str, Any] | None) -> str:
  if run is None:
    return "not run"
  epoch = run["collapsed_in_epoch"]
  return f"{run['test_accuracy']:.2f}" + ("" if epoch is None else f" (collapsed in epoch {epoch})")


def different(texts: list[str]) -> str:
  return " / ".join(sorted(set(texts))) or "-"


def main(args: list[str] | None = None) -> None:
  with commands.errors_as_messages(resumes=True):
    options = tyro.cli(Options, prog="python -m experiments.reproduce", args=args)
    train_lib.set_determinism(options.deterministic)
    text, failures = reproduce(options)
    print(text)
    if failures:
      sys.exit("\n".join(["not trained:", *failures]))


if __name__ == "__main__":
  main()
