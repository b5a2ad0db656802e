"""Pictures of runs, made from their metrics."""

import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt

import sparsejax


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
  epochs = [line["epoch"] + 1 for line in metrics]
  for name, color in (("train_accuracy", "C0"), ("validation_accuracy", "C1")):
    label = name.replace("_", " ")
    left.plot(epochs, [100 * line[name] for line in metrics], color=color, label=label)
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
  path: pathlib.Path, title: str, results: dict[str, dict[int, dict[str, Any]]]
) -> None:
  """Draws the test accuracy of each run beside what is published.

  Runs that collapsed fall out of the picture; the legend counts them.

  Args:
    path: of the PNG to write.
    title: of the picture.
    results: by recipe and seed, the contents of `result.json`.
  """
  figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
  collapsed = 0
  for i, runs in enumerate(results.values()):
    for published in {run["config"]["published"] for run in runs.values()} - {None}:
      axes.plot(published, i, "D", color="C1")
    for run in runs.values():
      if run["collapsed_in_epoch"] is not None:
        collapsed += 1
        continue
      axes.plot(run["test_accuracy"], i, "o", color="C0", alpha=0.6)
  axes.plot([], [], "o", color="C0", label=f"one seed ({collapsed} collapsed, not shown)")
  axes.plot([], [], "D", color="C1", label="published")
  axes.set_yticks(range(len(results)), list(results))
  axes.set(title=title, xlabel="test accuracy of the last epoch (%)")
  axes.invert_yaxis()
  axes.legend()
  figure.savefig(path, dpi=100)
  plt.close(figure)
