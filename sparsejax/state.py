"""The state of a pruning transformation, and the masks in the state of any optimizer around it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsejax import packing, trees
from sparsejax.trees import PyTree


class MaskedUpdatesState(NamedTuple):
  """State of `masked_updates`, and so of every pruning transformation.

  Attributes:
    count: number of calls of `update` so far.  # shape=(), dtype=jnp.int32
    masks: a boolean tree with the structure of the parameters, True where a weight is active, with
      `optax.MaskedNode()` in place of leaves that are never pruned. Packed ones have eight weights
      of the last axis in a byte; `sparsejax.get_masks` unpacks them.
    key: the random key, or None.
    inner: the state of the optimizer that is wrapped, or None.
    statistics: what the rule keeps from call to call, or None.
  """

  count: jax.Array
  masks: PyTree
  key: jax.Array | None = None
  inner: PyTree = None
  statistics: PyTree = None


def get_masks(opt_state: PyTree, params: PyTree) -> PyTree:
  """Finds the masks in an optimizer state.

  Args:
    opt_state: any optimizer state that contains that of a pruning transformation, however deep.
    params: the parameters that the optimizer was initialised with (their shapes suffice); with
      Flax NNX, `nnx.state(model, nnx.Param)`.

  Returns:
    A full boolean tree with the structure of the parameters: True where a weight is active and in
    leaves that are never pruned. The masks of several transformations are and-ed.

  Raises:
    ValueError: if there are no masks in the state, or none that fit the parameters, or if two of
      these have the same name.

  Example:
    >>> import jax.numpy as jnp, optax, sparsejax
    >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    >>> tx = optax.chain(optax.adam(1e-3), sparsejax.one_shot_pruning(0.5, at=10))
    >>> sparsejax.get_masks(tx.init(params), params)["bias"]
    Array([ True,  True], dtype=bool)
  """
  # By name, since the parameters may be in another container, such as a module of Flax NNX.
  leaves, found = trees.leaves_by_name(params), {}
  for state in _states(opt_state):
    masks = trees.leaves_by_name(packing.unpack(state.masks, params))
    pruned = {name: leaf for name, leaf in leaves.items() if name in masks}
    trees.check_same_shapes(masks, pruned, "the masks", "the parameters")
    for name, mask in masks.items():
      found.setdefault(name, []).append(mask)

  def full_mask(path, leaf):
    masks = found.get(trees.path_name(path), [])
    return functools.reduce(jnp.logical_and, masks, jnp.ones_like(leaf, dtype=bool))

  return trees.map_with_path(full_mask, params)


def mask_bytes(opt_state: PyTree) -> int:
  """The memory that all masks in an optimizer state take."""
  masks = [mask for state in _states(opt_state) for mask in jax.tree.leaves(state.masks)]
  return sum(mask.size * mask.dtype.itemsize for mask in masks)


def _states(opt_state: PyTree) -> list[MaskedUpdatesState]:
  """Those of all transformations of this library; a ValueError if there is none."""

  def find(tree):
    for leaf in jax.tree.leaves(tree, is_leaf=_is_state):
      if _is_state(leaf):
        yield leaf
        yield from find(leaf.inner)

  if not (found := list(find(opt_state))):
    raise ValueError(
      "there are no masks in this optimizer state: chain a transformation of sparsejax, such as"
      " progressive_pruning, after the optimizer; and restore a state in the structure of one that"
      " `init` returns."
    )
  return found


def _is_state(x: Any) -> bool:
  return isinstance(x, MaskedUpdatesState)
