"""Pictures of runs, made from their metrics."""

import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt

import sparsejax
from experiments.recipe import Recipe


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
  path: pathlib.Path,
  series: Mapping[str, Sequence[str]],
  recipes: Mapping[str, Recipe],
  results: Mapping[str, Mapping[int, dict[str, Any]]],
) -> None:
  """Draws test accuracy over sparsity: our runs, their means, and what is published.

  Where the accuracy of the best epoch is published, ours of that kind stands beside it. Runs that
  collapsed fall out of the picture; the title counts them.

  Args:
    path: of the PNG to write.
    series: names of recipes, by the label of the line that they make.
    recipes: all recipes, by name.
    results: by recipe and seed, the contents of `result.json`.
  """
  sets = list(dict.fromkeys(recipes[name].data for names in series.values() for name in names))
  figure, axes = plt.subplots(
    1, len(sets), figsize=(6 * len(sets), 5), layout="constrained", squeeze=False
  )
  runs = [run for of_recipe in results.values() for run in of_recipe.values()]
  collapsed = sum(run["collapsed_in_epoch"] is not None for run in runs)
  figure.suptitle(f"runs: {len(runs)}" + f", of which collapsed: {collapsed}" * bool(collapsed))
  for i, (label, names) in enumerate(series.items()):
    axis, color = axes[0, sets.index(recipes[names[0]].data)], f"C{i}"
    means = {}
    for name in names:
      published, at = recipes[name].published, 100 * recipes[name].sparsity
      if published is not None:
        axis.errorbar(
          at,
          published.accuracy,
          published.spread,
          fmt="D" if published.epoch == "last" else "*",
          mfc="none",
          color=color,
          capsize=3,
        )
      alive = [run for run in results[name].values() if run["collapsed_in_epoch"] is None]
      accuracies = [run["test_accuracy"] for run in alive]
      axis.plot([at] * len(accuracies), accuracies, ".", color=color, alpha=0.5)
      for run in alive:
        if run["best_test_accuracy"] is not None:
          axis.plot(at, run["best_test_accuracy"]["test_accuracy"], "*", color=color)
      if accuracies:
        means[at] = statistics.mean(accuracies)
    axis.plot(list(means), list(means.values()), "-o", color=color, label=label)
  for data, axis in zip(sets, axes[0]):
    axis.plot([], [], ".", color="k", label="one seed")
    axis.plot([], [], "D", mfc="none", color="k", label="published")
    if any(recipes[name].best_above < 1 for name in results if recipes[name].data == data):
      axis.plot([], [], "*", color="k", label="best epoch, by the test set")
      axis.plot([], [], "*", mfc="none", color="k", label="published, best epoch")
    axis.set(title=data, xlabel="sparsity (%)", ylabel="test accuracy (%)")
    axis.legend()
  figure.savefig(path, dpi=100)
  plt.close(figure)
