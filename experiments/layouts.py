"""A picture of where the weights of a network lie."""

import math
import pathlib
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np

# Cells of a panel at most in either direction: more could not be seen.
_CELLS = 200
_WEIGHT = np.array([0.03, 0.19, 0.42])
_NO_WEIGHT = np.array([0.99, 0.86, 0.79])


def plot_layout(
  path: pathlib.Path, title: str, kernels: Mapping[str, np.ndarray], left: Mapping[str, str]
) -> None:
  """Draws how dense the weights of each kernel lie: inputs from top to bottom, outputs across.

  Outputs are the last axis of a kernel, inputs are all others. Inputs and outputs without any
  weight are shaded.

  Args:
    path: of the PNG to write.
    title: of the picture.
    kernels: by name, pruned weights being zero.
    left: by name, what compaction leaves of it.
  """
  columns = min(len(kernels), 3 if len(kernels) <= 6 else 6)
  lines = math.ceil(len(kernels) / columns)
  height = 4 if columns <= 3 else 2.5
  figure, axes = plt.subplots(
    lines, columns, figsize=(12, 0.5 + height * lines), layout="constrained", squeeze=False
  )
  figure.suptitle(f"{title} (shaded: inputs and outputs without any weight)", fontsize=10)
  for axis in axes.ravel()[len(kernels) :]:
    axis.set_axis_off()
  for axis, (name, kernel) in zip(axes.ravel(), kernels.items()):
    is_weight = kernel.reshape(-1, kernel.shape[-1]) != 0
    rows, outputs = is_weight.shape
    axis.imshow(
      _color(is_weight), aspect="auto", interpolation="nearest", extent=(0, outputs, rows, 0)
    )
    size = "x".join(map(str, kernel.shape))
    axis.set_title(
      f"{name}\n{size}, {is_weight.mean():.1%} left; compact: {left[name]}", fontsize=7
    )
    axis.tick_params(labelsize=6)
  figure.savefig(path, dpi=90)
  plt.close(figure)


def _color(is_weight: np.ndarray) -> np.ndarray:
  """The colour of each cell.  # shape=(down, across, 3)"""
  density = _mean_of_cells(is_weight)
  shade = _mean_of_cells(~(is_weight.any(1, keepdims=True) & is_weight.any(0, keepdims=True)))
  # A square root, so that single weights are seen beside dense parts.
  depth = np.sqrt(density / max(density.max(), 1e-9))[..., None]
  ground = 1 - shade[..., None] * (1 - _NO_WEIGHT)
  return ground * (1 - depth) + _WEIGHT * depth


def _mean_of_cells(array: np.ndarray) -> np.ndarray:
  """An array with the means of parts of each axis, where it is too long."""
  for axis, size in enumerate(array.shape):
    starts = np.unique(np.linspace(0, size, min(size, _CELLS), endpoint=False).astype(int))
    counts = np.diff([*starts, size]).reshape([-1 if a == axis else 1 for a in (0, 1)])
    array = np.add.reduceat(array.astype(np.float64), starts, axis) / counts
  return array
