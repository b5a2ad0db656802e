"""A function of JAX as NumPy operations, whose products are dense or sparse."""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np

from sparsejax.deploy import program as programs
from sparsejax.deploy import runtime
from sparsejax.deploy.contraction import as_einsum
from sparsejax.deploy.program import Equation, Program
from sparsejax.masks import PyTree

Function = Callable[..., Any]

_IN_BOUNDS = jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS


@dataclasses.dataclass(frozen=True)
class Translated:
  """A function of NumPy arrays; made by `to_numpy`.

  Attributes:
    choices: for each product or convolution with weights, in order, "dense" or "sparse".
  """

  choices: tuple[str, ...]
  _steps: tuple["_Step", ...] = dataclasses.field(repr=False)
  _constants: dict[int, np.ndarray] = dataclasses.field(repr=False)
  _program: Program = dataclasses.field(repr=False)

  def __call__(self, *inputs: Any) -> Any:
    """Computes the outputs for inputs of the shapes and types of the example.

    Raises:
      ValueError: if they are others.
    """
    values = list(map(np.asarray, jax.tree.leaves(inputs)))
    expected = [(self._program.shapes[i], self._program.dtypes[i]) for i in self._program.inputs]
    if [(x.shape, x.dtype) for x in values] != expected:
      raise ValueError(
        f"the inputs have shapes {[x.shape for x in values]} and types"
        f" {[str(x.dtype) for x in values]}, but those of the example were"
        f" {[shape for shape, _ in expected]} and {[str(dtype) for _, dtype in expected]}:"
        " translate it for these."
      )
    known = self._constants | dict(zip(self._program.inputs, values))
    with np.errstate(all="ignore"):  # As JAX does.
      for step in self._steps:
        step(known)
    return jax.tree.unflatten(self._program.structure, [known[i] for i in self._program.outputs])


@dataclasses.dataclass(frozen=True)
class _Step:
  """An operation on numbered variables.

  Attributes:
    function: from operands to the output, or to a list of them.
    inputs: the variables of its operands.
    outputs: those that it makes.
    last: those of its operands that nothing reads later.
    in_place: whether it may write its output to its first operand.
  """

  function: Function
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  last: tuple[int, ...] = ()
  in_place: bool = False

  def __call__(self, known: dict[int, Any]) -> None:
    operands = [known[i] for i in self.inputs]
    out = self.function(*operands, out=operands[0]) if self.in_place else self.function(*operands)
    known.update(zip(self.outputs, out if isinstance(out, list) else [out]))
    for i in self.last:
      del known[i]


def to_numpy(
  apply_fn: Callable[..., Any],
  params: PyTree,
  example_inputs: Any,
  *,
  kind: Literal["fastest", "dense", "sparse"] = "fastest",
  rounds: int = 5,
) -> Translated:
  """Translates a function of JAX to NumPy.

  What does not depend on the inputs is computed once. Weights are multiplied as dense matrices, or
  as sparse ones (CSR).

  Args:
    apply_fn: a function of the parameters and of the inputs, or a `Compacted`'s `apply`.
    params: its parameters.
    example_inputs: an array or a tuple of them, of the shapes and types that it is to take, and for
      which it is to be fast.
    kind: of the matrices; by default the one that takes less time in each layer.
    rounds: how often to time each.

  Returns:
    A function of NumPy arrays.

  Raises:
    ValueError: if the function has an operation that is not known here; it is named.

  Example:
    >>> import jax.numpy as jnp
    >>> from sparsejax import deploy
    >>> apply = lambda params, x: jnp.maximum(x @ params["kernel"], 0)
    >>> params = {"kernel": jnp.array([[1.0, 0.0], [0.0, -1.0]])}
    >>> network = deploy.to_numpy(apply, params, jnp.ones((1, 2)), kind="sparse")
    >>> print(network(jnp.array([[2.0, 3.0]])))
    [[2. 0.]]
  """
  inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
  inputs = jax.tree.map(np.asarray, inputs)
  types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
  program = programs.trace(apply_fn, params, types)
  known = dict(zip(program.params, map(np.asarray, jax.tree.leaves(params))))
  for constants in (program.literals, program.captured):
    known |= {i: np.asarray(x, program.dtypes[i]) for i, x in constants.items()}
  running = dict(zip(program.inputs, jax.tree.leaves(inputs)))
  own: set[int] = set()  # Arrays that no other variable is a view of.
  steps, choices = [], []
  equations = _needed(program)
  last = {i: n for n, equation in enumerate(equations) for i in equation.inputs}
  last |= dict.fromkeys(program.outputs, len(equations))
  for number, equation in enumerate(equations):
    if running.keys().isdisjoint(equation.inputs):
      known.update(zip(equation.outputs, _constant(equation, known)))
      continue
    product = _product(equation, program, known)
    function = _function(equation, program) if product is None else None
    operands, in_place = equation.inputs, False
    if product is not None:
      operands = (equation.inputs[product.data],)
      rows = product.rows(running[operands[0]])
      choice, multiply = runtime.choose(product.matrix, _flat(rows), kind, rounds)
      choices.append(choice)
      function = functools.partial(_multiply, product, multiply)
    elif isinstance(function, np.ufunc):
      first = operands[0]
      in_place = (
        first in own
        and last[first] == number
        and operands.count(first) == 1
        and program.shapes[first]  # A number of NumPy is no array.
        and _same_type(program, first, equation.outputs[0])
      )
    if product is not None or isinstance(function, np.ufunc):
      own.update(equation.outputs)
    else:
      own.difference_update(operands)
    ending = {i for i in operands if i in running and last[i] == number}
    step = _Step(function, operands, equation.outputs, tuple(ending), in_place)
    values = known | running
    step(values)
    running = {i: x for i, x in values.items() if i in running or i in equation.outputs}
    steps.append(step)
  read = {i for step in steps for i in step.inputs} | set(program.outputs)
  constants = {i: x for i, x in known.items() if i in read}
  return Translated(tuple(choices), tuple(steps), constants, program)


