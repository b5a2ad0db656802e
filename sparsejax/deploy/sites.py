"""The equations that are computed at run time."""

import dataclasses
import math

import numpy as np

from sparsejax.deploy.channels import Place
from sparsejax.deploy.program import Equation, Program, Shape, same_arguments

Indices = tuple[np.ndarray | None, ...]  # Kept indices by axis; None: all.


@dataclasses.dataclass(frozen=True)
class Site:
  """An equation that is computed at run time, and where its operands are.

  Attributes:
    equation: the equation.
    inputs: the places of its operands.
    outputs: the places of its outputs.
    shapes_in: of the operands.
    shapes_out: of the outputs.
    moving: the positions of operands that are not stored constants.
    grows: whether a shape of the outputs depends on the batch size.
    follows: whether a static argument does.
  """

  equation: Equation
  inputs: tuple[Place, ...]
  outputs: tuple[int, ...]
  shapes_in: tuple[Shape, ...]
  shapes_out: tuple[Shape, ...]
  moving: tuple[int, ...]
  grows: bool
  follows: bool


def cut(shape: Shape, kept: Indices) -> Shape:
  """The shape of what is kept."""
  return tuple(size if k is None else len(k) for size, k in zip(shape, kept))


def positions(indices: np.ndarray, kept: np.ndarray | None) -> np.ndarray:
  """Where indices of an axis are among those that are kept."""
  return indices if kept is None else np.searchsorted(kept, indices)


def find_changing(program: Program, other: Program) -> set[int]:
  """The variables of literals and captured arrays that differ between traces of two batch sizes."""
  pairs = [
    (i, value, second[i])
    for first, second in ((program.literals, other.literals), (program.captured, other.captured))
    for i, value in first.items()
  ]
  return {i for i, a, b in pairs if a is not b and not np.array_equal(np.asarray(a), np.asarray(b))}


def split(
  program: Program, other: Program, changing: set[int]
) -> tuple[set[int], tuple[Site, ...]]:
  """What is stored and what is computed at run time.

  What does not depend on the inputs is stored, unless it follows the batch, in its shape or in how
  it is computed, or is nothing but something smaller repeated.

  Args:
    program: all equations.
    other: the same for another batch size.
    changing: variables that depend on the batch size.

  Returns:
    The variables that are stored, and the sites of the equations that are not.
  """
  stored = {*program.params, *program.literals, *program.captured} - changing
  sites: list[Site] = []
  for equation, others in zip(program.equations, other.equations):
    repeats = equation.name in ("broadcast_in_dim", "iota", "tile") and (
      _size(program, equation.outputs) > _size(program, equation.inputs)
    )
    grows = any(program.shapes[i] != other.shapes[i] for i in equation.outputs)
    follows = not same_arguments(equation.params, others.params)
    is_stored = stored.issuperset(equation.inputs) and not (repeats or grows or follows)
    if is_stored and not equation.has_effects:
      stored.update(equation.outputs)
    else:
      sites.append(_site(program, len(sites), equation, stored, grows, follows))
  return stored, tuple(sites)


def _site(program, number, equation, stored, grows, follows):
  moving = tuple(k for k, i in enumerate(equation.inputs) if i not in stored)
  return Site(
    equation,
    tuple(i if k in moving else (number, k) for k, i in enumerate(equation.inputs)),
    equation.outputs,
    tuple(program.shapes[i] for i in equation.inputs),
    tuple(program.shapes[i] for i in equation.outputs),
    moving,
    grows,
    follows,
  )


def _size(program, variables):
  return sum(math.prod(program.shapes[i]) for i in variables)
