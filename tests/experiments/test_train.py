import contextlib
import dataclasses
import functools
import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import chex
import numpy as np
import orbax.checkpoint as ocp
import pytest
from sklearn import datasets

from experiments import checkpoints, data, records, sparse_training, train
from experiments import recipe as recipe_lib
from experiments.models import MODELS, vgg
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


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
  """Runs lie below the current folder by default: not in that of whoever runs the tests."""
  monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))


def photographs():
  """Patches of 32x32 pixels from two photographs; the label is the strip that one comes from."""
  rng = np.random.default_rng(0)
  images, labels = np.zeros((700, 32, 32, 3), np.uint8), rng.integers(0, 10, 700).astype(np.int32)
  photos = datasets.load_sample_images().images
  for i, label in enumerate(labels):
    photo = photos[label % 2]
    width = photo.shape[1] // 5
    y = rng.integers(0, photo.shape[0] - 32)
    x = label // 2 * width + rng.integers(0, width - 32)
    images[i] = photo[y : y + 32, x : x + 32]
  return images, labels


load = data.load


def real_images(name, data_dir=None):
  """Images inside of scikit-learn, in the shape of the data set that a recipe asks for."""
  del data_dir
  digits = load("digits")
  if name == "digits":
    return digits
  if name == "mnist":
    images, labels = digits.train_images, digits.train_labels
    images = np.pad(images.repeat(3, axis=1).repeat(3, axis=2), ((0, 0), (2, 2), (2, 2), (0, 0)))
  else:
    images, labels = photographs()
  moments = (0.5,) * images.shape[-1]
  return data.Dataset(
    name, images[:600], labels[:600], images[600:], labels[600:], moments, moments
  )


def same_but_for_sparsity(name):
  return dataclasses.replace(RECIPES[name], sparsity=0.5, prune_epochs=9, published=None)


def test_recipes_of_one_series_differ_in_sparsity_alone():
  name = "resnet18-cifar10-72.9"
  for other in ("70", "75", "80", "85", "90", "95"):
    assert same_but_for_sparsity(f"resnet18-cifar10-{other}") == same_but_for_sparsity(name)


# One of each series, where the test above or numbers alone tell the others apart. Of the baselines,
# what differs in how a run goes: the methods themselves are tested where they are made, and so are
# streamed images.
SMOKED = [
  name
  for name in RECIPES
  if name not in sparse_training.published()
  and not re.search(r"-e\d+-|lth|cifar10.*-(\d\d|72\.9)-|mnist-78|vgg19-cifar10-dense", name)
  and not re.search(r"imagenet|resnet18-cifar10-(?!72\.9)|resnet20|vgg-like", name)
]
SMOKED += [f"lenet300-mnist-98-e40-{m}" for m in ("gmp-original", "snip", "grasp", "synflow")]
SMOKED += ["lenet300-mnist-e40-lth-rewind"]
SMOKED += ["lenet300-mnist-98-e40-granet-sparse", "lenet300-mnist-98-e40-snfs"]
SMOKED += ["lenet300-mnist-98-e40-rigl", "mlp-cifar10-each-sign-random"]


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_has_a_smoke_version(name):
  assert recipe_lib.smoke(RECIPES[name]).total_epochs <= 6


@pytest.mark.parametrize("ramp", ["progressive", "linear", "cubic"])
@pytest.mark.parametrize("prune_epochs", [1, 2, 9])
def test_a_recipe_with_any_ramp_has_a_smoke_version(ramp, prune_epochs):
  recipe = dataclasses.replace(RECIPES["lenet300-digits"], ramp=ramp, prune_epochs=prune_epochs)
  smoked = recipe_lib.smoke(recipe)
  once = ramp == "progressive" and prune_epochs == 1
  assert (smoked.ramp, smoked.epochs, smoked.prune_begin) == (ramp, 2, int(once))


