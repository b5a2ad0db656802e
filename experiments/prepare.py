"""Writes a data set from its publishers' files as a TFDS data set in ArrayRecord format.

    python -m experiments.prepare mnist SOURCE TARGET

SOURCE is a directory with the publishers' files; afterwards
`tfds.data_source("mnist", data_dir=TARGET)` and the experiments read the data set from TARGET.
Neither TensorFlow nor a network is needed.
"""

import dataclasses
import pathlib
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal
from urllib import parse

import tyro

from experiments import published

_CIFAR10_CLASSES = (
  "airplane",
  "automobile",
  "bird",
  "cat",
  "deer",
  "dog",
  "frog",
  "horse",
  "ship",
  "truck",
)

# Superclasses and their classes: labels of both follow the alphabet, each for itself.
_CIFAR100_CLASSES = {
  "aquatic_mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
  "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
  "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
  "food_containers": ("bottle", "bowl", "can", "cup", "plate"),
  "fruit_and_vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
  "household_electrical_devices": ("clock", "keyboard", "lamp", "telephone", "television"),
  "household_furniture": ("bed", "chair", "couch", "table", "wardrobe"),
  "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
  "large_carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
  "large_man-made_outdoor_things": ("bridge", "castle", "house", "road", "skyscraper"),
  "large_natural_outdoor_scenes": ("cloud", "forest", "mountain", "plain", "sea"),
  "large_omnivores_and_herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
  "medium_mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
  "non-insect_invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
  "people": ("baby", "boy", "girl", "man", "woman"),
  "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
  "small_mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
  "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
  "vehicles_1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
  "vehicles_2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
}
_SUPERCLASSES = {
  name: superclass for superclass, names in _CIFAR100_CLASSES.items() for name in names
}

# What TFDS does not know before it has read the publishers' files.
_NAMES = {
  "cifar10": {"label": _CIFAR10_CLASSES},
  "cifar100": {"label": sorted(_SUPERCLASSES), "coarse_label": list(_CIFAR100_CLASSES)},
}


@dataclasses.dataclass(frozen=True)
class Options:
  """Writes a data set from its publishers' files as one of TFDS, read without TensorFlow."""

  name: tyro.conf.Positional[Literal[tuple(published.PUBLISHED)]]
  """Which data set."""
  source: Annotated[tyro.conf.Positional[pathlib.Path], tyro.conf.arg(metavar="SOURCE")]
  """The directory with the publishers' files."""
  target: Annotated[tyro.conf.Positional[pathlib.Path], tyro.conf.arg(metavar="TARGET")]
  """The directory for TFDS data sets; this one goes into TARGET/NAME/VERSION."""


def write(dataset: published.Dataset, target: pathlib.Path) -> pathlib.Path:
  """Writes a data set in ArrayRecord format under TFDS's name, version and features.

  Images keep their order. The data set appears under its name when it is complete, or not at all.

  Args:
    dataset: any but the digits, which TFDS has not.
    target: the directory for TFDS data sets, made if absent.

  Returns:
    The directory of the data set.

  Raises:
    FileExistsError: if `target` has this version of the data set already.
  """
  import tensorflow_datasets as tfds
  from PIL import Image

  def examples(split, images, labels):
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
      # TFDS needs TensorFlow to encode an array, but takes an image of Pillow as it is.
      example = {"image": Image.fromarray(image.squeeze()), "label": int(label)}
      if "id" in features:
        example["id"] = f"{split}_{i:05d}"
      if "coarse_label" in features:
        example["coarse_label"] = _SUPERCLASSES[features["label"].names[label]]
      yield example

  target.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=target, prefix=".incomplete-") as scratch:
    builder = tfds.builder(dataset.name, data_dir=scratch)
    written = pathlib.Path(builder.data_dir)
    destination = target / written.relative_to(scratch)
    if destination.exists():
      raise FileExistsError(
        f"{destination} exists already and is not overwritten: remove it, or choose another target."
      )
    features = builder.info.features
    for feature, names in _NAMES.get(dataset.name, {}).items():
      features[feature].names = names
    # One shard a split, as TFDS has it for data of this size, and in order.
    write_shards(
      builder,
      {
        "train": examples("train", dataset.train_images, dataset.train_labels),
        "test": examples("test", dataset.test_images, dataset.test_labels),
      },
      examples_per_shard=1_000_000,
    )
    destination.parent.mkdir(exist_ok=True)
    written.rename(destination)
  return destination


def write_shards(
  builder: Any, splits: Mapping[str, Iterable[dict[str, Any]]], *, examples_per_shard: int
) -> None:
  """Writes examples into the directory of a TFDS builder, which is made, in ArrayRecord format.

  Args:
    builder: a `tensorflow_datasets.core.DatasetBuilder` whose directory does not exist.
    splits: by name, examples with its features, in order.
    examples_per_shard: at most so many are in one file.
  """
  import tensorflow_datasets as tfds

  pathlib.Path(builder.data_dir).mkdir(parents=True)
  builder.info.set_file_format("array_record", override=True)
  writer = tfds.core.SequentialWriter(
    builder.info, max_examples_per_shard=examples_per_shard, file_format="array_record"
  )
  writer.initialize_splits(list(splits))
  writer.add_examples(dict(splits))
  writer.close_all()


def download(name: str, target: pathlib.Path) -> published.Dataset:
  """Downloads the publishers' files through TFDS and keeps them as a prepared data set.

  TFDS's own preparation reads these files with TensorFlow; its downloader does without.

  Args:
    name: a key of `published.PUBLISHED`.
    target: the directory for TFDS data sets; the files themselves stay in its folder "downloads".

  Returns:
    The data set.
  """
  import tensorflow_datasets as tfds

  checksums = tfds.core.tfds_path(f"url_checksums/{name}.txt")
  manager = tfds.download.DownloadManager(
    download_dir=target / "downloads",
    url_infos=tfds.core.download.checksums.load_url_infos(checksums),
    dataset_name=name,
  )
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch, published.PUBLISHED[name].folders[0])
    folder.mkdir(exist_ok=True)
    for url in published.PUBLISHED[name].urls:
      path = manager.download(url)
      file = pathlib.PurePosixPath(parse.urlsplit(url).path).name
      if file.endswith(".tar.gz"):
        with tarfile.open(path) as archive:
          archive.extractall(folder, filter="data")
      else:  # TFDS has changed its name.
        shutil.copyfile(path, folder / file)
    dataset = published.read_files(name, published.find_files(name, pathlib.Path(scratch)))
  write(dataset, target)
  return dataset


def main(args: Sequence[str] | None = None) -> None:
  """Reads, checks and writes the data set that the command line names."""
  options = tyro.cli(Options, prog="python -m experiments.prepare", args=args)
  try:
    directory = published.find_files(options.name, options.source)
    if directory is None:
      files = published.describe_files(options.name, options.source)
      raise published.DataNotFound(f"{options.source} holds no file of {options.name!r} ({files}).")
    dataset = published.read_files(options.name, directory)
    destination = write(dataset, options.target)
  except (OSError, ValueError) as error:
    raise SystemExit(f"error: {error}") from None
  print(
    f"{destination}: {len(dataset.train_images)} training images, "
    f"{len(dataset.test_images)} test images"
  )


if __name__ == "__main__":
  main()
