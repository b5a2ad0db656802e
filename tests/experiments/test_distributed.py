"""Several processes, and meshes of the devices of one."""

import dataclasses
import functools
import json
import shutil
import socket
import struct
import types

import chex
import jax
import numpy as np
import processes
import pytest

from experiments import data, distributed, plots, train, training
from experiments.augment import Augmentation
from experiments.distributed import Distributed
from experiments.recipes import RECIPES

# LeNet-300-100 in five steps an epoch. Masks change with the first step of each but the last one.
OPTIONS = (
  "--sparsity 0.7 --epochs 4 --prune-epochs 3 --batch-size 256 --drop-last --learning-rate 0.01"
  " --rotation 0 --translation 0"
)
PRUNED = 186_340


def write_digits(folder):
  """Writes the embedded digits, enlarged, as the files of MNIST."""
  digits = data.load("digits")
  for name, images, labels in (
    ("train", digits.train_images, digits.train_labels),
    ("t10k", digits.test_images, digits.test_labels),
  ):
    images = np.pad(images.repeat(3, axis=1).repeat(3, axis=2)[..., 0], ((0, 0), (2, 2), (2, 2)))
    for kind, array in (("images-idx3", images), ("labels-idx1", labels.astype(np.uint8))):
      header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
      (folder / f"{name}-{kind}-ubyte").write_bytes(header + array.tobytes())


def copy_unfinished(folder, target):
  """Copies a finished run as if it had ended within its last checkpoint."""
  shutil.copytree(folder, target)
  (target / "result.json").unlink()
  largest = max((target / "checkpoints/4").rglob("*"), key=lambda path: path.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:-9])


def read_result(folder):
  return json.loads((folder / "result.json").read_text())


def read_metrics(folder):
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def no_plots():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(plots, "plot_run", lambda *args: None)
    yield


@pytest.fixture(scope="module")
def jobs(no_plots, tmp_path_factory):
  """A folder in which 1, 2 and 4 processes have worked; and with which codes they ended."""
  root = tmp_path_factory.mktemp("jobs")
  write_digits(root)

  def arguments(name, *more):
    folders = "--data-dir", str(root), "--out", str(root / name)
    return ["lenet300-mnist-98", *OPTIONS.split(), *folders, *more]

  def run(count, *tasks):
    started = processes.start(tasks, count, root)
    try:
      return [process.wait(timeout=300) for process in started]
    finally:
      for process in started:
        process.kill()

  # It stops where the next step changes masks.
  train.main(arguments("one", "--time-limit", "1e-9"))
  shutil.copytree(root / "one", root / "replayed")
  processes.replay(root / "masks1.npz", arguments("replayed"), devices=1)
  mesh = "--mesh", "data=2,model=2"
  codes = {}
  codes[4] = run(
    4,
    ["train", str(root / "disagreement"), *arguments("none", "--seed", "{process}", *mesh)],
    ["replay", str(root / "masks4.npz"), *arguments("replayed", *mesh)],
    ["train", str(root / "failure"), *arguments("four", "--checkpoint-every", "2", *mesh)],
  )
  for name in ("by_one", "by_two"):
    copy_unfinished(root / "four", root / name)
  until_killed = arguments("by_two", "--checkpoint-every", "1", *mesh)
  codes[2] = run(
    2,
    ["replay", str(root / "masks2.npz"), *arguments("replayed", *mesh)],
    ["train", str(root / "failure"), *arguments("two", *mesh)],
    ["train until killed", str(root / "failure"), *until_killed],
  )
  train.main(arguments("one"))
  with pytest.warns(UserWarning, match="after 4 epochs is not whole, going back to 2"):
    train.main(arguments("by_one"))
  shutil.copytree(root / "by_two", root / "restarted")
  train.main(arguments("restarted"))
  for seed in ("1", "2"):
    train.main(arguments(f"seed{seed}", "--seed", seed))
  return root, codes


def test_a_mask_update_from_one_checkpoint_gives_the_same_masks_on_1_2_and_4_processes(jobs):
  root, _ = jobs
  found = {count: dict(np.load(root / f"masks{count}.npz")) for count in (1, 2, 4)}
  chex.assert_trees_all_equal(found[1], found[2], found[4])
  pruned = {
    when: sum(np.sum(~mask) for name, mask in found[1].items() if name.startswith(when))
    for when in ("before", "after")
  }
  assert pruned == {"before": round(PRUNED / 3), "after": round(PRUNED * 2 / 3)}


