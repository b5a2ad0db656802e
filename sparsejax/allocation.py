r"""How much each layer keeps, and masks that keep it.

An allocation is a function `(shapes, density) -> densities` that shares an overall density out
among layers, given the shapes of their kernels (for convolutions height, width, inputs, outputs).
Those known by name:

`"global"`
  One threshold on the scores of all layers: the layers' densities come out of the scores.
`"uniform"`
  The same density in each layer.
`"er"`, `"erk"`
  Erdos-Renyi: densities proportional to :math:`(n_{in} + n_{out}) / (n_{in} n_{out})`, or, with the
  kernel, to the sum of all dimensions over their product. Layers whose share would exceed 1 are
  dense, and the others make up for it.

References:
  Mocanu et al., `Scalable training of artificial neural networks with adaptive sparse connectivity
  inspired by network science <https://arxiv.org/abs/1707.04780>`_, 2018

  Evci et al., `Rigging the Lottery: Making All Tickets Winners
  <https://arxiv.org/abs/1911.11134>`_, 2020
"""

import math
import numbers
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import arguments, counts, patterns, selection, sparsities
from sparsejax import masks as masks_lib
from sparsejax.arguments import OneOf
from sparsejax.counts import Count
from sparsejax.masks import Prunable, is_kernel
from sparsejax.patterns import SINGLE, Pattern
from sparsejax.sparsities import Scalar, Sparsity
from sparsejax.trees import PyTree

Shapes = Sequence[tuple[int, ...]]
Density = float | jax.Array
Allocation = str | Callable[[Shapes, Density], Any]


def uniform(shapes: Shapes, density: Density):
  """The same density in each layer."""
  xp = _numpy_for(density)
  return xp.full(len(shapes), density)


def erdos_renyi(shapes: Shapes, density: Density):
  """In proportion to the inputs plus outputs over their product (the last two dimensions)."""
  return _in_proportion([_sum_over_product(shape[-2:]) for shape in shapes], shapes, density)


def erdos_renyi_kernel(shapes: Shapes, density: Density):
  """In proportion to the sum of all dimensions over their product."""
  return _in_proportion([_sum_over_product(shape) for shape in shapes], shapes, density)


_BY_NAME = {"global": None, "uniform": uniform, "er": erdos_renyi, "erk": erdos_renyi_kernel}


def densities(shapes: Shapes, density: Density, allocation: Allocation):
  """The density of each layer.

  Args:
    shapes: of the layers' kernels.
    density: the fraction of all weights that is kept, in [0, 1]. With a Python float the densities
      are computed in float64 by NumPy; it may be traced.
    allocation: "uniform", "er", "erk" or a function (shapes, density) -> densities.

  Returns:
    An array of one density for each layer.

  Raises:
    ValueError: if the allocation is unknown, or "global", which depends on scores; if it is a
      function that does not return one density in [0, 1] for each layer.

  Example:
    >>> from sparsejax import allocation
    >>> allocation.densities([(784, 300), (300, 100), (100, 10)], 0.1, "erk").round(3).tolist()
    [0.08, 0.23, 1.0]
  """
  function = resolve(allocation)
  if function is None:
    raise ValueError('"global" has no densities of its own: they come out of the scores.')
  if isinstance(density, numbers.Real):
    # Functions of the user's may compute with jax.numpy, and are called while something is traced.
    with jax.ensure_compile_time_eval():
      found = np.asarray(function(shapes, float(density)), np.float64)
  else:
    found = jnp.asarray(function(shapes, density), jnp.float32)
  if found.shape != (len(shapes),):
    raise ValueError(
      f"an allocation must return one density for each of the {len(shapes)} layers, but"
      f" {allocation!r} returned an array of shape {found.shape}."
    )
  if isinstance(found, np.ndarray) and not np.all((found >= 0) & (found <= 1)):
    raise ValueError(f"densities must be in [0, 1], but {allocation!r} returned {found}.")
  return found


def resolve(allocation: Allocation) -> Callable[[Shapes, Density], Any] | None:
  """The function of that name; None stands for one global threshold."""
  if callable(allocation):
    return allocation
  if not isinstance(allocation, str) or allocation not in _BY_NAME:
    hint = arguments.did_you_mean(allocation, _BY_NAME)
    raise ValueError(
      f"unknown allocation {allocation!r}{hint}: use one of {sorted(_BY_NAME)}, a function"
      " (shapes, density) -> densities, or a tree of sparsities instead of one sparsity."
    )
  return _BY_NAME[allocation]


