"""Masks as pytrees: which leaves are pruned; apply, count and compare.

A mask is a boolean array of its weight's shape, True where the weight is kept. *Full* masks have
the structure of the parameters, with True everywhere in leaves that are never pruned. Inside an
optimizer state, and in the trees that a rule sees, `optax.MaskedNode()` stands for such leaves.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax import counts, ordinals, trees
from sparsejax.trees import KeyPath, PyTree

Prunable = Callable[[KeyPath, Any], bool]


def is_kernel(path: KeyPath, leaf: Any) -> bool:
  """Whether a leaf is a kernel: of rank 2 or more, as are those of dense and convolution layers.

  What is called "bias" or "scale" is none, whatever its rank: in Flax biases of attention have an
  axis of heads, and `nn.scan` gives each parameter one of layers. This is the default `prunable`.
  """
  return np.ndim(leaf) >= 2 and trees.path_name(path[-1:]) not in ("bias", "scale")


def apply_masks(tree: PyTree, masks: PyTree) -> PyTree:
  """Sets to zero what the masks prune.

  Needed only outside of training, for what the optimizer does not keep sparse: a moving average of
  the parameters, say, or parameters that masks made before training are to be applied to.

  Args:
    tree: a pytree of arrays.
    masks: a full boolean tree with its structure and shapes.

  Returns:
    The tree, zero where a mask is False.
  """
  check_boolean(masks)
  trees.check_same_structure(masks, tree, "the masks", "the tree")
  return jax.tree.map(lambda m, x: jnp.where(m, x, jnp.zeros_like(x)), masks, tree)


def where(mask: jax.Array, x: Any, y: Any) -> jax.Array:
  """`jnp.where`, faster for masks."""
  # XLA's CPU backend selects by bytes faster than by booleans.
  return jnp.where(mask.astype(jnp.uint8) != 0, x, y)


def sparsity(masks: PyTree, prunable: Prunable = is_kernel) -> jax.Array:
  """The pruned fraction of the weights that may be pruned.

  Args:
    masks: a full boolean tree.
    prunable: which leaves are counted.

  Returns:
    A scalar in [0, 1].

  Raises:
    ValueError: if no leaf is prunable.

  Example:
    >>> import jax.numpy as jnp
    >>> import sparsejax
    >>> masks = {"kernel": jnp.array([[True, False], [False, False]]), "bias": jnp.ones(2, bool)}
    >>> float(sparsejax.sparsity(masks))
    0.75
  """
  check_boolean(masks)
  pool = jax.tree.leaves(select_prunable(masks, prunable))
  size = sum(m.size for m in pool)
  if not size:
    raise ValueError("the sparsity of nothing is undefined: no leaf is prunable.")
  # A float32 cannot hold a large count, but it can hold each leaf's share.
  return sum((m.size - count_kept(m)).astype(jnp.float32) / size for m in pool)


class Overlap(NamedTuple):
  """How far two sets of masks agree: the Jaccard index of the weights that they keep.

  Attributes:
    overall: of all prunable weights together.  # shape=()
    per_layer: by the path of the leaf, such as "dense/kernel".
  """

  overall: jax.Array
  per_layer: dict[str, jax.Array]


def overlap(masks_a: PyTree, masks_b: PyTree, prunable: Prunable = is_kernel) -> Overlap:
  r"""The Jaccard index :math:`|A \cap B| / |A \cup B|` of the weights that two masks keep.

  Where neither keeps anything the index is 1.

  Args:
    masks_a: a full boolean tree.
    masks_b: another with the same structure and shapes.
    prunable: which leaves are compared.

  Returns:
    The index overall and per layer.

  Example:
    >>> import jax.numpy as jnp
    >>> import sparsejax
    >>> a, b = jnp.array([[True, True, False]]), jnp.array([[False, True, True]])
    >>> print(round(float(sparsejax.overlap({"kernel": a}, {"kernel": b}).overall), 3))
    0.333
  """

  def jaccard(both, either):
    return jnp.where(either > 0, both / jnp.maximum(either, 1), 1.0)

  check_boolean(masks_a)
  check_boolean(masks_b)
  trees.check_same_structure(masks_a, masks_b, "the first masks", "the second masks")
  a, b = (trees.leaves_by_name(select_prunable(masks, prunable)) for masks in (masks_a, masks_b))
  per_layer, both, either = {}, 0.0, 0.0
  for name in a:
    one, other = jax.lax.optimization_barrier((a[name], b[name]))
    shared, united = map(jnp.float32, counts.count_true(one & other, one | other))
    per_layer[name] = jaccard(shared, united)
    both, either = both + shared, either + united
  return Overlap(jaccard(both, either), per_layer)


def check_boolean(masks: PyTree) -> None:
  """Raises a ValueError if a mask is of another type."""
  for name, mask in trees.leaves_by_name(masks).items():
    if jnp.result_type(mask) != jnp.bool_:
      raise ValueError(
        f"masks must be boolean, but {trees.quoted(name)} has dtype {jnp.result_type(mask)}:"
        " compare it, as in mask != 0."
      )


def count_kept(mask: jax.Array) -> jax.Array:
  """How many weights a mask keeps.  # shape=(), dtype=uint32"""
  # Masks that are known when compiling, such as those of a dense network, would be counted by the
  # compiler, which takes it minutes.
  return counts.count_true(jax.lax.optimization_barrier(mask))[0]


