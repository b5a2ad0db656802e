import dataclasses
import json

import pytest

from experiments import lanes, records, reproduce, sweep
from experiments import train as train_lib
from experiments.recipes import RECIPES

DIGITS = RECIPES["lenet300-digits"]
COMMAND = (
  "lenet300-digits --sparsities 0.5 0.9 --seeds 1 2 --compare 1 --width 0.2 --epochs 2"
  " --prune-epochs 2 --validation 0.2 --drop-last --checkpoint-every 1"
)


def metrics_of(folder):
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_sweep_that_was_cut_resumes_and_reports_what_separate_runs_come_to(tmp_path, capsys):
  command = [*COMMAND.split(), "--out", str(tmp_path)]
  # Even a limit that is over at once leaves time for one epoch.
  sweep.main([*command, "--time-limit", "1e-9"])
  assert "the same command resumes" in capsys.readouterr().out
  assert not (tmp_path / "sweep.md").exists()
  sweep.main(command)
  table = (tmp_path / "sweep.md").read_text()
  assert table in capsys.readouterr().out
  assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
  content = records.read_json(tmp_path / "sweep.json")
  assert sweep.make_table(content) == table
  assert "`lenet300-digits`, 2 epochs, with width=0.2, prune_epochs=2, " in table
  assert "| 50 % | 2,620 of 5,240 | " in table and "| 90 % | 4,716 of 5,240 | " in table
  assert "4 lanes in one program" in table
  # The one that was trained alone too has as many pruned weights after each epoch.
  assert "| 50 %, seed 1 | 2,620 | 2,620 | " in table
  (alone,), in_a_lane = content["alone"], content["runs"][0]
  assert alone["test_accuracy"] == pytest.approx(in_a_lane["test_accuracy"], abs=1.5)
  folders = [tmp_path / "0.5/seed1", tmp_path / "alone/0.5/seed1"]
  for line, of_alone in zip(*map(metrics_of, folders), strict=True):
    assert line["sparsity"] == of_alone["sparsity"]
  # Runs that are finished are not trained again.
  before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/seed*/result.json")}
  sweep.main(command)
  assert len(before) == 4
  assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.fixture
def trained(monkeypatch):
  """The runs that lanes are asked for, without training: they have results at once."""
  asked = []

  def fake_lanes(runs, folder, time_limit):
    assert time_limit > 0
    asked.append([(run.recipe.sparsity, run.seed) for run in runs])
    for run in runs:
      run.folder.mkdir(parents=True, exist_ok=True)
      result = {
        "config": train_lib.make_config(run),
        "test_accuracy": 100 - 10 * run.recipe.sparsity + run.seed / 10,
        "best_test_accuracy": None,
        "pool": 1000,
        "pruned": round(1000 * run.recipe.sparsity),
        "sparsity": run.recipe.sparsity,
        "collapsed_in_epoch": 1 if run.seed == 3 else None,
        "seconds": {"train": 2.0, "compile": 0.5},
        "device": "cpu",
        "layers": [],
        "commit": None,
        "lanes": len(runs),
      }
      (run.folder / "result.json").write_text(json.dumps(result))
    return runs

  monkeypatch.setattr(sweep.lanes, "train_lanes", fake_lanes)
  return asked


def make_sweep(folder, sparsities=(0.5, 0.9), seeds=(1, 2), **options):
  return sweep.Sweep(DIGITS, "lenet300-digits", sparsities, seeds, out=folder, **options)


def begin(runs, folder):
  """Leaves what a training of these runs side by side leaves when it begins."""
  (folder,) = lanes.find_sets(runs, runs, folder, len(runs))
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps(lanes._config(runs)))


def test_the_table_has_a_row_for_each_sparsity_and_says_who_died(tmp_path, trained):
  table = sweep.sweep(make_sweep(tmp_path, (0.0, 0.9), (1, 2, 3)))
  assert trained == [[(0.0, 1), (0.0, 2), (0.0, 3), (0.9, 1), (0.9, 2), (0.9, 3)]]
  assert "`lenet300-digits`, 200 epochs:\n" in table
  rows = table.splitlines()[4:6]
  assert rows[0].startswith("| 0 % | 0 of 1,000 | 100.20 ± 0.10 (n = 3); without collapsed ones ")
  assert "91.20 ± 0.10 (n = 3); without collapsed ones 91.15 ± 0.07 (n = 2) | 2.00 s |" in rows[1]
  assert rows[1].endswith("| cpu | 91.10 | 91.20 | 91.30 (collapsed in epoch 1) |")
  assert "6 lanes in one program" in table
  assert "initialisation come to 3.0 s." in table
  assert "alone" not in table