def test_whole_runs_on_1_2_and_4_processes_have_the_same_counts_and_like_accuracies(jobs):
  root, codes = jobs
  assert codes[4] == [0, 0, 0, 0]
  results = {name: read_result(root / name) for name in ("one", "two", "four")}
  accuracies = [read_result(root / name)["test_accuracy"] for name in ("one", "seed1", "seed2")]
  spread = max(accuracies) - min(accuracies)
  sparsities = [[line["sparsity"] for line in read_metrics(root / name)] for name in results]
  assert sparsities[0] == sparsities[1] == sparsities[2]
  for result in results.values():
    assert result["pruned"] == PRUNED
    assert abs(result["test_accuracy"] - results["one"]["test_accuracy"]) <= spread < 15
  found = [(result["processes"], result["mesh"]) for result in results.values()]
  mesh = {"data": 2, "model": 2}
  assert found == [(1, None), (2, mesh), (4, mesh)]


@pytest.mark.parametrize(("name", "epochs"), [("by_one", 2), ("restarted", 3)])
def test_a_run_goes_on_with_another_number_of_processes(jobs, name, epochs):
  """From the checkpoint of 4 processes after two epochs, and from that of 2 after one more."""
  root, _ = jobs
  before = "four" if name == "by_one" else "by_two"
  assert read_metrics(root / name)[:epochs] == read_metrics(root / before)[:epochs]
  assert [line["epoch"] for line in read_metrics(root / name)] == [0, 1, 2, 3]
  result, whole = read_result(root / name), read_result(root / "four")
  assert result["pruned"] == PRUNED
  assert result["test_accuracy"] == pytest.approx(whole["test_accuracy"], abs=3)


def test_a_process_that_is_killed_takes_the_others_with_it_and_leaves_a_checkpoint(jobs):
  root, codes = jobs
  survivor, killed = codes[2]
  assert killed == -9 and survivor != 0
  assert not (root / "by_two/result.json").exists()
  # It had resumed the run of 4 processes, whose last checkpoint both found to be damaged.
  assert read_metrics(root / "by_two")[:2] == read_metrics(root / "four")[:2]
  assert (root / "by_two/checkpoints/3/checksums.json").exists()
  for process in range(2):
    assert "not whole, going back to 2" in (root / f"process{process}of2.txt").read_text()


def test_processes_that_disagree_all_end_with_the_field_before_they_train(jobs):
  root, _ = jobs
  for process in range(4):
    assert "seed=1 there, but seed=0 in" in (root / f"disagreement{process}").read_text()
  assert not (root / "none").exists()
  assert not list(root.glob("failure*"))


def test_only_the_first_process_speaks(jobs):
  root, _ = jobs
  spoken = [(root / f"process{process}of4.txt").read_text() for process in range(4)]
  assert ["test accuracy" in text for text in spoken] == [True, False, False, False]


def test_a_coordinator_that_is_not_there_is_an_error_after_the_timeout():
  with socket.create_server(("127.0.0.1", 0)) as server:
    address = f"127.0.0.1:{server.getsockname()[1]}"
    first = Distributed(True, address, processes=2, process=0)
    with pytest.raises(ValueError, match=f"coordinator={address}: process 0 cannot listen there"):
      distributed.start(first)
  second = Distributed(True, address, processes=2, process=1, coordinator_timeout=1)
  message = f"coordinator={address} was not there within coordinator_timeout=1 seconds"
  with pytest.raises(ValueError, match=message):
    distributed.start(second)


def test_without_any_word_of_the_others_the_options_are_named(monkeypatch):
  for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
    monkeypatch.delenv(name, raising=False)

  def initialize(address, *args, **kwargs):
    assert address is None
    raise ValueError("coordinator_address should be defined.")

  monkeypatch.setattr(jax.distributed, "initialize", initialize)
  with pytest.raises(ValueError, match="distributed=True needs --coordinator, --processes and"):
    distributed.start(Distributed(True))
  monkeypatch.setenv("JAX_PROCESS_ID", "first")
  with pytest.raises(ValueError, match="JAX_PROCESS_ID=first must be a whole number"):
    distributed.start(Distributed(True))


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    ("--mesh data=3,model=2", "mesh=data=3,model=2 must divide all of the 8 devices"),
    ("--mesh data=4", "mesh=data=4 must divide all of the 8 devices"),
    ("--mesh model=3", "mesh=model=3 must divide all of the 8 devices"),
    ("--mesh data=8,rows=1", "mesh=data=8,rows=1 must be such as data=4,model=2"),
    ("--mesh data=8,model=0", "mesh=data=8,model=0 must be such as"),
    ("--mesh data=8 --batch-size 100", "batch_size=100 must be a multiple of 8, the data axis"),
    ("--process 1", "process=1 must be left out without --distributed"),
    ("--distributed --processes 2 --process 2", "process=2 must be an index from 0"),
    ("--distributed --processes 0", "processes=0 must be at least 1"),
    ("--distributed --coordinator here", "coordinator='here' must be HOST:PORT"),
    ("--distributed --coordinator-timeout 0", "coordinator_timeout=0 must be at least 1"),
    ("--distributed --heartbeat-timeout 0", "heartbeat_timeout=0 must be at least 1"),
  ],
)
def test_options_that_do_not_fit_are_named(arguments, said, tmp_path, capsys):
  with pytest.raises(SystemExit) as failure:
    train.main(["lenet300-digits", "--out", str(tmp_path), *arguments.split()])
  printed = str(failure.value.code) + capsys.readouterr().err
  # Without the frame around it.
  assert said in " ".join(printed.replace("│", " ").split())


