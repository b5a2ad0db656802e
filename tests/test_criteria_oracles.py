"""What the original code of dynamic sparse training drops and grows; `oracles/README.md` says whose.

Where an original differs from its rule, the counts and the criteria that correct for it are here.
"""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax
from sparsejax import allocation, criteria, rules
from sparsejax.criteria import Leaf
from sparsejax.transform import Call

FOLDER = pathlib.Path(__file__).parent / "oracles"


def read(name, part="cases"):
  return json.loads((FOLDER / f"{name}.json").read_text())[part]


DROP, GROWTH, GLOBAL = read("drop_criteria"), read("growth"), read("global_pruning")
MISC = read("dynamic_misc", "entries")
LAYERS = {case: list(content["layers"]) for case, content in read("global_magnitude").items()}
RATES = ["0.5", "0.3", "0.1", "0.005"]
WITHOUT_TIES = [case for case in DROP if case != "edge_ties"]

# No set_released, on purpose: it drops all but the most negative of the negative weights, by a slip.
CRITERIA = {
  "magnitude": criteria.magnitude,
  "mest_g0.1": criteria.mest(0.1),
  "mest_g1": criteria.mest(),
  "mest_g10": criteria.mest(10.0),
  "mest_g1000": criteria.mest(1000.0),
  "snip": criteria.snip,
  "snip_unfixed": criteria.snip,
  "sensitivity": criteria.sensitivity,
  "rsensitivity": criteria.reciprocal_sensitivity,
  "gradstep_g1": criteria.gradient_step(),
  "taylor_fo": criteria.taylor,
  # It drops the weights that a step along the gradient would change most.
  "snip_plus": lambda leaf: -leaf.weight * leaf.gradient,
}
# What the original adds, so that active weights rank above inactive ones, which score zero.
OFFSETS = {"snip": 1e-5, "sensitivity": 1.0, "rsensitivity": 1.0}


@functools.cache
def load(name):
  with np.load(FOLDER / f"{name}.npz") as file:
    return dict(file)


def mask_at(name, path):
  return load(name)[path].astype(bool)


def context(case, **more):
  arrays = load("drop_criteria")
  weight, gradient = (jnp.asarray(arrays[f"{case}/{kind}"]) for kind in ("weight", "grad"))
  return Leaf(
    weight, jnp.asarray(mask_at("drop_criteria", f"{case}/mask")), gradient=gradient, **more
  )


def drop_case(case, method, rate):
  """How many weights are to be dropped, how many the original drops, and which it keeps."""
  active = DROP[case]["nnz"]
  removed = DROP[case]["results"][method][rate]["removed"]
  kept = mask_at("drop_criteria", f"{case}/out/{method}/r{rate}")
  mask = mask_at("drop_criteria", f"{case}/mask")
  assert int(mask.sum()) == active and not (kept & ~mask).any()
  assert int(kept.sum()) == active - removed
  return math.ceil(float(rate) * active), removed, kept


def drop_cases(method, cases=DROP):
  return [(case, rate) for case in cases for rate in DROP[case]["results"][method]]


def lowest(scores, k, among):
  return np.asarray(sparsejax.select_smallest(scores, k, among=among))


def keep(criterion, leaf, k):
  return np.asarray(leaf.mask) & ~lowest(criterion(leaf), k, leaf.mask)


def tied_with(dropped, scores, among):
  """What a strict threshold drops: all that score no higher than the highest dropped."""
  return among & (scores <= np.max(scores, where=dropped, initial=-np.inf))


def assert_equal_but_for_ties(chosen, expected, scores):
  """The originals sort in no fixed order of ties: weights of one score stand for each other."""
  scores = np.asarray(scores)
  np.testing.assert_array_equal(np.sort(scores[chosen]), np.sort(scores[expected]))


# Dropping in each layer.


@pytest.mark.parametrize("method", CRITERIA)
def test_scores_are_those_of_fantastic_weights(method):
  for case in DROP:
    if f"{case}/score/{method}" not in load("drop_criteria"):  # It has none to drop at rate 0.
      assert (case, method) == ("edge_rate_zero", "magnitude")
      continue
    leaf = context(case)
    active = np.asarray(leaf.mask)
    scores = np.asarray(CRITERIA[method](leaf))[active]
    expected = load("drop_criteria")[f"{case}/score/{method}"][active]
    if method == "snip_plus":  # It drops the largest.
      expected = -expected
    if method not in OFFSETS:
      np.testing.assert_array_equal(scores, expected)
      continue
    # It divides by no less than 1e-8.
    is_finite = np.isfinite(scores)
    assert is_finite.all() or case == "edge_ties"
    assert (expected[~is_finite] > 1e5).all()
    np.testing.assert_allclose(
      scores[is_finite] + np.float32(OFFSETS[method]), expected[is_finite], rtol=1e-4
    )


