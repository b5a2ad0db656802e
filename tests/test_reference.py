"""The slow versions themselves, against numbers worked out by hand or printed elsewhere."""

import numpy as np
import pytest
import reference


def test_the_reference_selection_orders_by_value_then_leaf_then_index():
  scores = {"b": np.array([0.0, -1.0, np.nan]), "a": np.array([[np.inf, -0.0], [np.nan, -1.0]])}
  order = [("a", 3), ("b", 1), ("a", 1), ("b", 0), ("a", 0), ("a", 2), ("b", 2)]
  for k in range(8):
    masks = reference.select_smallest(scores, k)
    chosen = {(name, int(i)) for name in scores for i in np.flatnonzero(masks[name])}
    assert chosen == set(order[:k])


def test_the_reference_selection_respects_candidates_and_counts_per_leaf():
  scores = [np.array([3.0, 1.0, 2.0]), np.array([5.0, 4.0])]
  among = [np.array([True, False, True]), np.array([True, True])]
  masks = reference.select_smallest(scores, [1, 5], among=among)
  assert masks[0].tolist() == [False, False, True]
  assert masks[1].tolist() == [True, True]


def test_the_reference_schedule_is_the_published_one():
  # Ten weights to 70 % in two updates: 35 % keeps round(6.5), which is 6, then 70 % keeps 3.
  weights = np.arange(1.0, 11.0)[None]
  grown = weights.copy()
  grown[0, :4] = 100.0  # What is pruned stays pruned, however large it becomes.
  calls = [{"w": weights, "b": np.zeros(2)}] * 3 + [{"w": grown, "b": np.zeros(2)}] * 3
  history = reference.progressive_masks(calls, 0.7, steps=4, every=2, begin=1)
  assert [int(masks["w"].sum()) for masks in history] == [10, 6, 6, 3, 3, 3]
  assert np.flatnonzero(history[-1]["w"]).tolist() == [7, 8, 9]
  assert all(masks["b"].all() for masks in history)


def test_the_last_update_of_the_reference_schedule_lands_on_the_target_off_the_grid():
  calls = [{"w": np.arange(100.0).reshape(10, 10)}] * 8
  history = reference.progressive_masks(calls, 0.5, steps=7, every=3, initial=0.2)
  # Targets at calls 0, 3 and 6: 0.2 + 0.3 * (3, 6, 7) / 7.
  assert [int(masks["w"].sum()) for masks in history] == [67, 67, 67, 54, 54, 54, 50, 50]


@pytest.mark.parametrize(
  ("kernel", "density", "densities"),
  [(True, 0.1, [0.079568, 0.230189, 1.0]), (False, 0.1, [0.079568, 0.230189, 1.0])],
)
def test_the_reference_densities_of_lenet_are_the_published_ones(kernel, density, densities):
  shapes = [(784, 300), (300, 100), (100, 10)]
  np.testing.assert_allclose(
    reference.er_densities(shapes, density, kernel=kernel), densities, atol=1e-6
  )


def test_the_reference_densities_need_several_rounds_where_layers_saturate():
  # Raw values 2, 1 and 0.2 for 1, 4 and 100 weights: at 0.3 the first two become dense in turn.
  shapes = [(1, 1), (2, 2), (10, 10)]
  result = reference.er_densities(shapes, 0.3, kernel=True)
  np.testing.assert_allclose(result, [1.0, 1.0, (0.3 * 105 - 5) / 100])
