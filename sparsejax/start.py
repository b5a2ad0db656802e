"""What sparse training starts with: its sparsity, and masks that are given or drawn."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax import allocation as allocation_lib
from sparsejax import arguments, patterns, sparsities, trees
from sparsejax import masks as masks_lib
from sparsejax.allocation import Allocation
from sparsejax.patterns import Pattern
from sparsejax.trees import PyTree


def check_start(
  sparsity: PyTree, masks: PyTree | None, ramp: optax.Schedule | None, initial: float
) -> tuple[PyTree, PyTree]:
  """Checks what says how sparse training starts and ends; returns the sparsity of both."""
  initial = arguments.check_sparsity("initial", initial)
  if not isinstance(initial, float):
    raise ValueError(f"initial must be a Python number, got {initial!r}.")
  if sparsity is None and (masks is None or ramp is not None):
    raise ValueError(
      "pass a sparsity in [0, 1); or, to take that of given masks, pass `masks`, and no ramp."
    )
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
  final_allocation: Allocation,
) -> Callable[[PyTree, PyTree], PyTree]:
  """The masks that training starts with, as `transform.masked_updates` takes them.

  Args:
    sparsity: at the start; None with masks.
    masks: those that are given, or None.
    allocation: of the weights that are drawn.
    key: for the drawing.
    pattern: what is pruned together, and what has to stay.
    final: the sparsity at the end, which must not be lower in any leaf; None with masks.
    final_allocation: how that is shared out.
  """
  is_given, is_dense = masks is not None, isinstance(sparsity, float) and sparsity == 0
  # Weights of given sparsities per leaf are drawn too: an allocation has nothing to do there.
  by_magnitude = allocation_lib.resolve(allocation) is None and sparsities.is_scalar(sparsity)
  if is_given:
    masks_lib.check_boolean(masks)
  elif key is None and not (is_dense or by_magnitude):
    raise ValueError(
      "the weights that are active at the start are drawn at random: pass key=jax.random.key(seed),"
      " or masks."
    )

  def masks_of(params, pool):
    patterns.check_fit(pool, pattern)
    found = start_of(params, pool)
    if final is not None:
      at_end = allocation_lib.check_pool(final, params, pool, final_allocation, pattern)
      is_drawn = not (is_given or by_magnitude)
      at_start = (
        allocation_lib.check_pool(sparsity, params, pool, allocation, pattern)
        if is_drawn
        else _count_pruned(found, pattern)
      )
      _check_rise(pool, at_start, at_end)
    return found

  def start_of(params, pool):
    if is_given:
      return given_masks(masks, params, pool)
    if is_dense:
      return masks_lib.all_true(pool)
    sparsities.check_leaves(sparsity, params, pool)
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


def _count_pruned(masks: PyTree, pattern: Pattern) -> np.ndarray | None:
  """How much masks prune in each leaf, if they are known."""
  units = [pattern.pool_mask(mask) for mask in jax.tree.leaves(masks)]
  kept = [masks_lib.count_kept(mask) for mask in units]
  if any(isinstance(number, jax.core.Tracer) for number in kept):
    return None
  return np.array([mask.size - int(number) for mask, number in zip(units, jax.device_get(kept))])


def _check_rise(pool: PyTree, at_start: np.ndarray | None, at_end: np.ndarray | None) -> None:
  """Raises a ValueError if a leaf is known to be sparser at the start than at the end."""
  if at_start is None or at_end is None:
    return
  names = list(map(trees.quoted, trees.leaves_by_name(pool)))
  if len(at_end) < len(names):
    names, at_start = ["the network"], [sum(at_start)]
  for name, first, last in zip(names, map(int, at_start), map(int, at_end)):
    if first > last + 1:  # Two ways to share out may round differently.
      raise ValueError(
        f"{name} starts with {first} pruned and is to end with {last}, but none returns: lower"
        " `initial`, or share out the start like the end."
      )


def given_masks(masks: PyTree, params: PyTree, pool: PyTree) -> PyTree:
  """The masks of a pool, see `masks.by_name`; a ValueError if others are known to prune."""
  found = masks_lib.by_name(masks, params, pool)
  weights, besides = trees.leaves_by_name(params), trees.leaves_by_name(pool)
  for name, mask in trees.leaves_by_name(masks).items():
    if isinstance(mask, jax.core.Tracer) or name in besides or name not in weights:
      continue
    with jax.ensure_compile_time_eval():
      is_all_true = bool(jnp.all(mask))
    if not is_all_true:
      raise ValueError(
        f"the masks prune {trees.quoted(name)}, which is not prunable: see `prunable`."
      )
  return found
