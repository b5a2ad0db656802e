"""Inference with NumPy and SciPy alone, for networks of dense and convolution layers.

This file needs nothing else of the library, nor JAX: it may be copied. Each layer multiplies with a
dense or with a sparse (CSR) matrix, whichever took less time when the network was made. Where Numba
is installed, it compiles sparse layers for this processor, of which those in a row are one call.
"""

import dataclasses
import functools
import itertools
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

Padding = Literal["SAME", "VALID"] | Sequence[tuple[int, int]]

# So many rows go through compiled layers together: what they become there stays in fast memory.
_BLOCK = 64


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
      rows = layer.rows(x)
      if rows.shape[-1] != len(layer.matrix):
        raise ValueError(
          f"layer {number} takes {len(layer.matrix)} numbers, but gets {rows.shape[-1]}."
        )
      ways = {
        "dense": lambda layer=layer: _Product(layer, dense(_affine(layer))),
        "sparse": lambda layer=layer: _sparse(layer),
      }
      choice, product = choose(ways, x, kind, rounds)
      self.choices.append(choice)
      found.append(product)
      x = product(x)
    self._layers = []
    for function in found:
      both = joined(self._layers[-1], function) if self._layers else None
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


def _affine(layer: Dense | Conv) -> "Affine":
  """What becomes of the rows of a layer, but for activations that are more than a floor."""
  return Affine(layer.matrix, layer.bias, 0 if layer.activation is relu else None)


def _sparse(layer: Dense | Conv) -> Callable[[np.ndarray], np.ndarray]:
  """A layer with a sparse matrix."""
  layers = sparse(_affine(layer))
  is_all = isinstance(layer, Dense) and layer.activation in (None, relu)
  return layers if is_all else _Product(layer, layers)


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


class Affine(NamedTuple):
  """What becomes of rows in a layer.

  Attributes:
    matrix: what they are multiplied with; of SciPy's sparse ones too, where it becomes sparse.
      # shape=(inputs, outputs)
    bias: what is added to the products, or None.  # shape=(outputs,)
    floor: the least that comes out, such as 0 of a ReLU, or None.
  """

  matrix: Any
  bias: np.ndarray | None = None
  floor: float | None = None


def dense(affine: Affine) -> Callable[[np.ndarray], np.ndarray]:
  """A function of rows, with a dense matrix; biases and floors may be those of each row here."""
  _, bias, floor = affine
  matrix = np.ascontiguousarray(affine.matrix)
  if np.ndim(floor) == 0 and floor is not None:  # With a number, `np.maximum` takes twice as long.
    floor = np.full(matrix.shape[1], floor, matrix.dtype)

  def compute(rows):
    out = rows @ matrix
    if bias is not None:
      out += bias
    return out if floor is None else np.maximum(out, floor, out=out)

  return compute


def sparse(affine: Affine, threads: int = 1) -> "SparseLayers":
  """The same with a sparse matrix (CSR)."""
  return SparseLayers([affine], threads)


def joined(first: Any, second: Any) -> "SparseLayers | None":
  """Two functions as one, if both are sparse layers of one type."""
  are_sparse = isinstance(first, SparseLayers) and isinstance(second, SparseLayers)
  if not are_sparse or first.dtype != second.dtype:
    return None
  return SparseLayers([*first.layers, *second.layers], second.threads)


