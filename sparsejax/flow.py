"""Synaptic flow, with scores that stay in the range of numbers however deep the network is."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax import masks as masks_lib
from sparsejax import scoring, selection
from sparsejax.masks import PyTree


def scores_of(
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
  for name, x in masks_lib.leaves_by_name(inputs).items():
    if jnp.result_type(x) not in selection.FLOATS:
      raise ValueError(
        f"SynFlow needs floating-point inputs, but {name or 'they'} have dtype"
        f" {jnp.result_type(x)}: pass ones in place of indices, after any embedding."
      )
  function = scoring.for_widened(apply_fn, "the network", params)
  outputs = jax.eval_shape(function, jax.eval_shape(scoring.widened, params), inputs)
  if not isinstance(outputs, jax.ShapeDtypeStruct) or outputs.dtype not in selection.FLOATS:
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


def total(scores: PyTree) -> jax.Array:
  return sum((jnp.sum(s) for s in jax.tree.leaves(scores)), jnp.float32(0))


def check(totals: jax.Array, are_sound: jax.Array, stacklevel: int) -> None:
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
