"""ImageNet as a stream: every image once an epoch, the same ones after a resume, on any devices."""

import dataclasses
import functools
import itertools
import json
import multiprocessing
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from experiments import data, distributed, imagenet, loading, methods, streaming, train
from experiments import recipe as recipe_lib
from experiments.models import MODELS, layers, resnet
from experiments.recipes import RECIPES

TRAIN, TEST = 40, 13


def make_image(rng):
  """A coarse pattern in a size of its own."""
  height, width = rng.integers(30, 70, size=2)
  pattern = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
  return pattern.resize((width, height), Image.Resampling.BICUBIC)


def write_prepared(target, *, train_images=TRAIN, test_images=TEST, image=make_image):
  """Writes a data set in the shape of ImageNet, with ascending labels, in several shards."""
  rng = np.random.default_rng(0)
  splits = {
    split: ((image(rng), label) for label in range(count))
    for split, count in (("train", train_images), ("validation", test_images))
  }
  loading.write_prepared(target, splits, images_per_shard=16)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  root = tmp_path_factory.mktemp("tfds")
  write_prepared(root)
  return root


@pytest.fixture
def stream(prepared):
  return imagenet.Stream(
    data.load(imagenet.NAME, prepared), "train", 0, TRAIN, batch_size=8, image_size=24, seed=3
  )


def labels_of(batches):
  return np.concatenate([labels for _, labels in batches])


def assert_same(batches, others):
  for batch, other in zip(batches, others, strict=True):
    np.testing.assert_array_equal(batch[0], other[0])
    np.testing.assert_array_equal(batch[1], other[1])


def test_the_data_set_has_several_shards_and_is_not_read_before_it_is_asked_for(prepared):
  found = data.load(imagenet.NAME, prepared)
  assert (found.train_size, found.test_size, found.classes) == (TRAIN, TEST, 1000)
  assert len(list(found.directory.glob("*train.array_record*"))) == 3


def test_an_epoch_has_every_image_once_in_batches_of_crops(stream):
  batches = list(stream.shuffled(0))
  assert len(batches) == stream.full_batches == 5
  for pixels, labels in batches:
    assert pixels.shape == (8, 24, 24, 3) and pixels.dtype == np.uint8
    assert labels.shape == (8,) and labels.dtype == np.int32
  assert sorted(labels_of(batches)) == list(range(TRAIN))
  assert list(labels_of(batches)) != list(range(TRAIN))


def test_the_same_seed_and_epoch_give_the_same_batches_and_others_do_not(stream):
  batches = list(stream.shuffled(1))
  assert_same(batches, stream.shuffled(1))
  others = [stream.shuffled(2), dataclasses.replace(stream, seed=4).shuffled(1)]
  for other in others:
    assert list(labels_of(batches)) != list(labels_of(other))


def test_processes_that_decode_change_no_batch(stream):
  batches = list(stream.shuffled(1))
  # One after the other, since what one holds is memory of its process.
  found = dataclasses.replace(stream, workers=2).shuffled(1)
  assert_same(batches, ((pixels.copy(), labels.copy()) for pixels, labels in found))


