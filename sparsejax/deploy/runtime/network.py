"""Networks of dense and convolution layers, and what lies between them."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from . import affine, timing

Padding = Literal["SAME", "VALID"] | Sequence[tuple[int, int]]


def relu(x: np.ndarray) -> np.ndarray:
  return np.maximum(x, 0)


@dataclasses.dataclass(frozen=True)
class Dense:
  """A dense layer.

  Attributes:
    kernel: of inputs and outputs.  # shape=(inputs, outputs)
    bias: of the outputs, or None.  # shape=(outputs,)
    activation: an elementwise function, or None.
  """

  kernel: np.ndarray
  bias: np.ndarray | None = None
  activation: Callable[[np.ndarray], np.ndarray] | None = None

  @property
  def matrix(self) -> np.ndarray:
    """What it multiplies with.  # shape=(inputs, outputs)"""
    return self.kernel

  def rows(self, x: np.ndarray) -> np.ndarray:
    """The rows that are multiplied with the matrix."""
    return x


@dataclasses.dataclass(frozen=True)
class Conv:
  """A convolution of two dimensions, channels last.

  Attributes:
    kernel: as in JAX and Flax.  # shape=(height, width, inputs, outputs)
    bias: of the outputs, or None.  # shape=(outputs,)
    activation: an elementwise function, or None.
    strides: down and to the right.
    padding: with zeros: "SAME" or "VALID" as in JAX, or a pair for each of the two dimensions.
  """

  kernel: np.ndarray
  bias: np.ndarray | None = None
  activation: Callable[[np.ndarray], np.ndarray] | None = None
  strides: tuple[int, int] = (1, 1)
  padding: Padding = "SAME"

  @property
  def matrix(self) -> np.ndarray:
    """What it multiplies with.  # shape=(height * width * inputs, outputs)"""
    return self.kernel.reshape(-1, self.kernel.shape[-1])

  def rows(self, x: np.ndarray) -> np.ndarray:
    """The patches that are multiplied with the matrix."""
    windows = _windows(x, self.kernel.shape[:2], self.strides, self.padding, fill=0)
    patches = np.moveaxis(windows, 3, -1)
    return patches.reshape(*patches.shape[:3], math.prod(patches.shape[3:]))


@dataclasses.dataclass(frozen=True)
class Pool:
  """The largest or the mean value of each window, channels last.

  Attributes:
    kind: "max" or "mean".
    window: height and width.
    strides: by default the window.
    padding: as in `Conv`; a mean counts zeros there.
  """

  kind: Literal["max", "mean"]
  window: tuple[int, int]
  strides: tuple[int, int] | None = None
  padding: Padding = "VALID"

  def __call__(self, x: np.ndarray) -> np.ndarray:
    reduce, fill = (np.max, -np.inf) if self.kind == "max" else (np.mean, 0)
    windows = _windows(x, self.window, self.strides or self.window, self.padding, fill)
    return reduce(windows, axis=(-2, -1))


def flatten(x: np.ndarray) -> np.ndarray:
  """One row for each example."""
  return x.reshape(len(x), math.prod(x.shape[1:]))


class Network:
  """Layers one after the other, with the faster kind of matrix in each.

  Attributes:
    choices: for each layer with a matrix, in order, "dense" or "sparse".
  """

  def __init__(
    self,
    layers: Sequence[Dense | Conv | Callable[[np.ndarray], np.ndarray]],
    example: np.ndarray,
    *,
    kind: Literal["fastest", "dense", "sparse"] = "fastest",
    rounds: int = 5,
  ):
    """Prepares the layers, and times each in both ways.

    Args:
      layers: `Dense`, `Conv`, or any function of an array, such as `flatten` or `Pool`.
      example: inputs of the number and shape that it is to be fast for.
      kind: of all matrices; by default the one that takes less time in each layer.
      rounds: how often to time each.

    Raises:
      ValueError: if a layer does not fit what comes before it, or has NaN; it says which.
    """
    found: list[Any] = []
    self.choices = []
    x = np.asarray(example)
    for number, layer in enumerate(layers):
      if not isinstance(layer, (Dense, Conv)):
        found.append(layer)
        x = layer(x)
        continue
      for part in ("kernel", "bias"):
        weights = getattr(layer, part)
        if weights is not None and np.isnan(weights).any():
          raise ValueError(f"layer {number} has NaN in its {part}.")
      if layer.activation is not None and not callable(layer.activation):
        raise ValueError(
          f"the activation of layer {number} must be a function, got {layer.activation!r}."
        )
      outputs = layer.matrix.shape[-1]
      if layer.bias is not None and np.shape(layer.bias) != (outputs,):
        raise ValueError(
          f"the bias of layer {number} must have shape {(outputs,)}, got {np.shape(layer.bias)}."
        )
      rows = layer.rows(x)
      if rows.shape[-1] != len(layer.matrix):
        raise ValueError(
          f"layer {number} takes {len(layer.matrix)} numbers, but gets {rows.shape[-1]}."
        )
      ways = {
        "dense": lambda layer=layer: _Product(layer, affine.dense(_affine(layer))),
        "sparse": lambda layer=layer: _sparse(layer),
      }
      choice, product = timing.choose(ways, x, kind, rounds)
      self.choices.append(choice)
      found.append(product)
      x = product(x)
    self._layers = []
    for function in found:
      both = affine.joined(self._layers[-1], function) if self._layers else None
      if both is None:
        self._layers.append(function)
      else:
        self._layers[-1] = both

  def __call__(self, x: np.ndarray) -> np.ndarray:
    """The outputs, for a batch of any size."""
    for layer in self._layers:
      x = layer(x)
    return x


@dataclasses.dataclass(frozen=True)
class _Product:
  """A layer and how to compute what becomes of its rows."""

  layer: Dense | Conv
  compute: Callable[[np.ndarray], np.ndarray]

  def __call__(self, x: np.ndarray) -> np.ndarray:
    rows = self.layer.rows(x)
    out = self.compute(rows.reshape(-1, rows.shape[-1]))
    if self.layer.activation not in (None, relu):
      out = self.layer.activation(out)
    return out.reshape(*rows.shape[:-1], out.shape[-1])


def _affine(layer: Dense | Conv) -> affine.Affine:
  """What becomes of the rows of a layer, but for activations that are more than a floor."""
  return affine.Affine(layer.matrix, layer.bias, 0 if layer.activation is relu else None)


def _sparse(layer: Dense | Conv) -> Callable[[np.ndarray], np.ndarray]:
  """A layer with a sparse matrix."""
  layers = affine.sparse(_affine(layer))
  is_all = isinstance(layer, Dense) and layer.activation in (None, relu)
  return layers if is_all else _Product(layer, layers)


def _windows(
  x: np.ndarray, window: Sequence[int], strides: Sequence[int], padding: Padding, fill: float
) -> np.ndarray:
  """The windows at all places.  # shape=(batch, down, right, channels, height, width)"""
  if padding == "VALID":
    padding = [(0, 0), (0, 0)]
  elif padding == "SAME":
    missing = [
      max((-(-n // s) - 1) * s + w - n, 0) for n, w, s in zip(x.shape[1:3], window, strides)
    ]
    padding = [(m // 2, m - m // 2) for m in missing]
  padded = np.pad(x, [(0, 0), *padding, (0, 0)], constant_values=fill)
  found = sliding_window_view(padded, tuple(window), axis=(1, 2))
  return found[:, :: strides[0], :: strides[1]]