def select_prunable(tree: PyTree, prunable: Prunable) -> PyTree:
  """The tree with `optax.MaskedNode()` in place of the leaves that are not prunable."""
  return trees.map_with_path(lambda path, x: x if prunable(path, x) else optax.MaskedNode(), tree)


def check_prunable(params: PyTree, masks: PyTree) -> None:
  """Raises a ValueError if nothing can be pruned, or something that the masks are of cannot."""
  if (leaves := trees.leaves_by_name(params)) and not jax.tree.leaves(masks):
    listed = [f"{trees.quoted(name)} of shape {list(np.shape(x))}" for name, x in leaves.items()]
    raise ValueError(
      f"there is nothing to prune: `prunable` is False for each of {', '.join(listed[:5])}"
      f"{', ...' if len(listed) > 5 else ''}."
    )
  pool = trees.pick(masks, params, "the masks", "the parameters")
  for name, p in trees.leaves_by_name(pool).items():
    if p.dtype not in ordinals.FLOATS:
      raise ValueError(
        f"{trees.quoted(name)} has dtype {p.dtype}, but only weights of"
        f" {', '.join(map(str, ordinals.FLOATS))} can be pruned: exclude it by `prunable`."
      )
    if p.size >= 2**32:
      raise ValueError(
        f"{trees.quoted(name)} has {p.size} weights, but a leaf must have fewer than 2**32: split"
        " it."
      )


def full_masks(kept: PyTree, tree: PyTree) -> PyTree:
  """Masks with the structure of a tree, True where they have `optax.MaskedNode()`.

  In the rule of a transformation, the tree has that too; such places stay.
  """

  def full(mask, leaf):
    if trees.is_masked_node(mask) and not trees.is_masked_node(leaf):
      return jnp.ones_like(leaf, dtype=bool)
    return mask

  return jax.tree.map(full, kept, tree, is_leaf=trees.is_masked_node)


def all_true(tree: PyTree) -> PyTree:
  """A boolean tree like this one, True everywhere, and sharded alike."""
  return jax.tree.map(lambda x: jnp.ones_like(x, dtype=bool), tree)


def warn_of_emptied(masks: PyTree, stacklevel: int) -> None:
  """Warns of layers in which no weight is left, if the masks are known."""
  leaves = {name: m for name, m in trees.leaves_by_name(masks).items() if m.size}
  if any(isinstance(m, jax.core.Tracer) for m in leaves.values()):
    return
  alive = jax.device_get({name: jnp.any(m) for name, m in leaves.items()})
  if emptied := [name for name, is_alive in alive.items() if not is_alive]:
    warnings.warn(
      f"no weight is left in {', '.join(map(trees.quoted, emptied))}: nothing passes through such a"
      " layer. Prune less, or give each layer its share by `allocation`.",
      stacklevel=stacklevel + 1,
    )


def by_name(masks: PyTree, params: PyTree, pool: PyTree) -> PyTree:
  """The masks of the leaves of a pool, found by name.

  So they may be restored as a plain dictionary, and be those of a whole network where the
  parameters are those of a group.

  Args:
    masks: boolean; `optax.MaskedNode()` stands for leaves without a mask.
    params: the parameters; `optax.MaskedNode()` stands for other groups.
    pool: the parameters that are to have masks, with `optax.MaskedNode()` in place of the others.

  Raises:
    ValueError: if masks are missing, left over, or have other shapes.
  """
  check_boolean(masks)
  given, unmasked = trees.leaves_and_masked_nodes(masks)
  weights, other_groups = trees.leaves_and_masked_nodes(params)
  trees.check_same_shapes(
    {name: m for name, m in given.items() if not trees.lies_in(name, other_groups)},
    {name: p for name, p in weights.items() if not trees.lies_in(name, unmasked)},
    "the masks",
    "the parameters",
  )
  return trees.map_with_path(lambda path, _: given[trees.path_name(path)], pool)