def masks_from_scores(
  scores: PyTree,
  sparsity: Sparsity,
  *,
  allocation: Allocation = "global",
  pattern: Pattern = SINGLE,
  prunable: Prunable = is_kernel,
) -> PyTree:
  """Masks that prune the weights with the lowest scores.

  Args:
    scores: a pytree of floating-point arrays in the shapes of the weights, in which NaN is kept.
    sparsity: the fraction to prune, in [0, 1): a float, a traced scalar, a `sparsejax.OneOf`, or a
      tree like `scores` of these, one for each prunable leaf, that replace the allocation.
    allocation: how the sparsity is shared out among the leaves; see `sparsejax.allocation`.
    pattern: what is pruned together, and what has to stay; see `sparsejax.patterns`.
    prunable: `prunable(path, leaf) -> bool` says which leaves are pruned.

  Returns:
    A full boolean tree like `scores`, True where a weight is kept. Exactly N - round((1 - s) N) of
    the N prunable weights are not, or of each leaf's if the allocation is not global. A warning
    names leaves of which nothing is left, where the masks are not traced.

  Raises:
    ValueError: if the sparsity is out of range, does not match the scores or would leave nothing,
      or if the allocation is unknown.

  Example:
    >>> import jax.numpy as jnp
    >>> import sparsejax
    >>> scores = {"kernel": jnp.array([[0.3, 0.1], [0.4, 0.2]]), "bias": jnp.zeros(2)}
    >>> sparsejax.masks_from_scores(scores, 0.5)["kernel"]
    Array([[ True, False],
           [ True, False]], dtype=bool)
  """
  resolve(allocation)
  patterns.check_is_pattern(pattern)
  pool = masks_lib.select_prunable(scores, prunable)
  leaves, treedef = selection.check_scores(pool)
  if not leaves:
    return masks_lib.all_true(scores)
  sparsity = arguments.check_sparsity("sparsity", sparsity, may_be_chosen=True)
  sparsities.check_leaves(sparsity, scores, pool)
  patterns.check_fit(pool, pattern)
  shapes = [s.shape for s in leaves]
  k = count_pruned(shapes, sparsities.for_leaves(sparsity, pool), allocation, pattern)
  check_some_left([math.prod(pattern.units(shape)) for shape in shapes], k)
  ranked = [pattern.exempt(pattern.pool(s), None) for s in leaves]
  pruned = selection.select(ranked, counts.from_ints(k))
  kept = [pattern.spread(~p, s.shape) for p, s in zip(pruned, leaves)]
  kept = jax.tree.unflatten(treedef, kept)
  masks = masks_lib.full_masks(kept, scores)
  masks_lib.warn_of_emptied(masks, stacklevel=2)
  return masks


def check_pool(
  sparsity: Sparsity, tree: PyTree, pool: PyTree, allocation: Allocation, pattern: Pattern
) -> np.ndarray | None:
  """Checks that a sparsity and a pattern fit the prunable leaves; warns if nothing would be left.

  Args:
    sparsity: a scalar, or a tree.
    tree: the weights. It may have `optax.MaskedNode()` where other transformations are at work.
    pool: the same with `optax.MaskedNode()` in place of leaves that are not prunable.
    allocation: how an overall sparsity is shared out.
    pattern: what is pruned together, and what has to stay.

  Returns:
    How many weights are pruned, see `count_pruned`, if that is known, and not zero.

  Raises:
    ValueError: if the sparsity does not match the tree, or the pattern does not fit a shape.
  """
  sparsities.check_leaves(sparsity, tree, pool)
  patterns.check_fit(pool, pattern)
  shapes = [np.shape(leaf) for leaf in jax.tree.leaves(pool)]
  sparsity = sparsities.for_leaves(sparsity, pool)
  known = sparsity if isinstance(sparsity, list) else [sparsity]
  # An allocation is not asked for the shares of everything.
  if not all(isinstance(s, float) for s in known) or not any(known):
    return None
  pruned = count_pruned(shapes, sparsity, allocation, pattern)
  if message := _nothing_left([math.prod(pattern.units(shape)) for shape in shapes], pruned):
    warnings.warn(message, stacklevel=2)
  return pruned