@pytest.mark.parametrize("count", [2, 3])
def test_processes_have_disjoint_parts_that_are_all_images_together(stream, count):
  parts = [
    dataclasses.replace(stream, batch_size=count, shard=(index, count)) for index in range(count)
  ]
  seen = [labels_of(part.in_order()) for part in parts]
  everything = np.concatenate(seen)
  assert sorted(everything[everything >= 0]) == list(range(TRAIN))
  # Each process has as many batches as the others, in training and in testing.
  assert len({len(labels) for labels in seen}) == 1
  trained = [labels_of(part.shuffled(0)) for part in parts]
  assert {len(labels) for labels in trained} == {TRAIN // count}
  for one, other in itertools.combinations(trained, 2):
    assert not set(one) & set(other)


def test_each_process_has_an_order_of_its_own(stream):
  orders = []
  for index in range(2):
    part = dataclasses.replace(stream, shard=(index, 2))
    orders.append(list(labels_of(part.shuffled(0)) - TRAIN // 2 * index))
  assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]


def test_what_does_not_fill_a_batch_is_padded_in_testing_and_left_out_in_training(stream):
  test = dataclasses.replace(stream, split="validation", end=TEST)
  batches = list(test.in_order())
  assert list(labels_of(batches)) == [*range(TEST), -1, -1, -1]
  assert batches[-1][0].shape == (8, 24, 24, 3)
  assert len(list(test.shuffled(0))) == test.full_batches == 1
  assert len(labels_of(test.first(3).in_order())) == 8


def test_crops_for_testing_are_those_of_a_scaled_image(stream):
  image = make_image(np.random.default_rng(0)).resize((50, 37))
  # The shorter side becomes 27, since 24 / 27 is 224 / 256, up to a pixel.
  scaled = image.resize((36, 27), Image.Resampling.BILINEAR)
  expected = np.asarray(scaled)[2:26, 6:30]
  np.testing.assert_array_equal(np.asarray(imagenet.center_crop(image, 24)), expected)
  upright = imagenet.center_crop(image.transpose(Image.Transpose.TRANSPOSE), 24)
  assert upright.size == (24, 24)
  large = Image.new("RGB", (500, 375))
  assert imagenet.center_crop(large, 224).size == (224, 224)


def test_crops_for_training_are_scaled_parts_half_of_them_mirrored():
  image = make_image(np.random.default_rng(0)).resize((50, 37))
  mirrored = 0
  for seed in range(200):
    crop = np.asarray(imagenet.random_crop(image, 24, np.random.default_rng(seed)))
    box = imagenet.random_box(50, 37, np.random.default_rng(seed))
    expected = np.asarray(image.crop(box).resize((24, 24), Image.Resampling.BILINEAR))
    is_mirrored = np.array_equal(crop, expected[:, ::-1])
    assert is_mirrored or np.array_equal(crop, expected)
    mirrored += is_mirrored
  assert 70 < mirrored < 130


def test_boxes_are_of_the_published_areas_and_ratios():
  rng = np.random.default_rng(0)
  boxes = np.array([imagenet.random_box(500, 375, rng) for _ in range(2000)])
  width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
  areas = width * height / (500 * 375)
  assert 0.079 < areas.min() < 0.1 and 0.9 < areas.max() <= 1
  assert 0.74 < (width / height).min() < 0.77 and 1.3 < (width / height).max() < 1.35
  assert boxes.min() == 0 and boxes[:, 2].max() == 500 and boxes[:, 3].max() == 375


@pytest.mark.parametrize(
  ("size", "box"), [((300, 20), (136, 0, 163, 20)), ((20, 300), (0, 136, 20, 163))]
)
def test_where_no_box_fits_it_is_the_centre(size, box):
  class Largest:
    def uniform(self, low, high):
      return high

  assert imagenet.random_box(*size, Largest()) == box


def test_grey_images_have_three_channels(tmp_path):
  write_prepared(
    tmp_path,
    train_images=2,
    test_images=1,
    image=lambda rng: make_image(rng).convert(["L", "CMYK"][int(rng.integers(2))]),
  )
  grey = imagenet.Stream(data.load(imagenet.NAME, tmp_path), "train", 0, 2, 2, 24)
  assert next(grey.shuffled(0))[0].shape == (2, 24, 24, 3)


def test_a_missing_data_set_is_reported_with_ways_to_make_it(tmp_path):
  with pytest.raises(data.DataNotFound, match=r"tfds build imagenet2012.*\n.*convert_format"):
    data.load(imagenet.NAME, tmp_path)


def test_missing_shards_are_reported_before_training(prepared, tmp_path):
  shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
  next(tmp_path.rglob("*train.array_record-00001*")).unlink()
  with pytest.raises(data.DataNotFound, match=r"in part: .*train.array_record-00001.* missing"):
    data.load(imagenet.NAME, tmp_path)


def test_a_process_that_is_killed_is_not_taken_for_a_damaged_file(prepared, monkeypatch):
  stream = imagenet.Stream(data.load(imagenet.NAME, prepared), "train", 0, TRAIN, 8, 24, workers=1)
  batches = stream.in_order()
  next(batches)
  for child in multiprocessing.active_children():
    child.kill()
  with pytest.raises(ValueError, match="workers=1 processes that decode images was ended"):
    list(batches)


@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_a_damaged_shard_is_an_error_that_names_the_files(prepared, tmp_path, damage):
  shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
  path = next(tmp_path.rglob("*train.array_record-00001*"))
  content = path.read_bytes()
  path.write_bytes(
    content[: len(content) // 2] if damage == "cut" else bytes(b ^ 255 for b in content)
  )
  damaged = imagenet.Stream(data.load(imagenet.NAME, tmp_path), "train", 0, TRAIN, 8, 24)
  with pytest.raises(ValueError, match=r"train.array_record\* is incomplete or corrupt"):
    list(damaged.in_order())


@pytest.mark.parametrize(
  ("example", "message"),
  [
    ({"image": b"no image", "label": 1}, "cannot identify"),
    ({"image": b"", "label": 1000}, r"label 1000 is not in 0\.\.999"),
    ({"image": b"", "label": -1}, r"label -1 is not in 0\.\.999"),
  ],
)
def test_a_damaged_image_is_an_error_that_names_it(stream, example, message):
  decode = imagenet._Decode(stream, imagenet.center_crop)
  with pytest.raises(ValueError, match=f"train image b'n01.JPEG' is corrupt: .*{message}"):
    decode({**example, "file_name": b"n01.JPEG"})


def test_the_commands_start_without_the_readers_of_images():
  code = "import sys, experiments.train; print({'grain', 'tensorflow_datasets'} & set(sys.modules))"
  found = subprocess.run(
    [sys.executable, "-c", code], cwd=pathlib.Path(train.__file__).parents[1], capture_output=True
  )
  assert found.stdout == b"set()\n"


@pytest.fixture
def tiny(monkeypatch):
  """The smoke version of a recipe with one bottleneck."""
  network = functools.partial(
    resnet.ImageNetResNet50, blocks=(1,), channels=(64,), dense_init=layers.NORMAL_001
  )
  monkeypatch.setitem(MODELS, "tiny", network)
  recipe = recipe_lib.smoke(RECIPES["resnet50-imagenet-granet-80"])
  return dataclasses.replace(recipe, model="tiny", batch_size=8, train_images=TRAIN)


def test_a_run_that_is_cut_and_resumed_ends_with_the_same_bits(tiny, prepared, trainers, tmp_path):
  runs = [train.Run(tiny, "tiny", out=tmp_path / name, data_dir=prepared) for name in "ab"]
  whole = train.train(dataclasses.replace(runs[0], checkpoint_every=1))
  # A run stops before its time limit, but always trains one epoch.
  cut = dataclasses.replace(runs[1], time_limit=1e-9)
  assert train.train(cut) is None
  trainers.clear()
  resumed = train.train(dataclasses.replace(cut, time_limit=np.inf))
  for key in set(whole) - {"seconds", "compile_seconds"}:
    assert whole[key] == resumed[key], key
  assert json.loads((tmp_path / "a/result.json").read_text()) == whole
  assert whole["pruned"] == whole["pool"] - round((1 - float(np.float32(0.8))) * whole["pool"])
  lines = [
    [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    for name in "ab"
  ]
  for one, other in zip(*lines, strict=True):
    assert one | {"seconds": 0} == other | {"seconds": 0}
  assert_trees_equal(*(final_state(tmp_path / name) for name in "ab"))


def final_state(folder):
  with ocp.CheckpointManager(folder / "checkpoints") as saved:
    return saved.restore(saved.latest_step(), args=ocp.args.StandardRestore())["state"]


def assert_trees_equal(tree, other):
  for leaf, of_other in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
    assert jnp.array_equal(leaf, of_other)


def test_eight_devices_make_the_steps_of_one(tiny, prepared):
  # Dense, and few steps: rounding errors grow from one to the next.
  recipe = dataclasses.replace(
    tiny, sparsity=0.0, initial_sparsity=0.0, dynamic=recipe_lib.Dynamic(), train_images=16
  )
  found = []
  for devices in (jax.devices()[:1], jax.devices()):
    mesh = distributed.make_mesh("", devices)
    trainer = streaming.make_trainer(recipe, data.load(imagenet.NAME, prepared), seed=0, mesh=mesh)
    state, metrics = trainer.compile_epoch()(trainer.init(), trainer.train)
    assert len(state.step.devices()) == len(devices) in (1, 8)
    found.append((state.params, metrics, trainer.evaluate(state, trainer.test)))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), *found)


def test_images_that_fill_a_batch_up_count_in_no_test(tiny, prepared):
  trainer = streaming.make_trainer(tiny, data.load(imagenet.NAME, prepared), seed=0)
  state = trainer.init()
  assert not trainer.evaluate(state, trainer.test).constant
  head = {"kernel": jnp.zeros_like(state.params["classifier"]["kernel"])}
  head["bias"] = jnp.zeros(1000).at[5].set(1.0)
  dead = state.replace(params={**state.params, "classifier": head})
  evaluation = trainer.evaluate(dead, trainer.test)
  assert evaluation.constant and evaluation.accuracy == pytest.approx(1 / TEST)


def test_training_and_held_out_images_are_disjoint_and_as_many_as_asked_for(tiny, prepared):
  recipe = dataclasses.replace(tiny, train_images=32, validation=0.25)
  trainer = streaming.make_trainer(recipe, data.load(imagenet.NAME, prepared), seed=0)
  assert trainer.steps_per_epoch == 3
  assert sorted(labels_of(trainer.held_out.in_order())) == list(range(8))
  assert sorted(labels_of(trainer.train.shuffled(0))) == list(range(8, 32))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"train_images": TRAIN + 1}, f"more than there are, {TRAIN}"),
    ({"batch_size": 12}, "batch_size=12 must be a multiple of 8, the data axis"),
    ({"batch_size": 48}, f"batch_size=48 must not exceed the number of training images, {TRAIN}"),
    ({"drop_last": False}, "drop_last=False, but batches"),
  ],
)
def test_a_recipe_that_does_not_fit_is_an_error(tiny, prepared, changes, message):
  recipe = dataclasses.replace(tiny, **changes)
  with pytest.raises(ValueError, match=message):
    streaming.make_trainer(recipe, data.load(imagenet.NAME, prepared), seed=0)


