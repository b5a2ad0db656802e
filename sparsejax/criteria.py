"""Scores per weight: the lowest are pruned.

A criterion is a function of one leaf's context, a `Leaf`, that returns scores of the leaf's shape.
Any such function will do:

>>> def taylor(leaf):
...   return (leaf.weight * leaf.gradient) ** 2
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Leaf:
  """What a criterion may look at.

  Attributes:
    weight: the weights, as passed to `update`.
    mask: True where the weight is active.
  """

  weight: jax.Array
  mask: jax.Array
  _gradient: jax.Array | None = None
  _key: jax.Array | None = None

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


def scores(criterion: Criterion, call) -> list[jax.Array]:
  """The scores of all leaves.

  Args:
    criterion: the criterion.
    call: a `sparsejax.transform.Call`.

  Returns:
    One array for each leaf of its weights.

  Raises:
    ValueError: if the criterion returns anything else than scores of the leaf's shape.
  """
  weights, masks = jax.tree.leaves(call.params), jax.tree.leaves(call.masks)
  gradients = [None] * len(weights) if call.grad is None else jax.tree.leaves(call.grad)
  found = []
  for i, (weight, mask, gradient) in enumerate(zip(weights, masks, gradients)):
    key = None if call.key is None else jax.random.fold_in(call.key, i)
    score = jnp.asarray(criterion(Leaf(weight, mask, gradient, key)))
    if score.shape != weight.shape or not jnp.issubdtype(score.dtype, jnp.floating):
      raise ValueError(
        "a criterion must return one floating-point score for each weight, got"
        f" {score.dtype}{list(score.shape)} for weights of shape {list(weight.shape)}."
      )
    found.append(score)
  return found
