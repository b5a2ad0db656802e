"""The transformation itself: when masks change, and updates that give exact zeros."""

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from sparsejax import arguments, packing, trees
from sparsejax import masks as masks_lib
from sparsejax.lanes import in_any_lane
from sparsejax.masks import Prunable, is_kernel, where
from sparsejax.moments import map_moments
from sparsejax.state import MaskedUpdatesState
from sparsejax.trees import PyTree, is_masked_node

Moments = Literal["masked", "reset", "kept"]


class Call(NamedTuple):
  """What a rule sees of one call of `update`.

  In its trees `optax.MaskedNode()` stands for leaves that are never pruned: `jax.tree.map` over
  them meets the prunable leaves only.

  Attributes:
    count: the number of the call, from 0; from 1 if masks change after the step, so that it is the
      number of steps that the weights have taken.  # shape=(), dtype=jnp.int32
    params: the weights, as passed to `update`, or as the step leaves them.
    masks: the masks before this call.
    grad: the gradient, or None: what is passed as `update(..., grad=gradient)`, or else the updates
      that an inner optimizer gets.
    key: a random key of this call's own, or None if the transformation has none.
    inner: the state of the inner optimizer, before or after the step as the weights are, or None.
    statistics: those of the rule, this call's included.
    unmasked: the weights with those that earlier stages of the rule have pruned in this call, which
      are zero in `params`: what looks at active weights alone needs no copy with the zeros.
  """

  count: jax.Array
  params: PyTree
  masks: PyTree
  grad: PyTree | None
  key: jax.Array | None
  inner: PyTree = None
  statistics: PyTree = None
  unmasked: PyTree = None


class Rule(NamedTuple):
  """How masks change, for a rule of several stages, or one that keeps statistics.

  Attributes:
    stages: functions that take a `Call` and return new masks. Each sees the masks and weights that
      the one before leaves: what is pruned in one and grows in a later one starts at zero.
    init: takes the weights and returns the statistics to start with.
    observe: takes a `Call` and returns new statistics, at every call, before any change.
    forget: takes a `Call` and returns the statistics to go on with after a change.
  """

  stages: tuple[Callable[[Call], PyTree], ...]
  init: Callable[[PyTree], PyTree] = lambda params: None
  observe: Callable[[Call], PyTree] = lambda call: call.statistics
  forget: Callable[[Call], PyTree] = lambda call: call.statistics


