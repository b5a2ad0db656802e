"""The publishers' own files of image data sets: what they are, and how to read them."""

import dataclasses
import gzip
import math
import pathlib
import zlib
from typing import NamedTuple

import numpy as np


class DataNotFound(FileNotFoundError):
  """A data set, or one of its files, is not where it was looked for."""


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """A labelled image data set in memory.

  Attributes:
    name: "digits", or a key of `PUBLISHED`.
    train_images: uint8, (count, height, width, channels).
    train_labels: int32, (count,), in [0, classes).
    test_images: as `train_images`.
    test_labels: as `train_labels`.
    mean: mean of the training pixels of each channel, with pixels in [0, 1].
    std: standard deviation of the training pixels of each channel, with pixels in [0, 1].
    classes: number of classes.
  """

  name: str
  train_images: np.ndarray = dataclasses.field(repr=False)
  train_labels: np.ndarray = dataclasses.field(repr=False)
  test_images: np.ndarray = dataclasses.field(repr=False)
  test_labels: np.ndarray = dataclasses.field(repr=False)
  mean: tuple[float, ...]
  std: tuple[float, ...]
  classes: int = 10


class _Published(NamedTuple):
  """What is known of a published data set before any of its files is read."""

  files: tuple[str, ...]  # Each as it is, or compressed with the suffix ".gz".
  folders: tuple[str, ...]  # Where they lie, relative to the directory that the user names.
  urls: tuple[str, ...]  # What TFDS downloads: the files, or an archive of them.
  image_shape: tuple[int, int, int]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  classes: int = 10
  records: tuple[int, ...] = ()  # In each of CIFAR's files, the test set's last; idx needs none.
  label_bytes: int = 1  # In front of each record's image; the last is the class.


_IDX_FILES = (
  "train-images-idx3-ubyte",
  "train-labels-idx1-ubyte",
  "t10k-images-idx3-ubyte",
  "t10k-labels-idx1-ubyte",
)