@pytest.mark.parametrize("method", CRITERIA)
def test_dropping_is_that_of_fantastic_weights(method):
  for case, rate in drop_cases(method, WITHOUT_TIES):
    k, removed, expected = drop_case(case, method, rate)
    assert removed == k
    np.testing.assert_array_equal(keep(CRITERIA[method], context(case), k), expected)


# It ranks inactive weights among the active ones, at zero: where active ones score zero too, some
# of both are dropped. Elsewhere their number is as asked for.
DROPPED_AT_ZERO = {
  "magnitude": {"0.1": 23, "0.005": 20},
  "granet_imagenet_magnitude": {"0.1": 23, "0.005": 20},
  **{name: {"0.005": 4} for name in CRITERIA if name.startswith(("mest", "gradstep"))},
  **{name: {"0.3": 44, "0.1": 36, "0.005": 34} for name in ("snip_unfixed", "taylor_fo")},
}


@pytest.mark.parametrize("method", [*CRITERIA, "granet_imagenet_magnitude"])
def test_dropping_differs_from_the_originals_only_among_ties(method):
  criterion, leaf = CRITERIA.get(method, criteria.magnitude), context("edge_ties")
  for rate in RATES:
    k, removed, expected = drop_case("edge_ties", method, rate)
    assert removed == DROPPED_AT_ZERO.get(method, {}).get(rate, k)
    kept = keep(criterion, leaf, removed)
    assert_equal_but_for_ties(kept, expected, criterion(leaf))


@pytest.mark.parametrize("method", ["granet_imagenet_magnitude", "granet_magnitude_death"])
def test_dropping_by_magnitude_is_that_of_granet(method):
  for case, rate in drop_cases(method, WITHOUT_TIES):
    k, removed, expected = drop_case(case, method, rate)
    assert removed == k
    np.testing.assert_array_equal(keep(criteria.magnitude, context(case), k), expected)


def test_granet_on_cifar_drops_all_that_tie():
  leaf = context("edge_ties")
  scores, mask = np.abs(leaf.weight), np.asarray(leaf.mask)
  for rate in RATES:
    k, removed, expected = drop_case("edge_ties", "granet_magnitude_death", rate)
    dropped = tied_with(lowest(scores, k, mask), scores, mask)
    assert removed == dropped.sum() > k
    np.testing.assert_array_equal(mask & ~dropped, expected)


def test_dropping_at_random_is_that_of_fantastic_weights_given_its_permutation():
  for case, rate in drop_cases("random"):
    k, removed, expected = drop_case(case, "random", rate)
    order = jnp.float32(load("drop_criteria")[f"{case}/random_perm"])
    kept = keep(lambda leaf, order=order: order.reshape(leaf.weight.shape), context(case), k)
    assert removed == k
    np.testing.assert_array_equal(kept, expected)


def test_dropping_of_each_sign_is_that_of_fantastic_weights_but_for_the_number():
  for case, rate in drop_cases("set_fixed"):
    k, removed, expected = drop_case(case, "set_fixed", rate)
    leaf = context(case)
    # It drops as many of each sign, at least one, and all active zeros.
    signs = [np.asarray(leaf.mask & (sign * leaf.weight > 0)) for sign in (1, -1)]
    of_each = max(1, math.ceil(k / 2))
    count = of_each * sum(bool(sign.any()) for sign in signs)
    nonzero = Leaf(leaf.weight, jnp.asarray(signs[0] | signs[1]), count=jnp.uint32(count))
    dropped = ~keep(criteria.each_sign, nonzero, count)
    # Its thresholds are strict.
    dropped = [tied_with(dropped & sign, np.abs(leaf.weight), sign) for sign in signs]
    kept = (signs[0] | signs[1]) & ~(dropped[0] | dropped[1])
    if case != "edge_ties":
      assert removed == count
    np.testing.assert_array_equal(kept, expected)


def test_dropping_of_each_sign_in_proportion_is_that_of_set():
  for number in range(4):
    entry, name = MISC[f"set_keras/{number}"], f"set_keras/{number}"
    removed = [entry["removed_pos"], entry["removed_neg"]]
    # It rounds the number of each sign up.
    assert removed == [math.ceil(entry["zeta"] * entry[n]) for n in ("n_pos", "n_neg")]
    mask = jnp.asarray(mask_at("dynamic_misc", f"{name}/mask"))
    weight = jnp.asarray(load("dynamic_misc")[f"{name}/weight"])
    leaf = Leaf(weight, mask, count=jnp.uint32(sum(removed)))
    kept = keep(criteria.each_sign_in_proportion, leaf, sum(removed))
    np.testing.assert_array_equal(kept, mask_at("dynamic_misc", f"{name}/core"))


