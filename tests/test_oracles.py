"""Masks that other people's code made, reproduced; `oracles/README.md` says whose."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsejax

FOLDER = pathlib.Path(__file__).parent / "oracles"
CASES = json.loads((FOLDER / "global_magnitude.json").read_text())["cases"]
ROUNDS = 5

by_magnitude = jax.jit(
  lambda weights, k, among: sparsejax.select_smallest(
    jax.tree.map(jnp.abs, weights), k, among=among
  )
)


def load(name):
  with np.load(FOLDER / name) as file:
    return dict(file)


def layers(arrays, prefix, names):
  """The arrays of some layers as a list, in the order in which the original concatenates them."""
  return [arrays[f"{prefix}/{name}"] for name in names]


def total(masks):
  return sum(int(np.sum(mask)) for mask in masks)


def assert_equal_masks(actual, expected):
  for mask, wanted in zip(actual, expected, strict=True):
    np.testing.assert_array_equal(np.asarray(mask), wanted.astype(bool))


def cases(method):
  return [
    pytest.param(case, setting, id=f"{case}-{setting}")
    for case, content in CASES.items()
    for setting in content["results"][method]
  ]


def global_case(case):
  arrays, names = load("global_magnitude.npz"), list(CASES[case]["layers"])
  weights = layers(arrays, f"{case}/weight", names)
  active = [mask.astype(bool) for mask in layers(arrays, f"{case}/mask", names)]
  return arrays, names, weights, active


@pytest.mark.parametrize(("case", "rate"), cases("magnitude"))
def test_global_magnitude_pruning_is_that_of_fantastic_weights(case, rate):
  arrays, names, weights, active = global_case(case)
  counts = CASES[case]["results"]["magnitude"][rate]
  assert total(active) == counts["nnz_before"]
  dropped = by_magnitude(weights, math.ceil(float(rate) * total(active)), active)
  kept = [mask & ~np.asarray(drop) for mask, drop in zip(active, dropped, strict=True)]
  assert total(kept) == counts["nnz_after"]
  assert_equal_masks(kept, layers(arrays, f"{case}/out/magnitude/r{rate}", names))


@pytest.mark.parametrize(("case", "setting"), cases("granet_imagenet_pruning"))
def test_one_step_of_gradual_pruning_is_that_of_granet_on_imagenet(case, setting):
  arrays, names, weights, active = global_case(case)
  (keep,) = CASES[case]["results"]["granet_imagenet_pruning"][setting]["num_params_to_keep"]
  oracle = layers(arrays, f"{case}/out/granet_imagenet_pruning/{setting}", names)
  dropped = by_magnitude(weights, total(active) - keep, active)
  kept = [mask & ~np.asarray(drop) for mask, drop in zip(active, dropped, strict=True)]
  assert_equal_masks(kept, oracle)
  # Without being told what is active: what is not, is zero and goes first.
  size = sum(weight.size for weight in weights)
  everything = [np.ones_like(mask) for mask in active]
  dropped = by_magnitude(weights, size - keep, everything)
  assert_equal_masks([~np.asarray(drop) for drop in dropped], oracle)


@pytest.mark.parametrize(("case", "setting"), cases("granet_cifar_pruning"))
def test_one_step_of_gradual_pruning_is_that_of_granet_on_cifar_which_keeps_one_less(case, setting):
  arrays, names, weights, active = global_case(case)
  (keep,) = CASES[case]["results"]["granet_cifar_pruning"][setting]["num_params_to_keep"]
  dropped = by_magnitude(weights, total(active) - (keep - 1), active)
  kept = [mask & ~np.asarray(drop) for mask, drop in zip(active, dropped, strict=True)]
  assert_equal_masks(kept, layers(arrays, f"{case}/out/granet_cifar_pruning/{setting}", names))


def test_masks_from_scores_keep_what_granet_keeps_on_imagenet():
  arrays, names, weights, _ = global_case("g_dense")
  (keep,) = CASES["g_dense"]["results"]["granet_imagenet_pruning"]["s2s"]["num_params_to_keep"]
  size = sum(weight.size for weight in weights)
  kept = sparsejax.masks_from_scores([jnp.abs(weight) for weight in weights], 1 - keep / size)
  assert_equal_masks(kept, layers(arrays, "g_dense/out/granet_imagenet_pruning/s2s", names))


def test_five_rounds_per_layer_are_those_of_the_lottery_ticket_hypothesis():
  arrays, names = load("lth_google_prune_by_percent.npz"), ["layer0", "layer1", "layer2"]
  fractions = [0.2, 0.2, 0.1]
  kept = [np.ones(arrays[f"round0/mask/{name}"].shape, bool) for name in names]
  with jax.enable_x64(True):  # The weights were stored, and ranked, in float64.
    for number in range(ROUNDS):
      weights = layers(arrays, f"round{number}/final_w", names)
      counts = [
        round(fraction * int(mask.sum())) + 1
        for fraction, mask in zip(fractions, kept, strict=True)
      ]
      dropped = by_magnitude(weights, counts, kept)
      assert [int(np.sum(drop)) for drop in dropped] == counts
      rates = [count / int(mask.sum()) for count, mask in zip(counts, kept, strict=True)]
      tickets = sparsejax.lottery.prune(weights, kept, rates)
      kept = [mask & ~np.asarray(drop) for mask, drop in zip(kept, dropped, strict=True)]
      assert_equal_masks(kept, layers(arrays, f"round{number}/mask", names))
      assert_equal_masks(tickets, layers(arrays, f"round{number}/mask", names))
  assert [int(mask.sum()) for mask in kept] == [416, 128, 55]


def test_five_global_rounds_are_those_of_open_lth():
  arrays = load("lth_openlth_sparse_global_mlp.npz")
  names = ["fc_layers.0.weight", "fc_layers.1.weight", "fc.weight"]
  kept = [np.ones(arrays[f"round0/mask/{name}"].shape, bool) for name in names]
  for number in range(ROUNDS):
    weights = layers(arrays, f"round{number}/final_w", names)
    count = math.ceil(0.2 * total(kept)) + 1
    dropped = by_magnitude(weights, count, kept)
    tickets = sparsejax.lottery.prune(weights, kept, count / total(kept))
    kept = [mask & ~np.asarray(drop) for mask, drop in zip(kept, dropped, strict=True)]
    assert_equal_masks(kept, layers(arrays, f"round{number}/mask", names))
    assert_equal_masks(tickets, layers(arrays, f"round{number}/mask", names))
  assert [int(mask.sum()) for mask in kept] == [1531, 11, 21]
