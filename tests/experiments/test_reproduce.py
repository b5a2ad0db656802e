import dataclasses
import json
import pathlib

import pytest

from experiments import reproduce
from experiments.recipes import RECIPES


def result(name, accuracy, collapsed=None):
  return {
    "config": {"published": RECIPES[name].published},
    "test_accuracy": accuracy,
    "pruned": 78,
    "pool": 100,
    "collapsed_in_epoch": collapsed,
  }


@pytest.fixture
def folder(tmp_path):
  table = tmp_path / "lenet-mnist"
  table.mkdir()
  name = "lenet300-mnist-78.9"
  for seed, accuracy, collapsed in ((42, 98.0, None), (123, 99.0, None), (456, 10.0, 0)):
    path = table / f"{name}-seed{seed}.json"
    path.write_text(json.dumps(result(name, accuracy, collapsed)))
  return tmp_path


def test_the_table_counts_seeds_reports_the_dead_and_says_what_was_not_run(folder):
  table = reproduce.reproduce(reproduce.Options("lenet-mnist", results=folder, train=False))
  row = next(line for line in table.splitlines() if line.startswith("| `lenet300-mnist-78.9` |"))
  assert "78 of 100" in row
  assert "| 98.88 |" in row
  assert "69.00 ± 51.10 (n = 3)" in row
  assert "98.50 ± 0.71 (n = 2)" in row
  assert "10.00 (collapsed in epoch 0)" in row
  assert row.count("not run") == 2
  assert (folder / "lenet-mnist/table.md").read_text() == table
  assert (folder / "lenet-mnist/figure.png").read_bytes().startswith(b"\x89PNG")


def test_without_results_nothing_is_written(tmp_path):
  options = reproduce.Options("lenet-mnist", results=tmp_path, train=False)
  assert reproduce.reproduce(options).count("not run") == 4 * 7
  assert not list(tmp_path.iterdir())


def test_runs_with_a_result_are_not_trained_again(folder, monkeypatch):
  trained = []

  def fake_train(run):
    trained.append((run.name, run.seed))
    assert run.recipe == RECIPES[run.name]
    return result(run.name, 98.0)

  monkeypatch.setattr(reproduce.train_lib, "train", fake_train)
  recipes = reproduce.TABLES["lenet-mnist"].recipes
  monkeypatch.setitem(reproduce.TABLES, "lenet-mnist", reproduce.Table(recipes, seeds=(42, 789)))
  options = reproduce.Options("lenet-mnist", results=folder)
  reproduce.reproduce(options)
  assert ("lenet300-mnist-78.9", 42) not in trained
  assert len(trained) == 2 * len(recipes) - 1
  trained.clear()
  reproduce.reproduce(options)
  assert not trained


def test_the_committed_results_are_of_the_recipes_as_they_stand():
  committed = sorted(pathlib.Path(reproduce.RESULTS).glob("*/*-seed*.json"))
  assert committed
  for path in committed:
    config = json.loads(path.read_text())["config"]
    name, seed = config.pop("recipe"), config.pop("seed")
    assert path.name == f"{name}-seed{seed}.json"
    assert config == dataclasses.asdict(RECIPES[name])


@pytest.mark.parametrize("table", reproduce.TABLES)
def test_the_committed_table_is_made_of_the_committed_results(table, tmp_path):
  source, copy = reproduce.RESULTS / table, tmp_path / table
  copy.mkdir()
  for path in source.glob("*.json"):
    (copy / path.name).write_text(path.read_text())
  made = reproduce.reproduce(reproduce.Options(table, results=tmp_path, train=False))
  assert made == (source / "table.md").read_text()
