import dataclasses
import json

import numpy as np
import pytest

from experiments import data, lanes, similarity, train
from experiments.recipe import Dynamic
from experiments.recipes import RECIPES, of_row
from experiments.run import Run
from experiments.tables import TABLES

DIGITS = dataclasses.replace(
  RECIPES["lenet300-digits"],
  width=0.2,
  epochs=3,
  prune_epochs=0,
  validation=0.2,
  dynamic=Dynamic("criteria", drop="magnitude", grow="gradient", every=10),
)


def make_runs(folder, recipe=DIGITS, **options):
  return [
    Run(
      dataclasses.replace(recipe, sparsity=sparsity),
      "digits",
      seed,
      out=folder / f"{sparsity}/seed{seed}",
      checkpoint_every=1,
      **options,
    )
    for sparsity in (0.5, 0.8)
    for seed in (1, 2)
  ]


def test_lanes_come_to_what_separate_runs_come_to(tmp_path):
  results = lanes.train_lanes(make_runs(tmp_path), tmp_path / "lanes")
  for run, result in list(zip(make_runs(tmp_path / "alone"), results))[1:3]:
    alone = train.train(run)
    # Nearly the same arithmetic, in another order.
    for key in ("config", "pool", "pruned", "sparsity", "layers"):
      assert result[key] == alone[key], key
    assert result["test_accuracy"] == pytest.approx(alone["test_accuracy"], abs=1.5)
    assert result["lanes"] == 4
    folder = tmp_path / f"{run.recipe.sparsity}/seed{run.seed}"
    assert json.loads((folder / "result.json").read_text())["pruned"] == result["pruned"]
  assert len({result["test_accuracy"] for result in results}) > 1


def test_dense_networks_are_trained_in_lanes_too(tmp_path):
  dense = dataclasses.replace(DIGITS, sparsity=0.0, epochs=1, dynamic=Dynamic())
  runs = [Run(dense, "digits", seed, out=tmp_path / f"seed{seed}") for seed in (1, 2)]
  assert [r["pruned"] for r in lanes.train_lanes(runs, tmp_path / "lanes")] == [0, 0]


def test_lanes_that_were_cut_resume_to_the_same_bits(tmp_path):
  whole = lanes.train_lanes(make_runs(tmp_path / "whole"), tmp_path / "whole-lanes")
  # Even a limit that is over at once leaves time for one epoch.
  cut = make_runs(tmp_path / "cut")
  calls = 1
  while (found := lanes.train_lanes(cut, tmp_path / "cut-lanes", time_limit=1e-9)) is None:
    calls += 1
  assert calls == DIGITS.epochs
  assert [r["test_accuracy"] for r in found] == [r["test_accuracy"] for r in whole]
  assert [r["layers"] for r in found] == [r["layers"] for r in whole]


def test_lanes_that_differ_in_more_than_seed_and_sparsity_are_an_error(tmp_path):
  first, *rest = make_runs(tmp_path)
  other = dataclasses.replace(first, recipe=dataclasses.replace(first.recipe, epochs=4))
  with pytest.raises(ValueError, match="differ in seed, sparsity and folder alone"):
    lanes.train_lanes([other, *rest], tmp_path / "lanes")
  ramp = dataclasses.replace(DIGITS, dynamic=Dynamic(), sparsity=0.5, prune_epochs=2)
  assert not lanes.fit_in_lanes(ramp)
  with pytest.raises(ValueError, match="where a ramp leads to it"):
    lanes.train_lanes(make_runs(tmp_path, ramp), tmp_path / "lanes")


def test_criteria_that_are_alike_drop_alike(tmp_path):
  recipe = dataclasses.replace(DIGITS, epochs=4, sparsity=0.8)
  runs = {
    drop: Run(
      dataclasses.replace(recipe, dynamic=dataclasses.replace(recipe.dynamic, drop=drop)),
      "digits",
      1,
    )
    for drop in ("magnitude", "mest", "snip")
  }
  found = similarity.measure(runs)
  assert [each["epoch"] for each in found["dropped"]] == [0, 1, 2, 3]
  for each in found["dropped"]:
    overall = {tuple(pair["pair"]): pair["overall"] for pair in each["pairs"]}
    assert len(overall) == 6
    assert overall["magnitude", "mest"] > overall["magnitude", "snip"]
    # Half of the weights dropped at random have a third in common with any other half.
    by_chance = [value for pair, value in overall.items() if "random" in pair]
    np.testing.assert_allclose(by_chance, 1 / 3, atol=0.06)
    assert all(len(pair["layers"]) == 3 for pair in each["pairs"])
  final = [pair["overall"] for pair in found["final masks"]["pairs"]]
  assert len(final) == 3
  assert all(0.1 < value < 1 for value in final)


def test_the_runs_that_are_compared_differ_in_their_criterion_alone():
  for table in TABLES.values():
    for criterion, row in table.compared.items():
      dynamic = of_row(row).dynamic
      assert dynamic.drop == criterion
      (first, *_) = table.compared.values()
      like = dataclasses.replace(of_row(first), dynamic=dynamic)
      assert of_row(row) == like
      assert row in table.rows


def test_every_row_of_every_table_is_a_recipe_with_data_that_can_be_loaded():
  for table in TABLES.values():
    for row in table.rows:
      recipe = of_row(row)
      assert row.sparsity is None or recipe.sparsity == row.sparsity
      assert recipe.data in ("digits", "imagenet2012", *data.published.PUBLISHED)
