"""Exactly the k smallest scores of a pytree: stable, sharded, without sorting.

The scores' bit patterns, mapped to integers in the order of the values, are followed by their
positions in the tree, which cut ties: one long number for each weight, all different. Which of them
k others are less than is found by passes over the scores that count and write nothing; positions
are looked at only if there is a tie to cut.
"""

import functools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import PyTreeDef

from sparsejax import counts
from sparsejax.counts import Count
from sparsejax.masks import where
from sparsejax.ordinals import FLOATS, UNSIGNED, common_type, ordinal, widened
from sparsejax.search import search
from sparsejax.trees import PyTree


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
  leaves, treedef = check_scores(scores)
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


def check_scores(scores: PyTree) -> tuple[list[jax.Array], PyTreeDef]:
  """The leaves of a tree of scores, and its structure; a ValueError names a leaf that is none."""
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
  return leaves, treedef


def _count_of(k: Any, treedef: PyTreeDef) -> Count:
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
    if not isinstance(value, jax.core.Tracer) and value < 0:
      raise ValueError(f"k must not be negative, got {value!r}: use 0 to select nothing.")
  if not per_leaf:
    return counts.from_ints(np.zeros([0]))
  parts = [
    counts.from_ints(value if isinstance(value, jax.Array) else min(int(value), 2**64 - 1))
    for value in per_leaf
  ]
  return jax.tree.map(lambda *words: jnp.stack(words), *parts)


def _total(arrays: Sequence[jax.Array], k: Count) -> Count:
  """How many entries there are in all, or in each array if there is a count for each."""
  sizes = [array.size for array in arrays]
  return counts.from_ints([sum(sizes)] if k.low.shape[0] == 1 else sizes)


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
  pooled = k.low.shape[0] == 1
  sizes = [v.size for v in values]
  offsets = np.cumsum([0, *sizes[:-1]]) if pooled else np.zeros(len(sizes))
  order = _balanced(sorted(range(len(sizes)), key=lambda i: -sizes[i]))
  values, offsets = ([each[i] for i in order] for each in (values, offsets))
  active = [None] * len(values) if active is None else [active[i] for i in order]
  k = k if pooled else k[np.array(order)]
  dtype = common_type(v.dtype for v in values)
  key_type = UNSIGNED[dtype.itemsize]
  word_type = np.promote_types(key_type, np.uint32)
  largest = word_type.type(np.iinfo(word_type).max)
  is_small = key_type != np.uint64 and (not pooled or sum(sizes) < 2**32)
  k, offsets, total = (
    c.in_one_word(is_small)
    for c in (counts.minimum(k, _total(values, k)), counts.from_ints(offsets), _total(values, k))
  )

  def key_of(array, mask):
    key = ordinal(widened(score(array), dtype))
    return key if mask is None else where(mask, key, key_type(0))

  def in_each(test, *vectors):
    """For each array, what `test` says of its keys and positions, given its entries of vectors."""
    # Vectors that all have, and an index that is read from memory: so arrays that are alike share a
    # compiled kernel. (A single number, or one repeated, would be part of the code.)
    indices = [np.array([i, -1], np.int32) for i in range(len(values))]
    # Tied to the loop's own variables, so that XLA computes keys and positions in each pass instead
    # of hoisting them out of the loop, into memory.
    arrays, masks, indices, vectors = lax.optimization_barrier((values, active, indices, vectors))

    @jax.jit  # Arrays that are alike are traced once.
    def in_one(array, mask, index, *vectors):
      entries = [
        v[..., 0] if v.shape[-1] == 1 else lax.dynamic_index_in_dim(v, index[0], -1, keepdims=False)
        for v in vectors
      ]
      key = key_of(array, mask)
      return test(key, _positions(key, entries[0].astype(jnp.uint32)), *entries)

    return [in_one(*of_array, *vectors) for of_array in zip(arrays, masks, indices)]

  def in_arrays(place):
    """A place in the tree as a position in each array."""
    return (place - offsets[None]).clipped()

  def count_before(by_key, bound, guesses):
    """As `search` wants it."""
    places = in_arrays(guesses).astype(word_type)
    numbers = jnp.where(by_key[None], _word(guesses, word_type), places)

    def test(key, position, by_key, bound, numbers):
      place = jnp.where(key == bound, position.astype(word_type), largest)
      return counts.count_less(jnp.where(by_key, key.astype(word_type), place), numbers)

    *found, least = map(jnp.stack, zip(*in_each(test, by_key, _word(bound, key_type), numbers)))
    found = (counts.total if pooled else counts.widen)(jnp.stack(found))
    least = counts.widen(jnp.min(least, keepdims=True) if pooled else least)
    return found.in_one_word(is_small), least.in_one_word(is_small)

  masks = None if active[0] is None else _samples(active, pooled)
  sample = key_of(_samples(values, pooled), masks)
  bound, place = search(count_before, k, total, jnp.sort(sample))

  def comes_before(key, position, bound, end):
    return (key < bound) | ((key == bound) & (position < end))

  before = in_each(comes_before, _word(bound, key_type), in_arrays(place[None])[0])
  before = [b if mask is None else b | ~mask for b, mask in zip(before, active)]
  return [before[order.index(i)] for i in range(len(order))]


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
  k = counts.minimum(k, _total(values, k)) + before
  selected = select(values, k, active=candidates, score=score)
  return [s & c for s, c in zip(selected, candidates)]


def _balanced(items: list[Any]) -> list[Any]:
  """Sorted items so that each half, quarter and so on has large ones and small ones.

  XLA's CPU backend gives its threads halves of what can be computed at once, by their number.
  """
  return items if len(items) < 3 else _balanced(items[::2]) + _balanced(items[1::2])


def _samples(arrays: Sequence[jax.Array], pooled: bool) -> jax.Array:
  """Some entries of all arrays together, or of each; of those that are alike at the same positions.

  Returns:
    At least one row. # shape=(1 or len(arrays), any)
  """
  total = max(sum(x.size for x in arrays), 1)
  # A larger sample would save a part of a pass, and take longer to gather.
  number = min(int(np.clip(total // 2048, 128, 2048)), total)
  numbers = [number * x.size / total if pooled else number / len(arrays) for x in arrays]
  dtype = common_type(x.dtype for x in arrays)
  found = [_entries(x, math.ceil(n)).astype(dtype) for x, n in zip(arrays, numbers)]
  return jnp.concatenate(found)[None] if pooled else jnp.stack(found)


@functools.partial(jax.jit, static_argnames="number")
def _entries(x: jax.Array, number: int) -> jax.Array:
  """So many entries, evenly spread, on each device."""
  if not x.size or max(x.shape, default=1) >= 2**31:
    # There are none, or JAX cannot index them. Any sample will do, though others save passes.
    return jnp.zeros([number], x.dtype)
  # Multiples of the golden ratio fall in step with no axis.
  places = np.arange(number) * (5**0.5 - 1) / 2 % 1 * x.size
  x = jnp.atleast_1d(x)
  index = tuple(i.astype(np.int32) for i in np.unravel_index(places.astype(np.int64), x.shape))
  everywhere = NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(None))
  return x.at[index].get(mode="promise_in_bounds", out_sharding=everywhere)


def _word(count: Count, dtype) -> jax.Array:
  if np.dtype(dtype).itemsize <= 4:
    return count.low.astype(dtype)
  return (count.high.astype(dtype) << 32) | count.low.astype(dtype)


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
