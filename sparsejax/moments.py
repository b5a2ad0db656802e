"""What an optimizer remembers of each weight, found in the state of any optimizer.

Moments are the floating-point arrays in it that lie in a tree with the structure of the parameters
and have the shape of their weight there. So statistics that are factored, or kept per layer, are
none; and `optax.MaskedNode()` may stand in the places of other groups.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax.trees import PyTree, is_masked_node, leaves_by_name

# What optax calls the first moment in the states of its optimizers, and the second beside it.
_SECOND_OF = {
  "trace": "nu",
  "ema": "nu",
  "mu": "nu",
  "m": "n",
  "m1": "nu",
  "exp_avg": "exp_avg_sq",
}


def map_moments(
  function: Callable[..., jax.Array], state: PyTree, fresh: PyTree, *trees: PyTree
) -> PyTree:
  """Applies a function to the moments of each weight.

  Args:
    function: takes a moment, its value in the fresh state, and its weight's leaf of each tree.
    state: the state of an optimizer.
    fresh: the state that it starts with.
    *trees: trees like the parameters, with `optax.MaskedNode()` for leaves whose moments stay.

  Returns:
    The new state.
  """
  is_like = _is_like(trees[0])

  def change(node, new):
    if not is_like(node):
      return node
    return jax.tree.map(
      lambda x, x0, like, *rest: function(x, x0, like, *rest) if _is_moment(x, like) else x,
      node,
      new,
      *trees,
      is_leaf=is_masked_node,
    )

  return jax.tree.map(change, state, fresh, is_leaf=is_like)


def find_moments(state: PyTree, pool: PyTree) -> list[tuple[jax.Array, jax.Array | None]]:
  """The first moment of each leaf, and the second beside it, or None.

  Raises:
    ValueError: if a leaf has no first moment.
  """
  is_like = _is_like(pool)
  nodes = {
    path: dict(jax.tree_util.tree_leaves_with_path(node))
    for path, node in jax.tree_util.tree_leaves_with_path(state, is_leaf=is_like)
    if path and is_like(node)
  }
  pairs = [
    (first, nodes.get((*path[:-1], jax.tree_util.GetAttrKey(second)), {}))
    for path, first in nodes.items()
    if (second := _SECOND_OF.get(getattr(path[-1], "name", None)))
  ]

  def of_leaf(path, name, leaf):
    for first, second in pairs:
      if path in first and _is_moment(first[path], leaf):
        has_second = path in second and _is_moment(second[path], leaf)
        return first[path], second[path] if has_second else None
    names = ", ".join(sorted({type(part).__name__ for part in _parts(state)}))
    raise ValueError(
      "growth by momentum needs an inner optimizer that keeps a first moment of each weight, such"
      " as optax.sgd(learning_rate, momentum=0.9) or optax.adam(learning_rate), but for"
      f" {name!r} there is none in its state ({names}) under a name that is known:"
      f" {', '.join(_SECOND_OF)}."
    )

  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(pool)]
  return [of_leaf(path, *named) for path, named in zip(paths, leaves_by_name(pool).items())]


def _is_like(tree: PyTree) -> Callable[[Any], bool]:
  """Whether a node of a state is a tree like this one, but for `optax.MaskedNode()` in either."""

  def is_like(node):
    leaves, structure = jax.tree.flatten(node, is_leaf=is_masked_node)
    try:
      parts = structure.flatten_up_to(tree)
    except ValueError:
      return False
    return bool(leaves) and all(
      is_masked_node(leaf)
      or is_masked_node(part)
      or jax.tree_util.treedef_is_leaf(jax.tree.structure(part))
      for leaf, part in zip(leaves, parts)
    )

  return is_like


def _is_moment(x: Any, like: Any) -> bool:
  if is_masked_node(x) or is_masked_node(like):
    return False
  return jnp.issubdtype(x.dtype, jnp.floating) and x.shape == like.shape


def _parts(state: PyTree) -> list[Any]:
  """The states of single transformations, those of chains apart."""
  if isinstance(state, tuple) and not hasattr(state, "_fields"):
    return [s for part in state for s in _parts(part)]
  return [state]
