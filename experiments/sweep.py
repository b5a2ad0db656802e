"""Sweeps a recipe over sparsities and seeds, all of them trained as one compiled program.

    python -m experiments.sweep [RECIPE] [--sparsities S ...] [--seeds N ...] [options]

Writes to the sweep's folder `sweep.md`, a table of accuracy over sparsity, `sweep.png`, a figure of
it, and `sweep.json`, of which they are made; and below it a folder for each run, with its
`result.json`, `metrics.jsonl`, `summary.txt` and `plot.png`. The same command run again resumes at
the last checkpoint; with more sparsities or seeds, it trains the runs that are missing. The table
is of those that were asked for last.

On a CPU, networks with convolutions are trained one after the other, since XLA's CPU backend runs
convolutions far slower in a loop.
"""

import dataclasses
import math
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import tyro

from experiments import commands, lanes, plots, records, reproduce
from experiments import train as train_lib
from experiments.recipe import Recipe
from experiments.recipes import RECIPES
from experiments.run import Run
from experiments.tables import Row, Table


@dataclasses.dataclass(frozen=True)
class Sweep:
  """A recipe, the sparsities and seeds to train it with, and where things lie."""

  recipe: Recipe
  name: tyro.conf.Suppress[str]
  sparsities: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95, 0.98)
  """Final fractions of pruned weights, each in [0, 1), in place of the recipe's own."""
  seeds: tuple[int, ...] = (42, 123, 456)
  """Each decides initialisation, split, order and augmentation of one run at each sparsity."""
  compare: int = 0
  """Train so many of the runs alone too, and report the time of each beside that of its lane."""
  data_dir: pathlib.Path | None = None
  """Directory of the data set; see the README."""
  out: pathlib.Path | None = None
  """The sweep's folder; by default runs/RECIPE-sweep."""
  checkpoint_every: int = 10
  """Epochs from one checkpoint to the next; there is always one at the end."""
  time_limit: float = math.inf
  """Seconds, compilation included, after which no epoch may end; the same command resumes."""
  device: Literal["any", "cpu", "gpu", "tpu"] = "any"
  """What to train on; it is an error if there is none."""
  deterministic: bool = False
  """Whether a GPU has to give the same bits each time, which is slower."""

  def __post_init__(self):
    commands.check_fields(
      self,
      {
        "sparsities": (
          _are_distinct(self.sparsities) and all(0 <= s < 1 for s in self.sparsities),
          "one or more different numbers in [0, 1)",
        ),
        "seeds": (
          _are_distinct(self.seeds) and min(self.seeds) >= 0,
          "one or more different integers, at least 0",
        ),
        "compare": (
          0 <= self.compare <= len(self.sparsities) * len(self.seeds),
          f"from 0 to the number of runs, {len(self.sparsities) * len(self.seeds)}",
        ),
        "checkpoint_every": (self.checkpoint_every >= 1, "at least 1"),
        "time_limit": (self.time_limit > 0, "positive"),
      },
    )

  @property
  def folder(self) -> pathlib.Path:
    return self.out or pathlib.Path("runs") / f"{self.name}-sweep"


def _are_distinct(values: Sequence[float]) -> bool:
  return 0 < len(values) == len(set(values))


def sweep(options: Sweep) -> str | None:
  """Trains what is missing, and writes the table and the figure.

  Returns:
    The table in Markdown; None if the time limit came first.

  Raises:
    ValueError: before anything is trained, if the recipe does not prune, or cannot be trained side
      by side or with such sparsities; if the folder holds runs with other settings.
  """
  deadline = time.perf_counter() + options.time_limit
  runs = _make_runs(options)
  folder = options.folder
  results = _train_missing(runs, folder, deadline)
  chosen = np.linspace(0, len(runs) - 1, options.compare).round().astype(int)
  alone = results and _train_alone([runs[i] for i in chosen], folder / "alone", deadline)
  if results is None or alone is None:
    print("\nStopped at the time limit: the same command resumes.")
    return None
  content = {
    "recipe": options.name,
    "changes": _changes(options.recipe, RECIPES[options.name]),
    "epochs": options.recipe.epochs,
    "runs": [_brief(result) for result in results],
    "alone": [_brief(result) for result in alone],
    **records.provenance(),
  }
  text = make_table(content)
  records.replace_file(folder / "sweep.json", records.to_json(content))
  records.replace_file(folder / "sweep.md", text)
  _plot(folder / "sweep.png", options, runs, results)
  return text


