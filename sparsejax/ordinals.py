"""Floating-point numbers as unsigned integers in the same order.

Backends differ in what they make of denormal numbers, of NaN and of the sign of zero, but not in
how they compare integers.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}
FLOATS = tuple(jnp.dtype(t) for t in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64))


def ordinal(scores: jax.Array) -> jax.Array:
  """Unsigned integers in the order of the scores; both zeros are one, all NaN are the largest."""
  unsigned = UNSIGNED[scores.dtype.itemsize]
  bits = lax.bitcast_convert_type(scores, unsigned)
  sign = unsigned(1 << (scores.dtype.itemsize * 8 - 1))
  infinity = np.asarray(np.inf, scores.dtype).view(unsigned)[()]
  magnitude = bits & (sign - unsigned(1))
  negative = (bits >= sign) & (magnitude <= infinity)
  magnitude = jnp.minimum(magnitude, infinity + unsigned(1))
  return jnp.where(negative, sign - magnitude, sign + magnitude)


def common_type(dtypes: Iterable[Any]) -> np.dtype:
  """The narrowest floating-point type that has all numbers of some."""
  found = set(dtypes)
  # Neither of half precision has the numbers of the other.
  return found.pop() if len(found) == 1 else functools.reduce(np.promote_types, found, np.float32)


def widened(scores: jax.Array, dtype) -> jax.Array:
  """Scores in a wider type with their exact values, also where the backend flushes denormals."""
  if scores.dtype == dtype:
    return scores
  if scores.dtype == jnp.bfloat16:
    bits = lax.bitcast_convert_type(scores, jnp.uint16).astype(jnp.uint32) << 16
    return widened(lax.bitcast_convert_type(bits, jnp.float32), dtype)
  info = jnp.finfo(scores.dtype)
  unsigned = UNSIGNED[scores.dtype.itemsize]
  bits = lax.bitcast_convert_type(scores, unsigned)
  magnitude = bits & unsigned(2 ** (info.bits - 1) - 1)
  smallest = np.asarray(info.smallest_subnormal, dtype)
  tiny = magnitude.astype(dtype) * smallest
  tiny = jnp.where(bits == magnitude, tiny, -tiny)
  return jnp.where(magnitude < 2**info.nmant, tiny, scores.astype(dtype))