@pytest.mark.parametrize("name", SMOKED)
def test_the_smoke_version_of_each_recipe_runs_on_real_images(name, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(data, "load", real_images)
  recipe, out = RECIPES[name], tmp_path / "run"
  result = train.train(train.Run(recipe, name, seed=1, out=out, smoke=True))

  pool = result["pool"]
  sparsity = np.float32(recipe.sparsity) if recipe.ramp != "progressive" else recipe.sparsity
  if recipe.dynamic.method not in ("none", "granet"):
    # Rounded in each layer.
    expected = pool - (1 - recipe.sparsity) * pool
    assert result["pruned"] == pytest.approx(expected, abs=len(result["layers"]) / 2)
  elif recipe.cycles == 1:
    assert result["pruned"] == pool - round((1 - float(sparsity)) * pool)
  else:
    assert 0 == result["cycles"][0]["pruned"] < result["cycles"][1]["pruned"] < result["pruned"]
  assert json.loads((out / "result.json").read_text()) == result
  lines = read_metrics(out)
  assert [line["epoch"] for line in lines[:2]] == [0, 1]
  assert lines[-1]["sparsity"] == pytest.approx(result["sparsity"], abs=1 / pool)
  assert all(np.isfinite(line["loss"]) for line in lines)
  assert (result["best_test_accuracy"] is not None) == (recipe.best_above < 1)
  assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
  assert "prunable" in (out / "summary.txt").read_text()
  empty = [layer["name"] for layer in result["layers"] if not layer["active"]]
  assert ("WARNING: no active weight is left in" in capsys.readouterr().out) == bool(empty)


def read_metrics(folder):
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def final_state(folder):
  with ocp.CheckpointManager(folder / "checkpoints") as saved:
    return saved.restore(saved.latest_step(), args=ocp.args.StandardRestore())["state"]


def test_a_killed_run_resumes_with_bit_identical_results(tmp_path):
  lengths = "--epochs", "80", "--prune-epochs", "40", "--checkpoint-every", "7"
  arguments = ["lenet300-digits", *lengths, "--seed", "5"]
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
  assert int(whole["step"]) == 80 * 11
  chex.assert_trees_all_equal(resumed, whole)
  lines = [read_metrics(folder) for folder in (killed, tmp_path / "whole")]
  for line in lines[0] + lines[1]:
    del line["seconds"]
  assert lines[0] == lines[1]


TINY = functools.partial(
  vgg.VGG, convolutions=(1, 1, 0, 0, 0), hidden=(16,), dropout=(0.0, 0.5), width=0.1
)


@pytest.fixture
def tiny(monkeypatch, trainers):
  """A recipe with batch norm, dropout and a last batch that is not full."""
  return _tiny(monkeypatch)


def _tiny(monkeypatch):
  monkeypatch.setitem(MODELS, "tiny", TINY)
  monkeypatch.setattr(data, "load", real_images)
  recipe = RECIPES["vgg-like-cifar10-97"]
  # Colours take long to compile.
  plain = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0)
  recipe = dataclasses.replace(
    recipe,
    augmentation=dataclasses.replace(recipe.augmentation, **plain),
    model="tiny",
    dtype="float32",
    width=0.1,
    epochs=4,
    prune_epochs=3,
    batch_size=100,
  )
  return train.Run(recipe, "tiny")


@pytest.fixture(scope="module")
def tiny_runs(tmp_path_factory, trainers):
  """Folders of runs of `tiny`: "whole", and "cut1" to "cut3" as a time limit left them.

  Tests go on with copies: `copy_of`.
  """
  root = tmp_path_factory.mktemp("tiny")
  with pytest.MonkeyPatch.context() as monkeypatch:
    tiny = _tiny(monkeypatch)
    result = train.train(dataclasses.replace(tiny, out=root / "whole", time_limit=3600.0))
    run = dataclasses.replace(tiny, out=root / "cut", time_limit=1e-9)
    said = {}
    for epochs in (1, 2, 3):
      with contextlib.redirect_stdout(io.StringIO()) as output:
        assert train.train(run) is None
      said[epochs] = output.getvalue()
      shutil.copytree(run.folder, root / f"cut{epochs}")
  return root, result, said


