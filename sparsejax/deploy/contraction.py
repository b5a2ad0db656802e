"""Matrix products and convolutions: which inputs they take, and what the left out ones add."""

import dataclasses
import math
import string
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparsejax.deploy import rules, surrogates
from sparsejax.deploy.channels import Channels
from sparsejax.deploy.links import Link, whole
from sparsejax.deploy.program import Equation
from sparsejax.deploy.rules import Rule
from sparsejax.deploy.sites import Site


def rule_of(site: Site) -> Rule:
  """What is known about a site; `rules.UNKNOWN` if nothing is.

  Nothing is of what does other things at another batch size, such as a power whose exponent it is.
  """
  rule = _rule_of_primitive(site)
  says_shape = rule.moves and site.grows
  return rules.UNKNOWN if site.follows and not says_shape else rule


def _rule_of_primitive(site: Site) -> Rule:
  params = site.equation.params
  match site.equation.name:
    case "dot_general":
      return _DOT
    case "conv_general_dilated" if 1 not in site.moving and params["batch_group_count"] == 1:
      return _CONV if params["feature_group_count"] == 1 else _GROUPED_CONV
    case "conv_general_dilated":
      return rules.UNKNOWN
    case "reshape" if params["dimensions"] is not None:
      return rules.UNKNOWN
    case name:
      return rules.RULES.get(name, rules.UNKNOWN)


def _dot_links(site: Site, channels: Channels):
  del channels
  (left, right), (left_batch, right_batch) = site.equation.params["dimension_numbers"]
  output_axis = 0
  for axes in zip(left_batch, right_batch):
    for k in (0, 1):
      yield whole(k, axes[k], site.shapes_in[k][axes[k]], 0, output_axis)
    output_axis += 1
  for k, used in ((0, (*left, *left_batch)), (1, (*right, *right_batch))):
    for axis, size in enumerate(site.shapes_in[k]):
      if axis not in used:
        yield whole(k, axis, size, 0, output_axis)
        output_axis += 1


def _conv_links(site: Site, channels: Channels):
  del channels
  numbers = site.equation.params["dimension_numbers"]
  batch, channel = numbers.lhs_spec[0], numbers.rhs_spec[0]
  yield whole(0, batch, site.shapes_in[0][batch], 0, numbers.out_spec[0])
  yield whole(1, channel, site.shapes_in[1][channel], 0, numbers.out_spec[1])


def _grouped_links(site: Site, channels: Channels):
  """All inputs and outputs of a group belong together."""
  yield from _conv_links(site, channels)
  numbers = site.equation.params["dimension_numbers"]
  axis, output_axis = numbers.lhs_spec[1], numbers.out_spec[1]
  groups = site.equation.params["feature_group_count"]
  inputs = np.arange(site.shapes_in[0][axis]).reshape(groups, -1)
  outputs = np.arange(site.shapes_out[0][output_axis]).reshape(groups, -1)
  for i in inputs.T:
    yield Link(0, axis, i, 0, output_axis, outputs[:, 0])
  for o in outputs.T:
    yield Link(0, axis, inputs[:, 0], 0, output_axis, o)


