"""The search finds the very number from any sample, in few passes, or in as many as it has bits."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import counts
from sparsejax.search import search

# Magnitudes that are drawn from different distributions, as bit patterns.
DISTRIBUTIONS = {
  "normal": lambda rng, n: np.abs(rng.normal(size=n)),
  "of two scales": lambda rng, n: np.abs(rng.normal(size=n)) * rng.choice([1, 1e-4], n),
  "equal": lambda rng, n: np.ones(n),
  "few values": lambda rng, n: rng.integers(0, 3, n),
  "half zeros": lambda rng, n: np.maximum(rng.normal(size=n), 0),
  "all binades": lambda rng, n: np.exp2(rng.uniform(-126, 127, n)),
  "one outlier": lambda rng, n: np.where(np.arange(n) == n // 3, 1e30, 1e-30 * rng.random(n)),
}


def keys_of(distribution, n, dtype=np.float32, seed=0):
  rng = np.random.default_rng(seed)
  values = np.asarray(DISTRIBUTIONS[distribution](rng, n)).astype(dtype)
  return values.view(f"uint{8 * values.dtype.itemsize}")


def find(keys, k, sample, in_one_word=True):
  """The key and place that k keys come before, and how many passes it took to find them."""

  def count(n):
    return counts.from_ints(n).in_one_word(in_one_word)

  passes = 0
  in_order = np.sort(keys)

  def count_before(by_key, bound, guesses):
    nonlocal passes
    passes += 1
    # The first, by the sample; then each leaves half of the keys, or the next a third of numbers.
    bits = np.array([8 * keys.dtype.itemsize, keys.size.bit_length()])
    assert passes <= 1 + bits[1] + 2 * np.ceil(bits / np.log2(3)).sum()
    numbers = [to_int(guesses[i, 0]) for i in range(3)]
    if by_key[0]:
      found = [int(np.searchsorted(in_order, np.uint64(n))) for n in numbers]
      least = int(in_order[found[0]]) if found[0] < keys.size else np.iinfo(keys.dtype).max
    else:
      places = np.flatnonzero(keys == to_int(bound[0]))
      found = [int(np.searchsorted(places, n)) for n in numbers]
      least = 0
    return count(np.array(found)[:, None]), count([least])

  # Loops are run by Python, so that passes can be counted.
  with jax.disable_jit():
    bound, place = search(
      count_before,
      count([k]),
      count([keys.size]),
      jnp.asarray(np.sort(sample))[None],
    )
  return to_int(bound[0]), to_int(place[0]), passes


def to_int(count):
  return (0 if count.high is None else int(count.high) << 32) | int(count.low)


def assert_exact(keys, k, bound, place):
  before = (keys < bound) | ((keys == bound) & (np.arange(keys.size) < place))
  expected = np.zeros(keys.size, bool)
  expected[np.argsort(keys, kind="stable")[:k]] = True
  np.testing.assert_array_equal(before, expected)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=15, deadline=None)
def test_exactly_k_come_before_what_is_found_whatever_the_sample(distribution, data):
  n = data.draw(st.sampled_from([1, 2, 7, 1000, 50_000]))
  keys = keys_of(distribution, n, seed=data.draw(st.integers(0, 9)))
  k = data.draw(st.integers(0, n))
  samples = {
    "fair": np.random.default_rng(1).choice(keys, 256),
    "tiny": keys[:1],
    "lowest": np.zeros(256, keys.dtype),
    "highest": np.full(256, keys.max()),
    "noise": np.random.default_rng(1).integers(0, 2**32 - 1, 64).astype(keys.dtype),
  }
  sample = samples[data.draw(st.sampled_from(list(samples)))]
  bound, place, _ = find(keys, k, sample, in_one_word=data.draw(st.booleans()))
  assert_exact(keys, k, bound, place)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_keys_of_other_widths_are_found(dtype):
  keys = keys_of("normal", 3000, dtype)
  with jax.enable_x64(True):
    for k in (0, 1, 1234, 2999, 3000):
      bound, place, _ = find(keys, k, keys[:256], in_one_word=dtype != np.float64)
      assert_exact(keys, k, bound, place)


def test_among_weights_as_they_are_a_number_is_found_in_few_passes():
  keys = keys_of("normal", 1_000_000)
  sample = keys[:500]
  passes = [find(keys, k, sample)[-1] for k in range(50_000, 1_000_000, 50_000)]
  assert np.mean(passes) <= 6
  assert max(passes) <= 12


@pytest.mark.parametrize("more", [10, 1000])
def test_a_number_right_above_a_gap_is_found_in_few_passes(more):
  # Those pruned before have the key 0, and all others are larger than they were.
  keys = np.sort(keys_of("normal", 1_000_000))
  keys[:700_000] = 0
  keys = np.random.default_rng(0).permutation(keys)
  _, _, passes = find(keys, 700_000 + more, keys[:500])
  assert passes <= 7


@pytest.mark.parametrize("distribution", ["half zeros", "equal", "few values"])
def test_a_tie_is_cut_in_few_passes_wherever(distribution):
  keys = keys_of(distribution, 1_000_000)
  for k in (1, 10_000, 400_000, 480_000, 498_000, 999_000, 999_999):
    bound, place, passes = find(keys, k, keys[:500])
    assert_exact(keys, k, bound, place)
    assert passes <= 12, k


def test_weights_that_were_rounded_are_found_in_few_passes():
  keys = keys_of("normal", 1_000_000) & np.uint32(0xFFFF0000)
  passes = [find(keys, k, keys[:500])[-1] for k in range(50_000, 1_000_000, 50_000)]
  assert np.mean(passes) <= 10
  assert max(passes) <= 20


def test_nothing_and_everything_take_no_pass():
  keys = keys_of("normal", 1000)
  for k in (0, 1000):
    bound, place, passes = find(keys, k, keys[:100])
    assert passes == 0
    assert_exact(keys, k, bound, place)
