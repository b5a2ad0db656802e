"""Data is read exactly or not at all, and a missing data set is reported at once."""

import builtins
import collections
import gzip
import re
import socket
import struct
import sys
import time

import numpy as np
import pytest

from experiments import data, published

IMAGES_PER_FILE = 20


def _write_idx(directory, *, suffix=".gz", train=30, test=10, seed=0):
  """Writes MNIST's or Fashion-MNIST's four files, as small as their headers allow.

  Returns the arrays in them.
  """
  directory.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(seed)
  arrays = []
  for prefix, count in (("train", train), ("t10k", test)):
    images = rng.integers(256, size=(count, 28, 28), dtype=np.uint8)
    labels = rng.integers(10, size=count, dtype=np.uint8)
    for name, array in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
      header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
      content = header + array.tobytes()
      path = directory / f"{prefix}-{name}{suffix}"
      path.write_bytes(gzip.compress(content) if suffix else content)
    arrays += [images, labels]
  return arrays


# How many bytes are in front of an image: its class, or its superclass and its class.
LABEL_BYTES = {"cifar10": 1, "cifar100": 2}


def _write_cifar(name, directory):
  """Writes the files of CIFAR-10 or CIFAR-100; returns their labels and their planes."""
  directory.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(0)
  described = published.PUBLISHED[name]
  shape = (len(described.files), IMAGES_PER_FILE)
  labels = rng.integers(described.classes, size=shape, dtype=np.uint8)
  planes = rng.integers(256, size=(*shape, 3, 32, 32), dtype=np.uint8)
  for file, batch_labels, batch_planes in zip(described.files, labels, planes, strict=True):
    superclasses = np.full((IMAGES_PER_FILE, LABEL_BYTES[name] - 1), 19, np.uint8)
    records = np.c_[superclasses, batch_labels, batch_planes.reshape(IMAGES_PER_FILE, -1)]
    (directory / file).write_bytes(records.tobytes())
  return labels, planes


def _write(name, directory):
  if name in LABEL_BYTES:
    _write_cifar(name, directory)
  else:
    _write_idx(directory, suffix="")


@pytest.fixture(autouse=True)
def _small_cifar(monkeypatch):
  for name in LABEL_BYTES:
    described = published.PUBLISHED[name]
    small = described._replace(records=(IMAGES_PER_FILE,) * len(described.files))
    monkeypatch.setitem(published.PUBLISHED, name, small)


@pytest.fixture(autouse=True)
def _no_tfds(monkeypatch):
  """Importing TFDS takes time, so that nothing here may do it: `None` makes the import fail."""
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)


def _set_url(monkeypatch, name, url):
  monkeypatch.setenv("NO_PROXY", "*")
  monkeypatch.setitem(published.PUBLISHED, name, published.PUBLISHED[name]._replace(urls=(url,)))


@pytest.fixture
def silent_host(monkeypatch):
  """A host that accepts connections and never answers, in the place of the publishers'."""
  with socket.create_server(("127.0.0.1", 0)) as server:
    for name in published.PUBLISHED:
      _set_url(monkeypatch, name, f"http://127.0.0.1:{server.getsockname()[1]}/file.gz")
    yield


