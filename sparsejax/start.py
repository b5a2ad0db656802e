"""What sparse training starts with: its sparsity, and masks that are given or drawn."""

from collections.abc import Callable, Container

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax import allocation as allocation_lib
from sparsejax import arguments, patterns
from sparsejax import masks as masks_lib
from sparsejax.allocation import Allocation
from sparsejax.masks import PyTree
from sparsejax.patterns import Pattern


def check_start(
  sparsity: PyTree, masks: PyTree | None, ramp: optax.Schedule | None, initial: float
) -> tuple[PyTree, PyTree]:
  """Checks what says how sparse training starts and ends; returns the sparsity of both."""
  initial = arguments.check_sparsity("initial", initial)
  if not isinstance(initial, float):
    raise ValueError(f"initial must be a Python number, got {initial!r}.")
  if sparsity is None and (masks is None or ramp is not None):
    raise ValueError("sparsity=None is that of the masks: pass `masks`, and no ramp.")
  if sparsity is not None:
    sparsity = arguments.check_sparsity("sparsity", sparsity, may_be_chosen=True)
  if ramp is None:
    if initial:
      raise ValueError(f"initial={initial} is the start of a ramp, but there is none.")
    if masks is not None and sparsity is not None:
      raise ValueError("masks have a sparsity of their own: pass sparsity=None with them.")
    return sparsity, sparsity
  arguments.check_rise(initial, sparsity)
  return initial, sparsity


def initial_masks(
  sparsity: PyTree,
  masks: PyTree | None,
  allocation: Allocation,
  key: jax.Array | None,
  *,
  pattern: Pattern,
  final: PyTree,
) -> Callable[[PyTree, PyTree], PyTree]:
  """The masks that training starts with, as `transform.masked_updates` takes them.

  Args:
    sparsity: at the start; None with masks.
    masks: those that are given, or None.
    allocation: of the weights that are drawn.
    key: for the drawing.
    pattern: what is pruned together, and what has to stay.
    final: the sparsity at the end, which must not be lower in any leaf.
  """
  is_given, is_dense = masks is not None, isinstance(sparsity, float) and sparsity == 0
  # Weights of given sparsities per leaf are drawn too: an allocation has nothing to do there.
  by_magnitude = allocation_lib.resolve(allocation) is None and allocation_lib.is_scalar(sparsity)
  if is_given:
    masks_lib.check_boolean(masks)
  elif key is None and not (is_dense or by_magnitude):
    raise ValueError(
      "the weights that are active at the start are drawn at random: pass key=jax.random.key(seed),"
      " or masks."
    )

  def masks_of(params, pool):
    patterns.check_fit(pool, pattern)
    if not allocation_lib.is_scalar(final) and isinstance(sparsity, float):
      for name, value in masks_lib.leaves_by_name(final).items():
        in_pool = name in masks_lib.leaves_by_name(pool)
        if in_pool and isinstance(value, float) and value < sparsity:
          raise ValueError(
            f"the final sparsity of {name!r}, {value}, is below that of the start, {sparsity}."
          )
    if is_given:
      found = masks_lib.by_name(masks, params, pool)
      _check_all_true(masks, params, besides=masks_lib.leaves_by_name(pool))
      return found
    if is_dense:
      return masks_lib.all_true(pool)
    allocation_lib.check_leaves(sparsity, params, pool)
    if by_magnitude:
      scores = jax.tree.map(jnp.abs, pool)
    else:
      # No call has this number, by which keys are folded too.
      start_key = jax.random.fold_in(key, np.uint32(2**32 - 1))
      leaves, treedef = jax.tree.flatten(pool)
      scores = jax.tree.unflatten(
        treedef,
        [
          jax.random.uniform(jax.random.fold_in(start_key, i), w.shape)
          for i, w in enumerate(leaves)
        ],
      )
    return allocation_lib.masks_from_scores(
      scores, sparsity, allocation=allocation, pattern=pattern, prunable=lambda path, leaf: True
    )

  return masks_of


def _check_all_true(masks: PyTree, params: PyTree, besides: Container[str]) -> None:
  """Raises a ValueError if masks are known to prune parameters besides those named."""
  weights = masks_lib.leaves_by_name(params)
  for name, mask in masks_lib.leaves_by_name(masks).items():
    is_pruned = not isinstance(mask, jax.core.Tracer) and not np.all(mask)
    if is_pruned and name in weights and name not in besides:
      raise ValueError(f"the masks prune {name!r}, which is not prunable: see `prunable`.")
