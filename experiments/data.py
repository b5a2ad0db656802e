"""Image data sets as NumPy arrays: the publishers' own files, TFDS, or the embedded digits.

Every experiment reads its data with `load`, which looks on the disk before it asks anyone: a
missing data set is reported within a second, and nothing heavy is imported to find that out.
"""

import contextlib
import dataclasses
import gzip
import io
import json
import math
import os
import pathlib
import re
import threading
import zlib
from typing import NamedTuple

import numpy as np


class DataNotFound(FileNotFoundError):
  """A data set, or one of its files, is not where it was looked for."""


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """A labelled image data set in memory.

  Attributes:
    name: "digits", "mnist" or "cifar10".
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


_MNIST_FILES = (
  "train-images-idx3-ubyte",
  "train-labels-idx1-ubyte",
  "t10k-images-idx3-ubyte",
  "t10k-labels-idx1-ubyte",
)

PUBLISHED = {
  "mnist": _Published(
    files=_MNIST_FILES,
    folders=("", "mnist", "MNIST/raw"),  # The last is torchvision's.
    urls=tuple(
      f"https://storage.googleapis.com/cvdf-datasets/mnist/{file}.gz" for file in _MNIST_FILES
    ),
    image_shape=(28, 28, 1),
    mean=(0.1307,),
    std=(0.3081,),
  ),
  "cifar10": _Published(
    files=(*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"),
    folders=("", "cifar10", "cifar-10-batches-bin", "cifar10/cifar-10-batches-bin"),
    urls=("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
    image_shape=(32, 32, 3),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
  ),
}

_CIFAR10_IMAGES_PER_FILE = 10_000
_PROBE_SECONDS = 0.6


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
  """Loads a data set by name.

  The digits come with scikit-learn. The others are taken from the first of these that exists:

  1. the publishers' own files (MNIST as idx, gzipped or not; CIFAR-10 in its binary version);
  2. a prepared TFDS data set in ArrayRecord format, which is read without TensorFlow;
  3. a download through TFDS, which is kept as such a prepared data set.

  Images keep the publishers' order in all cases but one: an MNIST that TFDS itself has prepared
  is in the order of TFDS, which shuffles and keeps no index.

  Args:
    name: "digits", "mnist" or "cifar10".
    data_dir: the only directory to look in and to download to. By default those named by the
      environment variables SPARSEJAX_DATA and TFDS_DATA_DIR, the latter with TFDS's own default
      of ~/tensorflow_datasets.

  Returns:
    The data set.

  Raises:
    DataNotFound: if the data set is nowhere, or some of its files are missing.
    ValueError: if a file is corrupt, or the name is unknown.

  Example:
    >>> load("digits").train_images.shape
    (1442, 8, 8, 1)
  """
  if name == "digits":
    return _digits()
  if name not in PUBLISHED:
    known = ", ".join(["digits", *PUBLISHED])
    raise ValueError(f"Unknown data set {name!r}: choose one of {known}.")
  if data_dir is not None:
    roots = [pathlib.Path(data_dir)]
  else:
    tfds_dir = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    named = [os.environ.get("SPARSEJAX_DATA"), tfds_dir]
    roots = [pathlib.Path(root).expanduser() for root in named if root]
  for root in roots:
    if (directory := find_files(name, root)) is not None:
      return read_files(name, directory)
  for root in roots:
    if (directory := _find_prepared(name, root)) is not None:
      return _read_prepared(name, directory)
  url = PUBLISHED[name].urls[0]
  if _answers(url):
    from experiments import prepare  # Imports this module.

    return prepare.download(name, roots[-1])
  raise DataNotFound(
    f"The data set {name!r} is not in {' or '.join(map(str, roots))}. "
    "There are three ways to provide it:\n"
    f"  1. put the publishers' files ({', '.join(PUBLISHED[name].files)}) into a directory and "
    "name it with data_dir or the environment variable SPARSEJAX_DATA;\n"
    "  2. name with data_dir or TFDS_DATA_DIR the directory of a TFDS data set prepared in "
    f"ArrayRecord format (`python -m experiments.prepare {name} SOURCE TARGET` writes one);\n"
    f"  3. run where TFDS can download it: {url} did not answer within {_PROBE_SECONDS} s."
  )


def find_files(name: str, root: pathlib.Path) -> pathlib.Path | None:
  """Returns the directory at or below `root` that holds any of the publishers' files."""
  for folder in PUBLISHED[name].folders:
    if any(_find_file(root / folder, file) for file in PUBLISHED[name].files):
      return root / folder
  return None


