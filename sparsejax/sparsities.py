"""What sparsity is asked for: one for all prunable leaves, or a tree with one for each."""

import jax

from sparsejax import trees
from sparsejax.arguments import OneOf
from sparsejax.trees import PyTree

Scalar = float | jax.Array | OneOf
Sparsity = Scalar | PyTree


def check_leaves(sparsity: Sparsity, tree: PyTree, pool: PyTree) -> None:
  """Checks a tree of sparsities against a tree and its prunable leaves.

  Args:
    sparsity: a scalar, which always fits, or a tree.
    tree: the weights. It may have `optax.MaskedNode()` where other transformations are at work.
    pool: the same with `optax.MaskedNode()` in place of leaves that are not prunable.

  Raises:
    ValueError: if there is no sparsity for a leaf of the pool, or one for anything else.
  """
  if is_scalar(sparsity):
    return
  prunable = trees.leaves_by_name(pool)
  leaves, elsewhere = trees.leaves_and_masked_nodes(tree)
  given = trees.leaves_by_name(sparsity)
  for name in prunable:
    if name not in given:
      raise ValueError(
        f"the tree of sparsities has none for {name!r}, which is prunable: it has {sorted(given)}."
      )
  for name, value in given.items():
    is_idle = name in leaves and not (isinstance(value, float) and value != 0)
    if name not in prunable and not is_idle and not trees.lies_in(name, elsewhere):
      raise ValueError(
        f"the tree of sparsities asks for {value!r} in {name!r}, which is not a prunable leaf."
      )


def for_leaves(sparsity: Sparsity, pool: PyTree) -> Scalar | list[Scalar]:
  """A sparsity as a scalar, or as a list with one for each leaf of the pool."""
  if is_scalar(sparsity):
    return sparsity
  given = trees.leaves_by_name(sparsity)
  return [given[name] for name in trees.leaves_by_name(pool)]


def is_scalar(sparsity: Sparsity) -> bool:
  """Whether this is one sparsity, and no tree of them."""
  return jax.tree_util.treedef_is_leaf(jax.tree.structure(sparsity))
