"""From dense to sparse during training. What is pruned stays pruned, unless weights are kept."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax import allocation as allocation_lib
from sparsejax import arguments, criteria, patterns, rules, sparsities, transform, trees
from sparsejax import masks as masks_lib
from sparsejax.allocation import Allocation
from sparsejax.arguments import OneOf
from sparsejax.criteria import Criterion, Score
from sparsejax.masks import Prunable, is_kernel
from sparsejax.patterns import SINGLE, Pattern
from sparsejax.trees import PyTree


def progressive_pruning(
  sparsity: float | jax.Array | OneOf | PyTree,
  *,
  steps: int,
  every: int,
  begin: int = 0,
  initial: float = 0.0,
  allocation: Allocation = "global",
  criterion: str | Score | Criterion = criteria.magnitude,
  pattern: Pattern = SINGLE,
  pack: bool = False,
  prunable: Prunable = is_kernel,
  key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Progressive magnitude-based pruning: a linear ramp of sparsity in one cycle of training.

  In a chain of transformations, this should be the last one.

  Masks change at the calls :math:`c = b, b + \Delta, b + 2 \Delta, \dots < b + T`, where
  :math:`b` is `begin`, :math:`\Delta` is `every` and :math:`T` is `steps`. The call at c brings the
  overall sparsity to

  .. math::
    s_0 + (s - s_0) \frac{\min(c + \Delta - b, T)}{T}

  by pruning the active weights of lowest score, by default of smallest magnitude, as many as it
  takes. With one change an epoch, epoch e of E trains at :math:`s_0 + (s - s_0)(e + 1)/E`, as
  published. The number of pruned weights is exactly :math:`N - \mathrm{round}((1 - s) N)`, of all
  or, if the allocation is not global, of each leaf with its share: computed in float64 from Python
  floats, or exactly for the float32 value of a traced sparsity.

  Args:
    sparsity: the final sparsity, in [0, 1): a float, a traced scalar, a `sparsejax.OneOf`, or a
      tree like the parameters of final sparsities, one for each prunable leaf, that replace the
      allocation; each ramps from `initial` to its own. The other leaves of that tree may be None,
      0, or left out.
    steps: length of the ramp, in calls of `update`.
    every: calls from one change of the masks to the next.
    begin: the call at which the masks change first.
    initial: the sparsity at which the ramp starts.
    allocation: how the overall sparsity is shared out among layers: "global", "uniform", "er",
      "erk", or a function; see `sparsejax.allocation`.
    criterion: the score of each weight, lowest pruned: a name, a function of a
      `sparsejax.criteria.Leaf`, or a `sparsejax.criteria.Criterion`.
    pattern: what is pruned together, and what has to stay; see `sparsejax.patterns`.
    pack: whether the state holds masks as one bit per weight, see `sparsejax.masked_updates`.
    prunable: `prunable(path, leaf) -> bool` says which leaves are pruned.
    key: a random key, for criteria that use one.

  Returns:
    An `optax.GradientTransformationExtraArgs`; see `sparsejax.masked_updates`.

  Raises:
    ValueError: if an argument is out of its range; by `init`, if a tree of sparsities does not
      match the parameters, or if one of them is below `initial`.

  Example:
    >>> import jax.numpy as jnp, optax, sparsejax
    >>> tx = optax.chain(optax.sgd(0.1), sparsejax.progressive_pruning(0.8, steps=4, every=1))
    >>> params = {"kernel": jnp.arange(1., 11.).reshape(2, 5)}
    >>> state = tx.init(params)
    >>> for _ in range(4):
    ...   updates, state = tx.update({"kernel": jnp.zeros((2, 5))}, state, params)
    ...   params = optax.apply_updates(params, updates)
    ...   print(int((params["kernel"] == 0).sum()))
    2
    4
    6
    8

  References:
    Qureshi et al., `Finding Sparse Subnetworks in One Training Cycle via Progressive
    Magnitude-Based Pruning <https://arxiv.org/abs/2606.12278>`_, 2026
  """
  steps = arguments.check_integer("steps", steps, at_least=1)
  every = arguments.check_integer("every", every, at_least=1)
  begin = arguments.check_integer("begin", begin, at_least=0)
  initial = arguments.check_sparsity("initial", initial)
  if not isinstance(initial, float):
    raise ValueError(f"initial must be a Python number, got {initial!r}.")
  sparsity = arguments.check_sparsity("sparsity", sparsity, may_be_chosen=True)
  arguments.check_rise(initial, sparsity)
  ramped = [min(c + every, steps) for c in range(0, steps, every)]

  def due(count):
    return (count >= begin) & (count - begin < steps) & ((count - begin) % every == 0)

  def goal(count, pool, count_pruned):
    update = (count - begin) // every

    def at(final, done):
      # What lands on the final sparsity is that number itself, not a rounding error beside it.
      return final if done == steps else initial + (final - initial) * done / steps

    def now(final):
      if isinstance(final, float):
        final = OneOf((final,), 0)
      if isinstance(final, OneOf):
        # One of all sparsities along all ramps.
        values = tuple(at(value, done) for value in final.values for done in ramped)
        return OneOf(values, jnp.int32(final.index) * len(ramped) + update)
      part = jnp.asarray(np.array(ramped) / steps, jnp.float32)[update]
      return jnp.where(part >= 1, final, rules.on_the_way(initial, final - initial, part))

    return count_pruned(jax.tree.map(now, sparsities.for_leaves(sparsity, pool)))

  return _prune_lowest(
    goal,
    due=due,
    initial=initial,
    sparsity=sparsity,
    allocation=allocation,
    criterion=criterion,
    pattern=pattern,
    pack=pack,
    prunable=prunable,
    key=key,
  )