def test_set_of_sparse_momentum_drops_half_by_magnitude_and_half_of_the_negative_weights():
  """Of those that tie, one weight may be in both halves, and zeros compete with inactive ones."""
  tied = {"0.5": (32, 31), "0.3": (24, 20), "0.1": (20, 7), "0.005": (20, 1)}
  for case, rate in drop_cases("set_snfs"):
    k, removed, expected = drop_case(case, "set_snfs", rate)
    leaf = context(case)
    half = math.ceil(k / 2)
    small, negative = tied[rate] if case == "edge_ties" else (half, half)
    kept = jnp.asarray(keep(criteria.magnitude, leaf, small))
    candidates = kept & (leaf.weight < 0)
    negative = lowest(leaf.weight, negative, candidates)
    kept = np.asarray(kept) & ~negative
    if case != "edge_ties":
      np.testing.assert_array_equal(kept, expected)
    size, least = np.abs(leaf.weight), 0.05
    assert_equal_but_for_ties(kept, expected, np.where(size <= least, size, leaf.weight))


def test_snip_half_drops_half_of_the_lowest_scores_and_half_of_the_highest():
  """Or the whole layer, where half is none: it takes the last none of a list for all of it."""
  tied = {"0.5": 41, "0.3": 39, "0.1": 34}  # Zeros compete with inactive ones.
  for case, rate in drop_cases("snip_half"):
    k, removed, expected = drop_case(case, "snip_half", rate)
    leaf = context(case)
    if k // 2 == 0:
      assert not expected.any()
      continue
    is_tied = case == "edge_ties"
    scores = criteria.snip(leaf)
    kept = keep(criteria.snip, leaf, tied[rate] if is_tied else k // 2)
    kept = kept & ~lowest(-scores, k // 2, jnp.asarray(kept))
    if not is_tied:
      np.testing.assert_array_equal(kept, expected)
    assert_equal_but_for_ties(kept, expected, scores)


# Dropping over all layers.


def global_contexts(case):
  arrays = load("global_magnitude") | load("global_pruning")
  return [
    Leaf(
      *(jnp.asarray(arrays[f"{case}/{kind}/{name}"]) for kind in ("weight",)),
      jnp.asarray(arrays[f"{case}/mask/{name}"].astype(bool)),
      gradient=jnp.asarray(arrays[f"{case}/grad/{name}"]),
    )
    for name in LAYERS[case]
  ]


def global_case(case, method, rate):
  """How many weights are to be dropped, and which the original keeps."""
  counts = GLOBAL[case]["results"][method][rate]
  kept = [mask_at("global_pruning", f"{case}/out/{method}/r{rate}/{n}") for n in LAYERS[case]]
  assert total(kept) == counts["nnz_after"]
  return math.ceil(float(rate) * counts["nnz_before"]), kept


def total(masks):
  return sum(int(np.sum(mask)) for mask in masks)


def global_cases(*methods):
  return [
    (case, method, rate)
    for case, content in GLOBAL.items()
    for method, found in content["results"].items()
    for rate in found
    if method in methods
  ]


def without(masks, scores, k, among=None):
  dropped = sparsejax.select_smallest(scores, k, among=masks if among is None else among)
  return [np.asarray(mask & ~drop) for mask, drop in zip(masks, dropped, strict=True)]


def assert_equal_masks(actual, expected):
  for mask, wanted in zip(actual, expected, strict=True):
    np.testing.assert_array_equal(np.asarray(mask), wanted)


@pytest.mark.parametrize(
  ("case", "method", "rate"),
  global_cases("snip", "mest_g1", "rsensitivity", "sensitivity", "taylor_fo", "gradstep_g1"),
)
def test_dropping_over_all_layers_is_that_of_fantastic_weights(case, method, rate):
  leaves = global_contexts(case)
  masks = [leaf.mask for leaf in leaves]
  k, expected = global_case(case, method, rate)
  assert total(masks) - k == total(expected)
  kept = without(masks, [CRITERIA[method](leaf) for leaf in leaves], k)
  if (case, method) != ("g_d40", "sensitivity"):
    assert_equal_masks(kept, expected)
    return
  # It does not look at masks then: inactive weights, |g| over 1e-8, replace all that were active.
  assert not any((mask & old).any() for mask, old in zip(masks, expected, strict=True))
  scores = [jnp.abs(leaf.gradient) / (jnp.abs(leaf.weight) + 1e-8) for leaf in leaves]
  everything = [jnp.ones_like(mask) for mask in masks]
  pruned = sum(mask.size for mask in masks) - total(expected)
  assert_equal_masks(without(everything, scores, pruned), expected)


@pytest.mark.parametrize(("case", "method", "rate"), global_cases("set", "set_negativity"))
def test_dropping_of_each_sign_over_all_layers_is_that_of_fantastic_weights(case, method, rate):
  leaves = global_contexts(case)
  k, expected = global_case(case, method, rate)
  signs = [[leaf.mask & (sign * leaf.weight > 0) for leaf in leaves] for sign in (1, -1)]
  half = math.ceil(k / 2)
  # By "negativity" all but half - 1 of the negative weights go, however many are to be kept.
  of_negative = half if method == "set" else total(signs[1]) - (half - 1)
  scores = [criteria.magnitude(leaf) for leaf in leaves]
  kept = zip(without(signs[0], scores, half), without(signs[1], scores, of_negative), strict=True)
  assert_equal_masks([positive | negative for positive, negative in kept], expected)


# Growing.


def growth_case(case):
  """How many weights grow, the masks before, and the arrays of the layer."""
  layer = case.split("/")[0]
  arrays = {
    name.removeprefix(f"{layer}/"): array
    for name, array in (load("drop_criteria") | load("growth")).items()
    if name.startswith(f"{layer}/")
  }
  return GROWTH[case]["k"], mask_at("growth", f"{case}/mask_after_death"), arrays


def grown_in(case, method, after_drop):
  masks = mask_at("growth", f"{case}/out/{method}")
  assert not (after_drop & ~masks).any()
  grown = masks & ~after_drop
  assert grown.sum() == GROWTH[case][method]["grown"]
  return grown


@pytest.mark.parametrize(
  "method",
  ["gradient_granet", "gradient_fw_fixed", "gradient_fw_unfixed", "momentum_sgd", "momentum_adam"],
)
def test_growth_is_that_of_granet_and_fantastic_weights(method):
  criterion = criteria.gradient if method.startswith("gradient") else criteria.momentum
  first, second = {
    "momentum_sgd": ("momentum_buffer", None),
    "momentum_adam": ("adam_exp_avg", "adam_exp_avg_sq"),
  }.get(method, (None, None))
  for case in GROWTH:
    k, after_drop, arrays = growth_case(case)
    leaf = Leaf(
      jnp.asarray(arrays["weight"]),
      jnp.asarray(after_drop),
      gradient=jnp.asarray(arrays["grad"]),
      moment=lambda arrays=arrays: (arrays[first], None if second is None else arrays[second]),
    )
    scores = criterion(leaf)
    grown, expected = lowest(-scores, k, ~leaf.mask), grown_in(case, method, after_drop)
    if case.startswith("edge_ties"):
      assert_equal_but_for_ties(grown, expected, scores)
    else:
      np.testing.assert_array_equal(grown, expected)


def change(stage, weights, masks, gradients):
  return stage(Call(jnp.int32(0), weights, masks, gradients, None))


@pytest.mark.parametrize("method", ["random_fw", "random_granet"])
@pytest.mark.parametrize("case", GROWTH)
def test_growth_of_each_candidate_by_itself_is_that_of_granet_and_fantastic_weights(case, method):
  k, after_drop, arrays = growth_case(case)
  stage = rules.drop_and_grow(
    lambda leaf: jnp.float32(after_drop),
    # A candidate grows if its number is low there, and if it is high here.
    lambda leaf: 1 - arrays["uniform"],
    lambda count: k / (k + after_drop.sum()),
    exact_growth=False,
  )
  masks = [jnp.asarray(arrays["mask"].astype(bool))]
  (found,) = change(stage, [jnp.asarray(arrays["weight"])], masks, None)
  expected = grown_in(case, method, after_drop)
  np.testing.assert_array_equal(found, after_drop | expected)


# One round of pruning, with and without regrowth: GraNet's study of plasticity.


def plasticity_case(method, rate):
  arrays, names = load("dynamic_misc"), ["conv.weight", "fc1.weight", "classifier.weight"]
  weights = [jnp.asarray(arrays[f"plasticity/weight/{name}"]) for name in names]
  gradients = [jnp.asarray(arrays[f"plasticity/grad/{name}"]) for name in names]
  counts = MISC[f"plasticity/{method}/r{rate}"]
  masks = [weight != 0 for weight in weights]
  expected = [mask_at("dynamic_misc", f"plasticity/{method}/r{rate}/{name}") for name in names]
  for kind, found in (("nnz_before", masks), ("nnz_after", expected)):
    assert [counts[kind][name] for name in names] == [int(mask.sum()) for mask in found]
  return weights, gradients, masks, expected


@pytest.mark.parametrize("rate", ["0.2", "0.5", "0.9"])
@pytest.mark.parametrize("method", ["prune_uniform", "prune_global"])
def test_pruning_once_is_that_of_granet(method, rate):
  weights, _, masks, expected = plasticity_case(method, rate)
  counts = [math.ceil(float(rate) * int(mask.sum())) for mask in masks]
  k = counts if method == "prune_uniform" else math.ceil(float(rate) * total(masks))
  assert_equal_masks(without(masks, [jnp.abs(weight) for weight in weights], k), expected)


@pytest.mark.parametrize("rate", ["0.2", "0.5", "0.9"])
@pytest.mark.parametrize("method", ["prune_and_grow_uniform", "prune_and_grow_global"])
def test_pruning_and_regrowing_once_is_that_of_granet(method, rate):
  weights, gradients, masks, expected = plasticity_case(method, rate)
  stage = rules.drop_and_grow(
    criteria.magnitude,
    criteria.gradient,
    lambda count: float(rate),
    rounding="up",
    drop_globally=method.endswith("global"),
  )
  assert_equal_masks(change(stage, weights, masks, gradients), expected)


# Schedules.


@pytest.mark.parametrize("name", [name for name in MISC if name.startswith("cosine")])
def test_the_fraction_along_a_cosine_is_that_of_granet_and_fantastic_weights(name):
  entry, calls = MISC[name], load("dynamic_misc")[f"{name}/t"]
  schedule = optax.cosine_decay_schedule(
    entry["rate0"], entry["T_max"], entry["eta_min"] / entry["rate0"]
  )
  expected = load("dynamic_misc")[f"{name}/rate"]
  np.testing.assert_allclose(schedule(jnp.asarray(calls)), expected, rtol=0, atol=1e-7)


def cubic_case(name):
  """Where the ramp begins, how long it is, the sparsity at both ends, and what remains when."""
  entry, arrays = MISC[name], load("dynamic_misc")
  every = entry["update_frequency"]
  begin, end = (
    entry[key] * entry["loader_len"] * entry["multiplier"] // every * every
    for key in ("init_prune_epoch", "final_prune_epoch")
  )
  calls, kept = arrays[f"{name}/step"], arrays[f"{name}/k"]
  assert len(calls) == entry["n_prunings"] and kept[-1] == entry["last_k"]
  # It ends one change too early, so that the final sparsity is not reached.
  assert calls[-1] == max(end - every, begin) and kept[-1] > entry["final_density"] * entry["N"]
  sparsities = 1 - entry["init_density"], 1 - entry["final_density"]
  return begin, end - begin, sparsities, calls, kept


@pytest.mark.parametrize("name", [name for name in MISC if name.startswith("granet_k")])
def test_the_numbers_of_weights_along_the_cubic_ramp_are_those_of_granet(name):
  begin, steps, (initial, final), calls, expected = cubic_case(name)
  size = MISC[name]["N"]
  way = optax.polynomial_schedule(0.0, 1.0, 3, steps, begin)(jnp.asarray(calls))
  sparsities = initial + (final - initial) * jnp.float32(way)
  pruned = allocation.count_pruned([(size,)] * len(calls), list(sparsities), "global")
  more = size - np.asarray(pruned.low, np.int64) - expected
  # It rounds down, and in float64.
  assert np.abs(more).max() <= 1 + size * 2**-24


@pytest.mark.parametrize("name", [name for name in MISC if name.startswith("granet_k/small")])
def test_granet_prunes_along_the_cubic_ramp_of_its_authors(name):
  begin, steps, (initial, final), calls, expected = cubic_case(name)
  size, every = MISC[name]["N"], MISC[name]["update_frequency"]
  params = {"kernel": jax.random.normal(jax.random.key(0), (size, 1))}
  optimizer = sparsejax.granet(
    optax.sgd(0.0),
    sparsity=final,
    initial=initial,
    steps=steps,
    begin=begin,
    every=every,
    fraction=0.0,
    key=jax.random.key(1),
  )

  def step(state, _):
    _, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
    return state, jnp.sum(sparsejax.get_masks(state, params)["kernel"])

  _, kept = jax.jit(lambda s: jax.lax.scan(step, s, length=begin + steps))(optimizer.init(params))
  # It rounds down.
  assert set((kept[calls - 1] - expected).tolist()) <= {0, 1}
  assert kept[-1] == size - round(final * size)