def read_files(name: str, directory: pathlib.Path) -> Dataset:
  """Reads the publishers' files of a data set, all of them or none.

  Args:
    name: "mnist" or "cifar10".
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
  if name == "mnist":
    return _dataset(name, _read_idx_pair(*paths[:2]), _read_idx_pair(*paths[2:]))
  batches = [_read_cifar10_batch(path) for path in paths]
  train = tuple(np.concatenate(arrays) for arrays in zip(*batches[:-1], strict=True))
  return _dataset(name, train, batches[-1])


def _dataset(name, train, test) -> Dataset:
  (train_images, train_labels), (test_images, test_labels) = train, test
  return Dataset(
    name=name,
    train_images=train_images,
    train_labels=train_labels,
    test_images=test_images,
    test_labels=test_labels,
    mean=PUBLISHED[name].mean,
    std=PUBLISHED[name].std,
  )


def _digits() -> Dataset:
  """The handwritten digits of scikit-learn, every fifth of each class held out for testing."""
  from sklearn import datasets  # Takes a second to import.

  digits = datasets.load_digits()
  images = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)
  labels = digits.target.astype(np.int32)
  # Not by a random generator: the split must not change with anyone's version.
  rank_in_class = np.zeros_like(labels)
  for label in range(10):
    of_class = labels == label
    rank_in_class[of_class] = np.arange(of_class.sum())
  test = rank_in_class % 5 == 4
  pixels = images[~test] / 255
  return Dataset(
    name="digits",
    train_images=images[~test],
    train_labels=labels[~test],
    test_images=images[test],
    test_labels=labels[test],
    mean=(float(pixels.mean()),),
    std=(float(pixels.std()),),
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


def _read_idx_pair(images_path, labels_path) -> tuple[np.ndarray, np.ndarray]:
  images = _read_idx(images_path, rank=3)[..., None]
  labels = _read_idx(labels_path, rank=1)
  if len(images) != len(labels):
    raise ValueError(
      f"{images_path} and {labels_path} do not belong together: {len(images)} images but "
      f"{len(labels)} labels."
    )
  return _checked("mnist", images, labels, images_path, labels_path)


def _read_cifar10_batch(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
  """Reads records of one byte of label and 3072 of image: a red, a green and a blue plane."""
  content = _read_bytes(path)
  height, width, channels = shape = PUBLISHED["cifar10"].image_shape
  size = _CIFAR10_IMAGES_PER_FILE * (1 + math.prod(shape))
  if len(content) != size:
    raise ValueError(
      f"{path} is truncated or corrupt: {len(content)} bytes where "
      f"{_CIFAR10_IMAGES_PER_FILE} images take {size}."
    )
  records = np.frombuffer(content, np.uint8).reshape(_CIFAR10_IMAGES_PER_FILE, -1)
  images = records[:, 1:].reshape(-1, channels, height, width).transpose(0, 2, 3, 1)
  return _checked("cifar10", np.ascontiguousarray(images), records[:, 0], path, path)


def _checked(name, images, labels, images_source, labels_source):
  """Returns images and int32 labels, or raises an error that names where they are wrong."""
  if images.shape[1:] != PUBLISHED[name].image_shape:
    raise ValueError(
      f"{images_source} is not {name!r}: its images have the shape {images.shape[1:]} instead of "
      f"{PUBLISHED[name].image_shape}."
    )
  if (wrong := np.flatnonzero((labels < 0) | (labels > 9))).size:
    raise ValueError(
      f"{labels_source} is corrupt: label {labels[wrong[0]]} of image {wrong[0]} is not in 0..9."
    )
  return images, labels.astype(np.int32)


def _find_prepared(name: str, root: pathlib.Path) -> pathlib.Path | None:
  """Returns the directory of the latest version of a prepared TFDS data set below `root`.

  Only complete ones count: TFDS writes into a folder with a longer name and renames it.
  """
  versions = [
    path.parent
    for path in (root / name).glob("*/dataset_info.json")
    if re.fullmatch(r"\d+\.\d+\.\d+", path.parent.name)
  ]
  if not versions:
    return None
  latest = max(versions, key=lambda path: [int(part) for part in path.name.split(".")])
  info_path = latest / "dataset_info.json"
  try:
    info = json.loads(info_path.read_text())
  except ValueError as error:
    raise ValueError(f"{info_path} is corrupt: {error}") from error
  formats = [info.get("fileFormat", "tfrecord"), *info.get("alternativeFileFormats", [])]
  if "array_record" not in formats:
    raise DataNotFound(
      f"{latest} holds {name!r} in the format {formats[0]!r}, which only TensorFlow reads. Name "
      "another directory with data_dir, or convert it to ArrayRecord with `tfds convert_format`."
    )
  return latest


def _read_prepared(name: str, directory: pathlib.Path) -> Dataset:
  """Reads a TFDS data set in ArrayRecord format, without TensorFlow."""
  import tensorflow_datasets as tfds
  from PIL import Image

  builder = tfds.builder_from_directory(directory)

  def read(split):
    # Images are decoded here: TFDS would choose between two libraries, and warn about the choice.
    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    files = directory / f"{name}-{split}.array_record*"
    try:
      examples = source.__getitems__(range(len(source)))
    except RuntimeError as error:
      raise ValueError(f"{files} is incomplete or corrupt: {error}") from error
    if "id" in examples[0]:
      examples.sort(key=lambda e: e["id"])  # CIFAR-10's original order.
    images = np.stack([np.asarray(Image.open(io.BytesIO(e["image"]))) for e in examples])
    if images.ndim == 3:
      images = images[..., None]  # A grey image decodes to two axes.
    labels = np.array([e["label"] for e in examples])
    return _checked(name, images, labels, files, files)

  return _dataset(name, read("train"), read("test"))


def _answers(url: str) -> bool:
  """Whether a download can start at once: TFDS itself would retry an absent host for minutes."""
  import requests  # What TFDS downloads with, so that both see the same proxies and certificates.

  answers = threading.Event()

  def probe():
    with contextlib.suppress(requests.RequestException):
      if requests.head(url, timeout=_PROBE_SECONDS, allow_redirects=True).ok:
        answers.set()

  # In a thread because the timeout of a request does not cover the look-up of its host.
  thread = threading.Thread(target=probe, daemon=True)
  thread.start()
  thread.join(_PROBE_SECONDS)
  return answers.is_set()
