"""From a training to the weights that it was for."""

import jax
import jax.numpy as jnp

from sparsejax import masks as masks_lib
from sparsejax import state, trees
from sparsejax.trees import PyTree


def finalize(params: PyTree, opt_state: PyTree) -> PyTree:
  """Checks that weights are as sparse as the masks say, and leaves the optimizer behind.

  Args:
    params: the trained parameters.
    opt_state: the optimizer state that holds the masks.

  Returns:
    The parameters as plain arrays, in their structure.

  Raises:
    ValueError: if a weight is not zero where its mask prunes, or is NaN, or if masks and parameters
      differ in structure. It names the leaf.

  Example:
    >>> import jax.numpy as jnp, optax, sparsejax
    >>> from sparsejax import deploy
    >>> tx = optax.chain(optax.sgd(0.1), sparsejax.one_shot_pruning(0.5, at=0))
    >>> params = {"kernel": jnp.array([[3.0, 1.0], [2.0, 4.0]])}
    >>> updates, state = tx.update({"kernel": jnp.zeros((2, 2))}, tx.init(params), params)
    >>> deploy.finalize(params, state)
    Traceback (most recent call last):
    ...
    ValueError: 2 of 4 weights of 'kernel' should be pruned, but 2 of those are not zero: ...
  """
  check(params, state.get_masks(opt_state, params))
  return jax.tree.map(jnp.asarray, params)


def check(params: PyTree, masks: PyTree) -> None:
  """Raises a ValueError that names the first leaf which is not as sparse as its mask, or has NaN.

  Args:
    params: the parameters.
    masks: a full boolean tree like them.
  """
  masks_lib.check_boolean(masks)
  trees.check_same_structure(masks, params, "the masks", "the parameters")
  masks = trees.leaves_by_name(masks)
  for name, leaf in trees.leaves_by_name(params).items():
    mask = masks[name]
    pruned, left, nan = jax.device_get(
      (
        mask.size - masks_lib.count_kept(mask),
        jnp.sum(~mask & (jnp.asarray(leaf) != 0)),
        jnp.any(jnp.isnan(leaf)),
      )
    )
    if nan:
      raise ValueError(f"{trees.quoted(name)} holds NaN.")
    if left:
      raise ValueError(
        f"{pruned} of {mask.size} weights of {trees.quoted(name)} should be pruned, but {left} of"
        " those are not zero: these are not the parameters after the last update of this state, or"
        " something after the pruning has changed them. sparsejax.apply_masks prunes them."
      )
