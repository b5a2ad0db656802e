"""Synaptic flow: masks that preserve it, in the range of numbers however deep the network is."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax import allocation as allocation_lib
from sparsejax import arguments, counts, ordinals, scoring, selection, sparsities, trees
from sparsejax import masks as masks_lib
from sparsejax.allocation import Allocation
from sparsejax.masks import Prunable, is_kernel
from sparsejax.sparsities import Sparsity
from sparsejax.trees import PyTree

ApplyFn = Callable[[PyTree, Any], jax.Array]


def synflow_scores(
  apply_fn: ApplyFn, params: PyTree, inputs: Any, masks: PyTree | None = None
) -> PyTree:
  r"""Scores weights by the synaptic flow through them: one round of `synflow`.

  .. math:: s = | \theta \, \partial R / \partial \theta |, \quad R = \sum f(|\theta|, x)

  Args:
    apply_fn: `apply_fn(params, inputs)` gives the outputs; see `synflow`.
    params: the parameters.
    inputs: the inputs x; see `synflow`.
    masks: a full boolean tree of the weights that are active; all are by default.

  Returns:
    A tree of scores like `params`, times the power of two that keeps them near 1 whatever R is.

  Raises:
    ValueError: as `synflow` does.
  """
  scoring.check_params(params)
  if masks is None:
    masks = masks_lib.all_true(params)
  masks_lib.check_boolean(masks)
  trees.check_same_structure(masks, params, "the masks", "the parameters")
  flow = jax.jit(_scores_of(apply_fn, params, inputs))
  scores, is_sound = flow(scoring.widened(params), masks, inputs)
  _check(_total(scores), is_sound, stacklevel=2)
  return scores


def synflow(
  apply_fn: ApplyFn,
  params: PyTree,
  inputs: Any,
  sparsity: Sparsity,
  *,
  rounds: int = 100,
  allocation: Allocation = "global",
  prunable: Prunable = is_kernel,
) -> PyTree:
  r"""Masks that preserve the synaptic flow (iterative synaptic flow pruning), without data.

  After round k of n the density :math:`\rho^{k/n}` is left, :math:`\rho = 1 - \mathrm{sparsity}`.
  Each round scores what is left anew, by :math:`s = |\theta \, \partial R / \partial \theta|` where
  R is the sum of the outputs of the network with the absolute values of its parameters, and prunes
  the lowest. No score is recomputed after the last.

  In single precision R leaves the range of numbers in deep networks. Scores are linear in the
  cotangent of R, and the outputs in the inputs if nothing is added to activations (biases and
  shifts are zero, as initialised): both are scaled by powers of two, which leaves the bits of the
  scores as they would be, and the inputs only where they have to be.

  Args:
    apply_fn: `apply_fn(params, inputs)` gives the outputs, in evaluation mode. It is called with
      the absolute values of `params`; running statistics of batch normalisation, which are the
      caller's, have to be made absolute in it, as the authors do.
    params: the parameters.
    inputs: ones in the shape of one example, as a batch of one, in the paper.
    sparsity: the fraction to prune, a Python number in [0, 1), or a tree like `params` of such
      numbers, one for each prunable leaf.
    rounds: the number n of rounds.
    allocation: how the sparsity is shared out among the leaves; see `sparsejax.allocation`.
    prunable: `prunable(path, leaf) -> bool` says which leaves are pruned.

  Returns:
    A full boolean tree like `params`, True where a weight is kept, with the counts of
    `sparsejax.masks_from_scores`.

  Raises:
    ValueError: if an argument is out of range; if parameters or inputs are not floating-point
      arrays; if the network fails on the inputs; if its scores are not finite or all zero, as far
      as scaling cannot help it.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> import sparsejax
    >>> def apply_fn(params, inputs):
    ...   return jax.nn.relu(inputs @ params["in"]) @ params["out"]
    >>> keys = jax.random.split(jax.random.key(0))
    >>> params = {
    ...   "in": jax.random.normal(keys[0], (8, 16)), "out": jax.random.normal(keys[1], (16, 4))
    ... }
    >>> masks = sparsejax.foresight.synflow(apply_fn, params, jnp.ones((1, 8)), 0.9)
    >>> print(f"{sparsejax.sparsity(masks):.1%}")
    90.1%

  References:
    Tanaka et al., `Pruning neural networks without any data by iteratively conserving synaptic flow
    <https://arxiv.org/abs/2006.05467>`_, 2020
  """
  rounds = arguments.check_integer("rounds", rounds, at_least=1)
  scoring.check_params(params)
  weights = scoring.widened(params)
  pool = masks_lib.select_prunable(weights, prunable)
  k = counts.from_ints(_counts_of_rounds(weights, pool, sparsity, rounds, allocation))
  flow = _scores_of(apply_fn, params, inputs)

  @jax.jit
  def prune(weights, inputs):
    def prune_once(masks, k):
      scores, is_sound = flow(weights, masks_lib.full_masks(masks, weights), inputs)
      scores = trees.pick(pool, scores, "the pool", "the scores")
      leaves, treedef = jax.tree.flatten(scores)
      pruned = selection.select(leaves, k, active=jax.tree.leaves(masks))
      masks = jax.tree.unflatten(treedef, [~p for p in pruned])
      return masks, (_total(scores), is_sound)

    first = trees.pick(pool, weights, "the pool", "the weights")
    return lax.scan(prune_once, masks_lib.all_true(first), k)

  masks, (totals, are_sound) = prune(weights, inputs)
  if jax.tree.leaves(pool):
    _check(totals, are_sound, stacklevel=2)
  masks = masks_lib.full_masks(masks, weights)
  masks_lib.warn_of_emptied(masks, stacklevel=2)
  return masks


def _counts_of_rounds(weights, pool, sparsity, rounds, allocation) -> np.ndarray:
  """How many weights are pruned after each round, of all layers or of each."""
  allocation_lib.resolve(allocation)
  sparsity = arguments.check_sparsity("sparsity", sparsity)
  if any(isinstance(s, jax.core.Tracer) for s in jax.tree.leaves(sparsity)):
    raise ValueError("the sparsity must be a Python number: SynFlow counts its rounds beforehand.")
  sparsities.check_leaves(sparsity, weights, pool)
  final = jax.tree.map(float, sparsities.for_leaves(sparsity, pool))
  shapes = [w.shape for w in jax.tree.leaves(pool)]

  def after(k):
    # The last round reaches the sparsity itself, not a rounding error beside it.
    reached = jax.tree.map(lambda s: s if k == rounds else 1 - (1 - s) ** (k / rounds), final)
    return allocation_lib.count_pruned(shapes, reached, allocation)

  pruned = np.stack([after(k) for k in range(1, rounds + 1)])
  allocation_lib.check_some_left([w.size for w in jax.tree.leaves(pool)], pruned[-1])
  return pruned


def _scores_of(
  apply_fn: Callable[[PyTree, Any], jax.Array], params: PyTree, inputs: Any
) -> Callable[[PyTree, PyTree, Any], tuple[PyTree, jax.Array]]:
  r"""Makes a function that scores weights by :math:`|\theta \, \partial R / \partial \theta|`.

  Args:
    apply_fn: gives outputs of parameters and inputs; R is their sum.
    params: parameters, whose dtypes and shapes suffice.
    inputs: inputs, likewise.

  Returns:
    A function of widened parameters, full masks and inputs, for tracing. It returns the scores of
    all parameters, times the power of two that brings their sum in a layer near 1, and whether it
    was sound to scale the inputs, where it had to.

  Raises:
    ValueError: if inputs or outputs are not floating-point arrays, or if `apply_fn` fails.
  """
  for name, x in trees.leaves_by_name(inputs).items():
    if jnp.result_type(x) not in ordinals.FLOATS:
      raise ValueError(
        f"SynFlow needs floating-point inputs, but {name or 'they'} have dtype"
        f" {jnp.result_type(x)}: pass ones in place of indices, after any embedding."
      )
  function = scoring.for_widened(apply_fn, "the network", params)
  outputs = jax.eval_shape(function, jax.eval_shape(scoring.widened, params), inputs)
  if not isinstance(outputs, jax.ShapeDtypeStruct) or outputs.dtype not in ordinals.FLOATS:
    raise ValueError(
      "the network must return its outputs, a floating-point array, but it returned"
      f" {scoring.describe(outputs)}: leave anything else out in `apply_fn`."
    )
  types = [jnp.result_type(x) for x in jax.tree.leaves((params, inputs, outputs))]
  limit = min(int(jnp.finfo(dtype).maxexp) for dtype in types) * 7 // 8
  wide = jnp.promote_types(outputs.dtype, jnp.float32)

  def power_of_two(exponent):
    return jnp.ldexp(jnp.ones([], wide), exponent)

  def flow(weights, masks, inputs):
    weights = jax.tree.map(lambda w, m: jnp.where(m, jnp.abs(w), 0), weights, masks)

    def step(state):
      # First the inputs are as they are. If R is out of range, it is found with inputs that are
      # scaled as far as possible; then half of its exponent goes to them, and half to the
      # cotangent; and inputs half as large have to give the same scores once more. One loop, so
      # that the network is compiled once.
      number, exponent, previous, _, _ = state
      scaled = jax.tree.map(lambda x: x * power_of_two(exponent).astype(x.dtype), inputs)
      r, pull = jax.vjp(lambda w: jnp.sum(function(w, scaled).astype(wide)), weights)
      magnitude = jnp.clip(jnp.frexp(r)[1], -limit, limit)
      (gradient,) = pull(power_of_two(-magnitude))
      scores = jax.tree.map(lambda w, g: jnp.abs(w * g), weights, gradient)
      sums = jnp.asarray([jnp.sum(s) for s in jax.tree.leaves(scores)], wide)
      # R may look sound where activations are infinite: times a weight of zero they are NaN, of
      # which a maximum with zero may make zero. The gradients of the weights they meet tell.
      is_finite = jnp.isfinite(r) & jnp.all(jnp.isfinite(sums))
      is_small = is_finite & (jnp.abs(r) <= 2.0**-limit)
      extreme = jnp.where(is_small, limit, -limit)
      following = jnp.stack([extreme, (exponent - magnitude) // 2, exponent - 1, exponent])
      is_same = (number < 3) | jnp.all(jnp.abs(sums - previous) <= 1e-2 * sums)
      is_usable = (number == 0) & is_finite & ~is_small
      number = jnp.where(is_usable, 4, number + 1)
      return number, following[number - 1], sums, scores, is_finite & is_same

    nothing = jax.tree.map(jnp.zeros_like, weights)
    sums = jnp.zeros([len(jax.tree.leaves(weights))], wide)
    start = jnp.int32(0), jnp.int32(0), sums, nothing, jnp.bool_(True)
    *_, scores, is_sound = lax.while_loop(lambda state: state[0] < 4, step, start)
    return scores, is_sound

  return flow


def _total(scores: PyTree) -> jax.Array:
  return sum((jnp.sum(s) for s in jax.tree.leaves(scores)), jnp.float32(0))


def _check(totals: jax.Array, are_sound: jax.Array, stacklevel: int) -> None:
  """Looks at the scores of each round, if they are known.

  Args:
    totals: the sum of the scores, of one round or of each.
    are_sound: whether scaling was sound.
    stacklevel: of the warning, as seen by the caller.

  Raises:
    ValueError: if scores are of no use, from the first round on.
  """
  if isinstance(totals, jax.core.Tracer):
    return
  totals, are_sound = np.atleast_1d(totals), np.atleast_1d(are_sound)
  wider = (
    "compute in float64, with parameters and inputs made under jax.enable_x64(True) and a network"
    " that keeps their type."
  )
  for i in np.flatnonzero(~are_sound)[:1]:
    raise ValueError(
      f"in round {i + 1} the synaptic flow of the network leaves the range of its numbers, and"
      " it cannot be brought back by scaling the inputs: either the outputs are not in proportion"
      " to the inputs (are there biases or shifts other than zero?), or there are parameters that"
      f" are not finite, or it is too far beyond. For the first and last, {wider}"
    )
  dead = np.flatnonzero(totals == 0)
  if dead.size and dead[0] == 0:
    raise ValueError(
      "all scores are zero: no path of weights other than zero leads from the inputs to the"
      f" outputs, or else the flow is below the range of its numbers: if so, {wider}"
    )
  if dead.size:
    warnings.warn(
      f"from round {dead[0] + 1} on all scores are zero, and the first weights go: so sparse, no"
      " path leads from the inputs to the outputs any more (or the flow is below the range of"
      " its numbers).",
      stacklevel=stacklevel + 1,
    )