def test_more_seeds_and_sparsities_are_trained_where_they_are_missing(tmp_path, trained):
  sweep.sweep(make_sweep(tmp_path))
  sweep.sweep(make_sweep(tmp_path, seeds=(1, 2, 4)))
  sweep.sweep(make_sweep(tmp_path, (0.5, 0.8, 0.9), (1, 2, 4)))
  assert trained[1:] == [[(0.5, 4), (0.9, 4)], [(0.8, 1), (0.8, 2), (0.8, 4)]]


@pytest.mark.parametrize("seeds", [(1, 2), (1, 2, 4)])
def test_what_was_begun_together_goes_on_together(tmp_path, trained, seeds):
  # As if it had been stopped while it wrote the results.
  runs = sweep._make_runs(make_sweep(tmp_path))
  begin(runs, tmp_path / "lanes")
  lanes.train_lanes(runs[:1], tmp_path, 1)
  sweep.sweep(make_sweep(tmp_path, seeds=seeds))
  more = [[(0.5, 4), (0.9, 4)]] if 4 in seeds else []
  assert trained[1:] == [[(0.5, 1), (0.5, 2), (0.9, 1), (0.9, 2)], *more]


def test_a_set_that_was_added_goes_on_together_too(tmp_path, trained):
  sweep.sweep(make_sweep(tmp_path))
  added = [
    run
    for run in sweep._make_runs(make_sweep(tmp_path, (0.5, 0.8, 0.9)))
    if "0.8" in str(run.folder)
  ]
  begin(added, tmp_path / "lanes")
  lanes.train_lanes(added[:1], tmp_path, 1)
  sweep.sweep(make_sweep(tmp_path, (0.5, 0.8, 0.9)))
  assert trained[1:] == [[(0.8, 1)], [(0.8, 1), (0.8, 2)]]


def test_a_set_of_another_recipe_does_not_go_on(tmp_path, trained):
  runs = sweep._make_runs(make_sweep(tmp_path, (0.5,)))
  begin(
    [dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, width=0.5)) for run in runs],
    tmp_path / "lanes",
  )
  sweep.sweep(make_sweep(tmp_path))
  assert trained == [[(0.5, 1), (0.5, 2), (0.9, 1), (0.9, 2)]]


def test_a_folder_with_runs_of_another_recipe_is_an_error(tmp_path, trained):
  sweep.sweep(make_sweep(tmp_path))
  other = dataclasses.replace(make_sweep(tmp_path), recipe=dataclasses.replace(DIGITS, epochs=150))
  with pytest.raises(ValueError, match=r"0\.5/seed1 holds a run with epochs=200"):
    sweep.sweep(other)


@pytest.mark.parametrize(
  ("args", "said"),
  [
    ("lenet300-digits --sparsities 0.5 1.0", "sparsities="),
    ("lenet300-digits --sparsities -0.5", "sparsities="),
    ("lenet300-digits --sparsities 0.5 0.5", "sparsities="),
    ("lenet300-digits --seeds 1 -1", "seeds="),
    ("lenet300-digits --seeds 1 1", "seeds="),
    ("lenet300-digits --compare 16", "compare="),
    ("lenet300-digits --time-limit 0", "time_limit="),
  ],
)
def test_options_out_of_range_are_named_before_anything_is_trained(args, said, trained, capsys):
  with pytest.raises(SystemExit):
    sweep.main(args.split())
  assert said in capsys.readouterr().err
  assert not trained


@pytest.mark.parametrize(
  ("args", "said"),
  [
    ("lenet300-mnist-dense", "sparsity=0.0 must be above 0, but lenet300-mnist-dense is dense"),
    ("lenet300-mnist-e40-lth", "cycles=19 must be 1"),
    ("resnet50-imagenet-granet-80", "data='imagenet2012' must be images in memory"),
    ("lenet300-digits --initial-sparsity 0.6", "initial_sparsity=0.6 must be from 0 to"),
    ("lenet300-digts", "Did you mean lenet300-digits?"),
    ("--sparsities 0.5 lenet300-digits", "The recipe comes first"),
  ],
)
def test_recipes_that_cannot_be_swept_are_an_error(args, said, tmp_path, trained, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SystemExit) as error:
    sweep.main(args.split())
  assert said in str(error.value)
  assert not trained and not list(tmp_path.iterdir())


def test_the_committed_table_is_made_of_the_committed_sweep():
  path = reproduce.RESULTS / "sweep/sweep.json"
  assert sweep.make_table(records.read_json(path)) == path.with_suffix(".md").read_text()
  assert path.with_suffix(".png").stat().st_size < 300_000
