"""Dynamic sparse training: weights are dropped and others grow, at constant or falling density.

These transformations wrap the optimizer, since what grows is chosen by the dense gradient or by the
momentum. Training may start sparse; the parameters that it starts from are then to be masked:

>>> def start(optimizer, params):
...   state = optimizer.init(params)
...   return sparsejax.apply_masks(params, sparsejax.get_masks(state, params)), state
"""

import numbers
from typing import get_args

import jax
import jax.numpy as jnp
import optax

from sparsejax import allocation as allocation_lib
from sparsejax import arguments, counts, criteria, patterns, rules, sparsities, start, transform
from sparsejax.allocation import Allocation
from sparsejax.arguments import OneOf
from sparsejax.criteria import Criterion, Score
from sparsejax.masks import Prunable, is_kernel
from sparsejax.patterns import SINGLE, Pattern
from sparsejax.rules import Rounding
from sparsejax.transform import Moments
from sparsejax.trees import PyTree


def dynamic_sparse_training(
  inner: optax.GradientTransformation,
  *,
  sparsity: float | jax.Array | OneOf | PyTree | None = None,
  drop: str | Score | Criterion = criteria.magnitude,
  grow: str | Score | Criterion = criteria.gradient,
  fraction: float | optax.Schedule,
  every: int,
  begin: int = 0,
  end: int | None = None,
  allocation: Allocation = "erk",
  masks: PyTree | None = None,
  ramp: optax.Schedule | None = None,
  initial: float = 0.0,
  ramp_allocation: Allocation = "global",
  after_step: bool = False,
  skip_step: bool = False,
  moments: Moments = "masked",
  drop_globally: bool = False,
  redistribute: Score | None = None,
  exact_growth: bool = True,
  rounding: Rounding = "nearest",
  pattern: Pattern = SINGLE,
  pack: bool = False,
  prunable: Prunable = is_kernel,
  key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Trains sparse from the start, and moves weights to where they matter more.

  The updates that come in are the gradients, of all weights: those of inactive ones say where to
  grow, at no extra cost. (A loss that applies masks itself would hide them.)

  Masks change at the calls :math:`c = b, b + \Delta, b + 2 \Delta, \dots`, where :math:`b` is
  `begin` and :math:`\Delta` is `every`, up to `end`, and a last time at `end` itself. Then, in each
  layer with a active weights, the :math:`k = \mathrm{round}(f a)` of lowest drop score are dropped,
  where f is `fraction` (see `rounding`), and exactly k inactive ones of highest growth score grow,
  those just dropped included. What is dropped and grows again at once goes on with its value;
  everything else that grows starts at zero.

  With a `ramp` the network also becomes sparser: before weights are dropped, those of lowest drop
  score are pruned so that the overall sparsity is :math:`s_0 + (s - s_0) r(c)`, with :math:`s_0` =
  `initial` and :math:`s` = `sparsity`. Where the ramp r has come to 1, that is exactly the final
  sparsity. What is pruned may grow at once, but starts at zero.

  Args:
    inner: the whole optimizer, with learning rate and weight decay; nothing may follow the wrapper.
    sparsity: the sparsity in [0, 1): a float, a traced scalar, a `sparsejax.OneOf`, or a tree like
      the parameters, one for each prunable leaf, which replaces the allocation. None to take that
      of the `masks`.
    drop: the score of active weights, lowest dropped: a name, a function of a
      `sparsejax.criteria.Leaf`, or a `sparsejax.criteria.Criterion`.
    grow: the score of inactive weights, highest grown; likewise.
    fraction: of the active weights of each layer, how much is dropped and grown; or a schedule of
      it, from the number of the call. For the float32 value the count is exact.
    every: calls from one change of the masks to the next.
    begin: the call at which the masks change first.
    end: the call at which they change last. Without it they go on changing.
    allocation: how the sparsity at the start is shared out among layers: "uniform", "er", "erk", or
      a function, see `sparsejax.allocation`; the active weights in each are drawn at random. With
      "global", those of largest magnitude are active.
    masks: the masks to start with instead, a full boolean tree, such as
      `sparsejax.masks_from_scores` makes. Without a ramp, the sparsity has to be None then.
    ramp: a schedule from 0 to 1, from the number of the call. Nothing returns where it falls. Its
      last value needs a change of the masks at or after it, such as that at `end`.
    initial: the sparsity at the start of the ramp. Without a ramp training starts at `sparsity`.
    ramp_allocation: how the sparsity of the ramp is shared out, as in
      `sparsejax.gradual_pruning`.
    after_step: whether masks change by the weights that the inner optimizer's step leaves, not by
      those before it. Calls count from 1 then, so that with `begin` 0 masks change first at call
      `every`; and what grows takes its first step at the next one.
    skip_step: whether the inner optimizer makes no step when masks change.
    moments: "masked", "reset" or "kept": what happens to the inner optimizer's moments of weights
      that are dropped or grow, see `sparsejax.masked_updates`. Growth by momentum needs "kept".
    drop_globally: whether the active weights of all layers compete, and not those of each. In each
      layer as many grow as were dropped there.
    redistribute: from the context of a leaf to a number in proportion to which its layer gets its
      share of all that grows, such as `sparsejax.criteria.mean_momentum`.
    exact_growth: whether exactly k weights grow. If not, each candidate grows by itself, with the
      probability that gives k on average; only for random growth. The sparsity drifts then.
    rounding: of k: "nearest", "up" or "down".
    pattern: what is pruned together, and what has to stay; see `sparsejax.patterns`.
    pack: whether the state holds masks as one bit per weight, see `sparsejax.masked_updates`.
    prunable: `prunable(path, leaf) -> bool` says which leaves are sparse.
    key: a random key, for masks drawn at random and for random criteria; it lives in the state.

  Returns:
    An `optax.GradientTransformationExtraArgs`; see `sparsejax.masked_updates`.

  Raises:
    ValueError: if an argument is out of its range, or contradicts another one; by `init`, if a tree
      of sparsities or masks does not match the parameters; by `update`, if what a criterion needs
      is missing.

  Example:
    >>> import jax, jax.numpy as jnp, optax, sparsejax
    >>> tx = sparsejax.dynamic_sparse_training(
    ...     optax.sgd(0.1, momentum=0.9),
    ...     sparsity=0.5,
    ...     fraction=optax.cosine_decay_schedule(0.3, 1000),
    ...     every=10,
    ...     key=jax.random.key(0),
    ... )
    >>> params = {"kernel": jax.random.normal(jax.random.key(1), (8, 5))}
    >>> state = tx.init(params)
    >>> params = sparsejax.apply_masks(params, sparsejax.get_masks(state, params))
    >>> updates, state = tx.update(params, state, params)
    >>> print(int((optax.apply_updates(params, updates)["kernel"] != 0).sum()))
    20

  References:
    Nowak et al., `Fantastic Weights and How to Find Them: Where to Prune in Dynamic Sparse Training
    <https://arxiv.org/abs/2306.12230>`_, 2023
  """
  arguments.check_inner(inner)
  every = arguments.check_integer("every", every, at_least=1)
  begin = arguments.check_integer("begin", begin, at_least=0)
  if end is not None:
    end = arguments.check_integer("end", end, at_least=0)
    if begin > end:
      raise ValueError(f"masks would never change: first at call {begin}, but not after end={end}.")
  drop, grow = criteria.resolve(drop, "drop"), criteria.resolve(grow, "grow")
  first, sparsity = start.check_start(sparsity, masks, ramp, initial)
  criteria.check_key(key, drop, grow)
  patterns.check_is_pattern(pattern)
  criteria.check_pattern(drop, pattern, only_drops=ramp is None)
  if not exact_growth and grow is not criteria.random:
    raise ValueError('growth that is not exact is for random growth only: pass grow="random".')
  for name, function in (("ramp", ramp), ("redistribute", redistribute)):
    if function is not None:
      arguments.check_callable(name, function)
  is_global = allocation_lib.resolve(ramp_allocation) is None and sparsities.is_scalar(sparsity)
  if ramp is not None and redistribute is not None and not is_global:
    raise ValueError(
      "a ramp for each layer and `redistribute` would both decide how sparse a layer is: pass one"
      ' sparsity and ramp_allocation="global".'
    )
  if pattern.regrows_in_groups and redistribute is not None:
    raise ValueError(f"with {pattern} what is dropped in a group grows there: no `redistribute`.")
  if pattern != SINGLE and not exact_growth:
    raise ValueError(f"exact_growth=False is for single weights, which {pattern} does not allow.")
  if rounding not in get_args(Rounding):
    raise ValueError(f"rounding must be one of {get_args(Rounding)}, got {rounding!r}.")
  stages = [
    rules.drop_and_grow(
      drop,
      grow,
      _schedule(fraction),
      pattern=pattern,
      rounding=rounding,
      drop_globally=drop_globally,
      redistribute=redistribute,
      exact_growth=exact_growth,
      grows_by_moments=moments == "kept",
    )
  ]
  if ramp is not None:
    goal = _ramped(sparsity, initial, ramp)
    stages.insert(0, rules.prune_lowest(goal, ramp_allocation, drop, pattern=pattern))
  return transform.masked_updates(
    rules.from_criteria(*stages, drop=drop, grow=grow),
    due=rules.on_grid(begin, every, end),
    inner=inner,
    after_step=after_step,
    skip_step=skip_step,
    moments=moments,
    initial_masks=start.initial_masks(
      first,
      masks,
      allocation,
      key,
      pattern=pattern,
      final=sparsity,
      final_allocation=allocation if ramp is None else ramp_allocation,
    ),
    pack=pack,
    prunable=prunable,
    key=key,
  )


def _ramped(sparsity: PyTree, initial: float, ramp: optax.Schedule) -> rules.Goal:
  """How many weights are pruned along a ramp, exactly the final number at its end."""

  def goal(count, pool, count_pruned):
    final, way = sparsities.for_leaves(sparsity, pool), jnp.float32(ramp(count))

    def at(s):
      rise = s.pick(lambda s: s - initial) if isinstance(s, OneOf) else s - initial
      return rules.on_the_way(initial, rise, way)

    on_the_way = jax.tree.map(at, final)
    return counts.where(
      way >= 1, counts.from_ints(count_pruned(final)), counts.from_ints(count_pruned(on_the_way))
    )

  return goal


def _schedule(fraction: float | optax.Schedule) -> optax.Schedule:
  if callable(fraction):
    return fraction
  is_number = isinstance(fraction, numbers.Real) and not isinstance(fraction, bool)
  if not is_number or not 0 <= fraction <= 1:
    raise ValueError(
      f"fraction is of the active weights and must be in [0, 1], or a schedule, got {fraction!r}."
    )
  return optax.constant_schedule(float(fraction))
