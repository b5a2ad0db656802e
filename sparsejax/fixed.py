"""Masks that never change."""

import functools

import jax.numpy as jnp
import optax

from sparsejax import masks as masks_lib
from sparsejax import start, transform, trees
from sparsejax.trees import PyTree


def fixed_masks(masks: PyTree, *, pack: bool = False) -> optax.GradientTransformationExtraArgs:
  """Keeps weights at zero under masks that never change.

  In a chain of transformations, this should be the last one.

  Args:
    masks: a boolean tree with the leaves of the parameters, True where a weight is active, such as
      `sparsejax.masks_from_scores` makes; `optax.MaskedNode()` stands for leaves without a mask.
    pack: whether the state holds masks as one bit per weight, see `sparsejax.masked_updates`.

  Returns:
    An `optax.GradientTransformationExtraArgs`; see `sparsejax.masked_updates`. The first update
    brings the pruned weights to zero.

  Raises:
    ValueError: if a mask is not boolean; by `init`, if the masks do not match the parameters, or
      prune one that is not floating-point.

  Example:
    >>> import jax.numpy as jnp, optax, sparsejax
    >>> params = {"kernel": jnp.array([[3., 1.], [2., 4.]])}
    >>> masks = sparsejax.masks_from_scores(params, 0.75)
    >>> tx = optax.chain(optax.sgd(0.1), sparsejax.fixed_masks(masks))
    >>> updates, state = tx.update({"kernel": jnp.zeros((2, 2))}, tx.init(params), params)
    >>> print(optax.apply_updates(params, updates)["kernel"])
    [[0. 0.]
     [0. 4.]]
  """
  masks_lib.check_boolean(masks)
  _, unmasked = trees.leaves_and_masked_nodes(masks)

  def is_masked(path, leaf):
    is_float = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    return is_float and not trees.lies_in(trees.path_name(path), unmasked)

  return transform.masked_updates(
    lambda call: call.masks,
    due=lambda count: False,
    initial_masks=functools.partial(start.given_masks, masks),
    pack=pack,
    prunable=is_masked,
  )
