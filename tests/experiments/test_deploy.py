"""Reports of finished runs."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest

import sparsejax.deploy
from experiments import data, deploy, records, train
from experiments import recipe as recipe_lib
from experiments.benchmark import report as benchmark_report
from experiments.recipes import RECIPES
from experiments.reproduce import RESULTS
from experiments.run import Run

SMOKE = recipe_lib.smoke(RECIPES["lenet300-digits"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A finished run with its report."""
  folder = tmp_path_factory.mktemp("run")
  train.train(Run(SMOKE, "lenet300-digits", out=folder))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("sparsejax.deploy.comparison._TURN", 0.0)
    weights = str(folder / "weights")
    deploy.main([str(folder), "--batches", "2", "--rounds", "1", "--weights", weights])
  return folder


@pytest.fixture
def record(folder):
  return json.loads((folder / "deploy.json").read_text())


def test_the_report_is_of_the_network_that_was_trained(folder, record):
  result = records.read_json(folder / "result.json")
  accuracies = [variant["accuracy"] for variant in record["report"]["variants"]]
  np.testing.assert_allclose(accuracies, result["test_accuracy"] / 100, atol=1e-6)
  dense, sparse, *_ = record["report"]["variants"]
  assert dense["parameters"] - sparse["parameters"] == result["pruned"] > 0
  assert record["report"]["examples"] == len(data.load("digits").test_labels)
  assert record["config"]["recipe"] == "lenet300-digits"
  assert all(target["reached"] for target in record["targets"])


def test_the_weights_go_into_a_file_of_the_size_that_is_reported(folder, record):
  weights = folder / "weights"
  assert weights.stat().st_size == record["report"]["variants"][1]["file_bytes"]
  result = records.read_json(folder / "result.json")
  kernels = [leaf["kernel"] for leaf in sparsejax.deploy.load(weights)["params"].values()]
  assert sum(map(np.count_nonzero, kernels)) == result["pool"] - result["pruned"]
  with pytest.raises(ValueError, match="must be a file that does not exist"):
    deploy.Options(folder, weights=weights)


def test_the_page_is_made_of_the_json_and_the_picture_is_small(folder, record):
  text = (folder / "deploy.md").read_text()
  assert text == deploy.to_markdown(record)
  assert record["conclusion"] in text and "| sparse |" in text
  # It is a smoke version, which the title must not hide.
  assert "epochs=2" in text.splitlines()[0]
  assert "| params/Dense_0/kernel | 64x38 |" in text
  picture = (folder / "layout.png").read_bytes()
  assert picture.startswith(b"\x89PNG") and len(picture) < 300_000


def test_a_target_that_is_missed_is_said_to_be(record):
  record["targets"].append({"target": "small enough", "figure": 2.0, "reached": False})
  assert "| small enough | 2 | MISSED |" in deploy.to_markdown(record)


def test_a_recipe_comes_back_from_its_config():
  for name in ("vgg19-cifar10-98", "lenet300-mnist-98-e40-granet", "resnet50-imagenet-granet-80"):
    recipe = RECIPES[name]
    assert recipe_lib.from_config(train.make_config(Run(recipe, name))) == recipe
  with pytest.raises(ValueError, match=r"config is not one of this version.*'depth'"):
    recipe_lib.from_config({"recipe": "x", "seed": 1, "depth": 3})


def error_of(*args):
  with pytest.raises(SystemExit) as error:
    deploy.main([*map(str, args)])
  return str(error.value)


def test_a_config_of_another_version_is_an_error():
  config = dataclasses.asdict(RECIPES["lenet300-digits"])
  for change in ({"cutout": 1}, {"augmentation": config["augmentation"] | {"cutout": 1}}):
    with pytest.raises(ValueError, match=r"not one of this version of the program: .*'cutout'"):
      recipe_lib.from_config(config | change)


def test_what_is_no_finished_run_is_an_error_that_says_so(folder, tmp_path):
  for empty in (tmp_path, tmp_path / "nowhere"):
    assert "has no config.json: it is not the folder of a finished run" in error_of(empty)
  assert list(tmp_path.iterdir()) == []
  for name in ("config.json", "result.json"):
    shutil.copy(folder / name, tmp_path)
  assert "has no checkpoints" in error_of(tmp_path)
  nowhere = tmp_path / "config.json" / "below"
  for option in ("out", "weights"):
    assert f"{option}={nowhere} cannot be written" in error_of(folder, f"--{option}", nowhere)
  (tmp_path / "config.json").write_text("{")
  assert "config.json is damaged" in error_of(tmp_path)
  with pytest.raises(ValueError, match=r"batches=\(0,\) must be"):
    deploy.Options(folder, batches=(0,))
  assert not (tmp_path / "deploy.json").exists()


def test_a_run_whose_last_checkpoint_is_lost_is_an_error(folder, tmp_path):
  copy = tmp_path / "run"
  shutil.copytree(folder, copy)
  (last,) = (copy / "checkpoints").iterdir()
  (last / "checksums.json").write_text("{}")
  assert re.search(r"remove .*result\.json and train it again.*damaged are", error_of(copy))
  assert last.exists()
  assert (copy / "deploy.json").read_text() == (folder / "deploy.json").read_text()


COMMITTED = sorted((RESULTS / "deploy").glob("*/deploy.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_committed_reports_are_made_of_their_json(path):
  record = records.read_json(path)
  assert path.with_suffix(".md").read_text() == deploy.to_markdown(record)
  assert path.with_name("layout.png").stat().st_size < 300_000
  assert "dirty" not in record["commit"]


def test_the_committed_times_of_inference_are_made_of_their_json():
  record = records.read_json(RESULTS / "inference.json")
  text = (RESULTS / "inference.md").read_text()
  assert text == benchmark_report.to_markdown(record)
