"""What original code of dynamic sparse training drops and grows; `oracles/README.md` says whose.

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
from sparsejax import counts, criteria, rules
from sparsejax.criteria import Leaf
from sparsejax.transform import Call

FOLDER = pathlib.Path(__file__).parent / "oracles"


def read(name, part="cases"):
  return json.loads((FOLDER / f"{name}.json").read_text())[part]


DROP, GROWTH, GLOBAL = read("drop_criteria"), read("growth"), read("global_pruning")
MISC = read("dynamic_misc", "entries")
LAYERS = {case: list(content["layers"]) for case, content in read("global_magnitude").items()}

# No set_released, on purpose: it drops all but the most negative of negative weights, by mistake.
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


def line(array, fill=0):
  """An array in C order, filled up to one length: all layers share their programs so."""
  array = np.ravel(array)
  return np.pad(array, (0, 2400 - array.size), constant_values=fill)


def drop_leaf(case):
  weight, gradient = (line(load("drop_criteria")[f"{case}/{kind}"]) for kind in ("weight", "grad"))
  mask = line(mask_at("drop_criteria", f"{case}/mask"))
  return Leaf(jnp.asarray(weight), jnp.asarray(mask), gradient=jnp.asarray(gradient))


def drop_case(case, method, rate):
  """How many weights are to be dropped, how many the original drops, and which it keeps."""
  active, removed = DROP[case]["nnz"], DROP[case]["results"][method][rate]["removed"]
  mask = mask_at("drop_criteria", f"{case}/mask")
  kept = mask_at("drop_criteria", f"{case}/out/{method}/r{rate}")
  assert int(mask.sum()) == active and not (kept & ~mask).any()
  assert int(kept.sum()) == active - removed
  return math.ceil(float(rate) * active), removed, line(kept)


def drop_cases(method):
  return [(case, rate) for case in DROP for rate in DROP[case]["results"][method]]


def lowest(scores, k, among):
  return np.asarray(sparsejax.select_smallest(scores, int(k), among=among))


def keep(criterion, leaf, k):
  return np.asarray(leaf.mask) & ~lowest(criterion(leaf), k, leaf.mask)


def tied_with(dropped, scores, among):
  """What a strict threshold drops: all that score no higher than the highest dropped."""
  return among & (scores <= np.max(scores, where=dropped, initial=-np.inf))


def assert_chosen(case, chosen, expected, scores):
  """Among ties the originals choose in no fixed order: weights of one score are alike there."""
  if not case.startswith("edge_ties"):
    np.testing.assert_array_equal(chosen, expected)
  scores = np.asarray(scores)
  np.testing.assert_array_equal(np.sort(scores[chosen]), np.sort(scores[expected]))


# Dropping in each layer.


@pytest.mark.parametrize("method", [*CRITERIA, "snip_half"])
def test_scores_are_those_of_fantastic_weights(method):
  for case in DROP:
    if (case, method) == ("edge_rate_zero", "magnitude"):  # It computes none there.
      continue
    leaf = drop_leaf(case)
    scores = np.asarray(CRITERIA.get(method, criteria.snip)(leaf))[leaf.mask]
    expected = line(load("drop_criteria")[f"{case}/score/{method}"])[leaf.mask]
    if method == "snip_plus":  # It drops the largest.
      expected = -expected
    if method not in OFFSETS:
      np.testing.assert_array_equal(scores, expected)
      continue
    # It divides by 1e-8 at least.
    is_finite = np.isfinite(scores)
    assert is_finite.all() or case == "edge_ties"
    assert (expected[~is_finite] > 1e5).all()
    np.testing.assert_allclose(
      scores[is_finite] + np.float32(OFFSETS[method]), expected[is_finite], rtol=1e-4
    )


# The originals rank inactive weights among the active ones, at zero: where active ones score zero
# too, they drop some of both, and not as many active ones as asked for.
DROPPED_AT_ZERO = {
  "magnitude": {"0.1": 23, "0.005": 20},
  "granet_imagenet_magnitude": {"0.1": 23, "0.005": 20},
  **{name: {"0.005": 4} for name in CRITERIA if name.startswith(("mest", "gradstep"))},
  **{name: {"0.3": 44, "0.1": 36, "0.005": 34} for name in ("snip_unfixed", "taylor_fo")},
}


@pytest.mark.parametrize("method", [*CRITERIA, "granet_imagenet_magnitude"])
def test_dropping_is_that_of_fantastic_weights_and_granet(method):
  criterion = CRITERIA.get(method, criteria.magnitude)
  for case, rate in drop_cases(method):
    k, removed, expected = drop_case(case, method, rate)
    at_zero = DROPPED_AT_ZERO.get(method, {}) if case == "edge_ties" else {}
    assert removed == at_zero.get(rate, k)
    leaf = drop_leaf(case)
    assert_chosen(case, keep(criterion, leaf, removed), expected, criterion(leaf))


def test_dropping_by_magnitude_is_that_of_granet_on_cifar_which_drops_all_that_tie():
  for case, rate in drop_cases("granet_magnitude_death"):
    k, removed, expected = drop_case(case, "granet_magnitude_death", rate)
    leaf = drop_leaf(case)
    scores, mask = np.abs(leaf.weight), np.asarray(leaf.mask)
    dropped = tied_with(lowest(scores, k, mask), scores, mask)
    assert removed > k if case == "edge_ties" else removed == k
    np.testing.assert_array_equal(mask & ~dropped, expected)


def test_dropping_at_random_is_that_of_fantastic_weights_given_its_permutation():
  for case, rate in drop_cases("random"):
    k, removed, expected = drop_case(case, "random", rate)
    order = jnp.float32(line(load("drop_criteria")[f"{case}/random_perm"]))
    assert removed == k
    np.testing.assert_array_equal(keep(lambda leaf, o=order: o, drop_leaf(case), k), expected)


def each_sign(leaf):
  return [np.asarray(leaf.mask & (sign * leaf.weight > 0)) for sign in (1, -1)]


def test_dropping_of_each_sign_is_that_of_fantastic_weights_but_for_the_number():
  for case, rate in drop_cases("set_fixed"):
    k, removed, expected = drop_case(case, "set_fixed", rate)
    leaf = drop_leaf(case)
    signs = each_sign(leaf)
    # It drops as many of each sign, at least one, and all active weights that are zero.
    count = max(1, math.ceil(k / 2)) * sum(bool(sign.any()) for sign in signs)
    nonzero = Leaf(leaf.weight, jnp.asarray(signs[0] | signs[1]), count=jnp.uint32(count))
    dropped = np.asarray(nonzero.mask) & ~keep(criteria.each_sign, nonzero, count)
    if case == "edge_ties":  # Its thresholds are strict.
      size = np.abs(leaf.weight)
      positive, negative = (tied_with(dropped & sign, size, sign) for sign in signs)
      dropped = positive | negative
    else:
      assert removed == count
    np.testing.assert_array_equal(nonzero.mask & ~dropped, expected)


@pytest.mark.parametrize("name", [name for name in MISC if name.startswith("set_keras")])
def test_dropping_of_each_sign_in_proportion_is_that_of_set(name):
  entry = MISC[name]
  removed = [entry["removed_pos"], entry["removed_neg"]]
  # It rounds the number of each sign up.
  assert removed == [math.ceil(entry["zeta"] * entry[n]) for n in ("n_pos", "n_neg")]
  weight = line(load("dynamic_misc")[f"{name}/weight"])
  mask = line(mask_at("dynamic_misc", f"{name}/mask"))
  leaf = Leaf(jnp.asarray(weight), jnp.asarray(mask), count=jnp.uint32(sum(removed)))
  kept = keep(criteria.each_sign_in_proportion, leaf, sum(removed))
  np.testing.assert_array_equal(kept, line(mask_at("dynamic_misc", f"{name}/core")))


def test_set_in_the_code_of_sparse_momentum_drops_the_smallest_and_the_most_negative_weights():
  # Where weights tie, zeros compete with inactive ones, and a weight may be in both halves.
  tied = {"0.5": (32, 31), "0.3": (24, 20), "0.1": (20, 7), "0.005": (20, 1)}
  for case, rate in drop_cases("set_snfs"):
    k, _, expected = drop_case(case, "set_snfs", rate)
    leaf = drop_leaf(case)
    half = math.ceil(k / 2)
    small, negative = tied[rate] if case == "edge_ties" else (half, half)
    kept = keep(criteria.magnitude, leaf, small)
    kept &= ~lowest(leaf.weight, negative, kept & (leaf.weight < 0))
    # The smallest that are not zero, of both signs, tie for the last places among the smallest.
    size = np.abs(leaf.weight)
    alike = np.where(size <= 0.05, size, leaf.weight)
    assert_chosen(case, kept, expected, alike)


def test_snip_half_drops_half_of_the_lowest_scores_and_half_of_the_highest():
  tied = {"0.5": 41, "0.3": 39, "0.1": 34}  # Zeros compete with inactive weights.
  for case, rate in drop_cases("snip_half"):
    k, _, expected = drop_case(case, "snip_half", rate)
    if k < 2:  # Where half is none, it drops all.
      assert not expected.any()
      continue
    leaf = drop_leaf(case)
    scores = criteria.snip(leaf)
    kept = keep(criteria.snip, leaf, tied[rate] if case == "edge_ties" else k // 2)
    kept &= ~lowest(-scores, k // 2, kept)
    assert_chosen(case, kept, expected, scores)


# Dropping over all layers.


def global_leaves(case):
  arrays = load("global_magnitude") | load("global_pruning")

  def layer(kind, name):
    return jnp.asarray(line(arrays[f"{case}/{kind}/{name}"]))

  return [
    Leaf(layer("weight", name), layer("mask", name).astype(bool), gradient=layer("grad", name))
    for name in LAYERS[case]
  ]


def global_case(case, method, rate):
  """How many weights are to be dropped, and which the original keeps."""
  entry = GLOBAL[case]["results"][method][rate]
  kept = [mask_at("global_pruning", f"{case}/out/{method}/r{rate}/{n}") for n in LAYERS[case]]
  kept = [line(mask) for mask in kept]
  assert total(kept) == entry["nnz_after"]
  return math.ceil(float(rate) * entry["nnz_before"]), kept


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


def without(masks, scores, k):
  dropped = sparsejax.select_smallest(scores, k, among=masks)
  return [np.asarray(mask & ~drop) for mask, drop in zip(masks, dropped, strict=True)]


def assert_equal_masks(actual, expected):
  for mask, wanted in zip(actual, expected, strict=True):
    np.testing.assert_array_equal(np.asarray(mask), wanted)


@pytest.mark.parametrize(
  ("case", "method", "rate"),
  global_cases("snip", "mest_g1", "rsensitivity", "sensitivity", "taylor_fo", "gradstep_g1"),
)
def test_dropping_over_all_layers_is_that_of_fantastic_weights(case, method, rate):
  leaves = global_leaves(case)
  masks = [leaf.mask for leaf in leaves]
  k, expected = global_case(case, method, rate)
  assert total(masks) - k == total(expected)
  if (case, method) != ("g_d40", "sensitivity"):
    scores = [CRITERIA[method](leaf) for leaf in leaves]
    assert_equal_masks(without(masks, scores, k), expected)
    return
  # It does not look at masks then: inactive weights, |g| over 1e-8, replace all that were active.
  assert not any((mask & old).any() for mask, old in zip(masks, expected, strict=True))
  scores = [jnp.abs(leaf.gradient) / (jnp.abs(leaf.weight) + 1e-8) for leaf in leaves]
  everything = [jnp.ones_like(mask) for mask in masks]
  pruned = sum(mask.size for mask in masks) - total(expected)
  assert_equal_masks(without(everything, scores, pruned), expected)


@pytest.mark.parametrize(("case", "method", "rate"), global_cases("set", "set_negativity"))
def test_dropping_of_each_sign_over_all_layers_is_that_of_fantastic_weights(case, method, rate):
  leaves = global_leaves(case)
  k, expected = global_case(case, method, rate)
  signs = [list(masks) for masks in zip(*(each_sign(leaf) for leaf in leaves), strict=True)]
  half = math.ceil(k / 2)
  # By "negativity" all but half - 1 of the negative weights go, however many are to be kept.
  of_negative = half if method == "set" else total(signs[1]) - (half - 1)
  scores = [criteria.magnitude(leaf) for leaf in leaves]
  kept = zip(without(signs[0], scores, half), without(signs[1], scores, of_negative), strict=True)
  assert_equal_masks([positive | negative for positive, negative in kept], expected)


# Growing.


def growth_case(case):
  """How many weights grow, the mask before, and the arrays of the layer."""
  layer = case.split("/")[0]
  arrays = {
    name.removeprefix(f"{layer}/"): array
    for name, array in (load("drop_criteria") | load("growth")).items()
    if name.startswith(f"{layer}/")
  }
  return GROWTH[case]["k"], mask_at("growth", f"{case}/mask_after_death"), arrays


def grown_in(case, method):
  before = mask_at("growth", f"{case}/mask_after_death")
  after = mask_at("growth", f"{case}/out/{method}")
  assert not (before & ~after).any()
  assert (after & ~before).sum() == GROWTH[case][method]["grown"]
  return after & ~before


@pytest.mark.parametrize(
  ("method", "criterion", "moments"),
  [
    ("gradient_granet", criteria.gradient, []),
    ("gradient_fw_fixed", criteria.gradient, []),
    ("gradient_fw_unfixed", criteria.gradient, []),
    ("momentum_sgd", criteria.momentum, ["momentum_buffer"]),
    ("momentum_adam", criteria.momentum, ["adam_exp_avg", "adam_exp_avg_sq"]),
  ],
)
def test_growth_is_that_of_granet_and_fantastic_weights(method, criterion, moments):
  for case in GROWTH:
    k, mask, arrays = growth_case(case)
    first, second, *_ = [jnp.asarray(line(arrays[name])) for name in moments] + [None] * 2
    leaf = Leaf(
      jnp.asarray(line(arrays["weight"])),
      jnp.asarray(line(mask)),
      gradient=jnp.asarray(line(arrays["grad"])),
      moment=lambda first=first, second=second: (first, second),
    )
    scores = criterion(leaf)
    grown = lowest(-scores, k, line(~mask))
    assert grown.sum() == k
    assert_chosen(case, grown, line(grown_in(case, method)), scores)


def change(stage, weights, masks, gradients):
  return stage(Call(jnp.int32(0), weights, masks, gradients, None, unmasked=weights))


@pytest.mark.parametrize("case", GROWTH)
def test_growth_of_each_candidate_by_itself_is_that_of_granet_and_fantastic_weights(case):
  k, mask, arrays = growth_case(case)
  # What fills the line up is active, and no candidate.
  before, after_drop = line(arrays["mask"].astype(bool), True), line(mask, True)
  stage = rules.drop_and_grow(
    lambda leaf: jnp.float32(after_drop),
    # A candidate grows there if its number is low, and here if it is high.
    lambda leaf: 1 - line(arrays["uniform"]),
    lambda count: k / before.sum(),
    exact_growth=False,
  )
  weights = [jnp.asarray(line(arrays["weight"]))]
  (after,) = change(stage, weights, [jnp.asarray(before)], None)
  for method in ("random_fw", "random_granet"):
    np.testing.assert_array_equal(after, after_drop | line(grown_in(case, method)))


# One round of pruning, with and without regrowth: GraNet's study of plasticity.


def plasticity_case(method, rate):
  arrays, names = load("dynamic_misc"), ["conv.weight", "fc1.weight", "classifier.weight"]
  weights = [line(arrays[f"plasticity/weight/{name}"]) for name in names]
  gradients = [line(arrays[f"plasticity/grad/{name}"]) for name in names]
  masks = [weight != 0 for weight in weights]
  kept = [line(mask_at("dynamic_misc", f"plasticity/{method}/r{rate}/{name}")) for name in names]
  entry = MISC[f"plasticity/{method}/r{rate}"]
  for when, found in (("nnz_before", masks), ("nnz_after", kept)):
    assert [entry[when][name] for name in names] == [int(mask.sum()) for mask in found]
  return *(jax.tree.map(jnp.asarray, tree) for tree in (weights, gradients, masks)), kept


@pytest.mark.parametrize("rate", ["0.2", "0.5", "0.9"])
@pytest.mark.parametrize("method", ["prune_uniform", "prune_global"])
def test_pruning_once_is_that_of_granet(method, rate):
  weights, _, masks, expected = plasticity_case(method, rate)
  layers = [[0], [1], [2]] if method == "prune_uniform" else [[0, 1, 2]]
  for numbers in layers:
    weight, mask, kept = (
      np.concatenate([tree[i] for i in numbers]) for tree in (weights, masks, expected)
    )
    k = math.ceil(float(rate) * int(mask.sum()))
    leaf = Leaf(jnp.asarray(weight), jnp.asarray(mask))
    np.testing.assert_array_equal(keep(criteria.magnitude, leaf, k), kept)


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
  assert calls[-1] == end - every and kept[-1] > entry["final_density"] * entry["N"]
  sparsities = 1 - entry["init_density"], 1 - entry["final_density"]
  return begin, end - begin, sparsities, calls, kept


def test_the_numbers_of_weights_along_the_cubic_ramp_are_those_of_granet():
  sizes, sparsities, expected = [], [], []
  for name in (name for name in MISC if name.startswith("granet_k")):
    begin, steps, (initial, final), calls, kept = cubic_case(name)
    ramp = optax.polynomial_schedule(0.0, 1.0, 3, steps, begin)
    sizes += [MISC[name]["N"]] * len(calls)
    sparsities += [initial + (final - initial) * ramp(int(call)) for call in calls]
    expected += list(kept)
  sizes = np.array(sizes)
  pruned = jax.jit(lambda s: counts.rounded_pruned(s, sizes).low)(jnp.float32(sparsities))
  more = sizes - np.asarray(pruned, np.int64) - expected
  # It rounds down, and the sparsity is off by a unit or two of float32.
  assert (np.abs(more) <= 1 + 2 * sizes * 2.0**-24).all()


def test_granet_prunes_along_the_cubic_ramp_of_its_authors():
  name = "granet_k/small_mult2"
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