def masked_updates(
  rule: Callable[[Call], PyTree] | Rule,
  *,
  due: Callable[[jax.Array], jax.Array | bool],
  inner: optax.GradientTransformation | None = None,
  after_step: bool = False,
  skip_step: bool = False,
  moments: Moments = "masked",
  initial_masks: Callable[[PyTree, PyTree], PyTree] | None = None,
  keep_weights: bool = False,
  pack: bool = False,
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

  A rule that needs the dense gradient, or that lets weights grow again, wraps the optimizer instead
  of following it: `masked_updates(rule, inner=optax.sgd(0.1, momentum=0.9), due=...)`. The updates
  that come in are the gradients then, and what grows starts at zero.

  Args:
    rule: takes the `Call` and returns the new masks, or is a `Rule`. It runs only when masks are
      due (under `vmap`, when they are in any lane), and may use anything that JAX can trace.
    due: takes the number of the call, from 0, and returns whether masks change at it. One that
      always returns False makes a link that keeps the masks in the state of any other one: for
      loops of steps at which none are due, since XLA drops the conditional then.
    inner: the optimizer to wrap.
    after_step: whether masks change by the weights that the inner optimizer's step leaves, not by
      those before it. Calls count from 1 then, and what grows takes its first step at the next one.
    skip_step: whether the inner optimizer makes no step when masks change.
    moments: what happens to those of the inner optimizer: all floating-point arrays of its state
      that lie in a tree like the parameters and have a weight's shape.

      - "masked": wherever a weight is not active, the inner optimizer finds them as they were at
        first (zero, for most optimizers), and gets zero for the gradient.
      - "reset": it gets zero for that gradient too, and moments of dropped weights fade as it lets
        them; they are as at first when the weight grows again.
      - "kept": it gets all gradients, so that weights grow with the momentum that they would have.

      Adam's count of steps is one for all weights, so that weights which grow late with fresh
      moments take large first steps.
    initial_masks: takes the parameters, and the same with `optax.MaskedNode()` for leaves that are
      not prunable, and returns masks like the latter. By default all weights are active. The
      parameters are to be masked too before training, or else the first gradient is that of the
      dense network: `params = sparsejax.apply_masks(params, sparsejax.get_masks(state, params))`.
    keep_weights: whether pruned weights keep their values, so that they can return. The updates
      then pass as they are, and the masks in the state are to be applied wherever the network
      computes: `sparsejax.apply_masks(params, sparsejax.get_masks(state, params))`. Not with an
      inner optimizer.
    pack: whether the state holds masks as one bit per weight, packed along the last axis, and not
      as one byte. Results are the same bit for bit, and a step takes as long. Where the last axis
      is sharded, its parts should be multiples of eight long.
    prunable: `prunable(path, leaf) -> bool` says which leaves are pruned, given their path as in
      `jax.tree_util.tree_map_with_path`, but that of a variable of Flax NNX without the final
      `value`.
    key: a random key, for rules that use one: of `jax.random.key`, or of `jax.random.PRNGKey` where
      the state is to be serialised by something that knows arrays of numbers only.

  Returns:
    A transformation whose state is a `MaskedUpdatesState`. Its `update` needs the parameters, and
    accepts any extra arguments.

  Raises:
    ValueError: if arguments contradict each other; by `init`, if there are leaves and none is
      prunable, if a prunable leaf is not floating-point, or if two leaves have the same name; by
      `update`, if it gets no parameters, or others than `init` got.
  """
  if key is not None:
    arguments.check_key(key)
  _check_combination(inner, after_step, skip_step, moments, keep_weights)
  rule = rule if isinstance(rule, Rule) else Rule((rule,))
  for name, function in (("due", due), ("prunable", prunable)):
    arguments.check_callable(name, function)
  if not isinstance(rule.stages, Sequence) or not rule.stages:
    raise ValueError(
      f"the stages of a Rule must be a sequence of one function or more, got {rule.stages!r}."
    )
  for stage in rule.stages:
    arguments.check_callable("a stage of the rule", stage)
  inner = None if inner is None else optax.with_extra_args_support(inner)
  store = packing.pack if pack else lambda masks: masks

  def init_fn(params):
    pool = masks_lib.select_prunable(params, prunable)
    masks = masks_lib.all_true(pool)
    masks_lib.check_prunable(params, masks)
    if initial_masks is not None and jax.tree.leaves(params):
      # Copies, so that the state can be donated, and sharded like the parameters.
      masks = jax.tree.map(jnp.logical_and, masks, initial_masks(params, pool))
    return MaskedUpdatesState(
      count=jnp.zeros([], jnp.int32),
      masks=store(masks),
      key=None if key is None else jnp.array(key),
      inner=None if inner is None else inner.init(params),
      statistics=rule.init(pool),
    )

  def update_fn(updates, state, params=None, *, grad=None, **extra_args):
    if params is None:
      raise ValueError(
        "pruning needs the weights: call update(updates, state, params) with the parameters as"
        " third argument."
      )
    if not isinstance(state, MaskedUpdatesState):
      raise ValueError(
        "the second argument must be the optimizer state: call update(updates, state, params), got"
        f" {type(state).__name__}."
      )
    packing.check_is_packed(state.masks, pack)
    load = functools.partial(packing.unpack, params=params)
    before = load(state.masks)
    weights = trees.pick(before, params, "the masks", "the parameters")
    of_weights = trees.pick(before, updates, "the masks", "the updates")
    if grad is not None:
      gradient = trees.pick(before, grad, "the masks", "the gradients")
    else:
      gradient = None if inner is None else of_weights
    count = state.count + 1 if after_step else state.count
    is_due = jnp.asarray(due(count), bool)

    def change(weights, inner_state):
      # The key is not replaced but folded with the count: what a call draws depends on that alone.
      call_key = None if state.key is None else jax.random.fold_in(state.key, state.count)
      # Masks have no derivative, and JAX should not look for one in the rule.
      weights, grad, inner_state = jax.lax.stop_gradient((weights, gradient, inner_state))
      call = Call(count, weights, before, grad, call_key, inner_state, state.statistics)
      call = call._replace(statistics=rule.observe(call))
      found, survivors = _changed(rule.stages, call, is_due, state.masks, load, store)
      return found, survivors, _select(is_due, rule.forget(call), call.statistics)

    def step(masks, survivors, inner_state):
      seen = (lambda tree: tree) if moments == "kept" else functools.partial(_masked, masks)
      more = extra_args if grad is None else extra_args | {"grad": seen(grad)}
      return inner.update(seen(updates), inner_state, _masked(survivors, params), **more)

    inner_state = state.inner
    if after_step:
      updates, inner_state = step(before, before, inner_state)
      made = trees.pick(before, updates, "the masks", "the updates")
      weights = _masked(before, optax.apply_updates(weights, made))
    found, survivors, statistics = change(weights, inner_state)
    masks, survivors = load(found), load(survivors)
    if inner is not None and moments != "kept":
      inner_state = map_moments(
        lambda x, x0, m, s: where(s if moments == "masked" else s | ~m, x, x0),
        inner_state,
        inner.init(params),
        masks,
        survivors,
      )
    # After the step, what has grown stays at zero until the next call.
    may_move = survivors if after_step else masks
    if inner is not None and not after_step:
      nothing = jax.tree.map(jnp.zeros_like, updates), inner_state
      updates, inner_state = step(masks, survivors, inner_state)
      if skip_step:
        updates, inner_state = _select(is_due, nothing, (updates, inner_state))
      # What grows starts at zero, whatever its value was.
      updates = _map_masked(lambda s, u, p: where(s, u, u - p), survivors, updates, params)
    if not keep_weights:
      updates = _map_masked(lambda m, u, p: where(m, u, -p), may_move, updates, params)
    return updates, MaskedUpdatesState(
      optax.safe_increment(state.count), found, state.key, inner_state, statistics
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_combination(inner, after_step, skip_step, moments, keep_weights) -> None:
  """Raises a ValueError if arguments contradict each other."""
  if moments not in get_args(Moments):
    raise ValueError(f"moments must be one of {get_args(Moments)}, got {moments!r}.")
  if inner is None and (after_step or skip_step or moments != "masked"):
    raise ValueError("after_step, skip_step and moments are about an inner optimizer: pass one.")
  if inner is not None:
    arguments.check_inner(inner)
  if inner is not None and keep_weights:
    raise ValueError("keep_weights is for links after an optimizer, not with an inner one.")
  if after_step and skip_step:
    raise ValueError("a step that is skipped leaves nothing: pass after_step or skip_step.")


def _changed(
  stages: Sequence[Callable[[Call], PyTree]],
  call: Call,
  is_due: jax.Array,
  stored: PyTree,
  load: Callable[[PyTree], PyTree],
  store: Callable[[PyTree], PyTree],
) -> tuple[PyTree, PyTree]:
  """The masks after a call, and where weights have been active all the time, both as stored.

  Args:
    stages: of the rule.
    call: with the masks before.
    is_due: whether masks change.
    stored: the masks before as the state has them.
    load: from such masks to boolean ones.
    store: the other way.
  """

  def changed():
    now = call._replace(masks=load(stored), unmasked=call.params)
    found = []
    for stage in stages:
      masks = stage(now)
      trees.pick(now.masks, masks, "the masks", "the masks that the rule returns")
      masks_lib.check_boolean(masks)
      masks = jax.tree.map(lambda m, before: jnp.where(is_due, m, before), masks, now.masks)
      now = now._replace(masks=masks, params=_masked(masks, now.params))
      found.append(store(masks))
    return found

  unchanged = [stored] * len(stages)
  if isinstance(is_due, jax.core.Tracer):
    # What the rule looks at is all that goes in: updates among the operands, or masks that are
    # unpacked, would be written to memory at each step, for nothing.
    found = jax.lax.cond(in_any_lane(is_due), changed, lambda: unchanged)
  else:  # Outside of `jax.jit`, the conditional would be compiled at each call.
    found = changed() if is_due else unchanged
  survivors = jax.tree.map(lambda *each: functools.reduce(jnp.bitwise_and, each), stored, *found)
  return found[-1], survivors


def _masked(masks: PyTree, tree: PyTree) -> PyTree:
  """The tree, zero where a mask is False."""
  return _map_masked(lambda m, x: _zero_unless(x, m), masks, tree)


def _map_masked(function: Callable[..., jax.Array], masks: PyTree, tree: PyTree, *trees: PyTree):
  """The tree, changed where there is a mask; the function takes that before the leaves."""
  return jax.tree.map(
    lambda m, x, *xs: x if is_masked_node(m) else function(m, x, *xs),
    masks,
    tree,
    *trees,
    is_leaf=is_masked_node,
  )


def _zero_unless(x: jax.Array, mask: jax.Array) -> jax.Array:
  return where(mask, x, jnp.zeros_like(x))


def _select(condition: jax.Array, tree: PyTree, other: PyTree) -> PyTree:
  """One of two trees."""
  return jax.tree.map(lambda x, y: jnp.where(condition, x, y), tree, other)