class SparseLayers:
  """Layers with sparse matrices (CSR), one after the other, along the last axis of an array.

  Numba computes them if it is installed, or else SciPy.

  Attributes:
    layers: the layers, with matrices of SciPy.
    dtype: of their matrices.
    threads: among how many threads rows are shared out, by Numba.
  """

  def __init__(self, layers: Sequence[Affine], threads: int = 1):
    """Prepares the layers.

    Raises:
      ValueError: if their matrices are not all of float32, or all of float64, or if one does not
        take what the one before gives.
      ModuleNotFoundError: without SciPy.
    """
    try:
      import scipy.sparse
    except ModuleNotFoundError as error:
      raise ModuleNotFoundError(
        "sparse products need SciPy: pip install scipy, or 'sparsejax[deploy]'"
      ) from error
    self.dtype, *others = {layer.matrix.dtype for layer in layers}
    if others or self.dtype not in (np.float32, np.float64):
      names = " and ".join(sorted(str(dtype) for dtype in (self.dtype, *others)))
      raise ValueError(
        f"sparse matrices are all of float32 or all of float64, not of {names}: convert them."
      )
    for before, after in itertools.pairwise(layers):
      if before.matrix.shape[1] != after.matrix.shape[0]:
        raise ValueError(
          f"a layer takes {after.matrix.shape[0]} numbers, but gets {before.matrix.shape[1]}."
        )
    # By output: the transpose of a matrix in CSR is in CSC, with the same arrays.
    self._by_output = [scipy.sparse.csr_matrix(layer.matrix.T) for layer in layers]
    self.layers = tuple(
      layer._replace(matrix=matrix.T) for layer, matrix in zip(layers, self._by_output)
    )
    self.threads = threads
    self._arrays = _end_to_end(self.layers)

  def __call__(self, x: np.ndarray) -> np.ndarray:
    """The outputs.  # shape=(..., outputs of the last layer)

    Raises:
      ValueError: if the last axis has not the length that the first layer takes.
    """
    size = self.layers[0].matrix.shape[0]
    if x.shape[-1] != size:
      raise ValueError(f"the first layer takes {size} numbers, but gets {x.shape[-1]}.")
    rows = x.reshape(math.prod(x.shape[:-1]), size)
    compiled = _compiled(self.dtype)
    if compiled is None or rows.dtype != self.dtype:
      out = self._by_scipy(rows)
    else:
      rows = np.ascontiguousarray(rows)
      out = np.empty((len(rows), self.layers[-1].matrix.shape[1]), self.dtype)
      in_parts(functools.partial(compiled, *self._arrays), self.threads, rows, out)
    return out.reshape(*x.shape[:-1], out.shape[-1])

  def _by_scipy(self, x: np.ndarray) -> np.ndarray:
    for (_, bias, floor), matrix in zip(self.layers, self._by_output):
      x = (matrix @ x.T).T
      if bias is not None:
        x += bias
      if floor is not None:
        x = np.maximum(x, floor)
    return x


def in_parts(function: Callable[..., Any], threads: int, *arrays: np.ndarray) -> list[Any]:
  """What a function returns for equal parts of arrays along their first axis, each in a thread."""
  ends = [len(arrays[0]) * i // threads for i in range(threads + 1)]
  first, *others = ([x[i:j] for x in arrays] for i, j in itertools.pairwise(ends))
  answers = [queue.SimpleQueue() for _ in others]
  for part, answer in zip(others, answers):
    _calls(threads - 1).put((function, part, answer))
  results = [function(*first)]
  for answer in answers:
    result, error = answer.get()
    if error is not None:
      raise error
    results.append(result)
  return results


@functools.cache
def _calls(threads: int) -> queue.SimpleQueue:
  """Takes calls, each with a queue for its result and its error, which so many threads make.

  The executors of `concurrent.futures` take two to three times as long to hand over a call, which
  counts where it takes a tenth of a millisecond.
  """
  calls = queue.SimpleQueue()

  def make_calls():
    while True:
      function, arguments, answer = calls.get()
      try:
        answer.put((function(*arguments), None))
      except BaseException as error:
        answer.put((None, error))

  for _ in range(threads):
    threading.Thread(target=make_calls, daemon=True).start()
  return calls


if hasattr(os, "register_at_fork"):  # A process that is forked has none of them.
  os.register_at_fork(after_in_child=_calls.cache_clear)


def _end_to_end(layers: Sequence[Affine]) -> tuple[np.ndarray, ...]:
  """Layers as the compiled function takes them: each kind of number in one array.

  Indices have no sign, so that no look is needed at whether they count from the end. A bias that is
  not there is zero, and a floor is minus infinity.

  Returns:
    Which inputs count at all; of how many units each layer is, the inputs first; where the weights
    of each unit begin, and where the last ones end; the inputs of these weights, and themselves;
    the bias of each unit; and the floor of each layer.
  """
  matrices = [layer.matrix for layer in layers]
  dtype = matrices[0].dtype
  counts = np.concatenate([np.diff(matrix.indptr) for matrix in matrices])
  widths = [matrices[0].shape[0], *(matrix.shape[1] for matrix in matrices)]
  biases = [0 if layer.bias is None else layer.bias for layer in layers]
  return (
    np.unique(matrices[0].indices).astype(np.uint64),
    np.array(widths, np.uint64),
    np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64),
    np.concatenate([matrix.indices for matrix in matrices]).astype(np.uint32),
    np.concatenate([matrix.data for matrix in matrices]),
    np.concatenate(list(map(np.broadcast_to, biases, widths[1:]))).astype(dtype),
    np.array([-np.inf if layer.floor is None else layer.floor for layer in layers], dtype),
  )


