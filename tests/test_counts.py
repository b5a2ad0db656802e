import math
from fractions import Fraction

import compiling
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax import counts

words = st.integers(0, 2**64 - 1)
# Numbers on both sides of each word's boundary are the ones that go wrong.
edges = st.sampled_from([0, 1, 2**16 - 1, 2**16, 2**31, 2**32 - 1, 2**32, 2**33 + 5, 2**63])
integers = words | edges


def to_int(count):
  return (0 if count.high is None else int(count.high) << 32) | int(count.low)


@given(integers, integers)
def test_arithmetic_is_that_of_64_bit_integers(a, b):
  x, y = counts.from_ints(a), counts.from_ints(b)
  assert to_int(x) == a
  assert to_int(x + y) == (a + b) % 2**64
  assert to_int(x - y) == max(a - b, 0)
  assert bool(x <= y) == (a <= b)
  assert bool(x.equals(y)) == (a == b)
  assert to_int(x.halved()) == a // 2


@given(st.integers(0, 2**32 - 1), st.data(), st.booleans(), st.booleans())
def test_in_one_word_arithmetic_is_the_same(a, data, first, second):
  b = data.draw(st.integers(0, 2**32 - 1 - a))  # The sum is to fit, too.
  x, y = counts.from_ints(a).in_one_word(first), counts.from_ints(b).in_one_word(second)
  results = [x + y, x - y, x.halved(), counts.minimum(x, y)]
  assert [to_int(each) for each in results] == [a + b, max(a - b, 0), a // 2, min(a, b)]
  assert all((each.high is None) == (first and second) for each in [x + y, x - y])
  assert bool(x <= y) == (a <= b)
  assert bool(x.equals(y)) == (a == b)
  assert float(x.to_float()) == np.float32(a)
  assert int(x.clipped()) == a


def test_numbers_beyond_a_word_are_clipped_to_the_largest():
  assert int(counts.from_ints(2**40).clipped()) == 2**32 - 1


@given(integers, integers)
def test_the_smaller_and_the_larger_are_those_of_integers(a, b):
  x, y = counts.from_ints(a), counts.from_ints(b)
  assert to_int(counts.minimum(x, y)) == min(a, b)
  assert to_int(counts.maximum(x, y)) == max(a, b)
  both = counts.stack([x, y])
  assert [to_int(both[0]), to_int(both[1])] == [a, b]


@given(st.floats(0, 2.0**64 - 2.0**40, width=32))
def test_floats_lose_their_fractions_and_nothing_else(value):
  assert to_int(counts.from_floats(jnp.float32(value))) == int(value)


@pytest.mark.parametrize("value", [2.0**64, 1e30, np.inf])
def test_floats_beyond_all_counts_are_nearly_the_largest(value):
  assert to_int(counts.from_floats(jnp.float32(value))) == 2**64 - 2**40


def test_words_of_any_width_are_widened():
  assert to_int(counts.widen(jnp.uint16(2**16 - 1))) == 2**16 - 1
  assert to_int(counts.widen(jnp.uint32(2**32 - 1))) == 2**32 - 1
  with jax.enable_x64(True):
    assert to_int(counts.widen(jnp.uint64(2**63 + 5))) == 2**63 + 5


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5))
def test_sums_of_32_bit_counts_do_not_overflow(values):
  total = counts.total(jnp.array(values, jnp.uint32))
  assert total.low.shape == (1,)
  assert to_int(total[0]) == sum(values)


def test_the_largest_sum_of_many_leaves_is_exact():
  values = jnp.full(2**16, 2**32 - 1, jnp.uint32)
  assert to_int(counts.total(values)[0]) == 2**16 * (2**32 - 1)


def test_negative_traced_integers_count_as_nothing():
  assert to_int(counts.from_ints(jnp.int32(-5))) == 0
  assert to_int(counts.from_ints(jnp.int32(5))) == 5
  with jax.enable_x64(True):
    assert to_int(counts.from_ints(jnp.int64(2**40 + 3))) == 2**40 + 3


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("predicates", [1, 3])
def test_true_entries_are_counted_in_arrays_of_any_rank(shape, predicates):
  rng = np.random.default_rng(0)
  arrays = [rng.random(shape) < 0.4 for _ in range(predicates)]
  got = counts.count_true(*map(jnp.asarray, arrays))
  assert {count.dtype for count in got} == {jnp.uint32.dtype}
  assert list(map(int, got)) == [a.sum() for a in arrays]


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_entries_less_than_numbers_are_counted_and_the_next_one_is_found(shape, dtype):
  largest = np.iinfo(dtype).max
  values = np.random.default_rng(0).integers(3, 9, shape).astype(dtype)
  for first in (0, 5, 9, largest):
    *found, least = counts.count_less(jnp.asarray(values), jnp.asarray([first, 6, 8], dtype))
    assert list(map(int, found)) == [(values < number).sum() for number in (first, 6, 8)]
    assert least.dtype == dtype
    assert int(least) == values.min(where=values >= first, initial=largest)


def test_counting_writes_nothing_to_memory():
  mask = jax.ShapeDtypeStruct((512, 4096), jnp.bool_)
  numbers = jnp.arange(3, dtype=jnp.uint32)
  for function in (
    counts.count_true,
    lambda m: counts.count_true(~m),
    lambda m: counts.count_less(m.astype(jnp.uint32), numbers),
  ):
    compiled = jax.jit(function).lower(mask).compile(compiling.AS_USERS)
    assert compiled.memory_analysis().temp_size_in_bytes < 0.01 * 512 * 4096


fractions = st.floats(0, 1, width=32) | st.sampled_from([0.0, 0.5, 1.0, 2.0**-149, 1 - 2.0**-24])
sizes = st.integers(0, 2**48) | st.sampled_from([1, 2, 3, 11_164_352, 2**31, 2**32 + 1, 2**40 - 1])
_rounded_pruned = jax.jit(
  lambda s, high, low: counts.rounded_pruned(s, counts.Count(high, low)), static_argnums=()
)


@given(fractions, sizes)
def test_the_number_of_pruned_weights_is_exact_for_the_float32_value(sparsity, size):
  n = counts.from_ints([size])
  got = _rounded_pruned(jnp.array([sparsity], jnp.float32), n.high, n.low)
  # The value itself as a fraction, so that half a weight is known as such.
  assert to_int(got[0]) == size - round((1 - Fraction(sparsity)) * size)


@pytest.mark.parametrize(("sparsity", "pruned"), [(-0.5, 0), (np.nan, 0), (1.5, 10), (np.inf, 10)])
def test_values_that_are_no_fraction_prune_nothing_or_everything(sparsity, pruned):
  got = counts.rounded_pruned(jnp.array([sparsity], jnp.float32), [10])
  assert to_int(got[0]) == pruned


@given(fractions, sizes, st.sampled_from(["nearest", "up", "down"]))
def test_shares_are_exact_and_rounded_as_asked(fraction, size, rounding):
  found = counts.share(jnp.array([fraction], jnp.float32), counts.from_ints([size]), rounding)
  exact = Fraction(fraction) * size
  expected = {"nearest": round, "up": math.ceil, "down": math.floor}[rounding](exact)
  assert to_int(found[0]) == expected
