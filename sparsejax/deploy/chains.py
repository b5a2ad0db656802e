"""Products with weights that follow each other in a program, to be computed as sparse layers."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from sparsejax.deploy.products import Take, product_of, whole_matrix
from sparsejax.deploy.program import Equation, Program
from sparsejax.deploy.runtime import SparseLayer


class Chain(NamedTuple):
  """Layers, each a product with weights, and what is added to it, and the least that comes out.

  Attributes:
    data: the variable that the first of them reads.
    layers: the layers.
    variables: those that the equations make whose place the layers take.
    output: the one of them that the last layer makes.
  """

  data: int
  layers: tuple[SparseLayer, ...]
  variables: tuple[int, ...]
  output: int


def find_chains(
  equations: Iterable[Equation], program: Program, known: dict[int, Any], takes: dict[int, Take]
) -> dict[int, Chain]:
  """The longest chains, by the variable that the first product makes.

  Args:
    equations: those that depend on the inputs.
    program: what they are of.
    known: the values of constants.
    takes: what products take of an axis that they sum over, by the variable that it makes.
  """
  readers: dict[int, list[Equation]] = {}
  for equation in equations:
    for i in equation.inputs:
      readers.setdefault(i, []).append(equation)

  def next_of(i):
    """The equation that alone reads a variable."""
    found = readers.get(i, [])
    return found[0] if len(found) == 1 and i not in program.outputs else None

  def constant_after(i, name, shape):
    """The constant of this shape, along the last axes, with which an equation of this name alone
    reads a variable."""
    equation = next_of(i)
    constants = [known[j] for j in equation.inputs if j in known] if equation else []
    if not constants or equation.name != name:
      return None
    return _along_last_axes(constants[0], shape)

  def layer_of(equation):
    """A layer that begins with an equation, the variable that it reads, and those that it makes."""
    product = product_of(equation, known, program.shapes)
    if product is None:
      return None
    data = equation.inputs[product.data]
    is_plain = product.axes == (len(program.shapes[data]) - 1,) and len(product.shape) == 1
    if not is_plain or product.first or product.matrix.dtype not in (np.float32, np.float64):
      return None
    variables, bias = list(equation.outputs), None
    while (added := constant_after(variables[-1], "add", product.shape)) is not None:
      bias = added if bias is None else bias + added
      variables += next_of(variables[-1]).outputs
    if (floor := constant_after(variables[-1], "max", ())) is not None:
      variables += next_of(variables[-1]).outputs
    matrix = whole_matrix(product, takes.get(data), program.shapes)
    return SparseLayer(matrix, bias, floor), data, variables

  chains: dict[int, Chain] = {}
  inside: set[int] = set()
  for equation in equations:
    found = None if inside.issuperset(equation.outputs) else layer_of(equation)
    if found is None:
      continue
    layer, data, variables = found
    layers = [layer]
    while (following := next_of(variables[-1])) is not None:
      taken = following.outputs if following.outputs[0] in takes else ()
      following = next_of(taken[0]) if taken else following
      found = following and layer_of(following)
      if not found or found[0].matrix.dtype != layer.matrix.dtype:
        break
      layers.append(found[0])
      variables += [*taken, *found[2]]
    source = takes[data].source if data in takes else data
    chains[equation.outputs[0]] = Chain(source, tuple(layers), tuple(variables), variables[-1])
    inside.update(variables)
  return chains


def _along_last_axes(constant: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
  """A constant in this shape, if it is the same along all axes before these."""
  rank = max(constant.ndim - len(shape), 0)
  steps = zip(constant.shape[:rank], constant.strides[:rank])
  if any(size != 1 and step != 0 for size, step in steps):
    return None
  return np.broadcast_to(constant[(0,) * rank], shape)
