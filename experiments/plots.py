"""Pictures of runs, made from their metrics."""

import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt

import sparsejax
from experiments.recipe import Recipe
from experiments.tables import Row, Table

Results = Mapping[Row, Mapping[int, dict[str, Any]]]


def plot_run(
  path: pathlib.Path, title: str, metrics: Sequence[dict[str, Any]], layers: sparsejax.Summary
) -> None:
  """Draws accuracy and sparsity over epochs, and the sparsity of each layer.

  Args:
    path: of the PNG to write.
    title: of the picture.
    metrics: the lines of a run's `metrics.jsonl`.
    layers: of the trained network.
  """
  figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
  figure.suptitle(title)
  epochs = range(1, len(metrics) + 1)
  for name in ("train_accuracy", "validation_accuracy", "test_accuracy"):
    # Not each recipe measures each of them in each epoch.
    known = [
      (epoch, 100 * line[name])
      for epoch, line in zip(epochs, metrics)
      if line.get(name) is not None
    ]
    if known:
      left.plot(*zip(*known), label=name.replace("_", " "))
  left.plot([], [], "k--", label="sparsity")
  left.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(0, 101))
  left.xaxis.get_major_locator().set_params(integer=True)
  left.legend(loc="lower right")
  twin = left.twinx()
  twin.plot(epochs, [100 * line["sparsity"] for line in metrics], "k--")
  twin.set(ylabel="sparsity (%)", ylim=(0, 101))

  names = [row.name for row in layers.layers]
  right.barh(names, [100 * row.sparsity for row in layers.layers], color="C2", alpha=0.6)
  for i, row in enumerate(layers.layers):
    right.text(1, i, f"{row.active:,} of {row.parameters:,} active", verticalalignment="center")
  right.set(xlabel="sparsity (%)", xlim=(0, 100))
  right.invert_yaxis()
  figure.savefig(path, dpi=100)
  plt.close(figure)


def plot_table(
  path: pathlib.Path, table: Table, recipes: Mapping[str, Recipe], results: Results
) -> None:
  """Draws test accuracy over sparsity: our runs, their means, and what is published.

  Each block of the table has its own axes, unless it has no results. Where the accuracy of the best
  epoch is published, ours of that kind stands beside it. Runs that collapsed fall out of the
  picture; the titles count them.

  Args:
    path: of the PNG to write.
    table: whose.
    recipes: all recipes, by name.
    results: by row and seed, the contents of `result.json`.
  """
  blocks = {
    title: series
    for title, series in table.blocks.items()
    if any(results[row] for rows in series.values() for row in rows)
  } or table.blocks
  figure, axes = _subplots(len(blocks))
  for (title, series), axis in zip(blocks.items(), axes[0]):
    collapsed = sum(
      len(results[row]) - len(_alive(results[row])) for rows in series.values() for row in rows
    )
    title += f" (not drawn: {collapsed} collapsed)" if collapsed else ""
    for i, (label, rows) in enumerate(series.items()):
      style = _style(i)
      means = {}
      for row in rows:
        alive = _alive(results[row])
        published = recipes[row.recipe].published
        if published is not None:
          axis.errorbar(
            100 * recipes[row.recipe].sparsity,
            published.accuracy,
            published.spread,
            fmt="D" if published.epoch == "last" else "*",
            mfc="none",
            color=style["color"],
            capsize=3,
          )
        for run in alive:
          axis.plot(
            100 * run["sparsity"], run["test_accuracy"], ".", color=style["color"], alpha=0.4
          )
          if run["best_test_accuracy"] is not None:
            best = run["best_test_accuracy"]["test_accuracy"]
            axis.plot(100 * run["sparsity"], best, "*", color=style["color"])
        if alive:
          at, accuracies = zip(*((100 * run["sparsity"], run["test_accuracy"]) for run in alive))
          means[statistics.mean(at)] = statistics.mean(accuracies)
      axis.plot(list(means), list(means.values()), label=label, **style)
    rows = [row for rows in series.values() for row in rows]
    axis.plot([], [], ".", color="k", label="one seed")
    if any(recipes[row.recipe].published for row in rows):
      axis.plot([], [], "D", mfc="none", color="k", label="published")
    if any(recipes[row.recipe].best_above < 1 for row in rows):
      axis.plot([], [], "*", color="k", label="best epoch, by the test set")
      axis.plot([], [], "*", mfc="none", color="k", label="published, best epoch")
    axis.set(title=title, xlabel="sparsity (%)", ylabel="test accuracy (%)")
    axis.legend(fontsize="small")
  figure.savefig(path, dpi=80)
  plt.close(figure)


def plot_costs(
  path: pathlib.Path, table: Table, recipes: Mapping[str, Recipe], results: Results
) -> None:
  """Draws mean test accuracy over the epochs of training that it took, all cycles together.

  Blocks of the table whose titles agree up to a comma share their axes, one for each sparsity; the
  dense networks are in all of them. The arguments are those of `plot_table`.
  """
  points = {}  # By network and data: (label, epochs, sparsity, accuracies), in per cent.
  labels = list(dict.fromkeys(label for block in table.blocks.values() for label in block))
  for title, series in table.blocks.items():
    for label, rows in series.items():
      for row in rows:
        if alive := _alive(results[row]):
          recipe = recipes[row.recipe]
          epochs = recipe.epochs_after(row.cycle or recipe.cycles)
          sparsity = 100 * statistics.mean(run["sparsity"] for run in alive)
          accuracies = [run["test_accuracy"] for run in alive]
          point = (label, epochs, sparsity, accuracies)
          points.setdefault(title.split(",")[0], []).append(point)
  panels = [
    (title, group, [point for point in found if point[2] in (0, *group)])
    for title, found in points.items()
    for group in _close_together({point[2] for point in found} - {0})
  ]
  figure, axes = _subplots(max(len(panels), 1))
  for (title, group, found), axis in zip(panels, axes[0]):
    for i, label in enumerate(labels):
      of_label = sorted({each[1]: each[3] for each in found if each[0] == label}.items())
      if of_label:
        means = [statistics.mean(accuracies) for _, accuracies in of_label]
        spreads = [
          statistics.stdev(accuracies) if len(accuracies) > 1 else 0 for _, accuracies in of_label
        ]
        axis.errorbar(
          [epochs for epochs, _ in of_label], means, spreads, label=label, capsize=3, **_style(i)
        )
    pruned = "" if not group else f", {min(group):.1f}"
    pruned += f" to {max(group):.1f}" if len(group) > 1 else ""
    axis.set(title=f"{title}{pruned} % pruned", xlabel="epochs of training, in all cycles together")
    axis.set(ylabel="test accuracy (%)", xscale="log")
    axis.legend(fontsize="small")
  figure.savefig(path, dpi=80)
  plt.close(figure)


def _close_together(values: Iterable[float], gap: float = 2.0) -> list[list[float]]:
  """Groups of values, in order, between which there is a gap."""
  groups = []
  for value in sorted(values):
    if not groups or value - groups[-1][-1] > gap:
      groups.append([])
    groups[-1].append(value)
  return groups


def _alive(runs: Mapping[int, dict[str, Any]]) -> list[dict[str, Any]]:
  return [run for run in runs.values() if run["collapsed_in_epoch"] is None]


def _style(i: int) -> dict[str, str]:
  """Colour and marker of the i-th line: more than there are colours differ in the marker."""
  return {"color": f"C{i % 10}", "marker": "os^v"[i // 10 % 4], "linestyle": "-"}


def _subplots(count: int):
  return plt.subplots(1, count, figsize=(6.5 * count, 5.5), layout="constrained", squeeze=False)
