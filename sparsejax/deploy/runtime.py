"""Inference with NumPy and SciPy alone, for networks of dense and convolution layers.

This file needs nothing else of the library, nor JAX: it may be copied. Each layer multiplies with a
dense or with a sparse (CSR) matrix, whichever took less time when the network was made. Where Numba
is installed, it compiles sparse products for this processor.
"""

import dataclasses
import functools
import math
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
      for part in ("kernel", "bias"):
        weights = getattr(layer, part)
        if weights is not None and np.isnan(weights).any():
          raise ValueError(f"layer {number} has NaN in its {part}.")
      rows = layer.rows(x)
      if rows.shape[-1] != len(layer.matrix):
        raise ValueError(
          f"layer {number} takes {len(layer.matrix)} numbers, but gets {rows.shape[-1]}."
        )
      ways = {
        "dense": lambda layer=layer: _Product(layer, dense(layer.matrix)),
        "sparse": lambda layer=layer: _Product(layer, sparse(layer.matrix)),
      }
      choice, product = choose(ways, x, kind, rounds)
      self.choices.append(choice)
      self._layers.append(product)
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
  ways: Mapping[str, Callable[[], Callable[[np.ndarray], np.ndarray]]],
  x: np.ndarray,
  kind: str = "fastest",
  rounds: int = 5,
) -> tuple[str, Callable[[np.ndarray], np.ndarray]]:
  """Which of several functions to take.

  Args:
    ways: makes each of them.
    x: what they are to be fast for.
    kind: the name of one, or "fastest": the one that takes less time.
    rounds: how often to time each.

  Returns:
    Its name and itself.
  """
  if kind != "fastest":
    return kind, ways[kind]()
  functions = {name: make() for name, make in ways.items()}
  calls = {name: functools.partial(function, x) for name, function in functions.items()}
  times = take_turns(calls, rounds, turn=1e-2)
  choice = min(functions, key=lambda name: min(times[name]))
  return choice, functions[choice]


def take_turns(
  functions: Mapping[str, Callable[[], Any]], rounds: int, *, turn: float
) -> dict[str, list[float]]:
  """The time of a call of each function in each round, in seconds.

  In a round each function has a turn, so that what disturbs the machine for a while disturbs all of
  them; and of a turn the fastest call counts, which is disturbed the least. Threads that wait for
  each other, as those of dense products do, suffer more than others when the cores are shared.

  Args:
    functions: by name.
    rounds: how many.
    turn: how many seconds of calls make up a turn; it is one call at least.
  """

  def fastest(function):
    best, end = math.inf, time.perf_counter() + turn
    while True:
      started = time.perf_counter()
      function()
      now = time.perf_counter()
      best = min(best, now - started)
      if now >= end:
        return best

  for function in functions.values():
    function()  # The first call of all is longer.
  times = [{name: fastest(function) for name, function in functions.items()} for _ in range(rounds)]
  return {name: [each[name] for each in times] for name in functions}


def dense(matrix: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
  """A function that multiplies rows with a matrix."""
  matrix = np.ascontiguousarray(matrix)
  return lambda rows: rows @ matrix


def sparse(matrix: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
  """The same with a sparse matrix (CSR), by Numba if it is installed, or else by SciPy."""
  try:
    import scipy.sparse
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      "sparse products need SciPy: pip install scipy, or 'sparsejax[deploy]'"
    ) from error
  if matrix.dtype not in (np.float32, np.float64):
    raise ValueError(f"SciPy has no sparse matrices of {matrix.dtype}: convert it to float32.")
  transposed = scipy.sparse.csr_matrix(matrix.T)
  compiled = _compiled(matrix.dtype)
  # Indices without a sign need no look at whether they count from the end.
  starts, columns = transposed.indptr.astype(np.uint64), transposed.indices.astype(np.uint32)

  def multiply(rows):
    if compiled is None or rows.dtype != matrix.dtype or len(rows) == 1:
      return (transposed @ rows.T).T  # With one vector, this is fast.
    out = np.empty((len(starts) - 1, len(rows)), matrix.dtype)
    compiled(starts, columns, transposed.data, np.ascontiguousarray(rows.T), out)
    return out.T

  return multiply


@functools.cache
def _compiled(dtype: np.dtype) -> Callable[..., None] | None:
  """A product of CSR and dense matrices, compiled for this processor; None without Numba."""
  try:
    import numba
  except ImportError:  # It is not there, or not for this NumPy.
    return None
  number = numba.from_dtype(dtype)
  one, two, three, four = map(np.uint64, (1, 2, 3, 4))

  def read(kind, dimensions):
    return numba.types.Array(kind, dimensions, "C", readonly=True)

  arrays = read(numba.uint64, 1), read(numba.uint32, 1), read(number, 1), read(number, 2)

  # With a signature, this is compiled now and not at the first call.
  @numba.njit(
    numba.void(*arrays, numba.types.Array(number, 2, "C")), fastmath={"contract"}, nogil=True
  )
  def multiply(starts, columns, values, x, out):
    for row in range(len(out)):
      total = out[row]
      total[:] = 0
      i, end = starts[row], starts[row + 1]
      while i + four <= end:  # Sums are read and written once for four products.
        v0, v1, v2, v3 = values[i], values[i + one], values[i + two], values[i + three]
        x0, x1 = x[columns[i]], x[columns[i + one]]
        x2, x3 = x[columns[i + two]], x[columns[i + three]]
        for n in range(len(total)):
          total[n] += v0 * x0[n] + v1 * x1[n] + v2 * x2[n] + v3 * x3[n]
        i += four
      while i < end:
        v0, x0 = values[i], x[columns[i]]
        for n in range(len(total)):
          total[n] += v0 * x0[n]
        i += one

  return multiply


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