def gradual_pruning(
  schedule: optax.Schedule,
  *,
  every: int,
  begin: int = 0,
  end: int | None = None,
  keep_weights: bool = False,
  allocation: Allocation = "global",
  criterion: str | Score | Criterion = criteria.magnitude,
  pattern: Pattern = SINGLE,
  pack: bool = False,
  prunable: Prunable = is_kernel,
  key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Gradual pruning along any schedule of sparsity.

  In a chain of transformations, this should be the last one.

  Masks change at the calls :math:`c = b, b + \Delta, b + 2 \Delta, \dots`, where :math:`b` is
  `begin` and :math:`\Delta` is `every`, up to `end`, and a last time at `end` itself. The call at c
  brings the overall sparsity to `schedule(c)` by pruning the active weights of lowest score, by
  default of smallest magnitude.
  Weights that are pruned stay pruned: where the schedule falls, nothing changes. (Not so if they
  are kept, below.)

  The cubic schedule of Zhu & Gupta is `optax.polynomial_schedule(0., s, 3, steps)`. In the original
  form of their method, pruned weights keep their values and return when these rank high enough
  again. This is `keep_weights=True`, where the loss has to apply the masks:

  >>> def sparse_loss(params, state, batch):
  ...   masks = sparsejax.get_masks(state, params)
  ...   return loss(sparsejax.apply_masks(params, masks), batch)

  Args:
    schedule: takes the number of the call, from 0, and returns a sparsity in [0, 1]. It is taken as
      a float32, for which the number of pruned weights is exact. It is not checked: below 0 it
      prunes nothing, above 1 everything.
    every: calls from one change of the masks to the next.
    begin: the call at which the masks change first.
    end: the call at which they change last. Without it they go on changing. A schedule that is to
      be followed to its last value needs a change at or after that: with n calls, the last one is
      number n - 1.
    keep_weights: whether updates pass unchanged, so that pruned weights keep their values, and
      masks are chosen among all weights at each change. They are to be applied in the loss, which
      keeps the gradient of pruned weights at zero, and to the weights that training leaves.
    allocation: how the overall sparsity is shared out among layers: "global", "uniform", "er",
      "erk", or a function; see `sparsejax.allocation`.
    criterion: the score of each weight, lowest pruned: a name, a function of a
      `sparsejax.criteria.Leaf`, or a `sparsejax.criteria.Criterion`.
    pattern: what is pruned together, and what has to stay; see `sparsejax.patterns`.
    pack: whether the state holds masks as one bit per weight, see `sparsejax.masked_updates`.
    prunable: `prunable(path, leaf) -> bool` says which leaves are pruned.
    key: a random key, for criteria that use one.

  Returns:
    An `optax.GradientTransformationExtraArgs`; see `sparsejax.masked_updates`.

  Raises:
    ValueError: if an argument is out of its range.

  Example:
    >>> import jax.numpy as jnp, optax, sparsejax
    >>> cubic = optax.polynomial_schedule(0., 0.8, power=3, transition_steps=4)
    >>> tx = sparsejax.gradual_pruning(cubic, every=1, end=4)
    >>> params = {"kernel": jnp.arange(1., 11.).reshape(2, 5)}
    >>> state = tx.init(params)
    >>> for _ in range(5):
    ...   updates, state = tx.update({"kernel": jnp.zeros((2, 5))}, state, params)
    ...   params = optax.apply_updates(params, updates)
    ...   print(int((params["kernel"] == 0).sum()))
    0
    5
    7
    8
    8

  References:
    Zhu and Gupta, `To prune, or not to prune: exploring the efficacy of pruning for model
    compression <https://arxiv.org/abs/1710.01878>`_, 2017
  """
  if not callable(schedule):
    raise ValueError(
      f"schedule must be a function of the number of the call, got {schedule!r}: for a constant,"
      " use optax.constant_schedule."
    )
  every = arguments.check_integer("every", every, at_least=1)
  begin = arguments.check_integer("begin", begin, at_least=0)
  if end is not None:
    end = arguments.check_integer("end", end, at_least=0)
    if begin >= end:
      raise ValueError(f"begin must be less than end, got begin={begin} and end={end}.")

  def sparsity_at(count):
    value = jnp.asarray(schedule(count))
    if value.ndim != 0 or jnp.issubdtype(value.dtype, jnp.complexfloating):
      raise ValueError(f"schedule must return one real number, got {value}.")
    return value

  return _prune_lowest(
    lambda count, pool, count_pruned: count_pruned(sparsity_at(count)),
    due=rules.on_grid(begin, every, end),
    sparsity=0.0,
    keep_weights=keep_weights,
    allocation=allocation,
    criterion=criterion,
    pattern=pattern,
    pack=pack,
    prunable=prunable,
    key=key,
  )


def one_shot_pruning(
  sparsity: float | jax.Array | OneOf | PyTree,
  *,
  at: int,
  allocation: Allocation = "global",
  criterion: str | Score | Criterion = criteria.magnitude,
  pattern: Pattern = SINGLE,
  pack: bool = False,
  prunable: Prunable = is_kernel,
  key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Prunes once, at one call, and keeps the masks from then on.

  In a chain of transformations, this should be the last one.

  Args:
    sparsity: as in `sparsejax.progressive_pruning`.
    at: the number of the call of `update`, from 0.
    allocation: how the overall sparsity is shared out among layers: "global", "uniform", "er",
      "erk", or a function; see `sparsejax.allocation`.
    criterion: the score of each weight, lowest pruned: a name, a function of a
      `sparsejax.criteria.Leaf`, or a `sparsejax.criteria.Criterion`.
    pattern: what is pruned together, and what has to stay; see `sparsejax.patterns`.
    pack: whether the state holds masks as one bit per weight, see `sparsejax.masked_updates`.
    prunable: `prunable(path, leaf) -> bool` says which leaves are pruned.
    key: a random key, for criteria that use one.

  Returns:
    An `optax.GradientTransformationExtraArgs`; see `sparsejax.masked_updates`.

  Raises:
    ValueError: if an argument is out of its range; by `init`, if a tree of sparsities does not
      match the parameters.

  Example:
    >>> import jax.numpy as jnp, optax, sparsejax
    >>> tx = optax.chain(optax.sgd(0.1), sparsejax.one_shot_pruning(0.5, at=0))
    >>> params = {"kernel": jnp.array([[3., 1.], [2., 4.]])}
    >>> updates, state = tx.update({"kernel": jnp.zeros((2, 2))}, tx.init(params), params)
    >>> print(optax.apply_updates(params, updates)["kernel"])
    [[3. 0.]
     [0. 4.]]
  """
  at = arguments.check_integer("at", at, at_least=0)
  return progressive_pruning(
    sparsity,
    steps=1,
    every=1,
    begin=at,
    allocation=allocation,
    criterion=criterion,
    pattern=pattern,
    pack=pack,
    prunable=prunable,
    key=key,
  )


def _prune_lowest(
  goal: rules.Goal,
  *,
  due: Callable[[jax.Array], jax.Array],
  sparsity: PyTree,
  allocation: Allocation,
  criterion: str | Score | Criterion,
  pattern: Pattern,
  pack: bool,
  prunable: Prunable,
  key: jax.Array | None,
  initial: float = 0.0,
  keep_weights: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """The transformation whose rule is `rules.prune_lowest`; `init` checks the sparsities."""
  allocation_lib.resolve(allocation)
  criterion = criteria.resolve(criterion)
  criteria.check_key(key, criterion)
  patterns.check_is_pattern(pattern)
  criteria.check_pattern(criterion, pattern, only_drops=False)
  rule = rules.from_criteria(
    rules.prune_lowest(goal, allocation, criterion, pattern=pattern, revive=keep_weights),
    drop=criterion,
  )
  pruning = transform.masked_updates(
    rule, due=due, keep_weights=keep_weights, pack=pack, prunable=prunable, key=key
  )

  def init_fn(params):
    state = pruning.init(params)
    if jax.tree.leaves(params):
      pool = masks_lib.select_prunable(params, prunable)
      allocation_lib.check_pool(sparsity, params, pool, allocation, pattern)
      if not sparsities.is_scalar(sparsity):
        names = trees.leaves_by_name(pool)
        for name, value in zip(names, sparsities.for_leaves(sparsity, pool)):
          arguments.check_rise(initial, value, f"the sparsity of {trees.quoted(name)}")
    return state

  return optax.GradientTransformationExtraArgs(init_fn, pruning.update)
