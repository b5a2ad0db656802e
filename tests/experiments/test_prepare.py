"""What is written as a TFDS data set is read back as it was, by TFDS and by the experiments."""

import contextlib
import functools
import http.server
import json
import struct
import tarfile
import threading

import numpy as np
import pytest

from experiments import data, prepare, published

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")

VERSIONS = {"mnist": "3.0.1", "fashion_mnist": "3.0.1", "cifar10": "3.0.2", "cifar100": "3.0.2"}


# The labels of each superclass's classes.
CIFAR100_SUPERCLASSES = [
  [4, 30, 55, 72, 95],
  [1, 32, 67, 73, 91],
  [54, 62, 70, 82, 92],
  [9, 10, 16, 28, 61],
  [0, 51, 53, 57, 83],
  [22, 39, 40, 86, 87],
  [5, 20, 25, 84, 94],
  [6, 7, 14, 18, 24],
  [3, 42, 43, 88, 97],
  [12, 17, 37, 68, 76],
  [23, 33, 49, 60, 71],
  [15, 19, 21, 31, 38],
  [34, 63, 64, 66, 75],
  [26, 45, 77, 79, 99],
  [2, 11, 35, 46, 98],
  [27, 29, 44, 78, 93],
  [36, 50, 65, 74, 80],
  [47, 52, 56, 59, 96],
  [8, 13, 48, 58, 90],
  [41, 69, 81, 85, 89],
]


def _random(name, train=40, test=12):
  rng = np.random.default_rng(0)
  described = published.PUBLISHED[name]

  def split(count):
    images = rng.integers(256, size=(count, *described.image_shape), dtype=np.uint8)
    return images, rng.integers(described.classes, size=count, dtype=np.int32)

  return published.make_dataset(name, split(train), split(test))


def _write_files(dataset, directory):
  """Writes a data set in its publishers' format, with superclasses of zero."""
  directory.mkdir(parents=True, exist_ok=True)
  described = published.PUBLISHED[dataset.name]
  splits = (
    (dataset.train_images, dataset.train_labels),
    (dataset.test_images, dataset.test_labels),
  )
  if "mnist" in dataset.name:
    for prefix, (images, labels) in zip(("train", "t10k"), splits, strict=True):
      for kind, array in (("images-idx3", images.squeeze(-1)), ("labels-idx1", labels)):
        header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        content = header + array.astype(np.uint8).tobytes()
        (directory / f"{prefix}-{kind}-ubyte").write_bytes(content)
  else:
    records = [
      np.c_[
        np.zeros((len(labels), described.label_bytes - 1), np.uint8),
        labels.astype(np.uint8),
        images.transpose(0, 3, 1, 2).reshape(len(images), -1),
      ]
      for images, labels in splits
    ]
    batches = [*np.split(records[0], len(described.files) - 1), records[1]]
    for file, batch in zip(described.files, batches, strict=True):
      (directory / file).write_bytes(batch.tobytes())


