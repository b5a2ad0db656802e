import dataclasses
import json
import pathlib

import pytest

from experiments import lanes, plots, records, reproduce, tables
from experiments.recipes import RECIPES, of_row


def result(name, seed, accuracy, collapsed=None, best=None):
  return {
    "config": {"recipe": name, "seed": seed, **dataclasses.asdict(RECIPES[name])},
    "test_accuracy": accuracy,
    "best_test_accuracy": best and {"test_accuracy": best, "epoch": 1},
    "pruned": 78,
    "pool": 100,
    "sparsity": 0.78,
    "cycles": [],
    "layers": [],
    "commit": None,
    "collapsed_in_epoch": collapsed,
    "device": "cpu",
    "seconds": {"compile": 1.0, "train": 61.5},
  }


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "runs").mkdir()
  name = "lenet300-mnist-78.9"
  for seed, accuracy, collapsed in ((42, 98.0, None), (123, 99.0, None), (456, 10.0, 0)):
    path = tmp_path / f"runs/{name}-seed{seed}.json"
    path.write_text(json.dumps(result(name, seed, accuracy, collapsed)))
  path = tmp_path / "runs/vgg19-cifar10-98-seed42.json"
  path.write_text(json.dumps(result("vgg19-cifar10-98", 42, 83.0, best=93.25)))
  return tmp_path


def row_of(table, name):
  (row,) = [line for line in table.splitlines() if line.startswith(f"| `{name}` |")]
  return row


def test_the_table_counts_seeds_reports_the_dead_and_says_what_was_not_run(folder):
  table, _ = reproduce.reproduce(reproduce.Options("lenet-mnist", results=folder, train=False))
  row = row_of(table, "lenet300-mnist-78.9")
  assert "78 of 100" in row
  assert "| 98.88 (n = 1, 1,850 s) |" in row
  assert "69.00 ± 51.10 (n = 3); without collapsed ones 98.50 ± 0.71 (n = 2)" in row
  assert "10.00 (collapsed in epoch 0)" in row
  assert "| cpu | 62 s |" in row
  assert row.count("not run") == 2
  assert (folder / "lenet-mnist.md").read_text() == table
  assert (folder / "lenet-mnist.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_says_which_accuracies_are_of_the_best_epoch(folder):
  table, _ = reproduce.reproduce(reproduce.Options("progressive", results=folder, train=False))
  row = row_of(table, "vgg19-cifar10-98")
  assert "| 93.44 (n = 1, best epoch) |" in row
  assert "| 83.00 (n = 1); best epoch 93.25 (n = 1) |" in row
  row = row_of(table, "resnet18-cifar10-72.9")
  assert "| - | 1 | 200 | 95.12 ± 0.09 (n = 5, 3,602 s) | not run | - | - |" in row


def cycle(accuracy, pruned, seconds, collapsed=None):
  return {
    "test_accuracy": accuracy,
    "pool": 100,
    "pruned": pruned,
    "sparsity": pruned / 100,
    "collapsed_in_epoch": collapsed,
    "seconds": {"train": seconds},
  }


def test_a_run_of_several_cycles_is_read_after_those_that_the_table_asks_for(tmp_path):
  (tmp_path / "runs").mkdir()
  name = "lenet300-mnist-e40-lth"
  for seed in (42, 123):
    tickets = result(name, seed, 97.0)
    tickets["cycles"] = [cycle(98.0 + i / 100, 4 * i, 10.0 * (i + 1)) for i in range(19)]
    tickets["cycles"][7] = cycle(98.5 + seed / 1000, 79, 80.0, 3 if seed == 42 else None)
    (tmp_path / f"runs/{name}-seed{seed}.json").write_text(json.dumps(tickets))
  name = "lenet300-mnist-98-e40-snip"
  path = tmp_path / f"runs/{name}-seed42.json"
  path.write_text(json.dumps(result(name, 42, 91.0)))

  table, _ = reproduce.reproduce(reproduce.Options("baselines", results=tmp_path, train=False))
  eighth, last = [line for line in table.splitlines() if "`lenet300-mnist-e40-lth`, after" in line]
  assert "after cycle 8 | 79 of 100 | 8 | 320 | 98.58 ± 0.06 (n = 2); without" in eighth
  assert "| cpu | 80 s | 98.54 (collapsed in epoch 3) | 98.62 | not run |" in eighth
  assert "after cycle 19 | 72 of 100 | 19 | 760 | 98.18 ± 0.00 (n = 2) | cpu | 190 s |" in last
  assert "| `lenet300-mnist-98-e40-snip` | 78 of 100 | 1 | 40 | 91.00 (n = 1) |" in table
  assert table.count("### ") == len(reproduce.TABLES["baselines"].blocks)
  for figure in ("baselines.png", "baselines-cost.png"):
    assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG")


def test_every_published_run_is_in_the_table():
  published = {name for name, recipe in RECIPES.items() if recipe.published}
  of_the_paper = published & set(reproduce.TABLES["progressive"].recipes)
  assert len(of_the_paper) == 8 + 2 + 2
  assert published - of_the_paper <= set(reproduce.TABLES["imagenet"].recipes)


def test_runs_with_a_result_are_not_trained_again_and_all_others_are(folder, monkeypatch):
  trained = []

  def fake_train(run):
    trained.append((run.name, run.seed))
    assert run.recipe == RECIPES[run.name]
    return result(run.name, run.seed, 98.0)

  monkeypatch.setattr(reproduce.train_lib, "train", fake_train)
  options = reproduce.Options("lenet-mnist", seeds=(42, 789), results=folder)
  reproduce.reproduce(options)
  assert ("lenet300-mnist-78.9", 42) not in trained
  assert len(trained) == 2 * len(reproduce.TABLES["lenet-mnist"].recipes) - 1
  trained.clear()
  reproduce.reproduce(options)
  assert not trained


def test_runs_side_by_side_go_on_together_however_their_folder_is_called(tmp_path, monkeypatch):
  name, begun = "lenet300-mnist-e20-static", []

  def fake_lanes(runs, folder, time_limit):
    begun.append(([(run.recipe.sparsity, run.seed) for run in runs], folder.resolve()))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(lanes._config(runs)))

  monkeypatch.setattr(reproduce.lanes, "train_lanes", fake_lanes)
  monkeypatch.chdir(tmp_path)
  for runs, seeds in ((tmp_path / "runs", (42, 123)), (pathlib.Path("runs"), ())):
    options = reproduce.Options(
      "criteria", recipes=(name,), seeds=seeds, results=tmp_path, runs=runs
    )
    reproduce.reproduce(options)
  assert begun[0] == begun[1]
  assert begun[2][0] == [(s, 456) for s in (0.5, 0.8, 0.9, 0.95)]


