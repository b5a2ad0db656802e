"""Scores per weight: the lowest are pruned.

A criterion is a function of one leaf's context, a `Leaf`, that returns scores of the leaf's shape.
Any such function will do:

>>> def taylor(leaf):
...   return (leaf.weight * leaf.gradient) ** 2
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


class Leaf:
  """What a criterion may look at.

  Attributes:
    weight: the weights, as passed to `update`.
    mask: True where the weight is active.
  """

  def __init__(
    self,
    weight: jax.Array,
    mask: jax.Array,
    *,
    gradient: jax.Array | None = None,
    key: jax.Array | None = None,
  ):
    self.weight = weight
    self.mask = mask
    self._gradient = gradient
    self._key = key

  @property
  def gradient(self) -> jax.Array:
    """The gradient of the loss, as passed to `update(..., grad=gradient)`."""
    if self._gradient is None:
      raise ValueError(
        "this criterion needs the gradient: call update(updates, state, params, grad=gradient)."
        " The updates that reach the last link of a chain are not gradients any more."
      )
    return self._gradient

  @property
  def key(self) -> jax.Array:
    """A key of this leaf's own, new at each update of the masks."""
    if self._key is None:
      raise ValueError(
        "this criterion is random and needs a key: pass key=jax.random.key(seed) to the"
        " transformation."
      )
    return self._key


Criterion = Callable[[Leaf], jax.Array]


def magnitude(leaf: Leaf) -> jax.Array:
  """The absolute value of the weight."""
  return jnp.abs(leaf.weight)


def random(leaf: Leaf) -> jax.Array:
  """Independent uniform numbers: every active weight is equally likely to be pruned."""
  return jax.random.uniform(leaf.key, leaf.weight.shape)
