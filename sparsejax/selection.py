"""Exactly the k smallest scores of a pytree: stable, sharded, without sorting.

The scores' bit patterns, mapped to integers in the order of the values, are followed by their
positions in the tree, which cut ties: one long number for each weight, all different. The number
that k others are less than is found two bits at a time, from the highest. Each step is one pass
over the scores that counts and writes nothing; the bits of the position are reached only if there
is a tie to cut.
"""

import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax import counts
from sparsejax.counts import Count
from sparsejax.masks import PyTree

_UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}
FLOATS = tuple(jnp.dtype(t) for t in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64))


def select_smallest(scores: PyTree, k: Any, *, among: PyTree | None = None) -> PyTree:
  """Selects the k smallest scores of a pytree.

  Scores are compared by value, whatever the backend flushes: -0 equals 0, denormals count, NaN
  ranks above infinity. Equal scores go by leaf order, then by C-order index, lowest first. The
  result is the same on one device and on many. (Inside of `jax.shard_map` there is nothing but the
  shard: call it outside.)

  Args:
    scores: a pytree of floating-point arrays (float16, bfloat16, float32, float64) of any shapes,
      each with fewer than 2**32 entries.
    k: how many: a non-negative integer, or a traced one (where a negative one means none), for the
      whole tree; or a pytree like `scores` of such integers, one for each leaf.
    among: a boolean pytree like `scores`, True at the candidates. All are, by default.

  Returns:
    A boolean pytree like `scores`, True at exactly min(k, number of candidates) candidates.

  Raises:
    ValueError: if `k` is negative, not an integer, or neither a scalar nor a tree like `scores`; if
      `among` has another structure or other shapes; if scores are not floating-point numbers.

  Example:
    >>> import jax.numpy as jnp
    >>> import sparsejax
    >>> scores = {"a": jnp.array([3., 1.]), "b": jnp.array([[2., 1.]])}
    >>> sparsejax.select_smallest(scores, 2)
    {'a': Array([False,  True], dtype=bool), 'b': Array([[False,  True]], dtype=bool)}
  """
  paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(scores)
  leaves = []
  for path, leaf in paths_and_leaves:
    leaf = jnp.asarray(leaf)
    name = jax.tree_util.keystr(path) or "the array"
    if leaf.dtype not in FLOATS:
      raise ValueError(
        f"scores must be floating-point numbers, but {name} has dtype {leaf.dtype}: convert it"
        " with astype(float32)."
      )
    if leaf.size >= 2**32:
      raise ValueError(
        f"a leaf of scores must have fewer than 2**32 entries, but {name} has {leaf.size}: split"
        " it along its first axis."
      )
    leaves.append(leaf)

  k = _count_of(k, treedef)
  if among is None:
    return jax.tree.unflatten(treedef, select(leaves, k))
  candidates, among_treedef = jax.tree.flatten(among)
  if among_treedef != treedef or any(np.shape(c) != s.shape for c, s in zip(candidates, leaves)):
    raise ValueError(
      "`among` must be a boolean tree with the structure and shapes of `scores`, got"
      f" {jax.tree.map(np.shape, among)} for {jax.tree.map(np.shape, scores)}."
    )
  selected = select_among(leaves, k, [jnp.asarray(c, bool) for c in candidates])
  return jax.tree.unflatten(treedef, selected)


def _count_of(k: Any, treedef) -> Count:
  """Checks the argument k and returns one count for all leaves, or one for each."""
  per_leaf, k_treedef = jax.tree.flatten(k)
  is_one = len(per_leaf) == 1 and jax.tree_util.treedef_is_leaf(k_treedef)
  if not is_one and k_treedef != treedef:
    raise ValueError(
      f"k must be an integer or a tree of integers like `scores` ({treedef}), got {k!r}."
    )
  for value in per_leaf:
    is_array = isinstance(value, (jax.Array, np.ndarray, np.generic))
    if not (
      (isinstance(value, numbers.Integral) and not isinstance(value, bool))
      or (is_array and value.ndim == 0 and jnp.issubdtype(value.dtype, jnp.integer))
    ):
      raise ValueError(f"k must be one integer, or a tree with one for each leaf, got {value!r}.")
    if not isinstance(value, jax.Array) and value < 0:
      raise ValueError(f"k must not be negative, got {value!r}: use 0 to select nothing.")
  if not per_leaf:
    return counts.from_ints(np.zeros([0]))
  parts = [
    counts.from_ints(value if isinstance(value, jax.Array) else min(int(value), 2**64 - 1))
    for value in per_leaf
  ]
  return jax.tree.map(lambda *words: jnp.stack(words), *parts)


