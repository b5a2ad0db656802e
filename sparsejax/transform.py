"""The transformation itself: its state, when masks change, and updates that give exact zeros."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparsejax import arguments, selection
from sparsejax import masks as masks_lib
from sparsejax.masks import Prunable, PyTree, is_kernel, is_masked_node


class MaskedUpdatesState(NamedTuple):
  """State of `masked_updates`, and so of every pruning transformation.

  Attributes:
    count: number of calls of `update` so far.  # shape=(), dtype=jnp.int32
    masks: a boolean tree with the structure of the parameters, True where a weight is active, with
      `optax.MaskedNode()` in place of leaves that are never pruned.
    key: the random key, or None.
  """

  count: jax.Array
  masks: PyTree
  key: jax.Array | None = None


class Call(NamedTuple):
  """What a rule sees of one call of `update`.

  In its trees `optax.MaskedNode()` stands for leaves that are never pruned: `jax.tree.map` over
  them meets the prunable leaves only.

  Attributes:
    count: the number of the call, from 0.  # shape=(), dtype=jnp.int32
    params: the weights, as passed to `update`.
    masks: the masks before this call.
    grad: the gradient passed as `update(..., grad=gradient)`, or None.
    key: a random key of this call's own, or None if the transformation has none.
  """

  count: jax.Array
  params: PyTree
  masks: PyTree
  grad: PyTree | None
  key: jax.Array | None


def masked_updates(
  rule: Callable[[Call], PyTree],
  *,
  due: Callable[[jax.Array], jax.Array | bool],
  keep_weights: bool = False,
  prunable: Prunable = is_kernel,
  key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Keeps weights at exactly zero under masks that a rule changes from time to time.

  In a chain of transformations, this should be the last one: what follows it would destroy the
  zeros. With weights :math:`p`, masks :math:`m` and incoming updates :math:`u` it returns

  .. math::
    u' = u \text{ where } m, \quad -p \text{ elsewhere,}

  so that `optax.apply_updates` gives :math:`p + u' = 0` exactly, whatever momentum and weight decay
  have put into the updates. (A weight that is itself infinite or NaN cannot be brought to zero by
  adding.) The updates keep their data type, or take that of the weights where it is wider.

  This is the low-level builder of the other transformations, and of your own:

  >>> import jax, jax.numpy as jnp, optax, sparsejax
  >>> def prune_a_tenth_of_each_layer(call):
  ...   scores = jax.tree.map(jnp.abs, call.params)
  ...   k = jax.tree.map(lambda m: jnp.sum(m) // 10, call.masks)
  ...   pruned = sparsejax.select_smallest(scores, k, among=call.masks)
  ...   return jax.tree.map(lambda m, p: m & ~p, call.masks, pruned)
  >>> tx = optax.chain(
  ...     optax.sgd(0.1, momentum=0.9),
  ...     sparsejax.masked_updates(prune_a_tenth_of_each_layer, due=lambda count: count % 100 == 0),
  ... )
  >>> params = {"kernel": jnp.ones((4, 5))}
  >>> updates, state = tx.update(params, tx.init(params), params)
  >>> print(f"{sparsejax.sparsity(sparsejax.get_masks(state, params)):.1%}")
  10.0%

  Args:
    rule: takes the `Call` and returns the new masks. It runs only when masks are due (under `vmap`,
      when they are in any lane), and may use anything that JAX can trace.
    due: takes the number of the call, from 0, and returns whether masks change at it.
    keep_weights: whether pruned weights keep their values, so that they can return. The updates
      then pass as they are, and the masks in the state are to be applied wherever the network
      computes: `sparsejax.apply_masks(params, sparsejax.get_masks(state, params))`.
    prunable: `prunable(path, leaf) -> bool` says which leaves are pruned, given their path as in
      `jax.tree_util.tree_map_with_path`. An attribute `value` at its end, as of a variable of Flax
      NNX, is left out.
    key: a random key, for rules that use one: of `jax.random.key`, or of `jax.random.PRNGKey` where
      the state is to be serialised by something that knows arrays of numbers only.

  Returns:
    A transformation whose state is a `MaskedUpdatesState`. Its `update` needs the parameters, and
    accepts any extra arguments.

  Raises:
    ValueError: by `init`, if there are leaves and none is prunable, or if a prunable leaf is not
      floating-point; by `update`, if it gets no parameters, or others than `init` got.
  """

  if key is not None:
    arguments.check_key(key)

  def init_fn(params):
    masks = masks_lib.all_true(masks_lib.select_prunable(params, prunable))
    check_prunable(params, masks)
    return MaskedUpdatesState(
      count=jnp.zeros([], jnp.int32), masks=masks, key=None if key is None else jnp.array(key)
    )

  def update_fn(updates, state, params=None, *, grad=None, **extra_args):
    del extra_args
    if params is None:
      raise ValueError(
        "pruning needs the weights: call update(updates, state, params) with the parameters as"
        " third argument."
      )
    weights = masks_lib.pick(state.masks, params, "the masks", "the parameters")
    masks_lib.pick(state.masks, updates, "the masks", "the updates")
    if grad is not None:
      grad = masks_lib.pick(state.masks, grad, "the masks", "the gradients")
    is_due = jnp.asarray(due(state.count), bool)

    def changed(masks, weights):
      # The key is not replaced but folded with the count: what a call draws depends on that alone.
      call_key = None if state.key is None else jax.random.fold_in(state.key, state.count)
      new = rule(Call(state.count, weights, masks, grad, call_key))
      masks_lib.pick(masks, new, "the masks", "the masks that the rule returns")
      return jax.tree.map(lambda m, n: jnp.where(is_due, n, m), masks, new)

    # Masks and weights are all that goes in: updates among the operands would be written to memory
    # at each step, for nothing.
    masks = jax.lax.cond(
      _in_any_lane(is_due),
      changed,
      lambda masks, _: masks,
      state.masks,
      # Masks have no derivative, and JAX should not look for one in the rule.
      jax.lax.stop_gradient(weights),
    )
    if not keep_weights:
      updates = jax.tree.map(
        lambda m, u, p: u if is_masked_node(m) else _where(m, u, -p),
        masks,
        updates,
        params,
        is_leaf=is_masked_node,
      )
    return updates, MaskedUpdatesState(optax.safe_increment(state.count), masks, state.key)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def get_masks(opt_state: PyTree, params: PyTree) -> PyTree:
  """Finds the masks in an optimizer state.

  Args:
    opt_state: any optimizer state that contains that of a pruning transformation, however deep.
    params: the parameters that the optimizer was initialised with (their shapes suffice); with
      Flax NNX, `nnx.state(model, nnx.Param)`.

  Returns:
    A full boolean tree with the structure of the parameters: True where a weight is active and in
    leaves that are never pruned. The masks of several transformations are and-ed.

  Raises:
    ValueError: if there are no masks in the state, or none that fit the parameters.

  Example:
    >>> import jax.numpy as jnp, optax, sparsejax
    >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    >>> tx = optax.chain(optax.adam(1e-3), sparsejax.one_shot_pruning(0.5, at=10))
    >>> sparsejax.get_masks(tx.init(params), params)["bias"]
    Array([ True,  True], dtype=bool)
  """
  states = [leaf for leaf in jax.tree.leaves(opt_state, is_leaf=_is_state) if _is_state(leaf)]
  if not states:
    raise ValueError(
      "there are no masks in this optimizer state: chain a transformation of sparsejax, such as"
      " progressive_pruning, after the optimizer."
    )
  found = {}
  for state in states:
    for path, mask in jax.tree_util.tree_leaves_with_path(state.masks):
      found.setdefault(masks_lib.strip_value(path), []).append(mask)

  def full_mask(path, leaf):
    mask = jnp.ones_like(leaf, dtype=bool)
    for other in found.get(masks_lib.strip_value(path), ()):
      mask &= other
    return mask

  shapes = masks_lib.leaves_by_name(params)
  for path, masks in found.items():
    name = masks_lib.path_name(path)
    for mask in masks:
      masks_lib.check_same_shapes(
        {name: mask},
        {name: shapes[name]} if name in shapes else {},
        "the masks",
        "the parameters",
      )

  full = jax.tree_util.tree_map_with_path(full_mask, params)
  return full