def _needed(program: Program) -> list[Equation]:
  """The equations that the outputs depend on."""
  needed, equations = set(program.outputs), []
  for equation in reversed(program.equations):
    if not needed.isdisjoint(equation.outputs):
      needed.update(equation.inputs)
      equations.append(equation)
  return equations[::-1]


def _constant(equation: Equation, known: dict[int, Any]) -> list[np.ndarray]:
  """The values of outputs that do not depend on the inputs."""
  if equation.name == "broadcast_in_dim":  # A view, where JAX would make a copy.
    return [_broadcast(equation.params)(known[equation.inputs[0]])]
  return list(map(np.asarray, equation.bind(*(known[i] for i in equation.inputs))))


def _same_type(program: Program, i: int, j: int) -> bool:
  return (program.shapes[i], program.dtypes[i]) == (program.shapes[j], program.dtypes[j])


# Products with weights.


@dataclasses.dataclass(frozen=True)
class _Product:
  """A product of rows that are made of the data with a matrix of weights.

  Attributes:
    data: the position of the operand that is not stored.
    matrix: the weights.  # shape=(inputs, outputs)
    rows: from the data to rows, with any number of leading axes.
    shape: of the output channels.
    first: whether these are the first axes of the output, and not the last.
  """

  data: int
  matrix: np.ndarray
  rows: Function
  shape: tuple[int, ...]
  first: bool = False


def _flat(rows: np.ndarray) -> np.ndarray:
  return rows.reshape(-1, rows.shape[-1])


def _multiply(product: _Product, multiply: Function, data: np.ndarray) -> np.ndarray:
  rows = product.rows(data)
  out = multiply(_flat(rows))
  if product.first:
    return out.T.reshape(*product.shape, *rows.shape[:-1])
  return out.reshape(*rows.shape[:-1], *product.shape)


def _product(equation: Equation, program: Program, known: dict[int, Any]) -> _Product | None:
  """The product that an equation is, if it is one with weights."""
  is_known = [i in known for i in equation.inputs]
  if equation.name == "conv_general_dilated" and is_known == [False, True]:
    return _conv(equation, known[equation.inputs[1]])
  if equation.name != "dot_general" or not any(is_known):
    return None
  data = is_known.index(False)
  contracted, batch = equation.params["dimension_numbers"]
  if batch[0] or not contracted[0]:
    return None
  weights = known[equation.inputs[1 - data]]
  axes, count = contracted[1 - data], len(contracted[0])
  matrix = np.moveaxis(weights, axes, range(count))
  shape = matrix.shape[count:]
  matrix = matrix.reshape(int(np.prod(matrix.shape[:count])), -1)

  def rows(x):
    x = np.moveaxis(x, contracted[data], range(x.ndim - count, x.ndim))
    return x.reshape(*x.shape[: x.ndim - count], -1)

  return _Product(data, matrix, rows, shape, first=data == 1)