def copy_of(runs, name, tmp_path):
  """A copy of one of `tiny_runs`, to go on with."""
  return pathlib.Path(shutil.copytree(runs[0] / name, tmp_path / name))


def test_a_run_stops_at_the_time_limit_and_resumes_with_bit_identical_results(
  tiny, tiny_runs, trainers, tmp_path
):
  root, whole, said = tiny_runs
  for epochs in (1, 2, 3):
    assert f"Stopped at the time limit after {epochs} of 4 epochs" in said[epochs]
    with checkpoints.open_checkpoints(root / f"cut{epochs}/checkpoints") as saved:
      assert max(saved.epochs) == epochs
    assert not (root / f"cut{epochs}/result.json").exists()
  folder = copy_of(tiny_runs, "cut3", tmp_path)
  trainers.clear()
  cut = train.train(dataclasses.replace(tiny, out=folder, time_limit=1e-9))
  chex.assert_trees_all_equal(final_state(folder), final_state(root / "whole"))
  assert cut["test_accuracy"] == whole["test_accuracy"]
  assert [line["epoch"] for line in read_metrics(folder)] == [0, 1, 2, 3]


def test_a_run_without_a_time_limit_in_sight_is_not_cut(tiny_runs):
  root, result, _ = tiny_runs
  assert result is not None
  assert len(read_metrics(root / "whole")) == 4


def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before(tiny, tiny_runs, tmp_path):
  root, whole, _ = tiny_runs
  run = dataclasses.replace(tiny, out=copy_of(tiny_runs, "cut3", tmp_path))
  files = [path for path in (run.folder / "checkpoints/3").rglob("*") if path.is_file()]
  largest = max(files, key=lambda path: path.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:-9])
  with pytest.warns(UserWarning, match="after 3 epochs is not whole, going back to 2"):
    result = train.train(dataclasses.replace(run, time_limit=3600.0))
  assert result["test_accuracy"] == whole["test_accuracy"]
  chex.assert_trees_all_equal(final_state(run.folder), final_state(root / "whole"))


def test_the_best_epoch_by_the_test_set_is_reported_beside_the_last(tiny, tmp_path):
  recipe = dataclasses.replace(tiny.recipe, best_above=0.5)
  result = train.train(dataclasses.replace(tiny, recipe=recipe, out=tmp_path))
  lines = read_metrics(tmp_path)
  # The ramp to 97 % takes three epochs.
  assert ["test_accuracy" in line for line in lines] == [False, True, True, True]
  tested = {line["epoch"]: 100 * line["test_accuracy"] for line in lines[1:]}
  best = result["best_test_accuracy"]
  assert best["test_accuracy"] == max(tested.values()) == tested[best["epoch"]]
  assert result["test_accuracy"] == tested[3]


def digits_run(folder, **changes):
  """A short run on noise of a network that is compiled fast."""
  name = "lenet300-digits"
  return train.Run(
    dataclasses.replace(RECIPES[name], **(dict(epochs=1, prune_epochs=1) | changes)),
    name,
    out=folder,
  )


