"""What depends on what: linear stand-ins for primitives.

The *surrogate* of a primitive is a linear function of arrays of zeros and ones that is positive
wherever the output may depend on an input that is one. Run forward it says what varies with the
data, transposed it says what is needed. It has one argument for each operand that is not stored.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.deploy.sites import Site

Operands = Callable[[int], Any]
Surrogate = Callable[..., list[jax.Array]]


def any_operand(site: Site, nonzero: Operands, values: Operands) -> Surrogate:
  """An element depends on the elements of the operands at its position."""
  del nonzero, values
  shape = site.shapes_out[0]
  return lambda *xs: [functools.reduce(operator.add, (jnp.broadcast_to(x, shape) for x in xs))]


def bilinear(site: Site, nonzero: Operands, values: Operands) -> Surrogate:
  """A product of two operands does not depend on one where the other is zero."""
  del values
  changes = {"preferred_element_type": None} if site.equation.name != "mul" else {}

  def surrogate(*xs):
    terms = [
      site.equation.bind(*(x if i == k else nonzero(i) for i in range(2)), **changes)[0]
      for k, x in zip(site.moving, xs)
    ]
    return [functools.reduce(operator.add, terms)]

  return surrogate


def itself(site: Site, nonzero: Operands, values: Operands) -> Surrogate:
  """A primitive that only moves or adds elements is its own surrogate."""
  del nonzero, values

  def surrogate(*xs):
    operands = [np.zeros(shape, np.float32) for shape in site.shapes_in]
    for k, x in zip(site.moving, xs):
      operands[k] = x
    return site.equation.bind(*operands)

  return surrogate


def selected(site: Site, nonzero: Operands, values: Operands) -> Surrogate:
  """A predicate that is known says on which case each element depends."""
  predicate = values(0)
  if predicate is None:
    return any_operand(site, nonzero, values)

  def surrogate(*xs):
    operands = [np.zeros(shape, np.float32) for shape in site.shapes_in]
    for k, x in zip(site.moving, xs):
      operands[k] = x
    return site.equation.bind(predicate, *operands[1:])

  return surrogate


def reduced(site: Site, nonzero: Operands, values: Operands) -> Surrogate:
  del nonzero, values
  return lambda x: [jnp.sum(x, axis=site.equation.params["axes"])]


def windows(site: Site, nonzero: Operands, values: Operands) -> Surrogate:
  del nonzero, values
  params = site.equation.params
  keys = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
  return lambda x: [jax.lax.reduce_window(x, 0.0, jax.lax.add, *(params[key] for key in keys))]


def everything(site: Site, nonzero: Operands, values: Operands) -> Surrogate:
  """Every element of the outputs depends on every element of the operands."""
  del nonzero, values
  return lambda *xs: [
    jnp.broadcast_to(sum((jnp.sum(x) for x in xs), jnp.zeros([])), shape)
    for shape in site.shapes_out
  ]
