"""Inference with NumPy and SciPy alone, for networks of dense and convolution layers.

This file needs nothing else of the library, nor JAX: it may be copied. Each layer multiplies with a
dense or with a sparse (CSR) matrix, whichever took less time when the network was made.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

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
    return patches.reshape(*patches.shape[:3], -1)


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
  return x.reshape(len(x), -1)


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
    self._layers = []
    self.choices = []
    x = np.asarray(example)
    for number, layer in enumerate(layers):
      if not isinstance(layer, (Dense, Conv)):
        self._layers.append(layer)
        x = layer(x)
        continue
      if np.isnan(layer.matrix).any():
        raise ValueError(f"layer {number} has NaN in its kernel.")
      rows = layer.rows(x)
      if rows.shape[-1] != len(layer.matrix):
        raise ValueError(
          f"layer {number} takes {len(layer.matrix)} numbers, but gets {rows.shape[-1]}."
        )
      choice, multiply = choose(layer.matrix, rows.reshape(-1, rows.shape[-1]), kind, rounds)
      self.choices.append(choice)
      self._layers.append(_Product(layer, multiply))
      x = self._layers[-1](x)

  def __call__(self, x: np.ndarray) -> np.ndarray:
    """The outputs, for a batch of any size."""
    for layer in self._layers:
      x = layer(x)
    return x


@dataclasses.dataclass(frozen=True)
class _Product:
  """A layer and its way to multiply."""

  layer: Dense | Conv
  multiply: Callable[[np.ndarray], np.ndarray]

  def __call__(self, x: np.ndarray) -> np.ndarray:
    rows = self.layer.rows(x)
    out = self.multiply(rows.reshape(-1, rows.shape[-1]))
    if self.layer.bias is not None:
      out += self.layer.bias
    if self.layer.activation is not None:
      out = self.layer.activation(out)
    return out.reshape(*rows.shape[:-1], out.shape[-1])


def choose(
  matrix: np.ndarray, rows: np.ndarray, kind: str = "fastest", rounds: int = 5
) -> tuple[str, Callable[[np.ndarray], np.ndarray]]:
  """How to multiply rows with a matrix.

  Args:
    matrix: of inputs and outputs.  # shape=(inputs, outputs)
    rows: for which it is to be fast.  # shape=(rows, inputs)
    kind: "dense", "sparse", or "fastest": the one that takes less time.
    rounds: how often to time each.

  Returns:
    "dense" or "sparse", and a function from rows to their products.
  """
  if kind != "fastest":
    return kind, {"dense": _dense, "sparse": _sparse}[kind](matrix)
  ways = {"dense": _dense(matrix), "sparse": _sparse(matrix)}
  calls = {name: functools.partial(way, rows) for name, way in ways.items()}
  times = take_turns(calls, rounds, turn=1e-3)
  choice = min(ways, key=lambda name: statistics.median(times[name]))
  return choice, ways[choice]


def take_turns(
  functions: Mapping[str, Callable[[], Any]], rounds: int, *, turn: float = 0.0
) -> dict[str, list[float]]:
  """The time of a call of each function in each round, in seconds.

  In a round each function has a turn, so that what disturbs the machine for a while disturbs all of
  them.

  Args:
    functions: by name. Each is called twice before it is timed.
    rounds: how many.
    turn: how many seconds of calls a turn has at least; it is one call, at least.
  """

  def seconds(function, calls):
    started = time.perf_counter()
    for _ in range(calls):
      function()
    return (time.perf_counter() - started) / calls

  calls = {}
  for name, function in functions.items():
    function()
    calls[name] = max(1, math.ceil(turn / max(seconds(function, 1), 1e-9)))
  times = [{name: seconds(f, calls[name]) for name, f in functions.items()} for _ in range(rounds)]
  return {name: [each[name] for each in times] for name in functions}


def _dense(matrix: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
  matrix = np.ascontiguousarray(matrix)
  return lambda rows: rows @ matrix


def _sparse(matrix: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
  try:
    import scipy.sparse
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      "sparse products need SciPy: pip install scipy, or 'sparsejax[deploy]'"
    ) from error
  transposed = scipy.sparse.csr_matrix(matrix.T)
  return lambda rows: (transposed @ rows.T).T


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
