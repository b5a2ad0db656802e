"""Operations of JAX as functions of NumPy arrays."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from sparsejax.deploy.contraction import as_einsum
from sparsejax.deploy.program import Equation, Shape

Function = Callable[..., Any]

# Constants of no more numbers are written out for each example: NumPy is slow in repeating them,
# but fast memory holds no more.
WRITTEN_OUT = 2**17

_TAKES = (jax.lax.GatherScatterMode.CLIP, jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS)


def function_of(equation: Equation, shapes: Sequence[Shape]) -> Function:
  """The operation of an equation; a ufunc where it is one.

  Args:
    equation: what to translate.
    shapes: of all variables.

  Raises:
    ValueError: if it is not known; it is named.
  """
  name = equation.name
  if name in _ELEMENTWISE:
    return _ELEMENTWISE[name]
  if name in _MADE:
    return _MADE[name](equation.params)
  if name == "dot_general":
    ranks = (len(shapes[i]) for i in equation.inputs)
    return functools.partial(np.einsum, as_einsum(equation, *ranks), optimize=True)
  if name == "integer_pow":
    return functools.partial(_power, equation.params["y"])
  known = sorted({*_ELEMENTWISE, *_MADE, "conv_general_dilated", "dot_general", "integer_pow"})
  raise ValueError(f"{name} cannot be translated to NumPy; what can is {', '.join(known)}.")


def _power(y: int, x: np.ndarray) -> np.ndarray:
  return functools.reduce(operator.mul, [x] * y) if 0 < y < 4 else x**y


def _select(which: np.ndarray, *cases: np.ndarray) -> np.ndarray:
  return np.choose(which, cases) if len(cases) > 2 else np.where(which, cases[1], cases[0])


def broadcast(params: dict[str, Any]) -> Function:
  """A view that repeats an array: the operation of `broadcast_in_dim`."""
  shape, axes = params["shape"], params["broadcast_dimensions"]

  def view(x):
    sizes = dict(zip(axes, x.shape))
    return np.broadcast_to(x.reshape([sizes.get(axis, 1) for axis in range(len(shape))]), shape)

  return view


def axis_of_take(params: dict[str, Any], shape: tuple[int, ...]) -> int | None:
  """The axis of an array of this shape along which a gather takes indices, as `jnp.take` does.

  None if it does more.
  """
  numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
  if len(numbers.start_index_map) != 1 or params["mode"] not in _TAKES:
    return None
  (axis,) = numbers.start_index_map
  others = tuple(a for a in range(len(sizes)) if a != axis)
  is_take = (
    numbers.collapsed_slice_dims == (axis,)
    and not numbers.operand_batching_dims
    and numbers.offset_dims == others
    and all(sizes[a] == shape[a] for a in others)
  )
  return axis if is_take else None


def has_negative(padding: Sequence[Sequence[int]]) -> bool:
  """Whether a padding takes away from an array."""
  return any(width < 0 for widths in padding for width in widths)


def _gather(params):
  def take(x, indices):
    axis = axis_of_take(params, x.shape)
    if axis is None or indices.ndim != 2:
      raise ValueError(f"a gather with {params} cannot be translated to NumPy.")
    return np.take(x, indices[:, 0], axis, mode="clip")

  return take


def _lowest(dtype):
  return np.iinfo(dtype).min if np.issubdtype(dtype, np.integer) else -np.inf


def _highest(dtype):
  return np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else np.inf


def _windows(function, neutral):
  """A reduction of windows; `neutral` is the number of a type that changes no result."""

  def make(params):
    is_plain = {*params["base_dilation"], *params["window_dilation"]} == {1}
    if not is_plain or has_negative(params["padding"]):
      raise ValueError("windows with dilation or negative padding cannot be translated to NumPy.")
    window, strides = params["window_dimensions"], params["window_strides"]

    def reduce_windows(x):
      x = np.pad(x, params["padding"], constant_values=neutral(x.dtype))
      ends = [n - w + 1 for n, w in zip(x.shape, window)]
      parts = (
        x[tuple(np.s_[o : o + end : step] for o, end, step in zip(offset, ends, strides))]
        for offset in np.ndindex(*window)
      )
      first = next(parts).copy()
      for part in parts:
        function(first, part, out=first)
      return first

    return reduce_windows

  return make


def _reduced(function):
  return lambda params: lambda x: function.reduce(x, axis=params["axes"], dtype=x.dtype)


def _pad(params):
  config = params["padding_config"]
  if any(low < 0 or high < 0 or interior for low, high, interior in config):
    raise ValueError("a pad that removes elements, or between them, cannot be translated to NumPy.")
  widths = [(low, high) for low, high, _ in config]
  return lambda x, fill: np.pad(x, widths, constant_values=fill)


def _slice(params):
  strides = params["strides"] or [1] * len(params["start_indices"])
  where = tuple(map(slice, params["start_indices"], params["limit_indices"], strides))
  return lambda x: x[where]


def _split(params):
  ends = np.cumsum(params["sizes"])[:-1]
  return lambda x: np.split(x, ends, params["axis"])


def _rsqrt(x):
  return 1 / np.sqrt(x)


def _logistic(x):
  return 1 / (1 + np.exp(-x))


def _same(x):
  return x


_ELEMENTWISE: dict[str, Function] = {
  "abs": np.abs,
  "add": np.add,
  "add_any": np.add,
  "and": np.bitwise_and,
  "ceil": np.ceil,
  "clamp": lambda low, x, high: np.clip(x, low, high),
  "copy": _same,
  "copy_p": _same,
  "cos": np.cos,
  "div": np.divide,
  "eq": np.equal,
  "exp": np.exp,
  "expm1": np.expm1,
  "floor": np.floor,
  "ge": np.greater_equal,
  "gt": np.greater,
  "is_finite": np.isfinite,
  "le": np.less_equal,
  "log": np.log,
  "log1p": np.log1p,
  "logistic": _logistic,
  "lt": np.less,
  "max": np.maximum,
  "min": np.minimum,
  "mul": np.multiply,
  "ne": np.not_equal,
  "neg": np.negative,
  "not": np.bitwise_not,
  "or": np.bitwise_or,
  "pow": np.power,
  "rsqrt": _rsqrt,
  "select_n": _select,
  "sign": np.sign,
  "sin": np.sin,
  "sqrt": np.sqrt,
  "square": np.square,
  "stop_gradient": _same,
  "sub": np.subtract,
  "tanh": np.tanh,
}
_MADE: dict[str, Callable[[dict[str, Any]], Function]] = {
  "broadcast_in_dim": broadcast,
  "concatenate": lambda params: lambda *xs: np.concatenate(xs, params["dimension"]),
  "convert_element_type": lambda params: lambda x: x.astype(params["new_dtype"], copy=False),
  "gather": _gather,
  "pad": _pad,
  "reduce_max": _reduced(np.maximum),
  "reduce_min": _reduced(np.minimum),
  "reduce_sum": _reduced(np.add),
  "reduce_window_max": _windows(np.maximum, _lowest),
  "reduce_window_min": _windows(np.minimum, _highest),
  "reduce_window_sum": _windows(np.add, lambda dtype: 0),
  "reshape": lambda params: lambda x: x.reshape(params["new_sizes"]),
  "rev": lambda params: lambda x: np.flip(x, params["dimensions"]),
  "slice": _slice,
  "split": _split,
  "squeeze": lambda params: lambda x: np.squeeze(x, params["dimensions"]),
  "transpose": lambda params: lambda x: np.transpose(x, params["permutation"]),
}