def test_without_validation_images_the_accuracy_is_unknown_and_a_collapse_still_seen(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(data, "load", tiny_mnist)
  result = train.train(digits_run(tmp_path, epochs=2, validation=0.0, learning_rate=1e9))
  assert all(line["validation_accuracy"] is None for line in read_metrics(tmp_path))
  assert result["collapsed_in_epoch"] == 0


def test_a_device_that_is_not_there_is_an_error_before_anything_else(tiny, tmp_path, monkeypatch):
  monkeypatch.delattr(data, "load")
  with pytest.raises(ValueError, match="device=tpu is asked for, but JAX finds none"):
    train.train(dataclasses.replace(tiny, out=tmp_path / "run", device="tpu"))
  assert not (tmp_path / "run").exists()


def test_a_gpu_can_be_asked_for_the_same_bits_each_time(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
  monkeypatch.setattr(train, "train", lambda run: None)
  train.main(["lenet300-digits"])
  assert "deterministic" not in os.environ["XLA_FLAGS"]
  train.main(["lenet300-digits", "--deterministic"])
  assert os.environ["XLA_FLAGS"].endswith("--xla_gpu_deterministic_ops=true")


def test_a_folder_with_another_run_is_left_alone(tmp_path, monkeypatch):
  monkeypatch.setattr(data, "load", tiny_mnist)
  run = digits_run(tmp_path)
  train.train(run)
  with pytest.raises(ValueError, match="holds a run with seed=42"):
    train.train(dataclasses.replace(run, seed=7))


def test_a_finished_run_is_left_alone(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(data, "load", tiny_mnist)
  run = digits_run(tmp_path)
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
  result = train.train(digits_run(tmp_path, epochs=3, prune_epochs=3, learning_rate=1e9))
  assert result["collapsed_in_epoch"] == 0
  printed = capsys.readouterr().out
  assert "seed 42, epoch 0: the network has collapsed" in printed
  assert "This run COLLAPSED in epoch 0" in printed
  assert all(line["collapsed"] for line in read_metrics(tmp_path))


def test_a_folder_in_which_another_process_trains_is_left_alone(tiny, tmp_path):
  config = {"recipe": "tiny", "seed": 42, **dataclasses.asdict(tiny.recipe)}
  with (
    records.open_folder(tmp_path, config),
    pytest.raises(ValueError, match="another process is training there"),
  ):
    train.train(dataclasses.replace(tiny, out=tmp_path))


def test_a_folder_that_cannot_be_written_is_an_error_before_anything_else(tiny, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match=r"out=.*file cannot be written"):
    train.train(dataclasses.replace(tiny, out=tmp_path / "file"))


def test_checkpoints_without_a_config_are_left_alone(tiny, tiny_runs, tmp_path):
  run = dataclasses.replace(tiny, out=copy_of(tiny_runs, "cut1", tmp_path), time_limit=1e-9)
  (run.folder / "config.json").unlink()
  with pytest.raises(ValueError, match=r"no config\.json that says of what"):
    train.train(run)


@pytest.mark.parametrize(
  ("name", "content"),
  [
    ("config.json", '{"seed":'),
    ("config.json", "[1]"),
    ("result.json", '{"seed":'),
    ("result.json", "[1]"),
    ("result.json", '{"config": {}}'),
  ],
)
def test_a_damaged_file_in_a_folder_is_named(tiny, tmp_path, name, content):
  (tmp_path / name).write_text(content)
  with pytest.raises(ValueError, match=f"{name} is damaged, remove it"):
    train.train(dataclasses.replace(tiny, out=tmp_path))


def test_a_changed_option_of_the_augmentation_is_named_alone(tiny, tiny_runs, tmp_path):
  folder = copy_of(tiny_runs, "cut1", tmp_path)
  augmentation = dataclasses.replace(tiny.recipe.augmentation, rotation=3.0)
  recipe = dataclasses.replace(tiny.recipe, augmentation=augmentation)
  with pytest.raises(ValueError, match=r"holds a run with augmentation\.rotation=15\.0: choose"):
    train.train(dataclasses.replace(tiny, recipe=recipe, out=folder))


def test_metrics_that_were_lost_come_back_from_the_checkpoint(tiny, tiny_runs, tmp_path):
  folder = copy_of(tiny_runs, "cut2", tmp_path)
  before = read_metrics(folder)
  (folder / "metrics.jsonl").write_text('{"epoch": 0, "lo')
  train.train(dataclasses.replace(tiny, out=folder, time_limit=3600.0))
  assert read_metrics(folder)[:2] == before
  assert len(read_metrics(folder)) == 4


def test_a_few_held_out_images_that_look_alike_to_a_network_are_no_collapse(tmp_path, monkeypatch):
  monkeypatch.setattr(data, "load", tiny_mnist)
  # One of 300.
  result = train.train(digits_run(tmp_path, epochs=4, validation=0.002, learning_rate=0.0))
  assert result["collapsed_in_epoch"] is None
  assert all(line["validation_accuracy"] in (0.0, 1.0) for line in read_metrics(tmp_path))


def test_without_git_a_result_has_no_commit(monkeypatch):
  monkeypatch.setenv("PATH", "")
  assert records.provenance()["commit"] is None


def test_images_that_are_too_small_for_a_network_are_an_error(tmp_path):
  for model in ("vgg19", "lenet5-caffe"):
    recipe = dataclasses.replace(RECIPES["lenet300-digits"], model=model)
    with pytest.raises(ValueError, match=f"model={model} needs larger images"):
      train.train(train.Run(recipe, "lenet300-digits", out=tmp_path))


def test_determinism_that_comes_too_late_is_an_error(tiny, tmp_path):
  with pytest.raises(ValueError, match="deterministic=True has come too late"):
    train.train(dataclasses.replace(tiny, out=tmp_path, deterministic=True))


def test_a_smoke_run_has_a_folder_of_its_own(tiny):
  assert dataclasses.replace(tiny, smoke=True).folder == pathlib.Path("runs/tiny-smoke/seed42")
  assert tiny.folder == pathlib.Path("runs/tiny/seed42")


def test_an_epoch_that_was_survived_is_no_collapse():
  flags = [True, False, False, True, True]
  metrics = [{"epoch": epoch, "collapsed": flag} for epoch, flag in enumerate(flags)]
  assert records.collapsed_in_epoch(metrics) == 3
  assert records.collapsed_in_epoch(metrics[:3]) is None


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
    (["lenet300-digits", "--seed", str(2**32)], "seed=4294967296 must be from 0 to"),
    (["lenet300-digits", "--checkpoint-every", "0"], "checkpoint_every=0"),
    (["lenet300-digits", "--time-limit", "0"], "time_limit=0"),
    (["lenet300-digits", "--batch-size", "2000"], "batch_size=2000"),
    (["lenet300-digits", "--train-images", "2000"], "train_images=2000"),
    (["lenet300-digits", "--learning-rate", "inf"], "learning_rate=inf"),
    (["--seed", "3", "lenet300-mnist-98"], "The recipe comes first: lenet300-mnist-98"),
    (["lenet300-digits", "--device", "tpu"], "device=tpu"),
    (["lenet300-digits", "--initial-sparsity", "0.95"], "initial_sparsity=0.95"),
    (["lenet300-digits", "--translation", "2"], "translation=2"),
    (["resnet18-cifar10-80", "--prune-begin", "1"], "prune_epochs=200"),
    (["vgg19-cifar10-98", "--epochs", "299"], "prune_epochs=290"),
    (["lenet300-digits", "--model", "lenet"], "lenet300"),
  ],
)
def test_an_unknown_recipe_or_option_fails_with_a_suggestion(arguments, said, capsys):
  with pytest.raises(SystemExit) as failure:
    train.main(arguments)
  assert failure.value.code
  message = str(failure.value.code) + capsys.readouterr().err
  assert said in message
  assert "__" not in message


def test_text_that_is_not_read_to_its_end_is_no_error():
  code = "import sys; from experiments import commands\n"
  code += "with commands.errors_as_messages(): [print(i) for i in range(10**5)]"
  command = [sys.executable, "-c", code]
  pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
    assert process.stdout.readline() == b"0\n"
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 1)


def test_the_help_of_the_command_is_a_line_for_each_recipe_and_that_of_a_recipe_its_options(capsys):
  with pytest.raises(SystemExit) as end:
    train.main(["--help"])
  assert not end.value.code
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in lines if line.startswith("  ")] == list(RECIPES)
  with pytest.raises(SystemExit) as end:
    train.main(["vgg19-cifar10-98", "--help"])
  assert not end.value.code
  text = capsys.readouterr().out
  assert "vgg19 on cifar10, 400 epochs, 98.0% pruned" in text
  assert "--learning-rate" in text
  assert "lenet300-digits" not in text


def test_a_missing_data_set_ends_the_command_with_the_ways_to_provide_it(tmp_path, monkeypatch):
  monkeypatch.setattr(data, "_answers", lambda url: False)
  with pytest.raises(SystemExit, match="three ways"):
    train.main(["lenet300-mnist-98", "--data-dir", str(tmp_path)])