def _at_most_all(k: Count, arrays: Sequence[jax.Array]) -> Count:
  """The counts, but no more than there are entries."""
  sizes = [array.size for array in arrays]
  return counts.minimum(k, counts.from_ints([sum(sizes)] if k.low.shape[0] == 1 else sizes))


@functools.partial(jax.jit, static_argnames="score")
def select(
  values: Sequence[jax.Array],
  k: Count,
  *,
  active: Sequence[jax.Array] | None = None,
  score: Callable[[jax.Array], jax.Array] = jnp.positive,
) -> list[jax.Array]:
  """`select_smallest` for a list of arrays, as the transformations use it.

  Args:
    values: the arrays whose `score` is ranked.
    k: of shape (1,) for one selection over all arrays, or (len(values),) for one in each; it
      includes what is not active.
    active: boolean arrays, False at what comes first, whatever its score.
    score: an elementwise function that is exact, such as the absolute value. It is computed anew
      in each pass, so that the scores are never written to memory.

  Returns:
    Boolean arrays, True where selected or not active.
  """
  if not values:
    return []
  sizes = [v.size for v in values]
  pooled = k.low.shape[0] == 1
  dtype = jnp.result_type(*(v.dtype for v in values))
  key_type = _UNSIGNED[dtype.itemsize]
  word_type = np.promote_types(key_type, np.uint32)
  largest = np.array(np.iinfo(word_type).max, word_type)
  offsets = counts.from_ints(np.cumsum([0, *sizes[:-1]]) if pooled else [0] * len(sizes))
  active = [None] * len(values) if active is None else list(active)

  def in_each(test, *vectors):
    """For each array, what `test` says of its keys and positions, given a scalar of each vector."""
    # Tied to the loop's own variables, so that XLA computes keys and positions in each pass instead
    # of hoisting them out of the loop, into memory.
    arrays, masks, vectors = lax.optimization_barrier((list(values), active, vectors))

    @jax.jit  # Arrays that are alike are traced once.
    def in_one(array, mask, *scalars):
      key = ordinal(_widened(score(array), dtype))
      if mask is not None:
        key = jnp.where(mask, key, key_type(0))
      return test(key, _positions(key, scalars[0].astype(jnp.uint32)), *scalars)

    return [
      in_one(array, mask, *(v[0] if v.shape[0] == 1 else v[i] for v in vectors))
      for i, (array, mask) in enumerate(zip(arrays, masks))
    ]

  def in_arrays(place):
    """A place in the tree as a position in each array."""
    position = place - offsets
    return jnp.where(position.high > 0, np.uint32(2**32 - 1), position.low)

  def count_before(by_key, bound, numbers):
    """By key: how many are less than each number. Else: of those that equal the bound, how many lie
    before each number as a place."""
    numbers = [
      jnp.where(by_key, _word(n, word_type), in_arrays(n).astype(word_type)) for n in numbers
    ]

    def test(key, position, by_key, bound, *numbers):
      place = jnp.where(key == bound, position.astype(word_type), largest)
      number = jnp.where(by_key, key.astype(word_type), place)
      return counts.count_true(*(number < n for n in numbers))

    found = in_each(test, by_key[None], _word(bound, key_type), *numbers)
    words = jnp.stack([jnp.stack(of_number) for of_number in zip(*found)])
    return counts.total(words) if pooled else counts.widen(words)

  bound, place = _search(
    count_before,
    _at_most_all(k, values),
    key_bits=8 * dtype.itemsize,
    place_bits=(sum(sizes) if pooled else max(sizes)).bit_length(),
  )

  def comes_before(key, position, bound, end):
    return (key < bound) | ((key == bound) & (position < end))

  before = in_each(comes_before, _word(bound, key_type), in_arrays(place))
  return [b if mask is None else b | ~mask for b, mask in zip(before, active)]


@functools.partial(jax.jit, static_argnames="score")
def select_among(
  values: Sequence[jax.Array],
  k: Count,
  candidates: Sequence[jax.Array],
  *,
  count: Count | None = None,
  score: Callable[[jax.Array], jax.Array] = jnp.positive,
) -> list[jax.Array]:
  """The same among some candidates only, which k counts, and nothing else is selected.

  Args:
    values: as for `select`.
    k: likewise, without what is no candidate.
    candidates: boolean arrays.
    count: of the candidates in each array, if it is known already.
    score: as for `select`.
  """
  if not values:
    return []
  if count is None:
    count = counts.widen(jnp.stack([counts.count_true(c)[0] for c in candidates]))
  # What is no candidate comes first, and is left out then.
  before = counts.from_ints([v.size for v in values]) - count
  if k.low.shape[0] == 1:
    before = counts.total(before.low)
  selected = select(values, _at_most_all(k, values) + before, active=candidates, score=score)
  return [s & c for s, c in zip(selected, candidates)]