@pytest.mark.parametrize(
  "name, folder",
  [
    ("mnist", ""),
    ("mnist", "mnist"),
    ("mnist", "MNIST/raw"),
    ("fashion_mnist", "fashion_mnist"),
    ("fashion_mnist", "FashionMNIST/raw"),
  ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_are_read_as_they_were_written(tmp_path, name, folder, suffix):
  arrays = _write_idx(tmp_path / folder, suffix=suffix)
  mnist = data.load(name, tmp_path)
  read = (
    mnist.train_images[..., 0],
    mnist.train_labels,
    mnist.test_images[..., 0],
    mnist.test_labels,
  )
  for got, expected in zip(read, arrays, strict=True):
    np.testing.assert_array_equal(got, expected)
  assert mnist.train_images.shape == (30, 28, 28, 1)
  assert mnist.train_images.dtype == np.uint8 and mnist.train_labels.dtype == np.int32
  assert (mnist.name, mnist.classes) == (name, 10)


def test_fashion_mnist_and_mnist_are_not_taken_for_each_other(tmp_path):
  _write_idx(tmp_path / "a")
  assert published.find_files("mnist", tmp_path / "a") == tmp_path / "a"
  assert published.find_files("fashion_mnist", tmp_path / "a") is None
  _write_idx(tmp_path / "b" / "fashion_mnist")
  assert published.find_files("mnist", tmp_path / "b") is None


@pytest.mark.parametrize(
  "name, folder",
  [
    ("cifar10", ""),
    ("cifar10", "cifar10"),
    ("cifar10", "cifar-10-batches-bin"),
    ("cifar100", ""),
    ("cifar100", "cifar100"),
    ("cifar100", "cifar-100-binary"),
    ("cifar100", "cifar100/cifar-100-binary"),
  ],
)
def test_cifar_files_are_read_as_they_were_written(tmp_path, name, folder):
  labels, planes = _write_cifar(name, tmp_path / folder)
  cifar = data.load(name, tmp_path)
  assert cifar.train_images.dtype == np.uint8 and cifar.train_labels.dtype == np.int32
  np.testing.assert_array_equal(cifar.train_labels, labels[:-1].ravel())
  np.testing.assert_array_equal(cifar.test_labels, labels[-1])
  pixels = np.moveaxis(planes, 2, -1)
  np.testing.assert_array_equal(cifar.train_images, pixels[:-1].reshape(-1, 32, 32, 3))
  np.testing.assert_array_equal(cifar.test_images, pixels[-1])
  assert (cifar.name, cifar.classes) == (name, {"cifar10": 10, "cifar100": 100}[name])


def test_the_environment_names_the_directory_and_an_argument_overrules_it(monkeypatch, tmp_path):
  _write_idx(tmp_path / "a", train=3)
  _write_idx(tmp_path / "b", train=4)
  monkeypatch.setenv("SPARSEJAX_DATA", str(tmp_path / "a"))
  assert len(data.load("mnist").train_labels) == 3
  assert len(data.load("mnist", tmp_path / "b").train_labels) == 4


def _replace(content, position, byte):
  return content[:position] + bytes([byte]) + content[position + 1 :]


@pytest.mark.parametrize(
  "corrupt, problem",
  [
    (lambda raw, packed: packed[: len(packed) // 2], "end-of-stream"),
    (lambda raw, packed: _replace(packed, -6, packed[-6] ^ 1), "CRC check failed"),
    (lambda raw, packed: _replace(packed, 12, packed[12] ^ 255), "truncated or corrupt"),
    (lambda raw, packed: raw, "Not a gzipped file"),
    (lambda raw, packed: b"", "magic number"),
    (lambda raw, packed: gzip.compress(_replace(raw, 3, 1)), "magic number '00000803'"),
    (lambda raw, packed: gzip.compress(raw[:2]), "magic number"),
    (lambda raw, packed: gzip.compress(raw[:6]), "truncated or corrupt"),
    (lambda raw, packed: gzip.compress(raw[:-1]), "header promises 23536"),
    (lambda raw, packed: gzip.compress(raw + b"\0"), "header promises 23536"),
    (lambda raw, packed: gzip.compress(_replace(raw, 7, 29)), "header promises"),
  ],
  ids=[
    "gzip truncated",
    "gzip checksum",
    "gzip damaged",
    "not gzip",
    "empty",
    "wrong magic number",
    "no magic number",
    "no sizes",
    "too short",
    "too long",
    "wrong count",
  ],
)
def test_a_corrupt_idx_file_is_named(tmp_path, corrupt, problem):
  _write_idx(tmp_path)
  path = tmp_path / "train-images-idx3-ubyte.gz"
  packed = path.read_bytes()
  path.write_bytes(corrupt(gzip.decompress(packed), packed))
  with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{problem}"):
    data.load("mnist", tmp_path)


def test_images_of_another_size_are_not_taken_for_mnist(tmp_path):
  _write_idx(tmp_path, suffix="")
  path = tmp_path / "train-images-idx3-ubyte"
  content = path.read_bytes()
  path.write_bytes(content[:8] + struct.pack(">II", 14, 56) + content[16:])
  with pytest.raises(ValueError, match=rf"{re.escape(str(path))}.*\(14, 56, 1\)"):
    data.load("mnist", tmp_path)


def test_images_and_labels_of_different_counts_are_named(tmp_path):
  _write_idx(tmp_path, train=30)
  _write_idx(tmp_path / "other", train=31)
  (tmp_path / "other" / "train-labels-idx1-ubyte.gz").rename(
    tmp_path / "train-labels-idx1-ubyte.gz"
  )
  with pytest.raises(ValueError, match=r"train-images.*train-labels.*30 images but 31 labels"):
    data.load("mnist", tmp_path)


@pytest.mark.parametrize("name, file", [("cifar10", "data_batch_3.bin"), ("cifar100", "test.bin")])
@pytest.mark.parametrize("change", [-1, +1, -3073, +3073, -3074, +3074])
def test_a_cifar_file_of_the_wrong_size_is_named(tmp_path, name, file, change):
  _write_cifar(name, tmp_path)
  path = tmp_path / file
  content = path.read_bytes()
  path.write_bytes(content[:change] if change < 0 else content + bytes(change))
  with pytest.raises(ValueError, match=rf"{re.escape(str(path))}.*{len(content) + change} bytes"):
    data.load(name, tmp_path)


@pytest.mark.parametrize(
  "name, file, position, classes",
  [
    ("mnist", "t10k-labels-idx1-ubyte", 8 + 4, 10),
    ("fashion_mnist", "train-labels-idx1-ubyte", 8 + 4, 10),
    ("cifar10", "test_batch.bin", 4 * 3073, 10),
    ("cifar100", "train.bin", 4 * 3074 + 1, 100),
  ],
)
def test_a_label_out_of_range_is_named(tmp_path, name, file, position, classes):
  _write(name, tmp_path / name)
  path = tmp_path / name / file
  content = path.read_bytes()
  path.write_bytes(_replace(content, position, classes - 1))
  data.load(name, tmp_path)
  path.write_bytes(_replace(content, position, classes))
  problem = rf"label {classes} of image 4 is not in 0\.\.{classes - 1}\."
  with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{problem}"):
    data.load(name, tmp_path)


@pytest.mark.parametrize("name", published.PUBLISHED)
def test_missing_files_are_named(tmp_path, name):
  _write(name, tmp_path / name)
  missing = sorted((tmp_path / name).iterdir())[1:3]
  for path in missing:
    path.unlink()
  with pytest.raises(data.DataNotFound, match="only in part") as error:
    data.load(name, tmp_path)
  for file in published.PUBLISHED[name].files:
    assert (file in str(error.value)) == any(path.name.startswith(file) for path in missing)


@pytest.mark.usefixtures("silent_host")
@pytest.mark.parametrize("name", published.PUBLISHED)
def test_a_missing_data_set_is_reported_within_a_second_with_three_remedies(tmp_path, name):
  start = time.perf_counter()
  with pytest.raises(data.DataNotFound) as error:
    data.load(name, tmp_path)
  assert time.perf_counter() - start < 1
  message = str(error.value)
  assert str(tmp_path) in message
  assert all(f"\n  {i}. " in message for i in (1, 2, 3))
  assert "SPARSEJAX_DATA" in message and "TFDS_DATA_DIR" in message
  assert all(f"DIR/{folder}" in message for folder in published.PUBLISHED[name].folders if folder)
  assert f"python -m experiments.prepare {name} SOURCE TARGET" in message
  assert published.PUBLISHED[name].urls[0] in message


def slow_name_server(*args, **kwargs):
  time.sleep(1.5)
  raise socket.gaierror("no such host")


def slow_import(name, *args, load=builtins.__import__, **kwargs):
  if name == "requests":
    time.sleep(1.5)
  return load(name, *args, **kwargs)


@pytest.mark.parametrize(
  ("where", "name", "slow"),
  [(socket, "getaddrinfo", slow_name_server), (builtins, "__import__", slow_import)],
)
def test_what_is_slow_does_not_delay_the_report(where, name, slow, monkeypatch, tmp_path):
  monkeypatch.setattr(where, name, slow)
  _set_url(monkeypatch, "mnist", "https://publisher.invalid/file.gz")
  start = time.perf_counter()
  with pytest.raises(data.DataNotFound, match="did not answer"):
    data.load("mnist", tmp_path)
  assert time.perf_counter() - start < 1


@pytest.mark.usefixtures("silent_host")
def test_without_an_argument_all_the_usual_places_are_named(monkeypatch, tmp_path):
  monkeypatch.setenv("SPARSEJAX_DATA", str(tmp_path / "files"))
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "prepared"))
  with pytest.raises(data.DataNotFound, match=rf"{tmp_path}/files or {tmp_path}/prepared"):
    data.load("mnist")


def test_a_data_set_that_only_tensorflow_reads_is_reported(tmp_path):
  directory = tmp_path / "mnist" / "3.0.1"
  directory.mkdir(parents=True)
  (directory / "dataset_info.json").write_text('{"name": "mnist", "version": "3.0.1"}')
  with pytest.raises(data.DataNotFound, match=rf"{directory} .*tfrecord.*tfds convert_format"):
    data.load("mnist", tmp_path)


def test_an_unknown_name_is_an_error_that_lists_the_known_ones():
  with pytest.raises(
    ValueError, match="'mnits': choose one of digits, mnist, fashion_mnist, cifar10, cif"
  ):
    data.load("mnits")


def test_the_digits_are_those_of_scikit_learn_with_a_fifth_of_each_class_held_out():
  datasets = pytest.importorskip("sklearn.datasets")
  digits = data.load("digits")
  assert digits.train_images.shape[1:] == digits.test_images.shape[1:] == (8, 8, 1)
  assert digits.train_images.dtype == np.uint8 and digits.train_labels.dtype == np.int32
  # Every image once, whichever side of the split it is on.
  original = datasets.load_digits()
  images = np.concatenate([digits.train_images, digits.test_images]).reshape(-1, 64)
  labels = np.concatenate([digits.train_labels, digits.test_labels])
  grey_levels = np.round(images * (16 / 255)).astype(int)
  assert sorted(map(tuple, np.c_[grey_levels, labels])) == sorted(
    map(tuple, np.c_[original.data.astype(int), original.target])
  )
  assert images.min() == 0 and images.max() == 255
  counts = np.bincount(labels)
  np.testing.assert_array_equal(np.bincount(digits.test_labels), counts // 5)
  np.testing.assert_allclose(digits.mean, (digits.train_images / 255).mean())
  np.testing.assert_allclose(digits.std, (digits.train_images / 255).std())


def test_the_digits_held_out_are_every_fifth_of_their_class():
  datasets = pytest.importorskip("sklearn.datasets")
  seen = collections.Counter()
  held_out = []
  for label in datasets.load_digits().target.tolist():
    seen[label] += 1
    if seen[label] % 5 == 0:
      held_out.append(label)
  assert data.load("digits").test_labels.tolist() == held_out