def static_args(transformation: Callable[..., Any]) -> tuple[str, ...]:
  """The arguments that `optax.inject_hyperparams` has to leave alone: all but the sparsity.

  Args:
    transformation: a function that takes a `sparsity`, such as `sparsejax.progressive_pruning`.

  Returns:
    The names of its other arguments.

  Example:
    >>> import jax.numpy as jnp, optax, sparsejax
    >>> pruning = sparsejax.one_shot_pruning
    >>> tx = optax.inject_hyperparams(pruning, sparsejax.static_args(pruning))(0.5, at=10)
    >>> state = tx.init({"kernel": jnp.ones((2, 2))})
    >>> print(state.hyperparams["sparsity"])
    0.5
  """
  return tuple(name for name in inspect.signature(transformation).parameters if name != "sparsity")


def check_prunable(params: PyTree, masks: PyTree) -> None:
  """Raises a ValueError if nothing can be pruned, or something that the masks are of cannot."""
  names = [masks_lib.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  if names and not jax.tree.leaves(masks):
    raise ValueError(
      f"there is nothing to prune: `prunable` is False for each of {', '.join(names[:5])}"
      f"{', ...' if len(names) > 5 else ''}."
    )
  pool = masks_lib.pick(masks, params, "the masks", "the parameters")
  for path, p in jax.tree_util.tree_leaves_with_path(pool):
    name = masks_lib.path_name(path)
    if p.dtype not in selection.FLOATS:
      raise ValueError(
        f"{name!r} has dtype {p.dtype}, but only floating-point weights can be pruned: exclude it"
        " by `prunable`."
      )
    if p.size >= 2**32:
      raise ValueError(
        f"{name!r} has {p.size} weights, but a leaf must have fewer than 2**32: split it."
      )


def _is_state(x: Any) -> bool:
  return isinstance(x, MaskedUpdatesState)


def _where(mask: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
  # XLA's CPU backend selects by bytes nearly twice as fast as by booleans.
  return jnp.where(mask.astype(jnp.uint8) != 0, x, y)


@jax.custom_batching.custom_vmap
def _in_any_lane(predicate: jax.Array) -> jax.Array:
  """The predicate; under vmap, whether it holds in any lane.

  A `lax.cond` on a batched predicate becomes a select, and each lane would pay for the rule at each
  step. On this one it stays a `lax.cond`.
  """
  return predicate


@_in_any_lane.def_vmap
def _(axis_size, in_batched, predicate):
  del axis_size
  # Called again, so that the vmap around this one reduces its lanes too.
  return _in_any_lane(jnp.any(predicate, axis=0) if in_batched[0] else predicate), False