def _conv(equation: Equation, kernel: np.ndarray) -> _Product:
  params = equation.params
  numbers = params["dimension_numbers"]
  last = len(numbers.lhs_spec) - 1
  is_plain = (
    last == 3
    and numbers.lhs_spec == numbers.out_spec == (0, last, 1, 2)
    and numbers.rhs_spec == (last, last - 1, 0, 1)
    and {*params["lhs_dilation"], *params["rhs_dilation"]} == {1}
    and params["feature_group_count"] == params["batch_group_count"] == 1
  )
  if not is_plain:
    raise ValueError(
      "only convolutions of two dimensions with channels last, without dilation and groups, can be"
      f" translated to NumPy, but there is one with {params}."
    )
  layer = runtime.Conv(kernel, strides=params["window_strides"], padding=params["padding"])
  return _Product(0, layer.matrix, layer.rows, kernel.shape[-1:])


# Everything else.


def _function(equation: Equation, program: Program) -> Function:
  """The operation of an equation; a ValueError names it if it is not known."""
  name = equation.name
  if name in _ELEMENTWISE:
    return _ELEMENTWISE[name]
  if name in _MADE:
    return _MADE[name](equation.params)
  if name == "dot_general":
    ranks = (len(program.shapes[i]) for i in equation.inputs)
    return functools.partial(np.einsum, as_einsum(equation, *ranks), optimize=True)
  if name == "integer_pow":
    return functools.partial(_power, equation.params["y"])
  known = sorted({*_ELEMENTWISE, *_MADE, "conv_general_dilated", "dot_general", "integer_pow"})
  raise ValueError(f"{name} cannot be translated to NumPy; what can is {', '.join(known)}.")


def _power(y: int, x: np.ndarray) -> np.ndarray:
  return functools.reduce(operator.mul, [x] * y) if 0 < y < 4 else x**y


def _select(which: np.ndarray, *cases: np.ndarray) -> np.ndarray:
  return np.choose(which, cases) if len(cases) > 2 else np.where(which, cases[1], cases[0])


def _broadcast(params):
  shape, axes = params["shape"], params["broadcast_dimensions"]

  def broadcast(x):
    sizes = dict(zip(axes, x.shape))
    return np.broadcast_to(x.reshape([sizes.get(axis, 1) for axis in range(len(shape))]), shape)

  return broadcast


def _gather(params):
  """Indices of one axis, as `jnp.take` takes them."""
  numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
  (axis,) = numbers.start_index_map if len(numbers.start_index_map) == 1 else (None,)
  others = tuple(a for a in range(len(sizes)) if a != axis)
  is_known = params["mode"] in (jax.lax.GatherScatterMode.CLIP, _IN_BOUNDS)
  if not is_known or numbers.collapsed_slice_dims != (axis,) or numbers.operand_batching_dims:
    raise ValueError(f"a gather with {params} cannot be translated to NumPy.")

  def gather(x, indices):
    is_take = all(sizes[a] == x.shape[a] for a in others) and indices.ndim == 2
    if not is_take or numbers.offset_dims != others:
      raise ValueError(f"a gather with {numbers} of {sizes} cannot be translated to NumPy.")
    return np.take(x, indices[:, 0], axis, mode="clip")

  return gather


def _windows(function, fill):
  def make(params):
    if {*params["base_dilation"], *params["window_dilation"]} != {1}:
      raise ValueError("windows with dilation cannot be translated to NumPy.")
    window, strides = params["window_dimensions"], params["window_strides"]

    def reduce_windows(x):
      x = np.pad(x, params["padding"], constant_values=fill)
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
  "broadcast_in_dim": _broadcast,
  "concatenate": lambda params: lambda *xs: np.concatenate(xs, params["dimension"]),
  "convert_element_type": lambda params: lambda x: x.astype(params["new_dtype"], copy=False),
  "gather": _gather,
  "pad": _pad,
  "reduce_max": _reduced(np.maximum),
  "reduce_min": _reduced(np.minimum),
  "reduce_sum": _reduced(np.add),
  "reduce_window_max": _windows(np.maximum, -np.inf),
  "reduce_window_min": _windows(np.minimum, np.inf),
  "reduce_window_sum": _windows(np.add, 0),
  "reshape": lambda params: lambda x: x.reshape(params["new_sizes"]),
  "rev": lambda params: lambda x: np.flip(x, params["dimensions"]),
  "slice": _slice,
  "split": _split,
  "squeeze": lambda params: lambda x: np.squeeze(x, params["dimensions"]),
  "transpose": lambda params: lambda x: np.transpose(x, params["permutation"]),
}
