"""A function of JAX as NumPy operations, whose products are dense or sparse."""

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from sparsejax import trees
from sparsejax.deploy import program as programs
from sparsejax.deploy.layers import Layers, ways_to_compute
from sparsejax.deploy.operations import WRITTEN_OUT, Function, broadcast, function_of
from sparsejax.deploy.program import Equation, Program, Shape
from sparsejax.deploy.runtime import timing
from sparsejax.deploy.runtime.affine import joined
from sparsejax.deploy.runtime.threads import in_parts
from sparsejax.trees import PyTree


class Translated:
  """A function of NumPy arrays; made by `to_numpy`.

  Attributes:
    choices: for each product or convolution with weights, in order, "dense" or "sparse".
    threads: among how many threads the examples are shared out.
  """

  def __init__(self, steps: "_Steps", parts: int, threads: int):
    self.choices = steps.choices
    self.threads = threads
    self._steps = steps
    self._parts = parts
    program = steps.program
    self._expected = [(program.shapes[i], program.dtypes[i]) for i in program.inputs]
    if parts > 1:
      self._expected = [((parts * n, *rest), dtype) for (n, *rest), dtype in self._expected]

  def __call__(self, *inputs: Any) -> Any:
    """Computes the outputs for inputs of the shapes and types of the example.

    Raises:
      ValueError: if they are others.
    """
    values = list(map(np.asarray, jax.tree.leaves(inputs)))
    if [(x.shape, x.dtype) for x in values] != self._expected:
      raise ValueError(
        f"the inputs are {_describe((x.shape, x.dtype) for x in values)}, but those of the example"
        f" were {_describe(self._expected)}: translate it for these."
      )
    if self._parts == 1:
      outputs = self._steps.run(*values)
    else:
      parts = in_parts(self._steps.run, self._parts, *values)
      outputs = list(map(np.concatenate, zip(*parts)))
    return jax.tree.unflatten(self._steps.program.structure, outputs)


def _describe(types):
  return ", ".join(f"{dtype} of shape {shape}" for shape, dtype in types)


def to_numpy(
  apply_fn: Callable[..., Any],
  params: PyTree,
  example_inputs: Any,
  *,
  kind: Literal["fastest", "dense", "sparse"] = "fastest",
  threads: int | Literal["fastest"] = 1,
  rounds: int = 5,
) -> Translated:
  """Translates a function of JAX to NumPy.

  What does not depend on the inputs is computed once. Weights are multiplied as dense matrices, or
  as sparse ones (CSR), which are computed together where they follow each other.

  Args:
    apply_fn: a function of the parameters and of the inputs, or a `Compacted`'s `apply`.
    params: its parameters.
    example_inputs: an array or a tuple of them, of the shapes and types that it is to take, and for
      which it is to be fast.
    kind: of the matrices; by default the one that takes less time in each layer, or sparse ones
      throughout if these take less time together.
    threads: among how many threads examples are shared out, by the computation as a whole or by
      each sparse layer, whichever takes less time. It needs functions that compute each example by
      itself, and leading axes that are those of the examples. "fastest": one, or as many as there
      are cores, if these divide the examples.
    rounds: how often to time each.

  Returns:
    A function of NumPy arrays.

  Raises:
    ValueError: if the function has an operation that is not known here, which is named; if a leaf
      holds NaN; if the parameters do not belong to the function; if matrices that may become sparse
      are neither of float32 nor of float64; or if the threads do not divide the examples.

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
  for name, leaf in trees.leaves_by_name(params).items():
    if np.isnan(leaf).any():
      raise ValueError(f"{trees.quoted(name)} holds NaN.")

  def translated(kind, parts, of_layers):
    part = inputs if parts == 1 else jax.tree.map(lambda x: x[: len(x) // parts], inputs)
    types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), part)
    program = programs.trace_of(apply_fn, params, types)
    leaves = list(map(np.asarray, jax.tree.leaves(params)))
    ways = _Ways(kind, rounds, of_layers)
    with np.errstate(all="ignore"):  # As JAX does.
      steps = _translate(program, leaves, jax.tree.leaves(part), ways)
    return Translated(steps, parts, threads=parts * of_layers)

  sizes = {len(x) if x.ndim else 1 for x in jax.tree.leaves(inputs)}
  counts = {1, _count_cores()} if threads == "fastest" else {threads}
  counts = {count for count in counts if count > 0 and not any(size % count for size in sizes)}
  if not counts:
    raise ValueError(f"threads={threads} do not divide {sizes} examples among them.")
  # Either the whole computation is shared out, or each sparse layer by itself, which leaves less to
  # do for Python.
  shared = {pair for count in counts for pair in ((count, 1), (1, count))}
  # What is sparse throughout may be one call, which takes less time than layer by layer.
  kinds = ("fastest", "sparse") if kind == "fastest" else (kind,)
  found = {(each, *pair): translated(each, *pair) for each in kinds for pair in sorted(shared)}
  if len(found) == 1:
    return next(iter(found.values()))
  calls = {way: functools.partial(network, *inputs) for way, network in found.items()}
  # A thread of dense products keeps its core busy for a while after the last of them.
  times = timing.take_turns(calls, rounds, turn=6e-2 if len(shared) > 1 else 1e-2)
  return found[min(found, key=lambda way: min(times[way]))]


def _count_cores() -> int:
  """Those that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
  last: tuple[int, ...]
  in_place: bool

  def __call__(self, known: dict[int, Any]) -> None:
    operands = [known[i] for i in self.inputs]
    out = self.function(*operands, out=operands[0]) if self.in_place else self.function(*operands)
    if isinstance(out, list):
      known.update(zip(self.outputs, out))
    else:
      known[self.outputs[0]] = out
    for i in self.last:
      del known[i]


