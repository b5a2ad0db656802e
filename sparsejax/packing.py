"""Masks as one bit per weight: eight along the last axis in a byte, the first in the lowest bit.

The other axes stay as they are, and so does their sharding. A last axis whose length is no multiple
of eight is filled up with False. If it is sharded, and its parts are no whole bytes, the packed
mask is not sharded along it.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sparsejax import trees
from sparsejax.trees import PyTree

# Shifted in 32 bits: in eight, XLA's CPU backend comes to an abrupt end beside float16.
_BITS = np.arange(8, dtype=np.uint32)


def pack(masks: PyTree) -> PyTree:
  """Packs boolean masks.

  Args:
    masks: a pytree of boolean arrays.

  Returns:
    A tree of the same structure. # shape=(..., ceil(n / 8)), dtype=uint8; scalars stay boolean
  """
  return jax.tree.map(lambda mask: _pack(mask) if mask.ndim else mask, masks)


def unpack(masks: PyTree, params: PyTree) -> PyTree:
  """Boolean masks, from packed ones or from such as are boolean already.

  Args:
    masks: a tree of masks; `optax.MaskedNode()` may stand for leaves without one.
    params: a tree with the weights that they are of, and perhaps others; their shapes suffice.

  Returns:
    A tree of boolean arrays with the structure of the masks.

  Raises:
    ValueError: if there is no weight for a packed mask, or one of another shape.
  """
  if not any(map(is_packed, jax.tree.leaves(masks))):
    return masks
  weights = trees.leaves_by_name(params)

  def of_leaf(path, mask):
    if not is_packed(mask):
      return mask
    name = trees.path_name(path)
    if name not in weights:
      raise ValueError(f"the masks have {trees.quoted(name)}, but the parameters have not.")
    shape = np.shape(weights[name])
    if not shape or mask.shape != (*shape[:-1], -(-shape[-1] // 8)):
      raise ValueError(
        f"{trees.quoted(name)} has shape {shape} in the parameters, but its packed mask has"
        f" {mask.shape}, with eight weights of the last axis to a byte."
      )
    return _sharded_like(weights[name], _unpack(mask)[..., : shape[-1]])

  return trees.map_with_path(of_leaf, masks)


def is_packed(mask: jax.Array) -> bool:
  return mask.dtype == jnp.uint8


def check_is_packed(masks: PyTree, pack: bool) -> None:
  """Raises a ValueError if masks in a state are packed and should not be, or the other way."""
  if any(is_packed(mask) != pack for mask in jax.tree.leaves(masks) if np.ndim(mask)):
    raise ValueError(
      f"this state was made with pack={not pack}, but this transformation has pack={pack}: take"
      " the other, or a state that its `init` makes."
    )


def _pack(mask: jax.Array) -> jax.Array:
  mask = _in_whole_bytes(mask)
  if missing := -mask.shape[-1] % 8:
    mask = jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, missing)])
  bits = mask.reshape(*mask.shape[:-1], mask.shape[-1] // 8, 8).astype(jnp.uint32)
  return jnp.sum(bits << _BITS, axis=-1, dtype=jnp.uint8)


def _unpack(packed: jax.Array) -> jax.Array:
  bits = (packed[..., None].astype(jnp.uint32) >> _BITS) & 1
  return bits.reshape(*packed.shape[:-1], 8 * packed.shape[-1]) != 0


def _in_whole_bytes(mask: jax.Array) -> jax.Array:
  """The mask, not sharded along its last axis where, by explicit axes, its parts are no bytes."""
  sharding = jax.typeof(mask).sharding
  axes = sharding.spec[-1]
  if axes is None:
    return mask
  parts = math.prod(sharding.mesh.shape[axis] for axis in np.atleast_1d(axes))
  if mask.shape[-1] % (8 * parts) == 0:
    return mask
  spec = PartitionSpec(*sharding.spec[:-1], None)
  return jax.sharding.reshard(mask, NamedSharding(sharding.mesh, spec))


def _sharded_like(leaf: jax.Array | jax.ShapeDtypeStruct, mask: jax.Array) -> jax.Array:
  """The mask, by explicit axes sharded like its weight, if that has a sharding."""
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return mask
  sharding = jax.typeof(leaf).sharding
  is_alike = jax.typeof(mask).sharding.spec == sharding.spec
  return mask if is_alike else jax.sharding.reshard(mask, sharding)