PUBLISHED = {
  "mnist": _Published(
    files=_IDX_FILES,
    folders=("", "mnist", "MNIST/raw"),  # The last is torchvision's.
    urls=tuple(
      f"https://storage.googleapis.com/cvdf-datasets/mnist/{file}.gz" for file in _IDX_FILES
    ),
    image_shape=(28, 28, 1),
    mean=(0.1307,),
    std=(0.3081,),
  ),
  "fashion_mnist": _Published(
    files=_IDX_FILES,
    folders=("fashion_mnist", "FashionMNIST/raw"),  # Only a folder tells these files from MNIST's.
    urls=tuple(
      f"http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/{file}.gz" for file in _IDX_FILES
    ),
    image_shape=(28, 28, 1),
    mean=(0.2860,),
    std=(0.3530,),
  ),
  "cifar10": _Published(
    files=(*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"),
    folders=("", "cifar10", "cifar-10-batches-bin", "cifar10/cifar-10-batches-bin"),
    urls=("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
    image_shape=(32, 32, 3),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    records=6 * (10_000,),
  ),
  "cifar100": _Published(
    files=("train.bin", "test.bin"),
    folders=("", "cifar100", "cifar-100-binary", "cifar100/cifar-100-binary"),
    urls=("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",),
    image_shape=(32, 32, 3),
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
    classes=100,
    records=(50_000, 10_000),
    label_bytes=2,  # The superclass, of 20, and the class.
  ),
}


def find_files(name: str, root: pathlib.Path) -> pathlib.Path | None:
  """Returns the directory at or below `root` that holds any of the publishers' files."""
  for folder in PUBLISHED[name].folders:
    if any(_find_file(root / folder, file) for file in PUBLISHED[name].files):
      return root / folder
  return None


def describe_files(name: str, root: str | pathlib.Path) -> str:
  """Says in words which files `find_files` looks for, and where at or below `root`."""
  places = " or ".join(str(pathlib.Path(root, folder)) for folder in PUBLISHED[name].folders)
  return f"{', '.join(PUBLISHED[name].files)} in {places}"


def read_files(name: str, directory: pathlib.Path) -> Dataset:
  """Reads the publishers' files of a data set, all of them or none.

  Args:
    name: a key of `PUBLISHED`.
    directory: where the files lie, as `find_files` returns it.

  Returns:
    The data set, in the publishers' order.

  Raises:
    DataNotFound: if a file is missing.
    ValueError: if a file is corrupt. Both errors name the file.
  """
  files = {file: _find_file(directory, file) for file in PUBLISHED[name].files}
  if missing := [file for file, path in files.items() if path is None]:
    raise DataNotFound(
      f"{directory} holds {name!r} only in part: {', '.join(missing)} (or .gz) missing."
    )
  paths = list(files.values())
  if counts := PUBLISHED[name].records:
    parts = [_read_records(name, path, count) for path, count in zip(paths, counts, strict=True)]
  else:
    parts = [_read_idx_pair(name, *pair) for pair in (paths[:2], paths[2:])]
  train = tuple(np.concatenate(arrays) for arrays in zip(*parts[:-1], strict=True))
  return make_dataset(name, train, parts[-1])


def make_dataset(name, train, test) -> Dataset:
  (train_images, train_labels), (test_images, test_labels) = train, test
  return Dataset(
    name=name,
    train_images=train_images,
    train_labels=train_labels,
    test_images=test_images,
    test_labels=test_labels,
    mean=PUBLISHED[name].mean,
    std=PUBLISHED[name].std,
    classes=PUBLISHED[name].classes,
  )


def _find_file(directory: pathlib.Path, file: str) -> pathlib.Path | None:
  candidates = (directory / file, directory / f"{file}.gz")
  return next((path for path in candidates if path.is_file()), None)


def _read_bytes(path: pathlib.Path) -> bytes:
  if path.suffix != ".gz":
    return path.read_bytes()
  try:
    return gzip.decompress(path.read_bytes())
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise ValueError(f"{path} is truncated or corrupt: {error}") from error


def _read_idx(path: pathlib.Path, rank: int) -> np.ndarray:
  """Reads unsigned bytes in idx format: magic number, big-endian sizes, bytes in C order."""
  content = _read_bytes(path)
  magic = bytes([0, 0, 8, rank])
  if content[:4] != magic:
    raise ValueError(
      f"{path} is corrupt: it starts with {content[:4].hex()!r} instead of the magic number "
      f"{magic.hex()!r}."
    )
  header = 4 + 4 * rank
  shape = tuple(int.from_bytes(content[i : i + 4]) for i in range(4, header, 4))
  if len(content) != header + math.prod(shape):
    raise ValueError(
      f"{path} is truncated or corrupt: {len(content)} bytes where its header promises "
      f"{header + math.prod(shape)}."
    )
  return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _read_idx_pair(name, images_path, labels_path) -> tuple[np.ndarray, np.ndarray]:
  images = _read_idx(images_path, rank=3)[..., None]
  labels = _read_idx(labels_path, rank=1)
  if len(images) != len(labels):
    raise ValueError(
      f"{images_path} and {labels_path} do not belong together: {len(images)} images but "
      f"{len(labels)} labels."
    )
  return checked(name, images, labels, images_path, labels_path)


def _read_records(name, path: pathlib.Path, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Reads records of labels, a byte each, and an image: a red, a green and a blue plane."""
  content = _read_bytes(path)
  height, width, channels = shape = PUBLISHED[name].image_shape
  label_bytes = PUBLISHED[name].label_bytes
  size = count * (label_bytes + math.prod(shape))
  if len(content) != size:
    raise ValueError(
      f"{path} is truncated or corrupt: {len(content)} bytes where {count} images take {size}."
    )
  records = np.frombuffer(content, np.uint8).reshape(count, -1)
  labels, planes = records[:, label_bytes - 1], records[:, label_bytes:]
  images = planes.reshape(-1, channels, height, width).transpose(0, 2, 3, 1)
  return checked(name, np.ascontiguousarray(images), labels, path, path)


def checked(name, images, labels, images_source, labels_source):
  """Returns images and int32 labels, or raises an error that names where they are wrong."""
  if images.shape[1:] != PUBLISHED[name].image_shape:
    raise ValueError(
      f"{images_source} is not {name!r}: its images have the shape {images.shape[1:]} instead of "
      f"{PUBLISHED[name].image_shape}."
    )
  last = PUBLISHED[name].classes - 1
  if (wrong := np.flatnonzero((labels < 0) | (labels > last))).size:
    raise ValueError(
      f"{labels_source} is corrupt: label {labels[wrong[0]]} of image {wrong[0]} is not in "
      f"0..{last}."
    )
  return images, labels.astype(np.int32)