def _search(
  count_before: Callable[[jax.Array, Count, Sequence[Count]], Count],
  k: Count,
  *,
  key_bits: int,
  place_bits: int,
) -> tuple[Count, Count]:
  """The largest pair of a bound and a place that at most k weights come before.

  Those come before it whose key is less than the bound, or equals it and lies before the place. The
  pair is found two bits at a time from the highest bit of the bound to the lowest of the place, or
  to where exactly k weights come before, whether or not it is the largest then.

  Args:
    count_before: takes whether the bound is still to be found, the bound so far, and three vectors
      of numbers to be tried as the bound, or else as the place; returns how many keys are less than
      each, or else how many keys equal the bound and lie before each, as three rows.
    k: a vector.
    key_bits: of the bound, an even number.
    place_bits: of the place.

  Returns:
    The vectors of bounds and of places.
  """
  nothing = counts.widen(jnp.zeros_like(k.low))
  place_bits += place_bits % 2

  def unfinished(carry):
    shift, _, _, before, _ = carry
    return (shift >= 0) & ~jnp.all(before.equals(k))

  def find_two_bits(carry):
    shift, bound, place, before, less = carry
    by_key = shift >= place_bits
    number = counts.where(by_key, bound, place)
    step = counts.power_of_two(jnp.where(by_key, shift - place_bits, shift))
    larger = [number + step]
    larger.append(larger[0] + step)
    larger.append(larger[1] + step)
    found = count_before(by_key, bound, larger)
    for i, candidate in enumerate(larger):
      total = less + found[i]
      fits = total <= k
      number = counts.where(fits, candidate, number)
      before = counts.where(fits, total, before)
    bound = counts.where(by_key, number, bound)
    place = counts.where(by_key, place, number)
    # At the last bits of the bound, the keys that are less than it have all been counted.
    less = counts.where(shift == place_bits, before, less)
    return shift - 2, bound, place, before, less

  start = (jnp.int32(key_bits + place_bits - 2), nothing, nothing, nothing, nothing)
  _, bound, place, _, _ = lax.while_loop(unfinished, find_two_bits, start)
  return bound, place


def _word(count: Count, dtype) -> jax.Array:
  if np.dtype(dtype).itemsize <= 4:
    return count.low.astype(dtype)
  return (count.high.astype(dtype) << 32) | count.low.astype(dtype)


def ordinal(scores: jax.Array) -> jax.Array:
  """Unsigned integers in the order of the scores; both zeros are one, all NaN are the largest."""
  unsigned = _UNSIGNED[scores.dtype.itemsize]
  bits = lax.bitcast_convert_type(scores, unsigned)
  sign = unsigned(1 << (scores.dtype.itemsize * 8 - 1))
  infinity = np.asarray(np.inf, scores.dtype).view(unsigned)[()]
  magnitude = bits & (sign - unsigned(1))
  negative = (bits >= sign) & (magnitude <= infinity)
  magnitude = jnp.minimum(magnitude, infinity + unsigned(1))
  return jnp.where(negative, sign - magnitude, sign + magnitude)


def _widened(scores: jax.Array, dtype) -> jax.Array:
  """Scores in a wider type with their exact values, also where the backend flushes denormals."""
  if scores.dtype == dtype:
    return scores
  if scores.dtype == jnp.bfloat16:
    bits = lax.bitcast_convert_type(scores, jnp.uint16).astype(jnp.uint32) << 16
    return _widened(lax.bitcast_convert_type(bits, jnp.float32), dtype)
  info = jnp.finfo(scores.dtype)
  unsigned = _UNSIGNED[scores.dtype.itemsize]
  bits = lax.bitcast_convert_type(scores, unsigned)
  magnitude = bits & unsigned(2 ** (info.bits - 1) - 1)
  smallest = np.asarray(info.smallest_subnormal, dtype)
  tiny = magnitude.astype(dtype) * smallest
  tiny = jnp.where(bits == magnitude, tiny, -tiny)
  return jnp.where(magnitude < 2**info.nmant, tiny, scores.astype(dtype))


def _positions(x: jax.Array, anything: jax.Array) -> jax.Array:
  """The C-order index of each entry, sharded alike.

  It depends on a scalar of the loop, though not in value, from its first multiplication on: XLA
  would otherwise compute it before the loop, into memory.
  """
  position = anything
  for axis, size in enumerate(x.shape):
    along = lax.broadcasted_iota(jnp.uint32, x.shape, axis, out_sharding=jax.typeof(x).sharding)
    position = position * np.uint32(size) + along
  return jnp.broadcast_to(position - anything * np.uint32(x.size), x.shape)