@pytest.mark.parametrize("sparsity", [80, 90])
def test_the_published_runs_have_the_published_schedule(sparsity):
  recipe = RECIPES[f"resnet50-imagenet-granet-{sparsity}"]
  steps = 1_281_167 // recipe.batch_size
  rate = methods.make_learning_rate(recipe, steps)
  expected_rates = {epoch: 0.1 * (epoch + 1) / 6 for epoch in range(5)}
  expected_rates |= {5: 0.1, 29: 0.1, 30: 0.01, 60: 1e-3, 90: 1e-4, 99: 1e-4}
  for epoch, expected in expected_rates.items():
    for step in (0, steps - 1):
      assert float(rate(steps * epoch + step)) == pytest.approx(expected, rel=1e-5)
  model = MODELS[recipe.model](classes=1000)
  params = jax.eval_shape(model.init, jax.random.key(0), np.zeros([1, 224, 224, 3]))["params"]
  decayed = methods._is_decayed(recipe.undecayed)(params)
  spared = [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, is_decayed in jax.tree_util.tree_leaves_with_path(decayed)
    if not is_decayed
  ]
  # All but those of four shortcuts, whose names in the published code do not say what they are.
  assert len(spared) == 2 * (53 - 4)
  assert all("norm" in path and "shortcut" not in path for path in spared)
