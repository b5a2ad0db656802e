"""Counts of weights that stay exact: 64-bit integers in JAX's 32-bit arithmetic.

A pool of weights may hold more than 2**32 of them, and a sparsity that is only known on the device
has to become a number of weights without a rounding error. JAX has no 64-bit integers unless
`jax_enable_x64` is set, so a count is a pair of 32-bit words.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_WORD = 2**32
_ONE, _INFINITY = np.array([1, np.inf], np.float32).view(np.uint32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Count:
  """Integers in [0, 2**64), of any shape.

  Attributes:
    high: the high words, or None if all numbers are known to be below 2**32, and what is computed
      of such numbers, too. # dtype=uint32
    low: the low words. # dtype=uint32, the shape of `high`
  """

  high: jax.Array | None
  low: jax.Array

  def __add__(self, other: Count) -> Count:
    a, b = _alike(self, other)
    low = a.low + b.low
    carried = (low < b.low).astype(jnp.uint32)
    return Count(None if a.high is None else a.high + b.high + carried, low)

  def __sub__(self, other: Count) -> Count:
    """The difference, or 0 where `other` is larger."""
    a, b = _alike(self, other)
    borrowed = (a.low < b.low).astype(jnp.uint32)
    high = None if a.high is None else a.high - b.high - borrowed
    return jax.tree.map(lambda word: jnp.where(b <= a, word, 0), Count(high, a.low - b.low))

  def __le__(self, other: Count) -> jax.Array:
    a, b = _alike(self, other)
    if a.high is None:
      return a.low <= b.low
    return (a.high < b.high) | ((a.high == b.high) & (a.low <= b.low))

  def __getitem__(self, index) -> Count:
    return jax.tree.map(lambda word: word[index], self)

  def equals(self, other: Count) -> jax.Array:
    a, b = _alike(self, other)
    return a.low == b.low if a.high is None else (a.high == b.high) & (a.low == b.low)

  def to_float(self) -> jax.Array:
    """The nearest float32, or one beside it."""
    low = self.low.astype(jnp.float32)
    return low if self.high is None else self.high.astype(jnp.float32) * float(_WORD) + low

  def halved(self) -> Count:
    if self.high is None:
      return Count(None, self.low >> 1)
    return Count(self.high >> 1, (self.high << 31) | (self.low >> 1))

  def clipped(self) -> jax.Array:
    """The numbers as words, those that are larger as the largest."""
    largest = np.uint32(_WORD - 1)
    return self.low if self.high is None else jnp.where(self.high > 0, largest, self.low)

  def in_one_word(self, does_fit: bool = True) -> Count:
    """The same without high words, for numbers that are known to be below 2**32."""
    return Count(None, self.low) if does_fit else self


def _alike(a: Count, b: Count) -> tuple[Count, Count]:
  if (a.high is None) == (b.high is None):
    return a, b
  return tuple(widen(c.low) if c.high is None else c for c in (a, b))


def where(condition: jax.Array, a: Count, b: Count) -> Count:
  return jax.tree.map(lambda x, y: jnp.where(condition, x, y), *_alike(a, b))


def minimum(a: Count, b: Count) -> Count:
  return where(a <= b, a, b)


def maximum(a: Count, b: Count) -> Count:
  return where(a <= b, b, a)


def from_ints(values) -> Count:
  """Python or NumPy integers (of any size below 2**64, nested or not), or an array of JAX's.

  A negative integer in an array of JAX's counts as 0. What is a `Count` already stays one.
  """
  if isinstance(values, Count):
    return values
  if isinstance(values, jax.Array):
    values = jnp.maximum(values, 0)
    wide = values.dtype.itemsize > 4
    high = (values >> 32).astype(jnp.uint32) if wide else jnp.zeros(values.shape, jnp.uint32)
    return Count(high, values.astype(jnp.uint32))
  values = np.asarray(values, np.uint64)
  return Count(
    jnp.asarray((values // _WORD).astype(np.uint32)),
    jnp.asarray((values % _WORD).astype(np.uint32)),
  )


def from_floats(values: jax.Array) -> Count:
  """Non-negative float32 numbers without their fractions; from 2**64 on, nearly that."""
  values = jnp.minimum(values, np.float32(2.0**64 - 2.0**40))
  high = jnp.floor(values * (1.0 / _WORD))
  return Count(high.astype(jnp.uint32), (values - high * float(_WORD)).astype(jnp.uint32))


def widen(words: jax.Array) -> Count:
  """Unsigned integers of at most 64 bits."""
  high = words >> 32 if words.dtype.itemsize > 4 else jnp.zeros_like(words)
  return Count(high.astype(jnp.uint32), words.astype(jnp.uint32))


def zeros_like(*words: jax.Array) -> Count:
  """Zeros of the shape that the arrays have together; inside of `jax.shard_map` they vary as these.

  So they can be what a loop begins with, whose results vary.
  """
  zero = sum(0 * word.astype(jnp.uint32) for word in words)
  return Count(zero, zero)


def stack(items: Sequence[Count]) -> Count:
  return jax.tree.map(lambda *words: jnp.stack(words), *items)


def total(words: jax.Array) -> Count:
  """Sums 32-bit counts over the last axis (up to 2**16 of them), which stays with length 1."""
  halves = jnp.stack([words & 0xFFFF, words >> 16])
  low, high = jnp.sum(halves, axis=-1, keepdims=True, dtype=jnp.uint32)
  return widen(low) + Count(high >> 16, high << 16)


@jax.jit
def count_true(*predicates: jax.Array) -> tuple[jax.Array, ...]:
  """How many entries of each array are True, in one pass over memory.

  Args:
    *predicates: boolean arrays of one shape with fewer than 2**32 entries.

  Returns:
    A count for each. # shape=(), dtype=uint32
  """
  # A reduction of one operand makes XLA's CPU backend write the operand to memory first; one of
  # several is fused with what computes them. The barrier keeps a second one alive.
  counted = predicates if len(predicates) > 1 else (predicates[0], ~predicates[0])
  operands = tuple(jnp.atleast_1d(p).astype(jnp.uint32) for p in counted)
  sums = lax.optimization_barrier(
    lax.reduce(
      operands,
      (np.uint32(0),) * len(operands),
      lambda a, b: tuple(x + y for x, y in zip(a, b)),
      tuple(range(operands[0].ndim)),
    )
  )
  return tuple(sums[: len(predicates)])


def count_less(values: jax.Array, numbers: jax.Array) -> tuple[jax.Array, ...]:
  """How many entries are less than each number, and the smallest that is not less than the first.

  Args:
    values: unsigned integers, fewer than 2**32.
    numbers: a vector of the same type.

  Returns:
    A count for each, and an entry, or the largest number of its type if there is none.
  """
  values = jnp.atleast_1d(values)
  largest = np.iinfo(values.dtype).max
  operands = [(values < number).astype(jnp.uint32) for number in numbers]
  operands.append(jnp.where(values < numbers[0], values.dtype.type(largest), values))
  return tuple(
    lax.reduce(
      operands,
      [np.uint32(0)] * len(numbers) + [values.dtype.type(largest)],
      lambda a, b: (*(x + y for x, y in zip(a[:-1], b[:-1])), jnp.minimum(a[-1], b[-1])),
      tuple(range(values.ndim)),
    )
  )


def rounded_pruned(sparsity: jax.Array, sizes: np.ndarray) -> Count:
  r"""The exact :math:`n - \mathrm{round}((1 - s) n)`, with ties to even as Python rounds.

  Args:
    sparsity: float32 values in [0, 1]; below 0 and NaN count as 0, above 1 as 1.
    sizes: the n, known when tracing, in the shape of `sparsity`.
  """
  n = from_ints(sizes)
  share, half, rest = _share(sparsity, n)
  odd_kept = (n - share).low & 1 == 1
  return share + widen((half & (rest | odd_kept)).astype(jnp.uint32))


def share(fraction: jax.Array, n: Count, rounding: str = "nearest") -> Count:
  r"""The exact :math:`f n`, rounded to an integer.

  Args:
    fraction: float32 values in [0, 1]; below 0 and NaN count as 0, above 1 as 1.
    n: in the shape of `fraction`.
    rounding: "nearest", with ties to even, "up" or "down".
  """
  whole, half, rest = _share(fraction, n)
  odd = whole.low & 1 == 1
  more = {"nearest": half & (rest | odd), "up": half | rest, "down": jnp.zeros_like(half)}[rounding]
  return whole + widen(more.astype(jnp.uint32))


@jax.jit
def _share(fraction: jax.Array, n: Count) -> tuple[Count, jax.Array, jax.Array]:
  """The whole part of a product, whether its fraction has a half, and whether it has more."""
  bits = lax.bitcast_convert_type(fraction.astype(jnp.float32), jnp.uint32)
  # Compared as bits, since denormals may be flushed to zero where they are compared as numbers.
  bits = jnp.where(bits <= _INFINITY, jnp.minimum(bits, _ONE), np.uint32(0))
  exponent = bits >> 23
  mantissa = (bits & 0x7FFFFF) | jnp.where(exponent > 0, np.uint32(1 << 23), np.uint32(0))
  # fraction = mantissa / 2**places
  places = 150 - jnp.maximum(exponent, 1).astype(jnp.int32)
  nothing = zeros_like(bits, n.high, n.low)

  def share_of_bit(position):
    shift = places - position
    inside = (shift >= 0) & (shift < 24)
    bit = mantissa >> jnp.clip(shift, 0, 23).astype(jnp.uint32)
    return where(inside & (bit & 1 == 1), n, nothing)

  def add_bit(i, carry):
    # Horner's rule from the last binary place to the first: no bit of the product is lost, those
    # behind the point are summed up in one for "half" and one for "more than nothing".
    share, half, rest = carry
    share += share_of_bit(149 - i)
    return share.halved(), share.low & 1 == 1, rest | half

  none = nothing.low > 0
  share, half, rest = lax.fori_loop(0, 149, add_bit, (nothing, none, none))
  return share + share_of_bit(0), half, rest
