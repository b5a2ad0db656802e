"""How many images a second the host decodes and crops, of ImageNet or of images in its shape."""

import contextlib
import io
import pathlib
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments import data, imagenet, prepare

# The shape of a typical image of ImageNet, and the quality that most of its files have.
_WIDTH, _HEIGHT, _QUALITY = 500, 375, 90
_BATCH = 32


def measure_loader(
  data_dir: pathlib.Path | None, workers: Sequence[int], *, images: int, rounds: int
) -> list[dict[str, Any]]:
  """Reads crops for training as fast as they come: a row of numbers for each count of processes.

  Args:
    data_dir: directory of ImageNet; None writes so many images in its shape beforehand.
    workers: numbers of processes that decode; 0 stands for threads of this one.
    images: how many to read in a round, at most; eight batches at least.
    rounds: how many epochs to read. The first quarter of each is not timed, since processes start
      in it.
  """
  with contextlib.ExitStack() as stack:
    if data_dir is None:
      data_dir = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
      photos = _photographs(images)
      write_prepared(data_dir, {"train": photos, "validation": []})
    dataset = data.load(imagenet.NAME, data_dir)
    images = min(images, dataset.train_size)
    if images < 8 * _BATCH:
      raise ValueError(f"images={images} must be at least {8 * _BATCH}, which are eight batches")
    rows = []
    for count in workers:
      stream = imagenet.Stream(
        dataset, "train", 0, images, batch_size=_BATCH, image_size=224, workers=count
      )
      times = [_time_epoch(stream, epoch) for epoch in range(rounds)]
      firsts, rates = zip(*times)
      rows.append(
        {
          "workers": count,
          "images": images,
          "first_batch_seconds": firsts,
          "images_per_second": rates,
        }
      )
  return rows


def write_prepared(
  target: pathlib.Path,
  splits: Mapping[str, Iterable[tuple[Any, int]]],
  *,
  images_per_shard: int = 1000,
) -> pathlib.Path:
  """Writes images under TFDS's name, version and features of ImageNet, in ArrayRecord format.

  Args:
    target: the directory for TFDS data sets, made if absent.
    splits: by name, images of Pillow and their labels.
    images_per_shard: at most so many are in one file.

  Returns:
    The directory of the data set.
  """
  import tensorflow_datasets as tfds

  builder = tfds.builder(imagenet.NAME, data_dir=target)
  examples = {split: _examples(split, images) for split, images in splits.items()}
  prepare.write_shards(builder, examples, examples_per_shard=images_per_shard)
  return pathlib.Path(builder.data_dir)


def _examples(split: str, images: Iterable[tuple[Any, int]]) -> Iterator[dict[str, Any]]:
  for i, (image, label) in enumerate(images):
    content = io.BytesIO()
    image.save(content, "JPEG", quality=_QUALITY)
    content.seek(0)
    yield {"image": content, "label": label, "file_name": f"{split}_{i:08d}.JPEG"}


def _photographs(count: int) -> Iterator[tuple[Any, int]]:
  """Parts of two photographs: noise or plain colours would take another time to decode."""
  from PIL import Image
  from sklearn import datasets

  photos = [Image.fromarray(photo) for photo in datasets.load_sample_images().images]
  rng = np.random.default_rng(0)
  for i in range(count):
    photo = photos[i % 2]
    left = int(rng.integers(photo.width - _WIDTH + 1))
    upper = int(rng.integers(photo.height - _HEIGHT + 1))
    yield photo.crop((left, upper, left + _WIDTH, upper + _HEIGHT)), i % 1000


def _time_epoch(stream: imagenet.Stream, epoch: int) -> tuple[float, float]:
  """Seconds to the first batch, and images per second after the first quarter."""
  started = time.perf_counter()
  arrivals = [time.perf_counter() for _ in stream.shuffled(epoch)]
  quarter = len(arrivals) // 4
  timed = _BATCH * (len(arrivals) - quarter)
  return arrivals[0] - started, timed / (arrivals[-1] - arrivals[quarter - 1])
