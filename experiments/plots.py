"""Pictures of runs, made from their metrics."""

import functools
import math
import pathlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes

import sparsejax
from experiments.recipe import Recipe
from experiments.tables import Row, Series, Table

Results = Mapping[Row, Mapping[int, dict[str, Any]]]
# Sparsities, in per cent, that stand together.
_NEAR = 2.0


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
  path: pathlib.Path, table: Table, recipes: Mapping[Row, Recipe], results: Results
) -> None:
  """Draws test accuracy over sparsity: our runs, their means, and what is published.

  Each block of the table has its own axes, unless it has no results and is not of published runs
  for the greater part. Where the accuracy of the best epoch is published, ours of that kind stands
  beside it. Runs that collapsed fall out of the picture; the titles count them.

  Args:
    path: of the PNG to write.
    table: whose.
    recipes: by row.
    results: by row and seed, the contents of `result.json`.
  """
  panels = []
  for title, block in table.blocks.items():
    rows = [row for rows in block.values() for row in rows]
    published = [row for row in rows if recipes[row].published]
    if not any(results[row] for row in rows) and len(published) <= len(rows) / 2:
      continue
    collapsed = sum(len(results[row]) - len(_alive(results[row])) for row in rows)
    title += f" (not drawn: {collapsed} collapsed)" if collapsed else ""
    panels.append((title, functools.partial(_draw_block, block, recipes, results)))
  _draw(path, panels, xlabel="sparsity (%)")


def _draw_block(block: Series, recipes: Mapping[Row, Recipe], results: Results, axis: Axes) -> None:
  """Draws a line for each series; what is not pruned at all is a level to compare with."""
  rows, pruned = [], []
  for label, rows_of_label in block.items():
    rows += rows_of_label
    for row in rows_of_label:
      found = [run["sparsity"] for run in _alive(results[row]) if run["pruned"]]
      found += [recipes[row].sparsity] * (recipes[row].published is not None)
      pruned += [(100 * sparsity, label, row) for sparsity in found if sparsity]
  place = _Places(pruned, len(block))
  for i, (label, rows_of_label) in enumerate(block.items()):
    style, means = _style(i), {}
    runs = [run for row in rows_of_label for run in _alive(results[row])]
    if runs and not any(run["pruned"] for run in runs):
      mean = statistics.mean(run["test_accuracy"] for run in runs)
      axis.axhline(mean, color=style["color"], linestyle="--", label=label)
      continue
    for row in rows_of_label:
      published = recipes[row].published
      if published is not None:
        axis.errorbar(
          place(i, 100 * recipes[row].sparsity),
          published.accuracy,
          published.spread,
          fmt="D" if published.epoch == "last" else "*",
          mfc="none",
          color=style["color"],
          capsize=3,
        )
      alive = _alive(results[row])
      for run in alive:
        at = place(i, 100 * run["sparsity"])
        axis.plot(at, run["test_accuracy"], ".", color=style["color"], alpha=0.4)
        if run["best_test_accuracy"] is not None:
          axis.plot(at, run["best_test_accuracy"]["test_accuracy"], "*", color=style["color"])
      if alive:
        at = place(i, 100 * statistics.mean(run["sparsity"] for run in alive))
        means[at] = statistics.mean(run["test_accuracy"] for run in alive)
    axis.plot(list(means), list(means.values()), label=label, **style)
  if place.groups:
    names = [_range(group) for group in place.groups]
    axis.set_xticks(range(len(names)), names)
  axis.plot([], [], ".", color="k", label="one seed")
  if any(recipes[row].published for row in rows):
    axis.plot([], [], "D", mfc="none", color="k", label="published")
  if any(recipes[row].best_above < 1 for row in rows):
    axis.plot([], [], "*", color="k", label="best epoch, by the test set")
    axis.plot([], [], "*", mfc="none", color="k", label="published, best epoch")


class _Places:
  """Where a sparsity stands: as it is, or, of many series, in a group, side by side.

  Attributes:
    groups: of sparsities that are nearly the same, but not of two rows of one series; empty if they
      stand as they are.
  """

  def __init__(self, sparsities: Iterable[tuple[float, str, Row]], series: int):
    """Groups sparsities, each with the label and the row of one of so many series."""
    self.groups: list[list[float]] = []
    self._series = series
    row_of = {}  # In the last group, by label.
    for sparsity, label, row in sorted(sparsities, key=lambda each: each[0]) if series > 5 else ():
      above = sparsity - self.groups[-1][-1] if self.groups else math.inf
      if above > _NEAR or (above and row_of.get(label, row) != row):
        self.groups.append([])
        row_of = {}
      self.groups[-1].append(sparsity)
      row_of[label] = row

  def __call__(self, series: int, sparsity: float) -> float:
    for i, group in enumerate(self.groups):
      if group[0] <= sparsity <= group[-1]:
        return i + 0.6 * (series / (self._series - 1) - 0.5)
    return sparsity


def plot_costs(
  path: pathlib.Path, table: Table, recipes: Mapping[Row, Recipe], results: Results
) -> None:
  """Draws mean test accuracy over the epochs of training that it took, all cycles together.

  Blocks of the table whose titles agree up to a comma share their axes, one for each sparsity, if
  they have a dense network to compare with. Runs that collapsed fall out, as in `plot_table`, which
  counts them and whose arguments these are.
  """
  points = {}  # By what axes share.
  comparisons = {title: block for title, block in table.blocks.items() if "dense" in block}
  for title, block in comparisons.items():
    for label, rows in block.items():
      for row in rows:
        if alive := _alive(results[row]):
          recipe = recipes[row]
          sparsity = 100 * statistics.mean(run["sparsity"] for run in alive)
          epochs = recipe.epochs_after(row.cycle or recipe.cycles)
          point = _Point(label, epochs, sparsity, [run["test_accuracy"] for run in alive])
          points.setdefault(title.split(",")[0], []).append(point)
  labels = list(dict.fromkeys(label for block in table.blocks.values() for label in block))
  panels = []
  for title, found in points.items():
    for group in _close_together({point.sparsity for point in found} - {0}):
      chosen = [point for point in found if point.sparsity in (0, *group)]
      title_of_group = f"{title}, {_range(group)} % pruned"
      panels.append((title_of_group, functools.partial(_draw_costs, labels, chosen)))
  _draw(path, panels, xlabel="epochs of training, of all cycles together")