@pytest.mark.parametrize(
  ("text", "shape"), [("", (8, 1)), ("model=2", (4, 2)), ("model=4,data=2", (2, 4))]
)
def test_an_axis_of_a_mesh_that_is_missing_has_the_rest(text, shape):
  assert distributed.make_mesh(text, jax.devices()).devices.shape == shape


@pytest.mark.parametrize(
  ("rows", "parts"),
  [
    ([[0, 0], [0, 0], [1, 1], [1, 1]], [(0, 2), (1, 2)]),
    ([[0, 1], [2, 3]], [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ([[0, 1], [0, 1]], [(0, 1), (0, 1)]),
  ],
)
def test_processes_that_share_rows_of_a_mesh_read_the_same_images(rows, parts, monkeypatch):
  devices = np.vectorize(lambda index: types.SimpleNamespace(process_index=index), [object])(rows)
  mesh = types.SimpleNamespace(devices=devices)
  for process, part in enumerate(parts):
    monkeypatch.setattr(jax, "process_index", lambda process=process: process)
    assert distributed.shard_of_process(mesh) == part


@pytest.mark.parametrize("rows", [[[0, 0, 1], [1, 2, 2]], [[0, 1], [0, 0]], [[0], [0], [1]]])
def test_processes_that_cannot_read_equal_parts_are_an_error(rows, monkeypatch):
  devices = np.vectorize(lambda index: types.SimpleNamespace(process_index=index), [object])(rows)
  monkeypatch.setattr(jax, "process_index", lambda: 0)
  with pytest.raises(ValueError, match="must be shared out among processes evenly"):
    distributed.shard_of_process(types.SimpleNamespace(devices=devices))


def test_devices_share_parameters_momentum_and_masks():
  mesh = distributed.make_mesh("data=4,model=2", jax.devices())
  digits = data.load("digits")
  state = training.make_trainer(RECIPES["lenet300-digits"], digits, seed=0, mesh=mesh).init()
  shapes = {(64, 300): (64, 150), (300, 100): (300, 50), (100, 10): (100, 5)}
  shared = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim == 2]
  assert len(shared) == 3 * len(shapes)
  for leaf in shared:
    assert leaf.sharding.shard_shape(leaf.shape) == shapes[leaf.shape]
    assert len(leaf.devices()) == 8


def test_devices_that_share_batches_and_parameters_make_the_steps_of_one():
  # Of its two batches, the second has 11 images, which four parts do not divide.
  options = dict(sparsity=0.0, augmentation=Augmentation(), train_images=30, batch_size=16)
  recipe = dataclasses.replace(RECIPES["lenet300-digits"], **options)
  found = []
  for mesh in (None, distributed.make_mesh("data=4,model=2", jax.devices())):
    trainer = training.make_trainer(recipe, data.load("digits"), seed=0, mesh=mesh)
    state, metrics = trainer.compile_epoch()(trainer.init(), trainer.train)
    found.append((state.params, metrics, trainer.evaluate(state, trainer.test)))
  assert state.params["Dense_0"]["kernel"].sharding.shard_shape((64, 300)) == (64, 150)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), *found)


def test_what_the_model_axis_does_not_divide_is_on_every_device():
  mesh = distributed.make_mesh("data=2,model=4", jax.devices())
  tree = {"kernel": np.zeros([3, 8]), "odd": np.zeros([8, 10]), "bias": np.zeros(8)}
  found = {name: tuple(each.spec) for name, each in distributed.over_model(tree, mesh).items()}
  assert found == {"kernel": (None, "model"), "odd": (), "bias": ()}
