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
  return (int(count.high) << 32) | int(count.low)


@given(integers, integers)
def test_arithmetic_is_that_of_64_bit_integers(a, b):
  x, y = counts.from_ints(a), counts.from_ints(b)
  assert to_int(x) == a
  assert to_int(x + y) == (a + b) % 2**64
  assert to_int(x - y) == max(a - b, 0)
  assert bool(x <= y) == (a <= b)
  assert bool(x.equals(y)) == (a == b)
  assert to_int(x.halved()) == a // 2


@pytest.mark.parametrize("exponent", [0, 1, 31, 32, 33, 63])
def test_powers_of_two_cross_the_word(exponent):
  assert to_int(jax.jit(counts.power_of_two)(jnp.int32(exponent))) == 2**exponent


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


def test_counting_writes_nothing_to_memory():
  mask = jax.ShapeDtypeStruct((512, 4096), jnp.bool_)
  for function in (counts.count_true, lambda m: counts.count_true(~m)):
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