def plot_similarity(path: pathlib.Path, found: dict[str, Any]) -> None:
  """Draws Jaccard indices of pairs of criteria: what they drop, early and late, and final masks.

  Args:
    path: of the PNG to write.
    found: as `similarity.measure` returns it.
  """
  early, late = found["dropped"][0], found["dropped"][-1]
  panels = {
    f"dropped after epoch {early['epoch']}": early["pairs"],
    f"dropped after epoch {late['epoch']}": late["pairs"],
    "final masks": found["final masks"]["pairs"],
  }
  figure, axes = plt.subplots(1, 3, figsize=(15, 5), layout="constrained")
  for axis, (title, pairs) in zip(axes, panels.items()):
    names = list(dict.fromkeys(name for pair in pairs for name in pair["pair"]))
    matrix = np.eye(len(names))
    for pair in pairs:
      i, j = (names.index(name) for name in pair["pair"])
      matrix[i, j] = matrix[j, i] = pair["overall"]
    axis.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
    for i, j in np.ndindex(matrix.shape):
      color = "white" if matrix[i, j] < 0.6 else "black"
      axis.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", color=color)
    labels = [name.replace("_", " ") for name in names]
    axis.set_xticks(range(len(names)), labels, rotation=40, ha="right")
    axis.set_yticks(range(len(names)), labels)
    axis.set_title(f"Jaccard index: {title}")
  figure.savefig(path, dpi=80)
  plt.close(figure)


class _Point(NamedTuple):
  """A row of a table in the figure of costs; accuracies and sparsity in per cent."""

  label: str
  epochs: int
  sparsity: float
  accuracies: Sequence[float]


def _draw_costs(labels: Sequence[str], points: Sequence[_Point], axis: Axes) -> None:
  for i, label in enumerate(labels):
    line = {point.epochs: point.accuracies for point in points if point.label == label}
    if line:
      axis.errorbar(
        sorted(line),
        [statistics.mean(line[epochs]) for epochs in sorted(line)],
        [_spread(line[epochs]) for epochs in sorted(line)],
        label=label,
        capsize=3,
        **_style(i),
      )
  axis.set_xscale("log")
  # Of those that would stand on each other, the first.
  epochs = [group[0] for group in _close_together((math.log(p.epochs) for p in points), gap=0.2)]
  axis.set_xticks([math.exp(x) for x in epochs], minor=False)
  axis.xaxis.set_major_formatter("{x:.0f}")
  axis.xaxis.set_minor_locator(ticker.NullLocator())


def _draw(
  path: pathlib.Path, panels: Sequence[tuple[str, Callable[[Axes], None]]], xlabel: str
) -> None:
  """Draws each panel, a title and a function, on axes of its own, at most two in a line."""
  if not panels:
    return
  columns, lines = min(max(len(panels), 1), 2), max(math.ceil(len(panels) / 2), 1)
  figure, axes = plt.subplots(
    lines, columns, figsize=(7 * columns, 5 * lines), layout="constrained", squeeze=False
  )
  for axis in axes.ravel()[len(panels) :]:
    axis.set_axis_off()
  for (title, draw), axis in zip(panels, axes.ravel()):
    draw(axis)
    axis.set(title=title, xlabel=xlabel, ylabel="test accuracy (%)")
    _spread_high_accuracies(axis)
    axis.legend(fontsize="x-small")
  figure.savefig(path, dpi=80)
  plt.close(figure)


def _spread_high_accuracies(axis: Axes) -> None:
  """Gives each halving of the error as much room, if accuracies differ much."""
  low, high = axis.get_ylim()
  ticks = [tick for tick in (20, 50, 80, 90, 95, 97, 98, 98.5, 99, 99.3) if low <= tick <= high]
  if high - low > 5:
    axis.set_yscale(
      "function",
      functions=(lambda a: -np.log(np.maximum(100.2 - a, 0.1)), lambda x: 100.2 - np.exp(-x)),
    )
    axis.set_ylim(low, min(high, 99.6))
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])


def _spread(values: Sequence[float]) -> float:
  return statistics.stdev(values) if len(values) > 1 else 0.0


def _close_together(values: Iterable[float], gap: float = _NEAR) -> list[list[float]]:
  """Groups of values, in order, between which there is a gap."""
  groups = []
  for value in sorted(values):
    if not groups or value - groups[-1][-1] > gap:
      groups.append([])
    groups[-1].append(value)
  return groups


def _range(values: Sequence[float]) -> str:
  return " to ".join(dict.fromkeys(f"{bound:.1f}" for bound in (min(values), max(values))))


def _alive(runs: Mapping[int, dict[str, Any]]) -> list[dict[str, Any]]:
  return [run for run in runs.values() if run["collapsed_in_epoch"] is None]


def _style(i: int) -> dict[str, str]:
  """How the i-th line looks: more than there are colours differ in markers and dashes."""
  lap = i // 10 % 4
  return {"color": f"C{i % 10}", "marker": "os^v"[lap], "linestyle": ("-", ":", "-.", "--")[lap]}