@functools.cache
def _compiled(dtype: np.dtype) -> Callable[..., None] | None:
  """Sparse layers, compiled for this processor; None without Numba."""
  try:
    import numba
  except ImportError:  # It is not there, or not for this NumPy.
    return None
  number, index = numba.from_dtype(dtype), numba.uint64
  zero, one, two, three, four = map(np.uint64, range(5))
  block, nothing = np.uint64(_BLOCK), dtype.type(-np.inf)

  def read(kind, dimensions=1):
    return numba.types.Array(kind, dimensions, "C", readonly=True)

  of_layers = [read(kind) for kind in (index, index, index, numba.uint32, number, number, number)]
  of_rows = read(number, 2), numba.types.Array(number, 2, "C")

  # With a signature, this is compiled now and not at the first call.
  @numba.njit(numba.void(*of_layers, *of_rows), fastmath={"contract"}, nogil=True)
  def run(used, widths, starts, inputs, weights, biases, floors, rows, out):
    count = np.uint64(len(rows))
    stride = min(block, count)  # From one unit to the next.
    # What a block of rows has come to, one unit after the other, and what it comes to next.
    now = np.empty(widths.max() * stride, rows.dtype)
    then = np.empty_like(now)
    for begin in range(zero, count, block):
      size = min(block, count - begin)
      for i in range(len(used)):
        unit = used[i]
        for n in range(size):
          now[unit * stride + n] = rows[begin + n, unit]
      unit = zero  # Of all layers.
      for layer in range(len(floors)):
        floor = floors[layer]
        for to in range(zero, widths[layer + 1] * stride, stride):
          bias, i, end = biases[unit], starts[unit], starts[unit + one]
          unit += one
          if size == one:
            total = bias
            while i < end:
              total += weights[i] * now[inputs[i] * stride]
              i += one
            then[to] = floor if total < floor else total
            continue
          for n in range(size):
            then[to + n] = bias
          while i + four <= end:  # Sums are read and written once for four products.
            w0, w1, w2, w3 = weights[i], weights[i + one], weights[i + two], weights[i + three]
            x0, x1 = inputs[i] * stride, inputs[i + one] * stride
            x2, x3 = inputs[i + two] * stride, inputs[i + three] * stride
            for n in range(size):
              then[to + n] += (
                w0 * now[x0 + n] + w1 * now[x1 + n] + w2 * now[x2 + n] + w3 * now[x3 + n]
              )
            i += four
          if i + two <= end:
            w0, w1 = weights[i], weights[i + one]
            x0, x1 = inputs[i] * stride, inputs[i + one] * stride
            for n in range(size):
              then[to + n] += w0 * now[x0 + n] + w1 * now[x1 + n]
            i += two
          if i < end:
            w0, x0 = weights[i], inputs[i] * stride
            for n in range(size):
              then[to + n] += w0 * now[x0 + n]
          if floor > nothing:
            for n in range(size):
              then[to + n] = floor if then[to + n] < floor else then[to + n]
        now, then = then, now
      for unit in range(out.shape[1]):
        for n in range(size):
          out[begin + n, unit] = now[unit * stride + n]

  return run


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
