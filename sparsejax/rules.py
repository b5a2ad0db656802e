"""Rules: how masks change when they are due."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import allocation as allocation_lib
from sparsejax import counts, criteria, selection
from sparsejax import masks as masks_lib
from sparsejax.allocation import Allocation
from sparsejax.criteria import Criterion, Leaf
from sparsejax.masks import PyTree
from sparsejax.transform import Call

# Takes the number of the call, the tree of prunable weights, and a function from a sparsity to a
# number of weights; returns how many weights are to be pruned in all.
Goal = Callable[[jax.Array, PyTree, Callable[[Any], Any]], Any]


def prune_lowest(
  goal: Goal, allocation: Allocation, criterion: Criterion, *, revive: bool
) -> Callable[[Call], PyTree]:
  """Prunes the weights of lowest score, as many as are asked for.

  Args:
    goal: how many that is.
    allocation: how a sparsity is shared out among layers; see `sparsejax.allocation`.
    criterion: the score of each weight.
    revive: whether the masks before have no say: pruned weights compete too, and may return. If
      not, those that are pruned already count among the weights to be pruned, and stay so.

  Returns:
    A rule for `sparsejax.masked_updates`.
  """

  def rule(call):
    weights, treedef = jax.tree.flatten(call.params)
    if not weights:
      return call.masks
    shapes = [w.shape for w in weights]
    k = counts.from_ints(
      goal(call.count, call.params, lambda s: allocation_lib.count_pruned(shapes, s, allocation))
    )
    active = None if revive else jax.tree.leaves(call.masks)
    select = functools.partial(selection.select, k=k, active=active)
    if criterion is criteria.magnitude:
      # The absolute value is exact, so that it need not be written to memory.
      pruned = select(weights, score=jnp.abs)
    else:
      pruned = select(_scores(criterion, call))
    return jax.tree.unflatten(treedef, [~p for p in pruned])

  return rule


def _scores(criterion: Criterion, call: Call) -> list[jax.Array]:
  """The scores of all prunable leaves."""
  masks = jax.tree.leaves(call.masks)
  gradients = [None] * len(masks) if call.grad is None else jax.tree.leaves(call.grad)
  found = []
  for i, (path, weight) in enumerate(jax.tree_util.tree_leaves_with_path(call.params)):
    key = None if call.key is None else jax.random.fold_in(call.key, i)
    score = jnp.asarray(criterion(Leaf(weight, masks[i], gradient=gradients[i], key=key)))
    if score.shape != weight.shape or score.dtype not in selection.FLOATS:
      raise ValueError(
        "a criterion must return one floating-point score for each weight, got"
        f" {score.dtype}{list(score.shape)} for {masks_lib.path_name(path)!r} of shape"
        f" {list(weight.shape)}."
      )
    found.append(score)
  return found