def count_pruned(
  shapes: Shapes,
  sparsity: Scalar | list[Scalar],
  allocation: Allocation,
  pattern: Pattern = SINGLE,
) -> np.ndarray | Count:
  r"""How many weights are pruned, :math:`n - \mathrm{round}((1 - s) n)`.

  Args:
    shapes: of the layers' kernels.
    sparsity: the overall sparsity s, or a list of one for each layer. Floats, and those of which
      one is chosen, are computed with in float64; for traced values the count is exact for the
      float32 value.
    allocation: how an overall sparsity is shared out.
    pattern: what is pruned together and counts as one, and what has to stay.

  Returns:
    A vector with one count for the whole pool if the allocation is global, and one for each layer
    otherwise: NumPy integers from floats, or else a traced `Count`.
  """
  if isinstance(sparsity, OneOf):
    table = [count_pruned(shapes, value, allocation, pattern) for value in sparsity.values]
    return counts.from_ints(table)[sparsity.index]
  if isinstance(sparsity, list) and any(isinstance(s, OneOf) for s in sparsity):
    parts = [count_pruned([shape], s, "global", pattern) for shape, s in zip(shapes, sparsity)]
    return jax.tree.map(lambda *words: jnp.concatenate(words), *map(counts.from_ints, parts))
  units = [pattern.units(shape) for shape in shapes]
  sizes = list(map(math.prod, units))
  return pattern.limit(_count_pruned(shapes, sizes, sparsity, allocation), units)


def _count_pruned(
  shapes: Shapes, sizes: Sequence[int], sparsity: Density | list[Density], allocation: Allocation
) -> np.ndarray | Count:
  """The same without one to choose, and whatever has to stay, in layers of such sizes."""
  if not isinstance(sparsity, list):
    if resolve(allocation) is not None:
      if isinstance(sparsity, float):
        density = 1 - sparsity
      else:
        density = 1 - jnp.where(jnp.isnan(sparsity), 0, jnp.float32(sparsity))
      found = densities(shapes, density, allocation)
      if isinstance(found, np.ndarray):
        return _count_in_float64(sizes, found)
      # From the densities themselves: in 1 - density a compiler might contract the product that
      # made it, and counts would depend on what it is compiled with.
      n = counts.from_ints(sizes)
      return n - counts.share(found, n)
    sizes, sparsity = [sum(sizes)], [sparsity]
  if all(isinstance(s, float) for s in sparsity):
    return _count_in_float64(sizes, [1 - s for s in sparsity])
  return counts.rounded_pruned(jnp.stack([jnp.asarray(s, jnp.float32) for s in sparsity]), sizes)


def check_some_left(sizes: Sequence[int], pruned: np.ndarray | Count) -> None:
  """Raises a ValueError if it is known that all weights are pruned."""
  if isinstance(pruned, np.ndarray) and (message := _nothing_left(sizes, pruned)):
    raise ValueError(message)


def _nothing_left(sizes: Sequence[int], pruned: np.ndarray) -> str:
  """What to say if all weights are pruned, or nothing."""
  if not 0 < sum(sizes) <= sum(map(int, pruned)):
    return ""
  return (
    f"so sparse, none of the {sum(sizes)} prunable weights would be left: prune less, or make more"
    " leaves prunable."
  )


def _count_in_float64(sizes, densities):
  return np.array([n - round(float(d) * n) for n, d in zip(sizes, densities)], dtype=np.uint64)


def _sum_over_product(shape: tuple[int, ...]) -> float:
  # A number is like a vector of one.
  return sum(shape) / math.prod(shape) if shape and math.prod(shape) else 1.0


def _in_proportion(weights: Sequence[float], shapes: Shapes, density: Density):
  """Densities proportional to the weights, except in layers that are dense.

  The layers of largest weight are made dense one after the other, until the share of the next is at
  most 1. How many, depends on the density alone, since their order is known beforehand.
  """
  xp = _numpy_for(density)
  weights = np.asarray(weights, np.float64)
  sizes = np.array([math.prod(shape) for shape in shapes], np.float64)
  order = np.argsort(-weights, kind="stable")
  rank = np.argsort(order)
  # With the first j layers dense: the share of all weights that they hold, the factor from what is
  # left of the density to the scale of the others, and the density up to which none exceeds 1.
  total = max(sizes.sum(), 1.0)
  dense = np.cumsum([0.0, *sizes[order]]) / total
  weighted = np.cumsum([0.0, *(weights * sizes)[order][::-1]])[::-1] / total
  factor = 1 / np.where(weighted > 0, weighted, 1.0)
  limit = weighted / np.array([*weights[order], 1.0]) + dense
  limit[-1] = np.inf
  first = xp.argmax(density <= xp.asarray(limit))
  # Difference first, then products: nothing here can be contracted to a fused multiply-add.
  scale = (density - xp.asarray(dense)[first]) * xp.asarray(factor)[first]
  # At density 1 rounding may leave the last layers an ulp below it.
  return xp.where((rank < first) | (density >= 1), 1.0, scale * weights)


def _numpy_for(density: Density):
  return np if isinstance(density, float) else jnp
