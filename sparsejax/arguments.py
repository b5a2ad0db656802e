"""Arguments of the public functions, checked before anything is traced; errors show them."""

import dataclasses
import difflib
import inspect
import numbers
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax.trees import PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class OneOf:
  """A sparsity that is one of several numbers, chosen by an index that may be traced.

  It stands wherever a sparsity does, and is for runs side by side under `jax.vmap`. Numbers of
  pruned weights are computed for each value in float64, as from a Python float, so that each lane
  has exactly those of a run of its own. (From a traced sparsity they are exact for its float32
  value, which is another number.)

  Attributes:
    values: the sparsities, Python or NumPy numbers in [0, 1).
    index: which of them, an integer in [0, len(values)).  # shape=()

  Raises:
    ValueError: if a value is not a number in [0, 1), or the index not one integer in its range, as
      far as it is known.

  Example:
    >>> import jax, jax.numpy as jnp, sparsejax
    >>> params = {"kernel": jnp.arange(1., 11.).reshape(2, 5)}
    >>> def pruned(index):
    ...   tx = sparsejax.one_shot_pruning(sparsejax.OneOf((0.2, 0.5, 0.9), index), at=0)
    ...   _, state = tx.update(params, tx.init(params), params)
    ...   return jnp.sum(~sparsejax.get_masks(state, params)["kernel"])
    >>> jax.vmap(pruned)(jnp.arange(3)).tolist()
    [2, 5, 9]
  """

  values: tuple[float, ...]
  index: int | jax.Array

  def __post_init__(self):
    if not isinstance(self.values, Iterable):
      raise ValueError(f"values of OneOf must be several numbers, got {self.values!r}.")
    values = tuple(
      _check_scalar(f"values[{i}] of OneOf", value) for i, value in enumerate(self.values)
    )
    if not all(isinstance(value, float) for value in values):
      raise ValueError(f"values of OneOf must be Python or NumPy numbers, got {self.values!r}.")
    if not values:
      raise ValueError("OneOf needs at least one value to choose.")
    object.__setattr__(self, "values", values)
    is_array = isinstance(self.index, (jax.Array, np.ndarray))
    if np.shape(self.index) or not (
      jnp.issubdtype(self.index.dtype, jnp.integer)
      if is_array
      else isinstance(self.index, numbers.Integral) and not isinstance(self.index, bool)
    ):
      raise ValueError(f"the index of OneOf must be one integer, got {self.index!r}.")
    if not isinstance(self.index, jax.core.Tracer) and not 0 <= self.index < len(values):
      raise ValueError(f"the index of OneOf must be in [0, {len(values)}), got {self.index!r}.")

  def pick(self, function: Callable[[float], float | jax.Array]) -> jax.Array:
    """What a function makes of the value that is chosen.

    Args:
      function: from a value, as a Python float, to a number.

    Returns:
      A scalar.  # dtype=float32
    """
    return jnp.asarray([function(value) for value in self.values], jnp.float32)[self.index]


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
  is_array = isinstance(key, (jax.Array, np.ndarray))
  is_new = is_array and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
  # Old ones are vectors of numbers.
  is_old = is_array and key.dtype == np.uint32
  if not (is_new or is_old) or np.ndim(key) != is_old:
    raise ValueError(f"key must be one random key, got {key!r}: pass jax.random.key(seed).")


def check_callable(name: str, value: Any) -> None:
  """Raises a ValueError if this is no function."""
  if not callable(value):
    raise ValueError(f"{name} must be a function, got {value!r}.")


def did_you_mean(value: Any, known: Iterable[str]) -> str:
  """What to add to a message that a value is none of those known: the nearest, if one is near."""
  close = difflib.get_close_matches(str(value).lower(), known, n=1)
  return f" (did you mean {close[0]!r}?)" if close else ""


def check_sparsity(name: str, sparsity: PyTree, *, may_be_chosen: bool = False) -> PyTree:
  """Checks a sparsity as far as it is known; makes floats of Python and NumPy numbers.

  Args:
    name: what to call it in an error.
    sparsity: a scalar, or a tree of scalars.
    may_be_chosen: whether `OneOf` may stand for a scalar.

  Returns:
    It, with floats for Python and NumPy numbers: they are computed with in float64.

  Raises:
    ValueError: if a value is not a number in [0, 1).
  """

  if sparsity is None:
    raise ValueError(f"{name} must be a number in [0, 1), got None.")

  def check_leaf(path, value):
    if isinstance(value, OneOf) and may_be_chosen:
      return value
    return _check_scalar(name + jax.tree_util.keystr(path), value)

  return jax.tree_util.tree_map_with_path(check_leaf, sparsity)


def _check_scalar(label: str, value: Any) -> Any:
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


def check_rise(initial: float, sparsity: PyTree, name: str = "the sparsity") -> None:
  """Raises a ValueError if a ramp to one sparsity is known to end below its start."""
  known = sparsity.values if isinstance(sparsity, OneOf) else [sparsity]
  for value in known:
    if isinstance(value, float) and initial > value:
      raise ValueError(f"initial must not exceed {name}, got {initial} and {value}.")


def check_inner(inner: Any) -> None:
  """Raises a ValueError if this is no optimizer."""
  if not isinstance(inner, optax.GradientTransformation):
    raise ValueError(
      "inner must be an optimizer, such as optax.sgd(0.1) or"
      f" optax.MultiSteps(...).gradient_transformation(), got {inner!r}."
    )


def static_args(transformation: Callable[..., Any]) -> tuple[str, ...]:
  """The arguments that `optax.inject_hyperparams` has to leave alone: all but the sparsity.

  Args:
    transformation: a function that takes a `sparsity`, such as `sparsejax.progressive_pruning`.

  Returns:
    The names of its other arguments. Where weights are in half precision, pass
    `hyperparam_dtype=jnp.float32` too: optax rounds the sparsity to the type of the updates.

  Example:
    >>> import jax.numpy as jnp, optax, sparsejax
    >>> pruning = sparsejax.one_shot_pruning
    >>> tx = optax.inject_hyperparams(pruning, sparsejax.static_args(pruning))(0.5, at=10)
    >>> state = tx.init({"kernel": jnp.ones((2, 2))})
    >>> print(state.hyperparams["sparsity"])
    0.5
  """
  return tuple(name for name in inspect.signature(transformation).parameters if name != "sparsity")
