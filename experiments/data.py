"""Image data sets as NumPy arrays: the publishers' own files, TFDS, or the embedded digits.

Every experiment reads its data with `load`, which looks on the disk before it asks anyone: a
missing data set is reported within a second, and nothing heavy is imported to find that out.
"""

import contextlib
import io
import json
import os
import pathlib
import re
import threading

import numpy as np

from experiments import imagenet, prepare, published
from experiments.published import DataNotFound, Dataset

_PROBE_SECONDS = 0.7


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset | imagenet.Imagenet:
  """Loads a data set by name.

  The digits come with scikit-learn. The others are taken from the first of these that exists:

  1. the publishers' own files, gzipped or not (CIFAR-10 and CIFAR-100 in their binary versions);
  2. a prepared TFDS data set in ArrayRecord format, which is read without TensorFlow;
  3. a download through TFDS, which is kept as such a prepared data set.

  ImageNet must be the second of these, and stays on the disk.

  Images keep the publishers' order in all cases but one: an MNIST or Fashion-MNIST that TFDS itself
  has prepared is in the order of TFDS, which shuffles and keeps no index.

  Args:
    name: "digits", "mnist", "fashion_mnist", "cifar10", "cifar100" or "imagenet2012".
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
  if name not in published.PUBLISHED and name != imagenet.NAME:
    known = ", ".join(["digits", *published.PUBLISHED, imagenet.NAME])
    raise ValueError(f"Unknown data set {name!r}: choose one of {known}.")
  if data_dir is not None:
    roots = [pathlib.Path(data_dir)]
  else:
    tfds_dir = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    named = [os.environ.get("SPARSEJAX_DATA"), tfds_dir]
    roots = [pathlib.Path(root).expanduser() for root in named if root]
  if name == imagenet.NAME:
    return _open_imagenet(roots)
  for root in roots:
    if (directory := published.find_files(name, root)) is not None:
      return published.read_files(name, directory)
  for root in roots:
    if (directory := _find_prepared(name, root)) is not None:
      return _read_prepared(name, directory)
  url = published.PUBLISHED[name].urls[0]
  if _answers(url):
    return prepare.download(name, roots[-1])
  raise DataNotFound(
    f"The data set {name!r} is not in {' or '.join(map(str, roots))}. "
    "There are three ways to provide it:\n"
    f"  1. put the publishers' files ({published.describe_files(name, 'DIR')}) and name DIR with "
    "data_dir or the environment variable SPARSEJAX_DATA;\n"
    "  2. name with data_dir or TFDS_DATA_DIR the directory of a TFDS data set prepared in "
    f"ArrayRecord format (`python -m experiments.prepare {name} SOURCE TARGET` writes one);\n"
    f"  3. run where TFDS can download it: {url} did not answer within {_PROBE_SECONDS} s."
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


def _open_imagenet(roots: list[pathlib.Path]) -> imagenet.Imagenet:
  for root in roots:
    if (directory := _find_prepared(imagenet.NAME, root)) is not None:
      return imagenet.open_prepared(directory)
  raise DataNotFound(
    f"The data set {imagenet.NAME!r} is not in {' or '.join(map(str, roots))}. It cannot be "
    "downloaded without registration. Name with data_dir or TFDS_DATA_DIR the directory of a TFDS "
    "data set prepared in ArrayRecord format. There are two ways to make it:\n"
    "  1. from ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar of image-net.org, in a "
    f"directory SOURCE: `tfds build {imagenet.NAME} --manual_dir=SOURCE --data_dir=DIR "
    "--file_format=array_record`;\n"
    "  2. from one that TFDS has prepared in another format: `tfds convert_format`."
  )


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
      examples.sort(key=lambda e: e["id"])  # CIFAR's original order.
    images = np.stack([np.asarray(Image.open(io.BytesIO(e["image"]))) for e in examples])
    if images.ndim == 3:
      images = images[..., None]  # A grey image decodes to two axes.
    labels = np.array([e["label"] for e in examples])
    return published.checked(name, images, labels, files, files)

  return published.make_dataset(name, read("train"), read("test"))


def _answers(url: str) -> bool:
  """Whether a download can start at once: TFDS itself would retry an absent host for minutes."""
  answers = threading.Event()

  def probe():
    import requests  # What TFDS downloads with, so that both see the same proxies and certificates.

    with contextlib.suppress(requests.RequestException):
      if requests.head(url, timeout=_PROBE_SECONDS, allow_redirects=True).ok:
        answers.set()

  # In a thread because the timeout of a request covers neither the import of the package, nor the
  # look-up of its host.
  thread = threading.Thread(target=probe, daemon=True)
  thread.start()
  thread.join(_PROBE_SECONDS)
  return answers.is_set()
