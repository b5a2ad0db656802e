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

import difflib
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import counts, selection
from sparsejax import masks as masks_lib
from sparsejax.counts import Count
from sparsejax.masks import Prunable, PyTree, is_kernel

Shapes = Sequence[tuple[int, ...]]
Density = float | jax.Array
Sparsity = Density | PyTree
Allocation = str | Callable[[Shapes, Density], Any]


def uniform(shapes: Shapes, density: Density):
  xp = _numpy_for(density)
  return xp.full(len(shapes), density)


def erdos_renyi(shapes: Shapes, density: Density):
  return _in_proportion([_sum_over_product(shape[-2:]) for shape in shapes], shapes, density)


def erdos_renyi_kernel(shapes: Shapes, density: Density):
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
    ValueError: if the allocation is unknown, or "global", which depends on scores.

  Example:
    >>> from sparsejax import allocation
    >>> allocation.densities([(784, 300), (300, 100), (100, 10)], 0.1, "erk").round(3).tolist()
    [0.08, 0.23, 1.0]
  """
  function = check(allocation)
  if function is None:
    raise ValueError('"global" has no densities of its own: they come out of the scores.')
  return function(shapes, density)


def check(allocation: Allocation) -> Callable[[Shapes, Density], Any] | None:
  """Resolves a name; None stands for one global threshold."""
  if callable(allocation):
    return allocation
  if not isinstance(allocation, str) or allocation not in _BY_NAME:
    close = difflib.get_close_matches(str(allocation), _BY_NAME, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
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
  prunable: Prunable = is_kernel,
) -> PyTree:
  """Masks that prune the weights with the lowest scores.

  Args:
    scores: a pytree of floating-point arrays in the shapes of the weights, in which NaN is kept.
    sparsity: the fraction to prune, in [0, 1): a float, a traced scalar, or a tree like `scores` of
      such numbers, one for each prunable leaf, that replace the allocation.
    allocation: how the sparsity is shared out among the leaves; see `sparsejax.allocation`.
    prunable: `prunable(path, leaf) -> bool` says which leaves are pruned.

  Returns:
    A full boolean tree like `scores`, True where a weight is kept. Exactly N - round((1 - s) N) of
    the N prunable weights are not, or of each leaf's if the allocation is not global.

  Raises:
    ValueError: if the sparsity is out of range or does not match the scores, or if the allocation
      is unknown.

  Example:
    >>> import jax.numpy as jnp
    >>> import sparsejax
    >>> scores = {"kernel": jnp.array([[0.3, 0.1], [0.4, 0.2]]), "bias": jnp.zeros(2)}
    >>> sparsejax.masks_from_scores(scores, 0.5)["kernel"]
    Array([[ True, False],
           [ True, False]], dtype=bool)
  """
  check(allocation)
  pool = masks_lib.select_prunable(scores, prunable)
  leaves, treedef = jax.tree.flatten(pool)
  if not leaves:
    return jax.tree.map(lambda s: jnp.ones_like(s, dtype=bool), scores)
  sparsity = for_leaves(check_sparsity("sparsity", sparsity), pool)
  k = count_pruned([s.shape for s in leaves], sparsity, allocation)
  pruned = selection.select([jnp.asarray(s) for s in leaves], counts.from_ints(k))
  pruned = jax.tree.unflatten(treedef, pruned)
  return jax.tree.map(
    lambda p, s: jnp.ones_like(s, dtype=bool) if masks_lib.is_masked_node(p) else ~p,
    pruned,
    scores,
    is_leaf=masks_lib.is_masked_node,
  )


def check_sparsity(name: str, sparsity: Sparsity) -> Sparsity:
  """Checks a sparsity as far as it is known; makes floats of Python and NumPy numbers.

  Args:
    name: what to call it in an error.
    sparsity: a scalar, or a tree of scalars.

  Returns:
    It, with floats for Python and NumPy numbers: they are computed with in float64.

  Raises:
    ValueError: if a value is not a number in [0, 1).
  """

  def check_scalar(path, value):
    label = name + jax.tree_util.keystr(path)
    if isinstance(value, jax.core.Tracer) and value.ndim == 0:
      return value
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, jax.Array, np.ndarray)):
      raise ValueError(f"{label} must be a number in [0, 1), got {value!r}.")
    if np.ndim(value) != 0:
      raise ValueError(f"{label} must be a scalar, got an array of shape {value.shape}.")
    if not 0 <= float(value) < 1:
      raise ValueError(
        f"{label} is the fraction of weights to prune and must be in [0, 1), got {value!r}."
      )
    return value if isinstance(value, jax.Array) else float(value)

  return jax.tree_util.tree_map_with_path(check_scalar, sparsity)


def for_leaves(sparsity: Sparsity, pool: PyTree) -> Density | list[Density]:
  """A sparsity as a scalar, or as a list with one for each leaf of the pool.

  Raises:
    ValueError: if a tree of sparsities has none for a leaf of the pool, or one for anything else.
  """
  if jax.tree_util.treedef_is_leaf(jax.tree.structure(sparsity)):
    return sparsity
  given = {
    masks_lib.path_name(path): value
    for path, value in jax.tree_util.tree_leaves_with_path(sparsity)
  }
  found, others = [], set()
  for path, leaf in jax.tree_util.tree_leaves_with_path(pool, is_leaf=masks_lib.is_masked_node):
    name = masks_lib.path_name(path)
    if masks_lib.is_masked_node(leaf):
      others.add(name)
      continue
    if name not in given:
      raise ValueError(
        f"the tree of sparsities has none for {name!r}, which is prunable: it has {sorted(given)}."
      )
    found.append(given.pop(name))
  for name, value in given.items():
    if name not in others or not (isinstance(value, float) and value == 0):
      raise ValueError(
        f"the tree of sparsities asks for {value!r} in {name!r}, which is not a prunable leaf."
      )
  return found


def count_pruned(
  shapes: Shapes, sparsity: Density | list[Density], allocation: Allocation
) -> np.ndarray | Count:
  r"""How many weights are pruned, :math:`n - \mathrm{round}((1 - s) n)`.

  Args:
    shapes: of the layers' kernels.
    sparsity: the overall sparsity s, or a list of one for each layer. Floats are computed with in
      float64; for traced values the count is exact for the float32 value.
    allocation: how an overall sparsity is shared out.

  Returns:
    A vector with one count for the whole pool if the allocation is global, and one for each layer
    otherwise: NumPy integers from floats, or else a traced `Count`.
  """
  share_out = check(allocation)
  sizes = [math.prod(shape) for shape in shapes]
  if not isinstance(sparsity, list):
    if share_out is None:
      sizes, sparsity = [sum(sizes)], [sparsity]
    elif isinstance(sparsity, float):
      return _count_in_float64(sizes, share_out(shapes, 1 - sparsity))
    else:
      sparsity = list(1 - share_out(shapes, 1 - jnp.asarray(sparsity, jnp.float32)))
  if all(isinstance(s, float) for s in sparsity):
    return _count_in_float64(sizes, [1 - s for s in sparsity])
  return counts.rounded_pruned(jnp.stack([jnp.asarray(s, jnp.float32) for s in sparsity]), sizes)


def _count_in_float64(sizes, densities):
  for density in densities:
    if not 0 <= density <= 1:
      raise ValueError(f"an allocation must return densities in [0, 1], got {density!r}.")
  return np.array([n - round(float(d) * n) for n, d in zip(sizes, densities)], dtype=np.uint64)


def _sum_over_product(shape: tuple[int, ...]) -> float:
  return sum(shape) / math.prod(shape) if math.prod(shape) else 1.0


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
  # With the first j layers dense: how many weights they have, and what is left for the others.
  dense = np.cumsum([0.0, *sizes[order]])
  weighted = np.cumsum([0.0, *(weights * sizes)[order][::-1]])[::-1]
  largest = np.array([*weights[order], 1.0])
  with np.errstate(all="ignore"):
    scale = (density * dense[-1] - dense) / np.where(weighted > 0, weighted, 1.0)
  fits = (scale * largest <= 1) | (np.arange(len(dense)) == len(weights))
  first = xp.argmax(fits)
  # At density 1 rounding may leave the last layers an ulp below it.
  return xp.where((rank < first) | (density >= 1), 1.0, scale[first] * weights)


def _numpy_for(density: Density):
  return np if isinstance(density, float) else jnp
