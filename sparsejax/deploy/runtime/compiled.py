"""Sparse layers, compiled by Numba."""

import functools
from collections.abc import Callable

import numpy as np

# So many rows go through the layers together: what they become there stays in fast memory.
_BLOCK = 64


@functools.cache
def run_of(dtype: np.dtype) -> Callable[..., None] | None:
  """A function that sends rows through sparse layers, compiled for this processor.

  Its arguments are the layers, end to end as `affine` puts them, the rows, and where the outputs
  go. None without Numba.
  """
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
