"""The number that exactly k weights come before, found by counting those before guesses.

A sorted sample says where to begin. Each pass over all weights then counts what comes before three
guesses, and the next three lie close to where the number would be if the weights between the two
nearest were evenly spread, as many are: then a pass leaves about the square root of what the pass
before it had left. Where they are not, a pass tells equal weights from others, and leaves a third.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax import counts
from sparsejax.counts import Count

# Of the first, second and third guess.
_SIDES = np.array([[-1], [0], [1]], np.float32)

# How far guesses lie apart: in standard deviations of where the number would be if the weights were
# drawn at random, and as a part of the distance, since they are not quite evenly spread.
_DEVIATIONS = 1.2
_UNEVENNESS = 2.0**-10
# And the first ones, which come from a sample: so far that the number hardly ever lies beyond them.
_DEVIATIONS_OF_SAMPLE = 2.5


class _Bracket(NamedTuple):
  """What is known of each number that is looked for. All are vectors.

  Attributes:
    by_key: whether a key is looked for, or else a place among equal keys.
    bound: the key, once it is known.
    less: how many keys are less than the bound then.
    low: a number that at most k weights come before.
    before_low: how many do.
    high: a larger one that more than k come before.
    before_high: how many do.
    shrank: whether the last pass left at most half of the weights between low and high.
  """

  by_key: jax.Array
  bound: Count
  less: Count
  low: Count
  before_low: Count
  high: Count
  before_high: Count
  shrank: jax.Array


def search(
  count_before: Callable[[jax.Array, Count, Count], tuple[Count, Count]],
  k: Count,
  total: Count,
  sample: jax.Array,
) -> tuple[Count, Count]:
  """Pairs of a bound and a place that exactly k weights come before.

  Those come before it whose key is less than the bound, or equals it and lies before the place.

  Args:
    count_before: takes whether bounds are still looked for, the bounds so far, and three rows of
      guesses; returns how many keys are less than each, or else how many keys equal the bound and
      lie before each as a place; and, where bounds are looked for, the smallest key that is not
      less than the first guess.
    k: how many, a vector; in one word if all numbers are, those that `count_before` returns, too.
    total: how many there are, a vector.
    sample: some of the keys for each number that is looked for, sorted. No key is the largest
      number of its type.  # shape=(len(k), any), dtype=uint16, uint32 or uint64

  Returns:
    The vectors of bounds and of places.
  """
  # All that the loop begins with varies over devices as its results do.
  zero = counts.zeros_like(k.low, total.low, jnp.sum(sample[:, :1], axis=-1))
  nothing, one, limit = (
    (zero + counts.from_ints(n)).in_one_word(k.high is None)
    for n in (0, 1, np.iinfo(sample.dtype).max)
  )
  everything, always = total <= k, nothing <= nothing
  start = _Bracket(
    by_key=always,
    bound=nothing,
    less=nothing,
    low=counts.where(everything, limit, nothing),
    before_low=counts.where(everything, total, nothing),
    high=limit,
    before_high=total + nothing,
    shrank=always,
  )

  def unfinished(carry):
    return ~jnp.all(carry[0].before_low.equals(k))

  def narrow(carry):
    b, guesses = carry
    found, least = count_before(b.by_key, b.bound, guesses)
    found += b.less[None]
    low, before_low, high, before_high = b.low, b.before_low, b.high, b.before_high
    for i in range(3):
      is_closer = (found[i] <= k) & (low <= guesses[i])
      # As many come before the least key that is not less than a guess as before the guess.
      closer = guesses[i] if i else counts.where(b.by_key, least, guesses[i])
      low = counts.where(is_closer, closer, low)
      before_low = counts.where(is_closer, found[i], before_low)
    for i in reversed(range(3)):
      is_beyond = ~(found[i] <= k)
      high = counts.where(is_beyond, guesses[i], high)
      before_high = counts.where(is_beyond, found[i], before_high)
    shrank = before_high - before_low <= (b.before_high - b.before_low).halved()
    # No number is left between them: all that come between are equal to low, and it is their places
    # that tell them apart.
    is_bound = b.by_key & (low + one).equals(high)
    b = _Bracket(
      by_key=b.by_key & ~is_bound,
      bound=counts.where(is_bound, low, b.bound),
      less=counts.where(is_bound, before_low, b.less),
      low=counts.where(is_bound, nothing, low),
      before_low=before_low,
      high=counts.where(is_bound, total, high),
      before_high=before_high,
      shrank=shrank | is_bound,
    )
    return b, _guesses(b, k)

  b, _ = lax.while_loop(unfinished, narrow, (start, _first_guesses(sample, k, total, one, limit)))
  return counts.where(b.by_key, b.low, b.bound), counts.where(b.by_key, nothing, b.low)


def _first_guesses(sample: jax.Array, k: Count, total: Count, one: Count, limit: Count) -> Count:
  """Numbers around the key that comes as early in the sample as the one looked for among all."""
  size = sample.shape[-1]
  rank = k.to_float() / jnp.maximum(total.to_float(), 1) * size
  apart = _DEVIATIONS_OF_SAMPLE * jnp.sqrt(jnp.maximum(rank * (1 - rank / size), 0)) + 1
  at = jnp.floor(rank[None] + _SIDES * apart[None]).astype(jnp.int32)
  inside = jnp.clip(at, 0, size - 1).T
  keys = jnp.take_along_axis(sample, inside, axis=1, mode="promise_in_bounds").T
  lower, middle, upper = (counts.widen(key).in_one_word(k.high is None) for key in keys)
  # The key 0 is that of what comes first in any case.
  lower = counts.where(at[0] < 0, one, counts.maximum(lower, one))
  upper = counts.where(at[2] < size, upper + one, limit)
  return counts.stack([lower, middle, upper])


def _guesses(b: _Bracket, k: Count) -> Count:
  """Numbers around the one that is looked for, if what lies from low to high is evenly spread."""
  distance = (b.high - b.low).to_float()
  between = jnp.maximum((b.before_high - b.before_low).to_float(), 1)
  part = ((k - b.before_low).to_float() + 0.5) / between
  apart = _DEVIATIONS * jnp.sqrt(jnp.maximum(part * (1 - part), 0) / between) + _UNEVENNESS
  close = distance[None] * (part[None] + _SIDES * apart[None]) + _SIDES
  # Or else many may be equal to low: what is larger is told from them, and cut in thirds.
  thirds = distance[None] * (_SIDES + 1) / 3
  steps = jnp.where(b.shrank[None], close, thirds)
  steps = jnp.clip(steps, 1, jnp.maximum(distance - 1, 1)[None])
  guesses = b.low[None] + counts.from_floats(steps).in_one_word(k.high is None)
  return counts.minimum(guesses, b.high[None])