class _Steps(NamedTuple):
  """A program in steps, with what they need."""

  steps: tuple[_Step, ...]
  constants: dict[int, np.ndarray]
  program: Program
  choices: tuple[str, ...]

  def run(self, *inputs: np.ndarray) -> list[np.ndarray]:
    known = self.constants | dict(zip(self.program.inputs, inputs))
    with np.errstate(all="ignore"):  # As JAX does.
      for step in self.steps:
        step(known)
    return [known[i] for i in self.program.outputs]


class _Ways(NamedTuple):
  """How to multiply with weights.

  Attributes:
    kind: of the matrices, or "fastest".
    rounds: how often to time each.
    threads: of sparse layers.
  """

  kind: str
  rounds: int
  threads: int


def _translate(program: Program, params: list[Any], inputs: list[Any], ways: _Ways) -> _Steps:
  """Translates equation by equation, and computes each for what the next one is to be fast for."""
  known = dict(zip(program.params, params))
  for constants in (program.literals, program.captured):
    known |= {i: np.asarray(x, program.dtypes[i]) for i, x in constants.items()}
  running = dict(zip(program.inputs, inputs))
  own: set[int] = set()  # Arrays that no other variable is a view of.
  new = itertools.count(len(program.shapes))
  steps, choices = [], []
  equations = _running(program, known)
  layers = Layers(equations, program, known)
  last = {i: n for n, equation in enumerate(equations) for i in equation.inputs}
  last |= {take.source: max(last[take.source], last[i]) for i, take in layers.takes.items()}
  last |= dict.fromkeys(program.outputs, len(equations))
  skipped = set(layers.takes)
  for number, equation in enumerate(equations):
    if equation.outputs[0] in skipped:
      continue
    operands, outputs, in_place = equation.inputs, equation.outputs, False
    layer = layers.layer_of(equation)
    if layer is not None:
      operands, outputs = (layer.data,), layer.variables[-1:]
      skipped.update(layer.variables)
      makers = ways_to_compute(layer, program, ways.threads)
      choice, function = timing.choose(makers, running[layer.data], ways.kind, ways.rounds)
      choices.append(choice)
    else:
      function = function_of(equation, program.shapes)
    if isinstance(function, np.ufunc):
      first = operands[0]
      in_place = (
        first in own
        and last[first] == number
        and operands.count(first) == 1
        and program.shapes[first] != ()  # A number of NumPy is no array.
        and _same_type(program, first, outputs[0])
      )
      shape = program.shapes[outputs[0]]
      if math.prod(shape) <= WRITTEN_OUT:
        like = next(running[i] for i in operands if i in running)
        for i in set(operands) & known.keys():
          fresh = next(new)
          known[fresh] = _written_out(known[i], shape, like)
          operands = tuple(fresh if j == i else j for j in operands)
    if layer is not None or isinstance(function, np.ufunc):
      own.update(outputs)
    else:
      own.difference_update(operands)
    ending = {i for i in operands if i in running and last[i] == number}
    step = _Step(function, operands, outputs, tuple(ending), in_place)
    values = known | running
    step(values)
    for i in outputs:
      if values[i].dtype != program.dtypes[i]:
        raise ValueError(
          f"{equation.name!r} to {program.dtypes[i]} cannot be translated to NumPy, where it gives"
          f" {values[i].dtype}."
        )
    running = {i: x for i, x in values.items() if i in running or i in outputs}
    both = None
    if steps and steps[-1].outputs == operands and layers.only_reader(operands[0]):
      both = joined(steps[-1].function, function)
    if both is None:
      steps.append(step)
    else:  # What lies between them nothing else reads.
      steps[-1] = dataclasses.replace(steps[-1], function=both, outputs=outputs)
  read = {i for step in steps for i in step.inputs} | set(program.outputs)
  constants = {i: x for i, x in known.items() if i in read}
  return _Steps(tuple(steps), constants, program, tuple(choices))


def _running(program: Program, known: dict[int, Any]) -> list[Equation]:
  """The equations that the outputs depend on, and that depend on the inputs; the values of those
  that do not are added to what is known."""
  needed, equations = set(program.outputs), []
  for equation in reversed(program.equations):
    if not needed.isdisjoint(equation.outputs):
      needed.update(equation.inputs)
      equations.append(equation)
  running = []
  for equation in reversed(equations):
    if known.keys() >= set(equation.inputs):
      known.update(zip(equation.outputs, _constant(equation, known)))
    else:
      running.append(equation)
  return running


def _constant(equation: Equation, known: dict[int, Any]) -> list[np.ndarray]:
  """The values of outputs that do not depend on the inputs."""
  if equation.name == "broadcast_in_dim":  # A view, where JAX would make a copy.
    return [broadcast(equation.params)(known[equation.inputs[0]])]
  return list(map(np.asarray, equation.bind(*(known[i] for i in equation.inputs))))


def _written_out(constant: np.ndarray, shape: Shape, like: np.ndarray) -> np.ndarray:
  """A constant in this shape, in the order in which the other operand lies in memory."""
  out = np.empty_like(like, constant.dtype, shape=shape)
  out[...] = constant
  return out


def _same_type(program: Program, i: int, j: int) -> bool:
  return (program.shapes[i], program.dtypes[i]) == (program.shapes[j], program.dtypes[j])
