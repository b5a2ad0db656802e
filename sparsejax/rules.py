"""Rules: when masks change, and how."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax import allocation as allocation_lib
from sparsejax import counts, criteria, ordinals, selection, trees
from sparsejax import masks as masks_lib
from sparsejax.allocation import Allocation
from sparsejax.counts import Count
from sparsejax.criteria import Criterion, Leaf, Score
from sparsejax.moments import find_moments
from sparsejax.patterns import SINGLE, Pattern
from sparsejax.transform import Call, Rule
from sparsejax.trees import PyTree

# Takes the number of the call, the tree of prunable weights, and a function from a sparsity to a
# number of weights; returns how many weights are to be pruned in all.
Goal = Callable[[jax.Array, PyTree, Callable[[Any], Any]], Any]
Stage = Callable[[Call], PyTree]
Rounding = Literal["nearest", "up", "down"]


def on_grid(begin: int, every: int, end: int | None) -> Callable[[jax.Array], jax.Array]:
  """When masks change: from `begin` on, each time after `every` calls, and a last time at `end`."""

  def due(count):
    on_grid = (count >= begin) & ((count - begin) % every == 0)
    return on_grid if end is None else (on_grid & (count <= end)) | (count == end)

  return due


def on_the_way(initial: float, rise: float | jax.Array, part: jax.Array) -> jax.Array:
  """The sparsity after such a part of the rise from the initial one, however it is compiled."""
  # Nothing returns where a ramp falls. And a maximum in between keeps compilers from contracting
  # the product and the sum, which would be another number.
  return initial + jnp.maximum(rise * part, 0)


def from_criteria(*stages: Stage, **scorers: Score | Criterion) -> Rule:
  """A rule that keeps the statistics of its criteria, by the names that `scores` finds them by."""
  running = {name: c for name, c in scorers.items() if isinstance(c, Criterion)}
  if not running:
    return Rule(stages)

  def updated(call, function):
    leaves, treedef = _leaves(call), jax.tree.structure(call.params)
    found = {}
    for name, criterion in running.items():
      statistics = treedef.flatten_up_to(call.statistics[name])
      new = [function(criterion, leaf, old) for leaf, old in zip(leaves, statistics)]
      found[name] = jax.tree.unflatten(treedef, new)
    return found

  return Rule(
    stages,
    init=lambda pool: {
      name: jax.tree.map(criterion.init, pool) for name, criterion in running.items()
    },
    observe=lambda call: updated(call, lambda c, leaf, old: c.update(leaf, old)),
    forget=lambda call: updated(
      call, lambda c, leaf, old: c.init(leaf.weight) if c.forget else old
    ),
  )


def prune_lowest(
  goal: Goal,
  allocation: Allocation,
  criterion: Score | Criterion,
  *,
  pattern: Pattern = SINGLE,
  revive: bool = False,
) -> Stage:
  """Prunes the weights of lowest score, as many as are asked for.

  Args:
    goal: how many that is.
    allocation: how a sparsity is shared out among layers; see `sparsejax.allocation`.
    criterion: the score of each weight, `drop` to `from_criteria`.
    pattern: what is pruned together, and what has to stay.
    revive: whether the masks before have no say: pruned weights compete too, and may return. If
      not, those that are pruned already count among the weights to be pruned, and stay so.
  """

  def stage(call):
    weights = jax.tree.leaves(call.params)
    if not weights:
      return call.masks
    shapes = [w.shape for w in weights]
    k = counts.from_ints(
      goal(
        call.count,
        call.params,
        lambda s: allocation_lib.count_pruned(shapes, s, allocation, pattern),
      )
    )
    masks = [pattern.pool_mask(m) for m in jax.tree.leaves(call.masks)]
    active = None if revive else masks
    number = None
    if active is not None and pattern == SINGLE and k.low.shape[0] == len(active):
      number = k - counts.widen(jnp.stack([counts.count_true(~m)[0] for m in active]))
    ranked = _ranked("drop", criterion, call, number, pattern=pattern)
    has_say = [None] * len(masks) if revive else masks
    ranked["values"] = [pattern.exempt(v, m) for v, m in zip(ranked["values"], has_say)]
    pruned = selection.select(**ranked, k=k, active=active)
    return _spread(pattern, [~p for p in pruned], call.params)

  return stage


def drop_and_grow(
  drop: Score | Criterion,
  grow: Score | Criterion,
  fraction: optax.Schedule,
  *,
  pattern: Pattern = SINGLE,
  rounding: Rounding = "nearest",
  drop_globally: bool = False,
  redistribute: Score | None = None,
  exact_growth: bool = True,
  grows_by_moments: bool = True,
) -> Stage:
  """Drops active weights of lowest score, and grows as many inactive ones of highest score.

  Args:
    drop: the score of active weights, `drop` to `from_criteria`.
    grow: the score of inactive weights, those just dropped included; `grow` to `from_criteria`.
    fraction: from the number of the call to the fraction of the active weights to be dropped.
    pattern: what is pruned together, and what has to stay.
    rounding: of their number.
    drop_globally: whether the active weights of all layers compete, and not those of each.
    redistribute: from the context of a leaf to a number in proportion to which it gets its share of
      what grows. By default as many grow in each layer as were dropped there.
    exact_growth: whether exactly that many grow, or, for uniform random scores in [0, 1), each
      candidate by itself, with the probability that gives that many on average.
    grows_by_moments: whether inactive weights have moments by which they could grow.
  """

  def stage(call):
    masks = [pattern.pool_mask(m) for m in jax.tree.leaves(call.masks)]
    if not masks:
      return call.masks
    active = jnp.stack([masks_lib.count_kept(m) for m in masks])
    pool = counts.total(active) if drop_globally else counts.widen(active)
    part = jnp.broadcast_to(jnp.float32(fraction(call.count)), pool.low.shape)
    number = counts.share(part, pool, rounding)
    ranked = _ranked("drop", drop, call, number, pattern=pattern, among_active=True)
    dropped = selection.select_among(
      **ranked, k=number, candidates=masks, count=counts.widen(active)
    )
    if drop_globally:
      number = counts.widen(jnp.stack([counts.count_true(d)[0] for d in dropped]))
    capacity = counts.from_ints([m.size for m in masks]) - counts.widen(active) + number
    if redistribute is not None:
      shares = jnp.stack([jnp.float32(redistribute(leaf)) for leaf in _leaves(call)])
      number = shared_out(number, capacity, shares)
    candidates = [d | ~m for m, d in zip(masks, dropped)]
    if not grows_by_moments:
      call = call._replace(inner=None)
    if call.key is not None:
      # Other random numbers than those by which weights were dropped.
      call = call._replace(key=jax.random.fold_in(call.key, len(masks)))
    if exact_growth:
      ranked = _ranked("grow", grow, call, number, pattern=pattern, highest=True)
      if pattern.regrows_in_groups:
        grown = [pattern.regrown(v, d, c) for v, d, c in zip(ranked["values"], dropped, candidates)]
      else:
        grown = selection.select_among(**ranked, k=number, candidates=candidates, count=capacity)
    else:
      chance = number.to_float() / jnp.maximum(capacity.to_float(), 1)
      uniform = _scores("grow", grow, call, number)
      grown = [c & (u >= 1 - p) for c, u, p in zip(candidates, uniform, chance)]
    return _spread(pattern, [g | ~c for g, c in zip(grown, candidates)], call.params)

  return stage


def shared_out(number: Count, capacity: Count, weights: jax.Array) -> Count:
  """Shares a total out among layers, in proportion to weights as far as their capacity allows.

  Args:
    number: whose sum is shared out, a vector of counts below 2**32.
    capacity: the most that each layer takes, in all at least that sum.
    weights: non-negative numbers; if all are zero, each layer gets its number.

  Returns:
    A vector with the same sum.
  """
  total, limit = counts.total(number.low)[0], capacity.to_float()
  weights = jnp.where((weights > 0) & jnp.isfinite(weights), weights, 0)
  weights = jnp.where(jnp.any(weights > 0), weights, number.to_float())

  def fill(_, share):
    # What a layer cannot take goes to those that are not full, until all fits.
    is_full = share >= limit
    rest = total.to_float() - jnp.sum(jnp.where(is_full, limit, 0))
    weight = jnp.where(is_full, 0, weights)
    scale = rest / jnp.maximum(jnp.sum(weight), jnp.finfo(jnp.float32).tiny)
    return jnp.where(is_full, limit, jnp.maximum(weight * scale, 0))

  share = jax.lax.fori_loop(0, len(weights) + 1, fill, jnp.zeros_like(limit))
  share = counts.widen(jnp.minimum(share, 2.0**32 - 256).astype(jnp.uint32))

  def take(left, wanted):
    taken = counts.minimum(wanted, left)
    return left - taken, taken

  # In whole weights: first what each should have; then, of what is left, what each can take.
  left, first = jax.lax.scan(take, total, counts.minimum(share, capacity))
  _, second = jax.lax.scan(take, left, capacity - first)
  return first + second


def _ranked(
  role: str,
  criterion: Score | Criterion,
  call: Call,
  number: Count | None = None,
  *,
  pattern: Pattern,
  highest: bool = False,
  among_active: bool = False,
) -> dict[str, Any]:
  """Arguments for a selection: values, and a score of them whose lowest are to be chosen."""
  if pattern != SINGLE:
    # Of what is pruned together, a number says nothing about single weights.
    number = number if pattern.regrows_in_groups else None
    ranked = _ranked(role, criterion, call, number, highest=highest, pattern=SINGLE)
    return dict(values=[pattern.pool(ranked["score"](v)) for v in ranked["values"]])
  if criterion is criteria.magnitude or (criterion is criteria.gradient and call.grad is not None):
    # Such scores are exact, so that they need not be written to memory.
    weights = call.unmasked if among_active else call.params
    values = weights if criterion is criteria.magnitude else call.grad
    return dict(values=jax.tree.leaves(values), score=_negative_abs if highest else jnp.abs)
  values = _scores(role, criterion, call, number)
  return dict(values=values, score=jnp.negative if highest else jnp.positive)


def _spread(pattern: Pattern, masks: Sequence[jax.Array], params: PyTree) -> PyTree:
  """The masks of the weights, from those of what is pruned together."""
  weights, treedef = jax.tree.flatten(params)
  spread = [pattern.spread(m, w.shape) for m, w in zip(masks, weights)]
  return jax.tree.unflatten(treedef, spread)


def _negative_abs(x: jax.Array) -> jax.Array:
  return -jnp.abs(x)


def _leaves(call: Call, number: Count | None = None) -> list[Leaf]:
  """The context of each prunable leaf, with how many weights are to be chosen in it, if known."""
  masks = jax.tree.leaves(call.masks)
  gradients = [None] * len(masks) if call.grad is None else jax.tree.leaves(call.grad)
  per_leaf = number is not None and number.low.shape[0] == len(masks)
  moments = None
  if call.inner is not None:
    moments = functools.cache(lambda: find_moments(call.inner, call.masks))
  return [
    Leaf(
      weight,
      masks[i],
      gradient=gradients[i],
      key=None if call.key is None else jax.random.fold_in(call.key, i),
      moment=None if moments is None else lambda i=i: moments()[i],
      count=number.low[i] if per_leaf else None,
    )
    for i, weight in enumerate(jax.tree.leaves(call.params))
  ]


def _scores(
  role: str, criterion: Score | Criterion, call: Call, number: Count | None = None
) -> list[jax.Array]:
  """The scores of all prunable leaves; the role is the criterion's name in `from_criteria`."""
  found = []
  paths, treedef = trees.leaves_with_path(call.params), jax.tree.structure(call.params)
  if isinstance(criterion, Criterion):
    statistics = treedef.flatten_up_to(call.statistics[role])
  for i, ((path, _), leaf) in enumerate(zip(paths, _leaves(call, number))):
    if isinstance(criterion, Criterion):
      score = criterion.score(leaf, statistics[i])
    else:
      score = criterion(leaf)
      if callable(score) or isinstance(score, Criterion):
        raise ValueError(f"{criterion} returns a criterion, not scores: call it first.")
    is_array = isinstance(score, (jax.Array, np.ndarray))
    if not is_array or score.shape != leaf.weight.shape or score.dtype not in ordinals.FLOATS:
      got = f"{score.dtype}{list(score.shape)}" if is_array else repr(score)
      raise ValueError(
        f"a criterion must return one floating-point score for each weight, got {got} for"
        f" {trees.quoted(trees.path_name(path))} of shape {list(leaf.weight.shape)}."
      )
    found.append(jnp.asarray(score))
  return found