def _make_runs(options: Sweep) -> list[Run]:
  """All combinations, by sparsity first."""
  recipe = dataclasses.replace(options.recipe, published=None)
  lanes.check_fit(recipe)
  commands.check_fields(
    recipe,
    {"sparsity": (recipe.sparsity > 0, f"above 0, but {options.name} is dense: it does not prune")},
  )
  return [
    Run(
      dataclasses.replace(recipe, sparsity=sparsity),
      options.name,
      seed,
      data_dir=options.data_dir,
      out=options.folder / str(sparsity) / f"seed{seed}",
      checkpoint_every=options.checkpoint_every,
      device=options.device,
      deterministic=options.deterministic,
    )
    for sparsity in options.sparsities
    for seed in options.seeds
  ]


def _train_missing(
  runs: Sequence[Run], folder: pathlib.Path, deadline: float
) -> list[dict[str, Any]] | None:
  """The results of all runs, after training those that have none; None if time is over."""
  missing = [run for run in runs if _read_result(run) is None]
  for checkpoints, together in lanes.find_sets(runs, missing, folder / "lanes", len(runs)).items():
    left = deadline - time.perf_counter()
    if left <= 0 or lanes.train_lanes(together, checkpoints, left) is None:
      return None
  return list(map(_read_result, runs))


def _train_alone(
  runs: Sequence[Run], folder: pathlib.Path, deadline: float
) -> list[dict[str, Any]] | None:
  """The results of some of the runs, each trained by itself in a folder of its own."""
  results = []
  for run in runs:
    left = deadline - time.perf_counter()
    out = folder / run.folder.parent.name / run.folder.name
    run = dataclasses.replace(run, out=out, time_limit=left) if left > 0 else None
    result = run and train_lib.train(run)
    if result is None:
      return None
    results.append(result)
  return results


def _read_result(run: Run) -> dict[str, Any] | None:
  """That of a finished run; a ValueError if its folder holds another one."""
  path = run.folder / "result.json"
  if not path.exists():
    return None
  result = records.read_result(path)
  records.check_config(run.folder, result["config"], train_lib.make_config(run))
  return result


def _changes(recipe: Recipe, named: Recipe) -> dict[str, Any]:
  """What differs from the recipe of that name, besides the epochs and the sparsity."""
  before, after = dataclasses.asdict(named), dataclasses.asdict(recipe)
  return {
    key: value
    for key, value in after.items()
    if value != before[key] and key not in ("epochs", "sparsity", "published")
  }


def _brief(result: dict[str, Any]) -> dict[str, Any]:
  """What the table is made of."""
  return {
    "final_sparsity": result["config"]["sparsity"],
    "seed": result["config"]["seed"],
    **{key: result[key] for key in records.IN_TABLES},
    "lanes": result.get("lanes", 1),
  }


