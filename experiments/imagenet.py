"""ImageNet, which no memory holds: read, decoded and cropped on the host, batch by batch.

It is a TFDS data set in ArrayRecord format, read without TensorFlow. Images leave here as uint8 of
one size; all else is done on the device. Nothing in this module needs JAX, so that processes that
decode images start quickly.
"""

import dataclasses
import io
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments.published import DataNotFound

NAME = "imagenet2012"

# The crops for testing are this much of the shorter side: 224 of 256 pixels.
_CENTER = 224 / 256

Batch = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Imagenet:
  """A labelled image data set on the disk, with images of all sizes.

  Attributes:
    directory: of the prepared TFDS data set.
    train_size: number of training images.
    test_size: number of test images: of ImageNet's validation set, whose labels are public.
    mean: of each channel, with pixels in [0, 1].
    std: of each channel, with pixels in [0, 1].
    classes: number of classes.
  """

  directory: pathlib.Path
  train_size: int
  test_size: int
  mean: tuple[float, ...] = (0.485, 0.456, 0.406)
  std: tuple[float, ...] = (0.229, 0.224, 0.225)
  classes: int = 1000


@dataclasses.dataclass(frozen=True)
class Stream:
  """Images of a part of a split, decoded as they are asked for.

  Each process reads a consecutive part of its own, and so the shards that this lies in.

  Attributes:
    dataset: whose.
    split: of the data set's files, "train" or "validation".
    begin: the first image of the part.
    end: the one after its last.
    batch_size: number of images in a batch, of all processes together; a multiple of their number.
    image_size: height and width of the crops.
    seed: decides the order and the crops of each epoch.
    workers: number of processes that decode; 0: threads of this process do.
    shard: which of so many parts, one for each process of the training, is read.
  """

  dataset: Imagenet
  split: str
  begin: int
  end: int
  batch_size: int
  image_size: int
  seed: int = 0
  workers: int = 0
  shard: tuple[int, int] = (0, 1)

  @property
  def size(self) -> int:
    """Number of images, of all processes together."""
    return self.end - self.begin

  @property
  def full_batches(self) -> int:
    """Number of batches that all processes can fill."""
    return self.size // self.shard[1] // self._local_size

  @property
  def _local_size(self) -> int:
    return self.batch_size // self.shard[1]

  def first(self, count: int) -> "Stream":
    """The first so many of its images."""
    return dataclasses.replace(self, end=min(self.end, self.begin + count))

  def shuffled(self, epoch: int) -> Iterator[Batch]:
    """The batches of an epoch of training: each image at most once, cropped and mirrored at random.

    They depend on nothing but the seed, the epoch and the shard. What does not fill a batch is left
    out.

    Yields:
      Pixels, uint8 of (batch, height, width, 3), and labels, int32.
    """
    seeds = np.random.SeedSequence([self.seed, epoch, self.shard[0]])
    images = self._source().seed(int(seeds.generate_state(1)[0])).shuffle()
    cropped = images.random_map(_Decode(self, random_crop))
    yield from self._read(cropped.batch(self._local_size, drop_remainder=True), self.full_batches)

  def in_order(self) -> Iterator[Batch]:
    """All images once, cropped at the centre; the last batch is filled up with labels of -1."""
    size = self._local_size
    batches = math.ceil(math.ceil(self.size / self.shard[1]) / size)
    padding = np.zeros([size, self.image_size, self.image_size, 3], np.uint8)
    none = padding[:0], np.zeros([0], np.int32)
    found = self._read(self._source().map(_Decode(self, center_crop)).batch(size), batches)
    for _ in range(batches):
      pixels, labels = next(found, none)
      missing = size - len(labels)
      yield (
        np.concatenate([pixels, padding[:missing]]),
        np.pad(labels, (0, missing), constant_values=-1),
      )

  def _source(self) -> Any:
    """This process's images, as examples of TFDS that are not decoded."""
    import grain
    import tensorflow_datasets as tfds

    index, count = self.shard
    part = tfds.even_splits(f"{self.split}[{self.begin}:{self.end}]", count, drop_remainder=False)
    return grain.MapDataset.source(
      tfds.builder_from_directory(self.dataset.directory).as_data_source(
        part[index], decoders={"image": tfds.decode.SkipDecoding()}
      )
    )

  def _read(self, batches: Any, count: int) -> Iterator[Batch]:
    """Reads batches ahead in threads or processes, at most so many of them."""
    import grain
    from absl import flags

    # An element is a whole batch, so that each is the work of one thread, and few are held.
    threads = max(1, (os.cpu_count() or 1) // max(1, self.workers))
    found = batches[:count].to_iter_dataset(
      grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
    )
    if self.workers:
      if not flags.FLAGS.is_parsed():  # Grain asks for one of them.
        flags.FLAGS.mark_as_parsed()
      found = found.mp_prefetch(grain.MultiprocessingOptions(num_workers=self.workers))
    try:
      yield from found
    except RuntimeError as error:
      if "terminated" in str(error):
        raise ValueError(
          f"one of workers={self.workers} processes that decode images was ended, perhaps for want"
          f" of memory: {error}"
        ) from error
      files = self.dataset.directory / f"{NAME}-{self.split}.array_record*"
      raise ValueError(f"{files} is incomplete or corrupt: {error}") from error


@dataclasses.dataclass(frozen=True)
class _Decode:
  """A function of an example of TFDS, and of a generator for random crops, that has no closure."""

  stream: Stream
  crop: Any

  def __call__(self, example: dict[str, Any], *rng: np.random.Generator) -> Batch:
    from PIL import Image

    dataset, label = self.stream.dataset, example["label"]
    if label is None:  # Where a file has been cut off, empty examples are read.
      raise RuntimeError("an example is empty")
    where = f"{dataset.directory}, {self.stream.split} image {example.get('file_name', '')!r}"
    if not 0 <= label < dataset.classes:
      raise ValueError(f"{where} is corrupt: label {label} is not in 0..{dataset.classes - 1}.")
    try:
      image = Image.open(io.BytesIO(example["image"])).convert("RGB")
    except OSError as error:
      raise ValueError(f"{where} is corrupt: {error}") from error
    return np.asarray(self.crop(image, self.stream.image_size, *rng)), np.int32(label)


def open_prepared(directory: pathlib.Path) -> Imagenet:
  """Looks at a prepared data set; none of its images is read.

  Args:
    directory: of one version of the data set, with `dataset_info.json`.

  Raises:
    DataNotFound: if some of its files are missing.
  """
  import tensorflow_datasets as tfds

  splits = tfds.builder_from_directory(directory).info.splits
  wanted = ("train", "validation")
  files = [
    pathlib.Path(file) for split in wanted if split in splits for file in splits[split].filepaths
  ]
  missing = [split for split in wanted if split not in splits]
  missing += [file.name for file in files if not file.exists()]
  if missing:
    raise DataNotFound(
      f"{directory} holds {NAME!r} only in part: {', '.join(missing[:3])}"
      f"{' and others' if len(missing) > 3 else ''} missing."
    )
  return Imagenet(directory, splits["train"].num_examples, splits["validation"].num_examples)


def random_crop(image: Any, size: int, rng: np.random.Generator) -> Any:
  """A part of an image at random, scaled to (size, size), and mirrored half of the time.

  As torchvision's RandomResizedCrop on PIL images: 8 to 100 % of the area, uniformly, with an
  aspect ratio of 3/4 to 4/3, whose logarithm is uniform. If ten in a row do not fit, it is as much
  of the centre as these ratios let.
  """
  from PIL import Image

  part = image.crop(random_box(image.width, image.height, rng))
  # Not by JPEG's own reduction to a half, which blurs otherwise and would ask for a part of twice
  # the size: few images are so large.
  part = part.resize((size, size), Image.Resampling.BILINEAR)
  return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else part


def random_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
  """Left, upper, right and lower bound of a random part of an image."""
  for _ in range(10):
    area = width * height * rng.uniform(0.08, 1.0)
    ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    columns, rows = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if 0 < columns <= width and 0 < rows <= height:
      left = int(rng.integers(width - columns + 1))
      upper = int(rng.integers(height - rows + 1))
      return left, upper, left + columns, upper + rows
  columns = min(width, round(height * 4 / 3))
  rows = min(height, round(width * 4 / 3))
  left, upper = (width - columns) // 2, (height - rows) // 2
  return left, upper, left + columns, upper + rows


def center_crop(image: Any, size: int) -> Any:
  """The centre of an image whose shorter side is scaled to 8/7 of the size.

  As torchvision's Resize(256) and CenterCrop(224) on PIL images.
  """
  from PIL import Image

  short = round(size / _CENTER)
  shorter = min(image.width, image.height)
  width, height = short * image.width // shorter, short * image.height // shorter
  image = image.resize((width, height), Image.Resampling.BILINEAR)
  left, upper = round((width - size) / 2), round((height - size) / 2)
  return image.crop((left, upper, left + size, upper + size))
