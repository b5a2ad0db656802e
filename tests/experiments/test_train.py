import dataclasses
import json
import pathlib
import signal
import subprocess
import sys
import time

import chex
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments import data, train
from experiments.recipes import RECIPES

ROOT = pathlib.Path(train.__file__).parents[1]


def tiny_mnist(name, data_dir=None):
  """Noise in the shape of the data set that a recipe asks for."""
  del data_dir
  rng = np.random.default_rng(0)
  shape = {"digits": (8, 8, 1), "mnist": (28, 28, 1), "cifar10": (32, 32, 3)}[name]
  images = rng.integers(0, 256, (400, *shape), np.uint8)
  labels = rng.integers(0, 10, 400).astype(np.int32)
  moments = (0.5,) * shape[-1]
  return data.Dataset(
    name, images[:300], labels[:300], images[300:], labels[300:], moments, moments
  )


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs_on_tiny_data(name, tmp_path, monkeypatch):
  monkeypatch.setattr(data, "load", tiny_mnist)
  recipe = RECIPES[name]
  short = dataclasses.replace(recipe, epochs=2, prune_epochs=min(recipe.prune_epochs, 2))
  result = train.train(train.Run(short, name, seed=1, out=tmp_path / "run"))

  assert result["pruned"] == result["pool"] - round((1 - recipe.sparsity) * result["pool"])
  assert json.loads((tmp_path / "run/result.json").read_text()) == result
  lines = read_metrics(tmp_path / "run")
  assert [line["epoch"] for line in lines] == [0, 1]
  assert lines[-1]["sparsity"] == pytest.approx(recipe.sparsity, abs=1e-5)
  assert (tmp_path / "run/plot.png").read_bytes().startswith(b"\x89PNG")
  assert "prunable" in (tmp_path / "run/summary.txt").read_text()


def read_metrics(folder):
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def final_state(folder):
  with ocp.CheckpointManager(folder / "checkpoints") as saved:
    return saved.restore(saved.latest_step(), args=ocp.args.StandardRestore())


def test_a_killed_run_resumes_with_bit_identical_results(tmp_path):
  arguments = ["lenet300-digits", "--epochs", "200", "--checkpoint-every", "7", "--seed", "5"]
  killed = tmp_path / "killed"
  command = [sys.executable, "-m", "experiments.train", *arguments, "--out", str(killed)]
  with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
    metrics = killed / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < 20:
      assert process.poll() is None and time.monotonic() < deadline
      time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
  assert not (killed / "result.json").exists()
  train.main([*arguments, "--out", str(killed)])
  train.main([*arguments, "--out", str(tmp_path / "whole")])

  resumed, whole = (final_state(folder) for folder in (killed, tmp_path / "whole"))
  assert int(whole["step"]) == 200 * 11
  chex.assert_trees_all_equal(resumed, whole)
  lines = [read_metrics(folder) for folder in (killed, tmp_path / "whole")]
  for line in lines[0] + lines[1]:
    del line["seconds"]
  assert lines[0] == lines[1]


def test_a_folder_with_another_run_is_left_alone(tmp_path, monkeypatch):
  monkeypatch.setattr(data, "load", tiny_mnist)
  name = "lenet300-digits"
  run = train.Run(dataclasses.replace(RECIPES[name], epochs=1, prune_epochs=1), name, out=tmp_path)
  train.train(run)
  with pytest.raises(ValueError, match="holds a run with seed=42"):
    train.train(dataclasses.replace(run, seed=7))


def test_a_finished_run_is_left_alone(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(data, "load", tiny_mnist)
  name = "lenet300-digits"
  run = train.Run(dataclasses.replace(RECIPES[name], epochs=1, prune_epochs=1), name, out=tmp_path)
  first = train.train(run)
  monkeypatch.delattr(data, "load")
  assert train.train(run) == first
  assert "This run is finished" in capsys.readouterr().out


def test_a_refused_option_does_not_claim_the_folder(tmp_path):
  with pytest.raises(SystemExit):
    train.main(["--learning-rate", "nan", "--out", str(tmp_path / "run")])
  assert not (tmp_path / "run").exists()


def test_a_run_that_collapses_says_so(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(data, "load", tiny_mnist)
  name = "lenet300-digits"
  recipe = dataclasses.replace(RECIPES[name], epochs=3, prune_epochs=3, learning_rate=1e9)
  result = train.train(train.Run(recipe, name, out=tmp_path))
  assert result["collapsed_in_epoch"] == 0
  printed = capsys.readouterr().out
  assert "seed 42, epoch 0: the network has collapsed" in printed
  assert "This run COLLAPSED in epoch 0" in printed
  assert all(line["collapsed"] for line in read_metrics(tmp_path))


def test_an_epoch_that_was_survived_is_no_collapse():
  flags = [True, False, False, True, True]
  metrics = [{"epoch": epoch, "collapsed": flag} for epoch, flag in enumerate(flags)]
  assert train._collapsed_in_epoch(metrics) == 3
  assert train._collapsed_in_epoch(metrics[:3]) is None


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (["lenet300-digit"], "Did you mean lenet300-digits?"),
    (["lenet300-digits", "--sede", "3"], "--seed"),
    (["lenet300-mnist-98", "--epochs", "many"], "--epochs"),
    (["lenet300-digits", "--epochs", "0"], "epochs=0"),
    (["lenet300-digits", "--sparsity", "1.5"], "sparsity=1.5"),
    (["lenet300-digits", "--epochs", "100"], "prune_epochs=120"),
    (["lenet300-digits", "--seed", "-1"], "seed=-1"),
    (["lenet300-digits", "--checkpoint-every", "0"], "checkpoint_every=0"),
    (["lenet300-digits", "--model", "lenet"], "lenet300"),
  ],
)
def test_an_unknown_recipe_or_option_fails_with_a_suggestion(arguments, said, capsys):
  with pytest.raises(SystemExit) as failure:
    train.main(arguments)
  assert failure.value.code
  assert said in str(failure.value.code) + capsys.readouterr().err


def test_a_missing_data_set_ends_the_command_with_the_ways_to_provide_it(tmp_path, monkeypatch):
  monkeypatch.setattr(data, "_answers", lambda url: False)
  with pytest.raises(SystemExit, match="three ways"):
    train.main(["lenet300-mnist-98", "--data-dir", str(tmp_path)])
