"""Slow, obvious NumPy versions of what the library computes.

Everything here sorts, concatenates and loops on purpose: these functions are read next to the
published rule, and the library is tested against them.
"""

import jax
import numpy as np


def as_float64(array):
  """The values of a floating-point array of any dtype as float64; every such cast is exact."""
  with np.errstate(invalid="ignore"):  # A signalling NaN becomes a quiet one: all the same here.
    return np.asarray(array).astype(np.float64)


def select_smallest(scores, k, *, among=None):
  """True at the `k` smallest scores of a tree, by a stable argsort of the concatenated leaves.

  Args:
    scores: a tree of floating-point arrays. They are compared as float64: NaN comes last, whatever
      its sign or payload, and -0 equals +0. Ties go to the lower leaf, then to the lower index in C
      order.
    k: how many; all candidates where there are fewer. A tree shaped like `scores` selects inside
      each leaf.
    among: a boolean tree of the candidates; None means everything.

  Returns:
    A tree of boolean NumPy arrays.
  """
  leaves, structure = jax.tree.flatten(scores)
  candidates = [np.ones(np.shape(leaf), bool) for leaf in leaves]
  if among is not None:
    candidates = [np.asarray(leaf, bool) for leaf in jax.tree.leaves(among)]
  if jax.tree.structure(k) == structure and not jax.tree_util.treedef_is_leaf(structure):
    groups = [[index] for index in range(len(leaves))]
    counts = [int(count) for count in jax.tree.leaves(k)]
  else:
    groups, counts = [list(range(len(leaves)))], [int(k)]
  selected = [np.zeros(np.shape(leaf), bool) for leaf in leaves]
  for group, count in zip(groups, counts, strict=True):
    values = np.concatenate([np.zeros(0)] + [as_float64(leaves[i]).ravel() for i in group])
    allowed = np.concatenate([np.zeros(0, bool)] + [candidates[i].ravel() for i in group])
    order = np.argsort(values, kind="stable")
    chosen = np.zeros(values.size, bool)
    chosen[order[allowed[order]][:count]] = True
    pieces = np.split(chosen, np.cumsum([candidates[i].size for i in group])[:-1])
    for i, piece in zip(group, pieces, strict=True):
      selected[i] = piece.reshape(candidates[i].shape)
  return jax.tree.unflatten(structure, selected)


def keep_largest(scores, kept):
  """True at all but the `N - kept` smallest of the `N` scores of a tree, or of each leaf."""
  if jax.tree.structure(kept) == jax.tree.structure(scores):
    dropped = jax.tree.map(lambda score, count: np.size(score) - int(count), scores, kept)
  else:
    dropped = sum(np.size(leaf) for leaf in jax.tree.leaves(scores)) - int(kept)
  return jax.tree.map(np.logical_not, select_smallest(scores, dropped))


def progressive_masks(
  weights, sparsity, *, steps, every, begin=0, initial=0.0, prunable=lambda leaf: np.ndim(leaf) >= 2
):
  """The published rule of progressive pruning, call by call, with its counts in float64.

  At call `c` of `begin <= c < begin + steps` with `(c - begin) % every == 0` the target is the
  linear ramp at the end of the coming interval, `s = initial + (sparsity - initial) * t / steps`
  with `t = min(c + every, begin + steps) - begin`; of the `N` prunable weights `round((1 - s) * N)`
  are kept, at most the active ones: the largest magnitudes among the active weights of the tree.

  Args:
    weights: for every call the tree of parameters that it is given.
    sparsity, steps, every, begin, initial: the ramp, in calls.
    prunable: which leaves form the pool.

  Returns:
    For every call the tree of masks in force after it, True where nothing is pruned.
  """
  masks, history = None, []
  for call, params in enumerate(weights):
    leaves, structure = jax.tree.flatten(params)
    if masks is None:
      masks = [np.ones(np.shape(leaf), bool) for leaf in leaves]
    if begin <= call < begin + steps and (call - begin) % every == 0:
      pool = [index for index, leaf in enumerate(leaves) if prunable(leaf)]
      total = sum(np.size(leaves[index]) for index in pool)
      active = sum(int(masks[index].sum()) for index in pool)
      elapsed = min(call + every, begin + steps) - begin
      target = initial + (sparsity - initial) * elapsed / steps
      kept = min(round((1 - target) * total), active)
      pruned = select_smallest(
        [np.abs(as_float64(leaves[index])) for index in pool],
        active - kept,
        among=[masks[index] for index in pool],
      )
      masks = list(masks)
      for index, leaf in zip(pool, pruned, strict=True):
        masks[index] = masks[index] & ~leaf
    history.append(jax.tree.unflatten(structure, masks))
  return history


def uniform_densities(shapes, density):
  """Every layer keeps the same fraction."""
  return np.full(len(shapes), float(density))


def er_densities(shapes, density, *, kernel):
  """Erdos-Renyi densities per layer: of the whole kernel (ERK), or of its channels only (ER).

  A layer's density is proportional to the sum over the product of its dimensions: all of them for
  ERK, the last two (in and out, in the HWIO layout) for ER. While some layer's would exceed one,
  the layers that have the largest raw value become dense and the rest is rescaled.
  """
  sizes = np.array([np.prod(shape, dtype=np.float64) for shape in shapes])
  used = [shape if kernel else shape[-2:] for shape in shapes]
  raw = np.array([sum(shape) / np.prod(shape, dtype=np.float64) for shape in used])
  dense = np.zeros(len(shapes), bool)
  while not dense.all():
    budget = density * sizes[~dense].sum() - (1 - density) * sizes[dense].sum()
    scale = budget / (raw[~dense] * sizes[~dense]).sum()
    largest = raw[~dense].max()
    if scale * largest <= 1:
      return np.where(dense, 1.0, scale * raw)
    dense |= raw == largest
  return np.ones(len(shapes))
