"""A JAX function as a flat list of equations, in which calls of other functions are written out."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend import core

from sparsejax.trees import PyTree

Shape = tuple[int, ...]

# What a call computes is what the function computes that it calls.
_CALLS = {
  "checkpoint",
  "closed_call",
  "core_call",
  "custom_jvp_call",
  "custom_vjp_call",
  "custom_vjp_call_jaxpr",
  "jit",
  "pjit",
  "remat",
  "remat2",
}
_CALLED = ("jaxpr", "call_jaxpr", "fun_jaxpr")


@dataclasses.dataclass(frozen=True)
class Equation:
  """An application of a primitive.

  Attributes:
    primitive: of JAX.
    params: its static arguments.
    inputs: the numbers of the variables that it reads.
    outputs: those that it makes.
    has_effects: whether it does more than compute its outputs, such as printing.
  """

  primitive: Any
  params: dict[str, Any]
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  has_effects: bool

  @property
  def name(self) -> str:
    return self.primitive.name

  def bind(self, *operands: Any, **changes: Any) -> list[Any]:
    """Applies the primitive, with some of its static arguments changed; a list of outputs."""
    params = self.primitive.get_bind_params(self.params | changes)
    outputs = self.primitive.bind(*operands, **params)
    return list(outputs) if self.primitive.multiple_results else [outputs]


@dataclasses.dataclass
class Program:
  """Equations over numbered variables. The same function has the same numbers in every trace.

  Attributes:
    equations: in an order in which they can be computed.
    shapes: of every variable.
    dtypes: of every variable.
    params: the variables of the leaves of the parameters.
    inputs: the variables of the leaves of the inputs.
    outputs: the variables of the leaves of the result.
    literals: the values of variables that are scalars written in the function.
    captured: the values of arrays that the function closes over.
    structure: of the result.
  """

  equations: list[Equation]
  shapes: list[Shape]
  dtypes: list[Any]
  params: list[int]
  inputs: list[int]
  outputs: list[int]
  literals: dict[int, Any]
  captured: dict[int, Any]
  structure: Any

  def same_as(self, other: "Program") -> bool:
    """Whether the other program applies the same primitives to the same variables."""

    def signature(program):
      return [(e.name, e.inputs, e.outputs) for e in program.equations], program.outputs

    return signature(self) == signature(other)


def same_arguments(a: Any, b: Any) -> bool:
  """Whether static arguments of two traces are the same, as far as they can be compared."""
  if a is b:
    return True
  if isinstance(a, core.ClosedJaxpr) and isinstance(b, core.ClosedJaxpr):
    return str(a) == str(b) and same_arguments(a.consts, b.consts)
  if isinstance(a, core.Jaxpr):
    return str(a) == str(b)
  if isinstance(a, dict) and isinstance(b, dict):
    return a.keys() == b.keys() and all(same_arguments(x, b[key]) for key, x in a.items())
  if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
    return len(a) == len(b) and all(map(same_arguments, a, b))
  if isinstance(a, (np.ndarray, jax.Array)):
    return np.array_equal(a, b)
  return type(a) is type(b) and a == b


def trace(apply_fn: Callable[..., Any], params: PyTree, inputs: tuple[Any, ...]) -> Program:
  """The program of `apply_fn(params, *inputs)`, for arrays or their `jax.ShapeDtypeStruct`."""
  closed, shape = jax.make_jaxpr(apply_fn, return_shape=True)(params, *inputs)
  program = Program([], [], [], [], [], [], {}, {}, jax.tree.structure(shape))
  captured = [_new(program, x) for x in closed.jaxpr.constvars]
  program.captured = dict(zip(captured, closed.consts))
  arguments = [_new(program, x) for x in closed.jaxpr.invars]
  count = len(jax.tree.leaves(params))
  program.params, program.inputs = arguments[:count], arguments[count:]
  program.outputs = _write_out(program, closed.jaxpr, captured + arguments)
  return program


def trace_of(apply_fn: Callable[..., Any], params: PyTree, inputs: tuple[Any, ...]) -> Program:
  """The same, if the parameters belong to the function.

  Raises:
    ValueError: if the function cannot be traced with these parameters, or if it uses none of them.
  """
  try:
    program = trace(apply_fn, params, inputs)
  except Exception as error:
    raise ValueError(
      "apply_fn(params, *example_inputs) fails; do the parameters belong to the function?"
      f" {type(error).__name__}: {error}"
    ) from error
  used = {i for equation in program.equations for i in equation.inputs}
  if not used.intersection(program.params):
    raise ValueError("apply_fn uses none of the parameters: they do not belong to it.")
  return program


def _new(program: Program, variable: Any) -> int:
  program.shapes.append(tuple(variable.aval.shape))
  program.dtypes.append(variable.aval.dtype)
  return len(program.shapes) - 1


def _write_out(program: Program, jaxpr: Any, arguments: list[int]) -> list[int]:
  """Appends the equations of a jaxpr; the variables of its outputs."""
  number = dict(zip([*jaxpr.constvars, *jaxpr.invars], arguments))

  def read(atom):
    if not isinstance(atom, core.Literal):
      return number[atom]
    literal = _new(program, atom)
    program.literals[literal] = atom.val
    return literal

  for eqn in jaxpr.eqns:
    inputs = [read(atom) for atom in eqn.invars]
    if eqn.primitive.name in _CALLS:
      called = next(eqn.params[key] for key in _CALLED if key in eqn.params)
      constants = []
      if isinstance(called, core.ClosedJaxpr):
        constants = [_new(program, x) for x in called.jaxpr.constvars]
        program.captured |= zip(constants, called.consts)
        called = called.jaxpr
      outputs = _write_out(program, called, constants + inputs)
    else:
      outputs = [_new(program, x) for x in eqn.outvars]
      program.equations.append(
        Equation(eqn.primitive, eqn.params, tuple(inputs), tuple(outputs), bool(eqn.effects))
      )
    number.update(zip(eqn.outvars, outputs))
  return [read(atom) for atom in jaxpr.outvars]


def extrapolate(program: Program, other: Program, steps: Any) -> Program:
  """The program for a batch that is larger by `steps`; `other` is that for one example more.

  Sizes are taken to be linear in that of the batch, which may be symbolic.

  Raises:
    ValueError: if the two differ in more than integers.
  """
  equations = [
    dataclasses.replace(
      ours, params={key: _linear(x, theirs.params[key], steps) for key, x in ours.params.items()}
    )
    for ours, theirs in zip(program.equations, other.equations)
  ]
  shapes = [_linear(a, b, steps) for a, b in zip(program.shapes, other.shapes)]
  for ours, theirs in ((program.literals, other.literals), (program.captured, other.captured)):
    if any(x is not theirs[i] and not np.array_equal(x, theirs[i]) for i, x in ours.items()):
      raise ValueError("a constant of the function depends on the batch size")
  return dataclasses.replace(program, equations=equations, shapes=shapes)


def _linear(a: Any, b: Any, steps: Any) -> Any:
  if a is b or (type(a) is type(b) and a == b):
    return a
  if isinstance(a, int) and isinstance(b, int):
    return a + steps * (b - a)
  if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
    parts = [_linear(x, y, steps) for x, y in zip(a, b)]
    return type(a)(*parts) if hasattr(a, "_fields") else tuple(parts)
  raise ValueError(f"{a} and {b} depend on the batch size")


def evaluate(program: Program, params: list[Any], inputs: list[Any]) -> list[Any]:
  """The values of all variables."""
  values: list[Any] = [None] * len(program.shapes)

  def write(variables: Iterator[int] | list[int], new: list[Any]) -> None:
    for variable, value in zip(variables, new):
      values[variable] = value

  write(program.params + program.inputs, params + inputs)
  for known in (program.literals, program.captured):
    write(list(known), list(known.values()))
  for equation in program.equations:
    write(equation.outputs, equation.bind(*(values[i] for i in equation.inputs)))
  return values
