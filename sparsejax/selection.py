"""Exactly the k smallest scores of a pytree: stable, sharded, without sorting.

The scores' bit patterns, mapped to integers in the order of the values, are searched for the
largest bound that at most k of them lie below, two bits at a time. Each step is one pass that
counts and writes nothing. If equal scores straddle the bound, a second search of the same kind over
their positions cuts the tie.
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

  if among is not None:
    candidates, among_treedef = jax.tree.flatten(among)
    if among_treedef != treedef or any(np.shape(c) != s.shape for c, s in zip(candidates, leaves)):
      raise ValueError(
        "`among` must be a boolean tree with the structure and shapes of `scores`, got"
        f" {jax.tree.map(np.shape, among)} for {jax.tree.map(np.shape, scores)}."
      )
    among = [jnp.asarray(c, bool) for c in candidates]
  selected = select(leaves, _count_of(k, treedef), among=among)
  return jax.tree.unflatten(treedef, selected)


def _count_of(k: Any, treedef) -> Count:
  """Checks the argument k and returns one count for all leaves, or one for each."""
  per_leaf, k_treedef = jax.tree.flatten(k)
  if not jax.tree_util.treedef_is_leaf(k_treedef) and k_treedef != treedef:
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
  parts = [counts.from_ints(value) for value in per_leaf]
  return jax.tree.map(lambda *words: jnp.stack(words), *parts)


def _identity(x: jax.Array) -> jax.Array:
  return x


@functools.partial(jax.jit, static_argnames="score")
def select(
  values: Sequence[jax.Array],
  k: Count,
  *,
  among: Sequence[jax.Array] | None = None,
  score: Callable[[jax.Array], jax.Array] = _identity,
) -> list[jax.Array]:
  """`select_smallest` for a list of arrays, as the transformations use it.

  Args:
    values: the arrays whose `score` is ranked.
    k: of shape (1,) for one selection over all arrays, or (len(values),) for one in each.
    among: boolean arrays, True at the candidates.
    score: an elementwise function that is exact, such as the absolute value. It is computed anew
      in each pass, so that the scores are never written to memory.

  Returns:
    Boolean arrays, True where selected.
  """
  if not values:
    return []
  pooled = k.low.shape[0] == 1
  dtype = jnp.result_type(*(v.dtype for v in values))
  among = [None] * len(values) if among is None else list(among)

  def candidates_that(test, *vectors):
    """For each array, the predicates that `test` returns, at the candidates."""
    # Tied to the loop's own variables, so that XLA computes keys and positions in each pass instead
    # of hoisting them out of the loop, into memory.
    arrays, candidates, vectors = lax.optimization_barrier((list(values), among, vectors))
    found = []
    for i, (array, candidate) in enumerate(zip(arrays, candidates)):
      key = _ordinal(_widened(score(array), dtype))
      scalars = (v[0] if v.shape[0] == 1 else v[i] for v in vectors)
      predicates = test(key, _positions(key, vectors[0][0].astype(jnp.uint32)), *scalars)
      found.append(predicates if candidate is None else [p & candidate for p in predicates])
    return found

  def count(test, *vectors):
    found = candidates_that(test, *vectors)
    words = jnp.stack([counts.count_true(*predicates) for predicates in found], axis=-1)
    return counts.total(words) if pooled else counts.widen(words)

  # First the largest bound on the scores that at most k of them lie below...
  def count_below(bounds):
    return count(
      lambda key, _, *bounds: [key < b for b in bounds], *(_word(b, key_type) for b in bounds)
    )

  key_type = _UNSIGNED[dtype.itemsize]
  nothing = counts.widen(jnp.zeros_like(k.low))
  bound, below = _search(count_below, k, nothing, dtype.itemsize * 8)
  bound = _word(bound, key_type)

  # ... then, of the scores that equal the bound, how many fit, as a position in the whole tree.
  sizes = [v.size for v in values]
  offsets = counts.from_ints(np.cumsum([0, *sizes[:-1]]) if pooled else [0] * len(sizes))

  def comes_first(key, position, bound, end):
    return (key < bound) | ((key == bound) & (position < end))

  def ends(place):
    """The position in each array before which scores that equal the bound come first."""
    end = place - offsets
    return jnp.where(end.high > 0, np.uint32(2**32 - 1), end.low)

  def count_first(places):
    return count(
      lambda key, position, bound, *ends: [comes_first(key, position, bound, e) for e in ends],
      bound,
      *(ends(place) for place in places),
    )

  places = sum(sizes) if pooled else max(sizes)
  place, _ = _search(count_first, k, below, places.bit_length())
  selected = candidates_that(lambda *args: [comes_first(*args)], bound, ends(place))
  return [predicate for (predicate,) in selected]


def _search(
  count_below: Callable[[Sequence[Count]], Count], k: Count, below: Count, bits: int
) -> tuple[Count, Count]:
  """The largest numbers of so many bits that at most k things lie below.

  Stops early at numbers that exactly k lie below, whether or not they are the largest.

  Args:
    count_below: takes three vectors of numbers; returns how many things lie below each of them, as
      three rows.
    k: a vector.
    below: how many lie below zero.
    bits: of the numbers.

  Returns:
    The numbers, and how many things lie below them.
  """

  def unfinished(carry):
    shift, _, below = carry
    return (shift >= 0) & ~jnp.all(below.equals(k))

  def find_two_bits(carry):
    shift, number, below = carry
    step = counts.power_of_two(shift)
    larger = [number + step]
    larger.append(larger[0] + step)
    larger.append(larger[1] + step)
    found = count_below(larger)
    for i, candidate in enumerate(larger):
      fits = found[i] <= k
      number = counts.where(fits, candidate, number)
      below = counts.where(fits, found[i], below)
    return shift - 2, number, below

  start = (jnp.int32((bits - 1) // 2 * 2), counts.widen(jnp.zeros_like(k.low)), below)
  _, number, below = lax.while_loop(unfinished, find_two_bits, start)
  return number, below


def _word(count: Count, dtype) -> jax.Array:
  if np.dtype(dtype).itemsize <= 4:
    return count.low.astype(dtype)
  return (count.high.astype(dtype) << 32) | count.low.astype(dtype)


def _ordinal(scores: jax.Array) -> jax.Array:
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
  """The C-order index of each entry, computed in a way that depends on a scalar."""
  position = anything
  for axis in range(x.ndim):
    stride = int(np.prod(x.shape[axis + 1 :], dtype=np.int64))
    position += lax.broadcasted_iota(jnp.uint32, x.shape, axis) * np.uint32(stride)
  return jnp.broadcast_to(position - anything, x.shape)
