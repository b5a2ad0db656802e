"""A function that computes what is left of another."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import trees
from sparsejax.deploy import program as programs
from sparsejax.deploy.compaction_report import CompactionReport
from sparsejax.deploy.contraction import Contraction, rule_of
from sparsejax.deploy.program import Program
from sparsejax.deploy.sites import Indices, Site, cut


@dataclasses.dataclass(frozen=True)
class Step:
  """An equation, and what has changed of it.

  Attributes:
    site: the equation in the original.
    constants: the names of those of its operands that are stored, by position.
    kept: of its operands and outputs, by place.
    contraction: if it is one of stored weights.
    gathers: by axis of its data, the name of the indices that it takes.
    folded: the name of what is added to it, or None.
    is_empty: whether it takes nothing of its data.
  """

  site: Site
  constants: dict[int, str]
  kept: dict[Any, Indices]
  contraction: Contraction | None = None
  gathers: dict[int, str] = dataclasses.field(default_factory=dict)
  folded: str | None = None
  is_empty: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Compacted:
  """A smaller function with the same outputs; made by `compact`.

  Call it with the inputs of the original, or `apply` it to parameters of your own; both can be
  jitted and exported. Every call traces the original function anew, for the shapes of its inputs:
  jit it.

  Attributes:
    params: the arrays that are left: weights, indices of inputs that are taken, and what units add
      that are left out, by name.
    report: what has become of the parameters.
  """

  params: dict[str, jax.Array]
  report: CompactionReport
  _apply_fn: Callable[..., Any] = dataclasses.field(repr=False)
  _param_types: Any = dataclasses.field(repr=False)
  _input_types: Any = dataclasses.field(repr=False)
  _batched: tuple[bool, ...] = dataclasses.field(repr=False)
  _program: Program = dataclasses.field(repr=False)
  _steps: tuple[Step, ...] = dataclasses.field(repr=False)
  _outputs: dict[int, str] = dataclasses.field(repr=False)
  _other: Program | None = dataclasses.field(repr=False)

  def __call__(self, *inputs: Any) -> Any:
    """Computes the outputs of the original function for these inputs."""
    return self.apply(self.params, *inputs)

  def apply(self, params: dict[str, jax.Array], *inputs: Any) -> Any:
    """Computes the outputs with parameters like `params`.

    Raises:
      ValueError: if the parameters or the inputs are of another network, or differ from the example
        in more than the batch size, or if the function does other things at this batch size.
    """
    trees.check_same_structure(params, self.params, "the parameters", "those of this network")
    inputs = jax.tree.map(jnp.asarray, inputs)
    self._check(inputs)
    program = self._program_for(inputs)
    values = dict(zip(program.inputs, jax.tree.leaves(inputs)))
    values |= program.literals | program.captured
    values |= {i: params[name] for i, name in self._outputs.items()}
    equations = {equation.outputs: equation for equation in program.equations}
    for step in self._steps:
      equation = equations[step.site.outputs]
      outputs = self._run(
        step, dataclasses.replace(step.site, equation=equation), program, params, values
      )
      values.update(zip(equation.outputs, outputs))
    return jax.tree.unflatten(program.structure, [values[i] for i in program.outputs])

  def _program_for(self, inputs):
    """The equations of the original for these inputs."""
    program = programs.trace(self._apply_fn, self._param_types, inputs)
    if program.same_as(self._program):
      return program
    message = (
      "the function has other equations for inputs of these shapes,"
      f" {_shapes(inputs)}, than for {_shapes(self._input_types)}"
    )
    sizes = {x.shape[0] for x, b in zip(jax.tree.leaves(inputs), self._batched) if b}
    # JAX writes products and indexing in another way for one example and for a symbolic batch.
    if len(sizes) == 1 and all(size == 1 or not isinstance(size, int) for size in sizes):
      first = next(
        x.shape[0] for x, b in zip(jax.tree.leaves(self._input_types), self._batched) if b
      )
      try:
        return programs.extrapolate(self._program, self._other, sizes.pop() - first)
      except ValueError as error:
        raise ValueError(f"{message}, and {error}: compact it for these.") from error
    raise ValueError(f"{message}: compact it for these.")

  def _run(self, step, site, program, params, values):
    equation = site.equation
    shapes = [
      _cut(program.shapes[i], site.shapes_out[m], step.kept[i]) for m, i in enumerate(site.outputs)
    ]
    folded = None if step.folded is None else params[step.folded]
    if step.contraction is None:
      operands = [
        params[step.constants[k]] if k in step.constants else values[i]
        for k, i in enumerate(equation.inputs)
      ]
      changes = rule_of(site).resize(site, step.kept.get, shapes)
      return equation.bind(*operands, **changes)
    contraction = dataclasses.replace(step.contraction, site=site)
    data = equation.inputs[contraction.data]
    if folded is not None and contraction.folds_to_kernel:
      folded = contraction.map_of(folded, program.shapes[data])
    dtype = program.dtypes[site.outputs[0]]
    if step.is_empty:
      output = jnp.zeros(shapes[0], dtype)
    else:
      weights = params[step.constants[contraction.weights]]
      gathers = {axis: params[name] for axis, name in step.gathers.items()}
      output = contraction.run(values[data], weights, gathers)
    return [output if folded is None else output + folded.astype(dtype)]

  def _check(self, inputs):
    given, expected = jax.tree.structure(inputs), jax.tree.structure(self._input_types)
    if given != expected:
      raise ValueError(f"the inputs are {given}, but those of the example were {expected}.")
    leaves = zip(jax.tree.leaves(inputs), jax.tree.leaves(self._input_types), self._batched)
    for x, example, batched in leaves:
      first = 1 if batched else 0
      if x.ndim != len(example.shape) or x.shape[first:] != example.shape[first:]:
        but = ", in more than the batch size" if batched else ""
        raise ValueError(
          f"an input has shape {x.shape}, which differs from that of the example,"
          f" {example.shape}{but}."
        )
      if x.dtype != example.dtype:
        raise ValueError(f"an input is {x.dtype}, but that of the example was {example.dtype}.")


def _cut(shape, original, kept):
  """The shape that is left of one in this trace."""
  for axis, indices in enumerate(kept):
    if indices is not None and shape[axis] != original[axis]:
      raise ValueError(
        f"axis {axis} of an array of shape {shape} had size {original[axis]} when units were"
        " removed from it: its size must not depend on the batch size."
      )
  return cut(shape, kept)


def _shapes(inputs):
  return ", ".join(str(x.shape) for x in jax.tree.leaves(inputs))