def test_runs_side_by_side_that_stop_at_the_time_limit_say_so(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(reproduce.lanes, "train_lanes", lambda runs, folder, time_limit: None)
  options = reproduce.Options("criteria", ("lenet300-mnist-e20-static",), results=tmp_path)
  table, _ = reproduce.reproduce(options)
  assert "Stopped at the time limit: the same command resumes." in capsys.readouterr().out
  assert "| `lenet300-mnist-e20-static-50` | - | 1 | 20 | not run |" in table


def test_a_run_that_stops_at_the_time_limit_is_not_a_result(folder, monkeypatch):
  limits = []

  def fake_train(run):
    limits.append(run.time_limit)

  monkeypatch.setattr(reproduce.train_lib, "train", fake_train)
  options = reproduce.Options(
    "lenet-mnist", recipes=("lenet300-mnist-98",), results=folder, time_limit=60.0
  )
  table, _ = reproduce.reproduce(options)
  assert row_of(table, "lenet300-mnist-98").count("not run") == 6
  assert len(limits) == 5 and 0 < limits[-1] <= limits[0] <= 60
  limits.clear()
  reproduce.reproduce(dataclasses.replace(options, time_limit=1e-9))
  assert not limits


def test_a_result_of_another_recipe_is_an_error_that_names_the_field(folder):
  path = folder / "runs/lenet300-mnist-98-seed42.json"
  of_another = result("lenet300-mnist-98", 42, 97.0)
  of_another["config"]["width"] = 0.125
  path.write_text(json.dumps(of_another))
  with pytest.raises(ValueError, match=r"98-seed42\.json holds a run with width=0\.125"):
    reproduce.reproduce(reproduce.Options("lenet-mnist", results=folder, train=False))


@pytest.mark.parametrize(
  ("content", "said"),
  [
    ("{", "Expecting"),
    ("{}", "it holds no config, no"),
    ('{"config": {}}', "it holds no test_acc"),
  ],
)
def test_a_result_that_is_none_is_an_error_that_names_it(folder, content, said):
  path = folder / "runs/lenet300-mnist-98-seed42.json"
  path.write_text(content)
  with pytest.raises(ValueError, match=rf"98-seed42\.json is damaged, remove it: {said}"):
    reproduce.reproduce(reproduce.Options("lenet-mnist", results=folder, train=False))


@pytest.fixture
def criteria(tmp_path):
  """A folder with all runs of a table of criteria."""
  (tmp_path / "runs").mkdir()
  table = reproduce.TABLES["criteria"]
  for row in table.rows:
    for seed in table.seeds:
      of_row_and_seed = result(row.recipe, seed, 97.0)
      of_row_and_seed["config"] |= dataclasses.asdict(of_row(row))
      path = tmp_path / f"runs/{row.name}-seed{seed}.json"
      path.write_text(json.dumps(of_row_and_seed))
  return tmp_path


def test_criteria_are_compared_once_all_runs_are_there_and_if_there_is_time(criteria, monkeypatch):
  measured = []

  def fake_measure(runs, deadline):
    (first, *_) = runs.values()
    measured.append(deadline)
    return {"config": reproduce.train_lib.make_config(first)}

  monkeypatch.setattr(reproduce.similarity, "measure", fake_measure)
  monkeypatch.setattr(reproduce.plots, "plot_similarity", lambda path, found: None)
  monkeypatch.setattr(reproduce.lanes, "train_lanes", lambda *args: None)
  monkeypatch.setattr(reproduce.train_lib, "train", lambda run: None)
  options = reproduce.Options("criteria", results=criteria)
  reproduce.reproduce(dataclasses.replace(options, train=False))
  reproduce.reproduce(dataclasses.replace(options, time_limit=1e-9))
  path = next((criteria / "runs").iterdir())
  content = path.read_text()
  path.unlink()
  reproduce.reproduce(options)
  assert not measured
  path.write_text(content)
  for _ in range(2):
    reproduce.reproduce(options)
  assert len(measured) == 1
  path = criteria / "criteria-similarity.json"
  path.write_text(path.read_text().replace('"width": 1.0', '"width": 0.5'))
  with pytest.raises(ValueError, match=r"similarity\.json holds a run with width=0\.5"):
    reproduce.reproduce(options)


def test_sparsities_stand_together_only_if_they_are_of_different_series():
  block, *_ = reproduce.TABLES["criteria-mlp"].blocks.values()
  of_rows = [
    (100 * of_row(row).sparsity, label, row)
    for label, rows in block.items()
    for row in rows
    if of_row(row).sparsity
  ]
  places = plots._Places(of_rows, len(block))
  densities = {sparsity for sparsity, _, _ in of_rows}
  assert [set(group) for group in places.groups] == [{each} for each in sorted(densities)]
  near = [(78.9, "a", 1), (79.0, "b", 2), (79.02, "b", 2), (80.5, "a", 3), (98.0, "a", 4)]
  assert plots._Places(near, 6).groups == [[78.9, 79.0, 79.02], [80.5], [98.0]]
  assert plots._Places(near, 5).groups == []


def test_what_cannot_be_trained_does_not_stop_the_others(folder, monkeypatch):
  trained = []

  def fake_train(run):
    if "mnist" in run.name:
      raise reproduce.data.DataNotFound("no mnist here")
    trained.append(run.name)

  monkeypatch.setattr(reproduce.train_lib, "train", fake_train)
  monkeypatch.setattr(reproduce, "RESULTS", folder)
  with pytest.raises(SystemExit, match="not trained:\nlenet300-mnist-dense: no mnist here"):
    reproduce.main(["progressive", "--seeds", "42", "--results", str(folder)])
  assert "resnet18-cifar10-95" in trained and "vgg19-cifar10-98-cosine" in trained
  assert (folder / "progressive.md").exists()


@pytest.mark.parametrize(
  ("options", "said"),
  [
    ({"recipes": ("resnet18-cifar10-70",)}, "recipes=.'resnet18-cifar10-70'. are not of the table"),
    ({"time_limit": float("nan")}, "time_limit=nan must be positive"),
    ({"seeds": (1, 42)}, "seeds=.1. are not of the table lenet-mnist: choose of 42"),
  ],
)
def test_what_is_not_of_the_table_is_an_error(options, said):
  with pytest.raises(ValueError, match=said):
    reproduce.Options("lenet-mnist", **options)


def test_what_the_system_refuses_is_a_message(tmp_path, monkeypatch):
  monkeypatch.setattr(reproduce, "_train_missing", None)  # Before anything is trained.
  (tmp_path / "file").touch()
  results = tmp_path / "file" / "results"
  with pytest.raises(SystemExit, match=f"error: results={results} cannot be written: "):
    reproduce.main(["lenet-mnist", "--results", str(results)])


def test_a_table_is_written_where_the_locale_knows_no_unicode(folder, monkeypatch):
  write = pathlib.Path.write_text
  monkeypatch.setattr(
    pathlib.Path, "write_text", lambda path, text, encoding="ascii": write(path, text, encoding)
  )
  reproduce.reproduce(reproduce.Options("lenet-mnist", results=folder, train=False))
  assert "69.00 ± 51.10" in (folder / "lenet-mnist.md").read_text("utf-8")


def test_the_committed_results_are_of_the_recipes_as_they_stand():
  committed = sorted((reproduce.RESULTS / "runs").glob("*.json"))
  assert committed
  for path in committed:
    found = json.loads(path.read_text())["config"]
    name, seed = found["recipe"], found["seed"]
    rows = [tables.Row(name), tables.Row(name, sparsity=found["sparsity"])]
    (row,) = [row for row in rows if path.name == f"{row.name}-seed{seed}.json"]
    expected = {"recipe": name, "seed": seed, **dataclasses.asdict(of_row(row))}
    records.check_config(path, found, expected)
    assert found["published"] == expected["published"]


@pytest.mark.parametrize("name", reproduce.TABLES)
def test_the_committed_table_is_made_of_the_committed_results(name):
  path, table = reproduce.RESULTS / f"{name}.md", reproduce.TABLES[name]
  runs = [f"{row.name}-seed{seed}.json" for row in table.rows for seed in table.seeds]
  was_run = any((reproduce.RESULTS / "runs" / run).exists() for run in runs)
  if was_run or path.exists():
    assert reproduce.make_table(name, reproduce.RESULTS) == path.read_text()
  if was_run:
    assert path.with_suffix(".png").stat().st_size < 300_000
