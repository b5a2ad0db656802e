import dataclasses
import itertools
import json

import numpy as np
import pytest

from experiments import data, lanes, records, similarity, train
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
  drop_last=True,  # Or else the step of the last images would be compiled too.
  dynamic=Dynamic("criteria", drop="magnitude", grow="gradient", every=10),
)

GRANET = dataclasses.replace(
  DIGITS, prune_epochs=2, ramp="cubic", dynamic=Dynamic("granet", every=5)
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


def metrics_of(folder):
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lanes_come_to_what_separate_runs_come_to(tmp_path):
  runs = make_runs(tmp_path, GRANET)
  order = [2, 0, 3, 1]
  shuffled = lanes.train_lanes([runs[i] for i in order], tmp_path / "lanes")
  results = [shuffled[order.index(i)] for i in range(4)]
  run = make_runs(tmp_path / "alone", GRANET)[-1]
  result, alone = results[-1], train.train(run)
  # Nearly the same arithmetic, in another order.
  for key in ("config", "pool", "pruned", "sparsity"):
    assert result[key] == alone[key], key
  assert result["test_accuracy"] == pytest.approx(alone["test_accuracy"], abs=1.5)
  assert result["lanes"] == 4
  folder = tmp_path / f"{run.recipe.sparsity}/seed{run.seed}"
  assert json.loads((folder / "result.json").read_text())["pruned"] == result["pruned"]
  assert len({result["test_accuracy"] for result in results}) > 1
  with records.open_folder(folder, train.make_config(run)):  # It is known as that run's.
    assert json.loads((folder / "config.json").read_text())["seed"] == run.seed
  # Exactly as many weights are pruned after each epoch, on the way to another sparsity each.
  after_epochs = [
    [round(line["sparsity"] * result["pool"]) for line in metrics_of(each)]
    for each in (folder, run.folder, tmp_path / "0.5/seed2")
  ]
  assert after_epochs[0] == after_epochs[1]
  assert all(0 < other < own for other, own in zip(after_epochs[2], after_epochs[0]))


def test_dense_networks_are_trained_in_lanes_too(tmp_path):
  dense = dataclasses.replace(DIGITS, sparsity=0.0, epochs=1, dynamic=Dynamic())
  runs = [Run(dense, "digits", seed, out=tmp_path / f"seed{seed}") for seed in (1, 2)]
  assert [r["pruned"] for r in lanes.train_lanes(runs, tmp_path / "lanes")] == [0, 0]


def test_lanes_that_were_cut_resume_to_the_same_bits(tmp_path):
  recipe = dataclasses.replace(DIGITS, epochs=2)
  whole = lanes.train_lanes(make_runs(tmp_path / "whole", recipe), tmp_path / "whole-lanes")
  # Even a limit that is over at once leaves time for one epoch.
  cut = make_runs(tmp_path / "cut", recipe)
  calls = 1
  while (found := lanes.train_lanes(cut, tmp_path / "cut-lanes", time_limit=1e-9)) is None:
    calls += 1
  assert calls == recipe.epochs
  assert [r["test_accuracy"] for r in found] == [r["test_accuracy"] for r in whole]
  assert [r["layers"] for r in found] == [r["layers"] for r in whole]


def test_lanes_leave_the_folder_of_another_run_alone(tmp_path, monkeypatch):
  recipe = dataclasses.replace(DIGITS, epochs=2)
  runs = make_runs(tmp_path, recipe)
  other = dataclasses.replace(runs[1], recipe=dataclasses.replace(recipe, sparsity=0.6))
  train.train(other)
  before = (other.folder / "result.json").read_text()
  for name in ("config.json", "result.json"):
    with pytest.raises(ValueError, match=r"0\.5/seed2 holds a run with sparsity=0\.6"):
      lanes.train_lanes(runs, tmp_path / "lanes")
    (other.folder / name).unlink()
    (other.folder / "result.json").write_text(before)
  with pytest.raises(ValueError, match=r"0\.5/seed2 holds a run with sparsity=0\.6"):
    train.train(runs[1])
  assert not (runs[0].folder / "result.json").exists()


def test_lanes_that_differ_in_more_than_seed_and_sparsity_are_an_error(tmp_path):
  first, *rest = make_runs(tmp_path)
  other = dataclasses.replace(first, recipe=dataclasses.replace(first.recipe, epochs=4))
  with pytest.raises(ValueError, match="differ in seed, sparsity and folder alone"):
    lanes.train_lanes([other, *rest], tmp_path / "lanes")
  for some in ([first, first], [first, *rest[1:]]):
    with pytest.raises(ValueError, match="all combinations of some sparsities and some seeds"):
      lanes.train_lanes(some, tmp_path / "lanes")


@pytest.mark.parametrize(
  ("name", "said"),
  [
    ("lenet300-mnist-e40-lth", "cycles=19 must be 1 for runs side by side"),
    ("resnet50-imagenet-granet-80", "data='imagenet2012' must be images in memory"),
  ],
)
def test_recipes_that_do_not_fit_in_lanes_are_an_error_that_names_the_field(name, said, tmp_path):
  assert not lanes.fit_in_lanes(RECIPES[name])
  with pytest.raises(ValueError, match=said):
    lanes.train_lanes([Run(RECIPES[name], name, 1, out=tmp_path)], tmp_path / "lanes")


def test_any_runs_are_split_into_combinations_of_sparsities_and_seeds(tmp_path):
  recipes = {s: dataclasses.replace(DIGITS, sparsity=s) for s in (0.1, 0.2, 0.3, 0.4)}
  seeds_of = {0.1: (1, 2, 3), 0.2: (2,), 0.3: (1, 2, 3), 0.4: (1, 2, 3)}
  runs = [Run(recipes[s], "digits", seed) for s, seeds in seeds_of.items() for seed in seeds]
  for size, sizes in ((1, [1] * 10), (2, [2, 2, 2, 2, 1, 1]), (8, [6, 3, 1]), (12, [9, 1])):
    grids = lanes.in_grids(runs, size)
    assert sorted(map(len, grids), reverse=True) == sizes
    assert sorted(map(repr, itertools.chain(*grids))) == sorted(map(repr, runs))
    for grid in grids:
      sparsities, seeds = {run.recipe.sparsity for run in grid}, {run.seed for run in grid}
      assert len(grid) == len(sparsities) * len(seeds)
  assert lanes.in_grids([], 12) == []


def test_each_run_is_trained_in_one_set(tmp_path):
  def make(sparsities, seeds):
    return [
      Run(dataclasses.replace(DIGITS, sparsity=sparsity), "digits", seed, out=tmp_path / "run")
      for sparsity in sparsities
      for seed in seeds
    ]

  def begin(name, runs):
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text(json.dumps(lanes._config(runs)))

  begin("a", make((0.5,), (1, 2)))
  begin("b", make((0.5, 0.8), (2, 1)))
  begin("c", make((0.9,), (1, 2)))  # Nobody asks for it.
  begin("d", make((0.8,), (3,)))
  (tmp_path / "e").mkdir()
  (tmp_path / "e/config.json").write_text('{"sparsity": [[0.5]], "seed": [1]}')
  runs = make((0.5, 0.8), (1, 2, 3))
  places = lambda sets: {p.name: [(r.recipe.sparsity, r.seed) for r in s] for p, s in sets.items()}
  found = places(lanes.find_sets(runs, runs, tmp_path, 6))
  assert found.pop("b") == [(0.5, 2), (0.5, 1), (0.8, 2), (0.8, 1)]
  assert found.pop("d") == [(0.8, 3)]
  assert list(found.values()) == [[(0.5, 3)]]
  found = places(lanes.find_sets(runs, runs[-1:], tmp_path, 6))
  assert found == {"d": [(0.8, 3)]}
  # What is damaged is in the way only where something is missing.
  (tmp_path / "e/config.json").write_text("{")
  assert lanes.find_sets(runs, [], tmp_path, 6) == {}
  with pytest.raises(ValueError, match=r"e/config\.json is damaged"):
    lanes.find_sets(runs, runs, tmp_path, 6)


def test_a_run_that_has_a_result_keeps_it(tmp_path):
  runs = make_runs(tmp_path)
  first = lanes.train_lanes(runs, tmp_path / "lanes")
  path = runs[1].folder / "result.json"
  path.write_text(json.dumps(first[1] | {"lanes": 1}))
  (runs[2].folder / "result.json").unlink()
  again = lanes.train_lanes(runs, tmp_path / "lanes")
  assert [result["lanes"] for result in again] == [4, 1, 4, 4]
  assert json.loads(path.read_text())["lanes"] == 1
  assert again[2]["test_accuracy"] == first[2]["test_accuracy"]


def test_networks_with_convolutions_are_trained_one_after_the_other_on_a_cpu(
  tmp_path, monkeypatch, capsys
):
  trained = []

  def fake_train(run):
    assert run.time_limit < 100
    trained.append((run.recipe.sparsity, run.seed))
    return {"seed": run.seed} if len(trained) < 7 else None

  monkeypatch.setattr(lanes.train_lib, "train", fake_train)
  runs = make_runs(tmp_path, dataclasses.replace(DIGITS, model="resnet20", width=0.1))
  results = lanes.train_lanes(runs, tmp_path / "lanes", time_limit=100)
  assert trained == [(0.5, 1), (0.5, 2), (0.8, 1), (0.8, 2)]
  assert [result["seed"] for result in results] == [1, 2, 1, 2]
  assert "the 4 runs are trained one after the other" in capsys.readouterr().out
  assert lanes.train_lanes(runs, tmp_path / "lanes", time_limit=100) is None


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
  assert similarity.measure(runs, deadline=0.0) is None
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