def _shrink(monkeypatch, name, **changes):
  """Makes the publishers' files of CIFAR those of 60 training and 12 test images."""
  described = published.PUBLISHED[name]
  batches = len(described.records) - 1
  records = (*batches * [60 // batches], 12) if described.records else ()
  monkeypatch.setitem(published.PUBLISHED, name, described._replace(records=records, **changes))


def _assert_equal(a, b):
  for field in ("train_images", "train_labels", "test_images", "test_labels"):
    np.testing.assert_array_equal(getattr(a, field), getattr(b, field), strict=True)
  assert (a.name, a.mean, a.std, a.classes) == (b.name, b.mean, b.std, b.classes)


@pytest.mark.parametrize("name", VERSIONS)
def test_a_written_data_set_is_loaded_identically(tmp_path, name):
  dataset = _random(name)
  assert prepare.write(dataset, tmp_path) == tmp_path / name / VERSIONS[name]
  _assert_equal(data.load(name, tmp_path), dataset)


@pytest.mark.parametrize("name", VERSIONS)
def test_tfds_reads_a_written_data_set_as_its_own(tmp_path, name):
  dataset = _random(name)
  prepare.write(dataset, tmp_path)
  source = tfds.data_source(name, data_dir=tmp_path)
  assert len(source["train"]) == 40 and len(source["test"]) == 12
  for i, example in enumerate(source["test"]):
    np.testing.assert_array_equal(example["image"], dataset.test_images[i])
    assert example["label"] == dataset.test_labels[i]
  info = tfds.builder(name, data_dir=tmp_path).info
  assert str(info.version) == VERSIONS[name]
  if name.startswith("cifar"):
    assert source["train"][7]["id"] == b"train_00007"
  names = {"mnist": "3", "fashion_mnist": "Dress", "cifar10": "cat", "cifar100": "bear"}
  assert info.features["label"].names[3] == names[name]


def test_classes_of_cifar100_have_the_superclasses_of_its_publishers(tmp_path):
  images, labels = np.zeros((100, 32, 32, 3), np.uint8), np.arange(100, dtype=np.int32)
  dataset = published.make_dataset("cifar100", (images, labels), (images, labels))
  prepare.write(dataset, tmp_path)
  source = tfds.data_source("cifar100", data_dir=tmp_path, split="test")
  features = source.dataset_info.features
  classes, superclasses = features["label"].names, features["coarse_label"].names
  assert len(classes) == len(set(classes)) == 100 and len(set(superclasses)) == 20
  members = [[] for _ in superclasses]
  for example in source:
    members[example["coarse_label"]].append(int(example["label"]))
  assert members == CIFAR100_SUPERCLASSES
  assert (classes[0], classes[99], superclasses[4]) == ("apple", "worm", "fruit_and_vegetables")


def test_cifar10_is_put_back_into_its_original_order(tmp_path):
  dataset = _random("cifar10", train=10, test=10)
  prepare.write(dataset, tmp_path)
  # What TFDS itself prepares is shuffled, and says in "id" where each image was.
  directory = tmp_path / "cifar10" / "3.0.2"
  builder = tfds.builder_from_directory(directory)
  source = builder.as_data_source("test", decoders={"image": tfds.decode.SkipDecoding()})
  order = np.random.default_rng(0).permutation(10)
  examples = [source[i] for i in order]
  assert not np.array_equal(order, np.arange(10))
  writer = tfds.core.SequentialWriter(
    builder.info, max_examples_per_shard=10, file_format="array_record"
  )
  writer.initialize_splits(["train", "test"])
  writer.add_examples({"train": [source[i] for i in range(10)], "test": examples})
  writer.close_all()
  loaded = data.load("cifar10", tmp_path)
  np.testing.assert_array_equal(loaded.test_images, dataset.test_images)
  np.testing.assert_array_equal(loaded.test_labels, dataset.test_labels)


def test_a_data_set_converted_in_place_is_read_in_the_format_it_was_converted_to(tmp_path):
  dataset = _random("mnist")
  info_path = prepare.write(dataset, tmp_path) / "dataset_info.json"
  info = json.loads(info_path.read_text())
  info |= {"fileFormat": "tfrecord", "alternativeFileFormats": [info["fileFormat"]]}
  info_path.write_text(json.dumps(info))
  _assert_equal(data.load("mnist", tmp_path), dataset)


def test_the_latest_complete_version_is_read(tmp_path):
  dataset = _random("mnist")
  prepare.write(dataset, tmp_path)
  for version in ("2.10.0", "3.0.1.incomplete7F3A_mnist", "broken"):
    (tmp_path / "mnist" / version).mkdir()
    (tmp_path / "mnist" / version / "dataset_info.json").write_text("{}")
  _assert_equal(data.load("mnist", tmp_path), dataset)


def test_an_existing_data_set_is_not_overwritten(tmp_path):
  first = _random("mnist")
  prepare.write(first, tmp_path)
  with pytest.raises(FileExistsError, match=f"{tmp_path}/mnist/3.0.1 exists already"):
    prepare.write(_random("mnist", train=5), tmp_path)
  _assert_equal(data.load("mnist", tmp_path), first)
  assert [path.name for path in tmp_path.iterdir()] == ["mnist"]


def test_a_failure_leaves_nothing_behind(tmp_path):
  dataset = _random("mnist")
  dataset.test_labels[-1] = 10  # Refused by TFDS, when all else is written.
  with pytest.raises(ValueError, match="10"):
    prepare.write(dataset, tmp_path)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["truncate", "overwrite", "remove"])
def test_a_damaged_data_set_is_named_and_not_read_in_part(tmp_path, damage):
  directory = prepare.write(_random("cifar10"), tmp_path)
  (path,) = directory.glob("cifar10-train*")
  content = path.read_bytes()
  if damage == "truncate":
    path.write_bytes(content[: len(content) // 2])
  elif damage == "overwrite":
    path.write_bytes(content[:30_000] + bytes(100) + content[30_100:])
  else:
    path.unlink()
  with pytest.raises(ValueError, match=rf"{directory}/cifar10-train.*incomplete or corrupt"):
    data.load("cifar10", tmp_path)


@pytest.mark.parametrize("name", VERSIONS)
def test_the_command_prepares_the_publishers_files(monkeypatch, tmp_path, capsys, name):
  dataset = _random(name, train=60)
  _shrink(monkeypatch, name)
  _write_files(dataset, tmp_path / "source" / name)
  target = tmp_path / "new" / "target"
  prepare.main([name, str(tmp_path / "source"), str(target)])
  printed = capsys.readouterr().out
  assert printed == f"{target / name / VERSIONS[name]}: 60 training images, 12 test images\n"
  _assert_equal(data.load(name, target), dataset)


def test_the_command_says_what_is_wrong_without_a_traceback(tmp_path):
  with pytest.raises(SystemExit, match=f"error: {tmp_path} holds no file of 'mnist'"):
    prepare.main(["mnist", str(tmp_path), str(tmp_path / "target")])
  (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"")
  with pytest.raises(SystemExit, match="only in part: train-labels-idx1-ubyte, t10k-images"):
    prepare.main(["mnist", str(tmp_path), str(tmp_path / "target")])
  assert not (tmp_path / "target").exists()
  # MNIST's files are not those of Fashion-MNIST, which lie in a folder of their own.
  with pytest.raises(
    SystemExit, match=f"holds no file of 'fashion_mnist' .* in {tmp_path}/fashion"
  ):
    prepare.main(["fashion_mnist", str(tmp_path), str(tmp_path / "target")])


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
  def log_message(self, *args):
    pass


@contextlib.contextmanager
def _publisher(directory):
  handler = functools.partial(_QuietHandler, directory=directory)
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
      yield f"http://127.0.0.1:{server.server_port}"
    finally:
      server.shutdown()
      thread.join()


@pytest.mark.parametrize(
  "name, archived",
  [
    ("mnist", None),
    ("fashion_mnist", None),
    ("cifar10", "cifar-10-batches-bin"),
    ("cifar100", "cifar-100-binary"),
  ],
)
def test_what_is_downloaded_once_is_kept(monkeypatch, tmp_path, name, archived):
  monkeypatch.setenv("NO_PROXY", "*")
  # A busy machine may take longer than a user is made to wait for a host that is not there.
  monkeypatch.setattr(data, "_PROBE_SECONDS", 60)
  dataset = _random(name, train=60)
  source, target = tmp_path / "source", tmp_path / "target"
  _write_files(dataset, source)
  files = published.PUBLISHED[name].files
  if archived:
    with tarfile.open(source / "binary.tar.gz", "w:gz") as archive:
      for file in files:
        archive.add(source / file, f"{archived}/{file}")
    files = ["binary.tar.gz"]
  with _publisher(source) as url:
    _shrink(monkeypatch, name, urls=tuple(f"{url}/{file}" for file in files))
    _assert_equal(data.load(name, target), dataset)
  _assert_equal(data.load(name, target), dataset)  # The host is gone.