def make_table(content: dict[str, Any]) -> str:
  """The table in Markdown, from the contents of `sweep.json`."""
  runs, alone = content["runs"], content["alone"]
  seeds = dict.fromkeys(run["seed"] for run in runs)
  rows = []
  for sparsity in dict.fromkeys(run["final_sparsity"] for run in runs):
    row = {run["seed"]: run for run in runs if run["final_sparsity"] == sparsity}
    done = list(row.values())
    rows.append(
      {
        "sparsity": f"{100 * sparsity:g} %",
        "pruned": reproduce.different([f"{run['pruned']:,} of {run['pool']:,}" for run in done]),
        "test accuracy": reproduce.describe_accuracy(done),
        "time per lane": _seconds(done),
        "hardware": reproduce.different([run["device"] for run in done]),
        **{f"seed {seed}": reproduce.describe_seed(row.get(seed)) for seed in seeds},
      }
    )
  changes = ", ".join(f"{key}={value}" for key, value in content["changes"].items())
  parts = [
    f"`{content['recipe']}`, {content['epochs']} epochs{', with ' * bool(changes)}{changes}:",
    commands.to_markdown(rows),
    "Test accuracy in per cent, of the last epoch unless it says otherwise: mean, standard"
    " deviation over seeds and their number. Times are those of training, without compilation,"
    f" initialisation and validation. {_describe_lanes(runs)}",
  ]
  if alone:
    parts += _compare(runs, alone)
  return "\n\n".join(parts) + "\n"


def _describe_lanes(runs: Sequence[dict[str, Any]]) -> str:
  """How runs were trained."""
  lane_counts = sorted({run["lanes"] for run in runs})
  if lane_counts == [1]:
    return "The runs were trained one after the other."
  compilation = sum(run["seconds"]["compile"] for run in runs)
  return (
    f"The runs were trained side by side, {' and '.join(map(str, lane_counts))} lanes in one"
    " program; the time of a lane is its share of the time of all. Their shares of compilation and"
    f" initialisation come to {compilation:.1f} s."
  )


def _compare(runs: Sequence[dict[str, Any]], alone: Sequence[dict[str, Any]]) -> list[str]:
  """Runs that were trained alone too, beside their lanes."""
  lane_of = {(run["final_sparsity"], run["seed"]): run for run in runs}
  pairs = [(lane_of[run["final_sparsity"], run["seed"]], run) for run in alone]
  rows = [
    {
      "run": f"{100 * run['final_sparsity']:g} %, seed {run['seed']}",
      "pruned in a lane": f"{lane['pruned']:,}",
      "pruned alone": f"{run['pruned']:,}",
      "accuracy in a lane": reproduce.describe_seed(lane),
      "accuracy alone": reproduce.describe_seed(run),
      "time per lane": _seconds([lane]),
      "time alone": _seconds([run]),
    }
    for lane, run in pairs
  ]
  ratio = _mean_time([lane for lane, _ in pairs], "train") / _mean_time(alone, "train")
  return [
    "Some of them were trained alone too:",
    commands.to_markdown(rows),
    f"A lane took {ratio:.2f} times as long as a run alone. Compilation and initialisation took"
    f" {_mean_time(alone, 'compile'):.1f} s for each run alone.",
  ]


def _seconds(runs: Sequence[dict[str, Any]]) -> str:
  return f"{_mean_time(runs, 'train'):,.2f} s"


def _mean_time(runs: Sequence[dict[str, Any]], what: str) -> float:
  return statistics.mean(run["seconds"][what] for run in runs)


def _plot(
  path: pathlib.Path, options: Sweep, runs: Sequence[Run], results: Sequence[dict[str, Any]]
) -> None:
  rows = [Row(options.name, sparsity=sparsity) for sparsity in options.sparsities]
  found = {row: {} for row in rows}
  for run, result in zip(runs, results):
    found[Row(options.name, sparsity=run.recipe.sparsity)][run.seed] = result
  title = f"{options.name}, {options.recipe.epochs} epochs"
  table = Table({title: {options.name: tuple(rows)}}, options.seeds)
  plots.plot_table(path, table, dict.fromkeys(rows, runs[0].recipe), found)


def main(args: list[str] | None = None) -> None:
  with commands.errors_as_messages(resumes=True):
    description = "Sweeps a recipe over sparsities and seeds, as one compiled program."
    options = train_lib.parse(Sweep, "sweep", description, args)
    train_lib.set_determinism(options.deterministic)
    text = sweep(options)
    if text is not None:
      print(f"\n{text}\nresults in {options.folder}")


if __name__ == "__main__":
  main()
