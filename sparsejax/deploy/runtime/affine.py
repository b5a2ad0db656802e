"""What becomes of rows in layers: products with dense or sparse matrices, biases and floors."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from . import compiled, threads


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
  if np.ndim(floor) == 0 and floor is not None:  # `np.maximum` is slow with a number.
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
    run = compiled.run_of(self.dtype)
    if run is None or rows.dtype != self.dtype:
      out = self._by_scipy(rows)
    else:
      rows = np.ascontiguousarray(rows)
      out = np.empty((len(rows), self.layers[-1].matrix.shape[1]), self.dtype)
      threads.in_parts(functools.partial(run, *self._arrays), self.threads, rows, out)
    return out.reshape(*x.shape[:-1], out.shape[-1])

  def _by_scipy(self, x: np.ndarray) -> np.ndarray:
    for (_, bias, floor), matrix in zip(self.layers, self._by_output):
      x = (matrix @ x.T).T
      if bias is not None:
        x += bias
      if floor is not None:
        x = np.maximum(x, floor)
    return x


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
