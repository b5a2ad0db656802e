"""Products and convolutions with weights as NumPy's products of rows with a matrix."""

import dataclasses
from typing import Any

import numpy as np

from sparsejax.deploy import runtime
from sparsejax.deploy.operations import Function, has_negative
from sparsejax.deploy.program import Equation, Shape


@dataclasses.dataclass(frozen=True)
class Product:
  """A product of rows that are made of the data with a matrix of weights.

  Attributes:
    data: the position of the operand that is not stored.
    matrix: the weights.  # shape=(inputs, outputs)
    rows: from the data to rows, with any number of leading axes.
    axes: of the data that are summed over; none of a convolution.
    shape: of the output channels.
    first: whether these are the first axes of the output, and not the last.
  """

  data: int
  matrix: np.ndarray
  rows: Function
  axes: tuple[int, ...]
  shape: tuple[int, ...]
  first: bool = False

  @property
  def is_last(self) -> bool:
    """Whether the output channels are the last axis of the output."""
    return not self.first and len(self.shape) == 1

  def times(self, compute: Function, data: np.ndarray) -> np.ndarray:
    """The product, by a function of rows."""
    rows = self.rows(data)
    out = compute(rows.reshape(-1, rows.shape[-1]))
    if self.first:
      return out.T.reshape(*self.shape, *rows.shape[:-1])
    return out.reshape(*rows.shape[:-1], *self.shape)


def product_of(equation: Equation, known: dict[int, Any], shapes: list[Shape]) -> Product | None:
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
  count = len(contracted[0])
  matrix = np.moveaxis(weights, contracted[1 - data], range(count))
  shape = matrix.shape[count:]
  matrix = matrix.reshape(int(np.prod(matrix.shape[:count])), -1)

  order = range(len(shapes[equation.inputs[data]]))
  others = tuple(axis for axis in order if axis not in contracted[data])

  def rows(x):
    moved = x.transpose(others + contracted[data])
    return moved.reshape(*moved.shape[: len(others)], -1)

  return Product(data, matrix, rows, contracted[data], shape, first=data == 1)


def _conv(equation: Equation, kernel: np.ndarray) -> Product:
  params = equation.params
  numbers = params["dimension_numbers"]
  last = len(numbers.lhs_spec) - 1
  is_plain = (
    last == 3
    and numbers.lhs_spec == numbers.out_spec == (0, last, 1, 2)
    and numbers.rhs_spec == (last, last - 1, 0, 1)
    and {*params["lhs_dilation"], *params["rhs_dilation"]} == {1}
    and params["feature_group_count"] == params["batch_group_count"] == 1
    and not has_negative(params["padding"])
  )
  if not is_plain:
    raise ValueError(
      "only convolutions of two dimensions with channels last, without dilation, negative padding"
      f" and groups can be translated to NumPy, but there is one with {params}."
    )
  layer = runtime.Conv(kernel, strides=params["window_strides"], padding=params["padding"])
  return Product(0, layer.matrix, layer.rows, (), kernel.shape[-1:])
