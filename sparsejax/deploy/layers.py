"""Layers of a program: products with weights, with what is taken before and what is done after."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sparsejax.deploy.operations import WRITTEN_OUT, Function, axis_of_take
from sparsejax.deploy.products import Product, product_of
from sparsejax.deploy.program import Equation, Program
from sparsejax.deploy.runtime import affine as affines
from sparsejax.deploy.runtime.affine import Affine


class Take(NamedTuple):
  """Indices that a product takes of an axis of its data."""

  source: int
  indices: np.ndarray


class Layer(NamedTuple):
  """A product with weights, and what is added to it, and the least that comes out.

  Attributes:
    product: the product.
    affine: what becomes of its rows.
    take: what is taken of the data before, or None.
    data: the variable that it reads, before anything is taken.
    variables: what the equations make whose place it takes, one after the other.
  """

  product: Product
  affine: Affine
  take: Take | None
  data: int
  variables: tuple[int, ...]


def ways_to_compute(
  layer: Layer, program: Program, threads: int
) -> dict[str, Callable[[], Function]]:
  """How to compute a layer from its data: with a dense matrix, or with a sparse one in threads."""
  product, take = layer.product, layer.take
  if take is not None:
    (axis,) = product.axes
    size = program.shapes[take.source][axis]
    indices = np.clip(take.indices, 0, size - 1)

  def dense():
    shape = program.shapes[layer.variables[-1]]
    affine = layer.affine
    if product.is_last and math.prod(shape) <= WRITTEN_OUT:
      rows = math.prod(shape[:-1]), shape[-1]
      written = [None if x is None else np.broadcast_to(x, rows).copy() for x in affine[1:]]
      affine = Affine(affine.matrix, *written)
    compute = functools.partial(product.times, affines.dense(affine))
    if take is None:
      return compute
    taken = (*[slice(None)] * axis, indices)  # Faster than `np.take`.
    return lambda x: compute(x[taken])

  def sparse():
    affine = layer.affine
    if take is not None:  # A sparse matrix has nothing for the inputs that are not taken.
      matrix = np.zeros((size, affine.matrix.shape[1]), affine.matrix.dtype)
      np.add.at(matrix, indices, affine.matrix)
      affine = affine._replace(matrix=matrix)
    layers = affines.sparse(affine, threads)
    is_along_last = product.axes == (len(program.shapes[layer.data]) - 1,)
    if product.is_last and is_along_last:
      return layers
    return functools.partial(product.times, layers)

  return {"dense": dense, "sparse": sparse}


class Layers:
  """Finds layers."""

  def __init__(self, equations: Sequence[Equation], program: Program, known: dict[int, Any]):
    """Looks at who reads what.

    Args:
      equations: those that depend on the inputs.
      program: what they are of.
      known: the values of constants.
    """
    self._program = program
    self._known = known
    self._readers: dict[int, list[Equation]] = {}
    for equation in equations:
      for i in equation.inputs:
        self._readers.setdefault(i, []).append(equation)
    self.takes = {
      equation.outputs[0]: take
      for equation in equations
      if (take := self._take_of(equation)) is not None
    }

  def only_reader(self, i: int) -> Equation | None:
    """The equation that alone reads a variable."""
    readers = self._readers.get(i, [])
    return readers[0] if len(readers) == 1 and i not in self._program.outputs else None

  def layer_of(self, equation: Equation) -> Layer | None:
    """The layer that begins with a product, if the equation is one with weights."""
    product = product_of(equation, self._known, self._program.shapes)
    if product is None:
      return None
    read = equation.inputs[product.data]
    take = self.takes.get(read)
    affine, variables = Affine(product.matrix), list(equation.outputs)
    dtypes = self._program.dtypes
    if product.is_last and dtypes[read] == dtypes[variables[0]] == product.matrix.dtype:
      affine, more = self._with_what_follows(affine, variables[0], product.shape)
      variables += more
    data = read if take is None else take.source
    return Layer(product, affine, take, data, tuple(variables))

  def _with_what_follows(
    self, affine: Affine, i: int, shape: tuple[int, ...]
  ) -> tuple[Affine, list[int]]:
    """Products with what is done to the variable that holds them, and the variables that this
    makes."""
    variables, bias, floor = [i], None, None
    while (added := self._constant_after(variables[-1], "add", shape)) is not None:
      total = added if bias is None else bias + added
      if not np.isfinite(total).all():  # Then the order counts in which they are added.
        break
      bias = total
      variables += self.only_reader(variables[-1]).outputs
    largest = self._constant_after(variables[-1], "max", ())
    if largest is not None and not np.isnan(largest):
      floor = largest[()]
      variables += self.only_reader(variables[-1]).outputs
    return affine._replace(bias=bias, floor=floor), variables[1:]

  def _take_of(self, equation: Equation) -> Take | None:
    """What is taken from an axis that a product sums over, if nothing else reads it."""
    if equation.name != "gather" or equation.inputs[1] not in self._known:
      return None
    reader = self.only_reader(equation.outputs[0])
    axis = axis_of_take(equation.params, self._program.shapes[equation.inputs[0]])
    indices = self._known[equation.inputs[1]]
    if reader is None or axis is None or indices.ndim != 2 or reader.name != "dot_general":
      return None
    contracted, batch = reader.params["dimension_numbers"]
    if reader.inputs[1] not in self._known or contracted[0] != (axis,) or batch[0]:
      return None
    return Take(equation.inputs[0], indices[:, 0].astype(np.intp))

  def _constant_after(self, i: int, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """The constant of this shape, along the last axes, with which an equation of this name alone
    reads a variable."""
    equation = self.only_reader(i)
    constants = [self._known[j] for j in equation.inputs if j in self._known] if equation else []
    if not constants or equation.name != name:
      return None
    constant = constants[0]
    rank = max(constant.ndim - len(shape), 0)
    steps = zip(constant.shape[:rank], constant.strides[:rank])
    if any(size != 1 and (step != 0 or size == 0) for size, step in steps):
      return None
    return np.broadcast_to(constant[(0,) * rank], shape)