def _resize_groups(site, kept, shapes):
  numbers = site.equation.params["dimension_numbers"]
  groups = site.equation.params["feature_group_count"]
  each = site.shapes_out[0][numbers.out_spec[1]] // groups
  return {"feature_group_count": shapes[0][numbers.out_spec[1]] // each}


_DOT = Rule(_dot_links, surrogates.bilinear)
_CONV = Rule(_conv_links, surrogates.bilinear)
_GROUPED_CONV = Rule(_grouped_links, surrogates.bilinear, resize=_resize_groups)


@dataclasses.dataclass(frozen=True)
class Contraction:
  """A sum over inputs times stored weights.

  Attributes:
    site: where it is.
    data: the position of the operand that is not stored; the other one are the weights.
    axes: pairs of the axes of the data and of the weights that are summed over.
    shared: pairs of those that the output has too, such as that of the heads of attention.
    alike: the axes of the data along which a constant has to be the same, to be left out.
  """

  site: Site
  data: int
  axes: tuple[tuple[int, int], ...]
  shared: tuple[tuple[int, int], ...]
  alike: tuple[int, ...]

  @property
  def weights(self) -> int:
    return 1 - self.data

  @property
  def is_conv(self) -> bool:
    return self.site.equation.name != "dot_general"

  def constants(self, value: Any, varying: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What the data that does not vary may add: zero where it varies or no weight reads it."""
    constants = np.where(varying, 0, _precise(value))
    for axis, other in self.axes:
      read = np.any(weights != 0, axis=_all_but(weights.ndim, other))
      constants = constants * np.expand_dims(read, _all_but(constants.ndim, axis))
    return constants

  def uneven(self, constants: np.ndarray, axis: int) -> np.ndarray:
    """At which indices of an axis the constants are not the same along the other axes."""
    first = self.first(constants)
    return np.any(constants != first, axis=_all_but(constants.ndim, axis))

  def first(self, constants: np.ndarray) -> np.ndarray:
    """The constants at the first index of the axes along which they are the same."""
    return constants[
      tuple(np.s_[:1] if a in self.alike else np.s_[:] for a in range(constants.ndim))
    ]

  def fold(self, constants: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What constants add to the output.

    Args:
      constants: like the data, with size 1 along the axes along which they are the same.
      weights: of the outputs that are kept.

    Returns:
      An array to be added to the output, which broadcasts to it; or, for a convolution with
      padding, a kernel with one input, whose convolution with ones is to be added.
    """
    weights = _precise(weights)
    if not self.is_conv:
      return self._dot(constants, weights)
    numbers = self.site.equation.params["dimension_numbers"]
    by_input = constants.reshape(-1)
    kernel = np.expand_dims(
      np.tensordot(weights, by_input, axes=(numbers.rhs_spec[1], 0)), numbers.rhs_spec[1]
    )
    if self.folds_to_kernel:
      return kernel
    by_output = kernel.sum(axis=_all_but(kernel.ndim, numbers.rhs_spec[0])).ravel()
    return np.expand_dims(by_output, _all_but(kernel.ndim, numbers.out_spec[1]))

  @property
  def folds_to_kernel(self) -> bool:
    """Whether what a constant adds depends on the position."""
    if not self.is_conv:
      return False
    params = self.site.equation.params
    return any(side for pad in params["padding"] for side in pad) or any(
      dilation != 1 for dilation in params["lhs_dilation"]
    )

  def _dot(self, constants, weights):
    operands = [constants, weights] if self.data == 0 else [weights, constants]
    equation = as_einsum(self.site.equation, *(x.ndim for x in operands))
    return np.einsum(equation, *operands, optimize=True)

  def run(self, data: Any, weights: Any, gathers: dict[int, Any]) -> Any:
    """The output of those inputs that `gathers` takes of the data, by axis."""
    for axis, indices in gathers.items():
      data = jnp.take(data, indices, axis=axis, mode="clip")
    operands = (data, weights) if self.data == 0 else (weights, data)
    return self.site.equation.bind(*operands)[0]

  def map_of(self, kernel: Any, shape: tuple[int, ...]) -> Any:
    """What constants add at every position, for data of this shape.  # shape=(1, ..., 1, ...)"""
    numbers = self.site.equation.params["dimension_numbers"]
    ones = [1 if axis in numbers.lhs_spec[:2] else size for axis, size in enumerate(shape)]
    return self.site.equation.bind(jnp.ones(ones, kernel.dtype), kernel)[0]


def as_einsum(equation: Equation, *ranks: int) -> str:
  """A product of two operands of these ranks in the notation of `einsum`."""
  (left, right), (left_batch, right_batch) = equation.params["dimension_numbers"]
  letters = iter(string.ascii_letters)
  names = [[next(letters) for _ in range(rank)] for rank in ranks]
  for i, j in zip((*left, *left_batch), (*right, *right_batch)):
    names[1][j] = names[0][i]
  output = [names[0][i] for i in left_batch]
  for k, used in ((0, (*left, *left_batch)), (1, (*right, *right_batch))):
    output += [name for axis, name in enumerate(names[k]) if axis not in used]
  return f"{''.join(names[0])},{''.join(names[1])}->{''.join(output)}"


def weights_of(site: Site) -> int | None:
  """The position of the weights of a product or a convolution; None if it is none of weights."""
  if len(site.moving) != 1 or rule_of(site) not in (_DOT, _CONV, _GROUPED_CONV):
    return None
  return 1 - site.moving[0]


def operations(site: Site, shape_out: tuple[int, ...], weights: tuple[int, ...]) -> int:
  """Multiplications and additions for an output of this shape with weights of that."""
  numbers = site.equation.params["dimension_numbers"]
  if rule_of(site) is _DOT:
    summed = [weights[axis] for axis in numbers[0][weights_of(site)]]
  else:
    summed = [size for axis, size in enumerate(weights) if axis != numbers.rhs_spec[0]]
  return 2 * math.prod(shape_out) * math.prod(summed)


def contraction_of(site: Site) -> Contraction | None:
  """The contraction at a site; None if it is none, or one whose inputs cannot be left out."""
  weights, rule = weights_of(site), rule_of(site)
  if weights is None or rule is _GROUPED_CONV:
    return None
  data = 1 - weights
  if rule is _CONV:
    numbers = site.equation.params["dimension_numbers"]
    alike = (numbers.lhs_spec[0], *numbers.lhs_spec[2:])
    return Contraction(site, data, ((numbers.lhs_spec[1], numbers.rhs_spec[1]),), (), alike)
  contracted, batch = site.equation.params["dimension_numbers"]
  used = (*contracted[data], *batch[data])
  alike = tuple(axis for axis in range(len(site.shapes_in[data])) if axis not in used)
  axes, shared = (tuple(zip(both[data], both[weights])) for both in (contracted, batch))
  return Contraction(site, data, axes, shared, alike)


def _precise(x: Any) -> np.ndarray:
  x = np.asarray(x)
  return x.astype(np.result_type(x.dtype, np.float64))


def _all_but(ndim: int, axis: int) -> tuple[int, ...]:
  return tuple(a for a in range(ndim) if a != axis)
