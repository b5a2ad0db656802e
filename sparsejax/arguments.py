"""Arguments of the public functions, checked before anything is traced; errors show them."""

import numbers
from typing import Any

import jax
import numpy as np

from sparsejax.masks import PyTree


def check_integer(name: str, value: Any, at_least: int) -> int:
  """Returns a Python integer, or raises a ValueError if it is none or out of range."""
  if isinstance(value, bool) or not isinstance(value, numbers.Integral):
    raise ValueError(f"{name} must be an integer, got {value!r}: wrap it in int() or round().")
  if not at_least <= value < 2**31:
    raise ValueError(f"{name} must be at least {at_least} and below 2**31, got {value!r}.")
  # NumPy's small integers would overflow in the arithmetic to come.
  return int(value)


def check_key(key: Any) -> None:
  """Raises a ValueError if this is no random key."""
  if not isinstance(key, (jax.Array, np.ndarray)):
    raise ValueError(f"key must be a random key, got {key!r}: pass jax.random.key(seed).")


def check_sparsity(name: str, sparsity: PyTree) -> PyTree:
  """Checks a sparsity as far as it is known; makes floats of Python and NumPy numbers.

  Args:
    name: what to call it in an error.
    sparsity: a scalar, or a tree of scalars.

  Returns:
    It, with floats for Python and NumPy numbers: they are computed with in float64.

  Raises:
    ValueError: if a value is not a number in [0, 1).
  """

  def check_scalar(path, value):
    label = name + jax.tree_util.keystr(path)
    if isinstance(value, jax.core.Tracer) and value.ndim == 0:
      return value
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, jax.Array, np.ndarray)):
      raise ValueError(f"{label} must be a number in [0, 1), got {value!r}.")
    if np.ndim(value) != 0:
      raise ValueError(f"{label} must be a scalar, got an array of shape {value.shape}.")
    if not 0 <= float(value) < 1:
      raise ValueError(
        f"{label} is the fraction of weights to prune and must be in [0, 1), got {value!r}."
      )
    return value if isinstance(value, jax.Array) else float(value)

  return jax.tree_util.tree_map_with_path(check_scalar, sparsity)
