"""Augmentation of images on the device: batched, jitted, with parameters of its own for each image.

    python -m experiments.augment [--data-dir DIR] [--out PATH]

draws a sheet of CIFAR-10 images under each step and under the published pipelines.

Steps are those of torchvision on PIL images, as published pipelines use them
(https://docs.pytorch.org/vision/stable/transforms.html): `geometry` and `colors` have them. Colours
differ by a level or a few, because only the final result is rounded, to the nearest: PIL cuts off
the fraction after every step, rounds the mean grey level and has 256 hues.
"""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFont

from experiments import colors, commands, data, geometry
from experiments.published import Dataset


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """What happens to a training image, by default nothing. `augment` says in which order."""

  crop: int = 0
  """Images are padded with so many black pixels on each side, and cropped to their size again."""
  flip: bool = False
  """Half of the images are mirrored."""
  rotation: float = 0.0
  """Images are rotated by up to so many degrees."""
  translation: float = 0.0
  """Images are shifted by up to this fraction of their size."""
  brightness: float = 0.0
  """Images are made darker or lighter by up to this fraction."""
  contrast: float = 0.0
  """The contrast is changed by up to this fraction."""
  saturation: float = 0.0
  """The saturation is changed by up to this fraction."""
  hue: float = 0.0
  """The hue is shifted by up to this fraction of the colour circle, at most 0.5."""
  erasing: float = 0.0
  """The probability that a rectangle is erased."""
  erase_to: Literal["black", "mean"] = "black"
  """What fills it: black, or the mean pixel of the data set, which normalisation makes zero."""

  def __post_init__(self):
    commands.check_fields(
      self,
      {
        "crop": (self.crop >= 0, "at least 0"),
        "rotation": (0 <= self.rotation < math.inf, "at least 0 and finite"),
        "translation": (0 <= self.translation <= 1, "in [0, 1]"),
        "brightness": (0 <= self.brightness < math.inf, "at least 0 and finite"),
        "contrast": (0 <= self.contrast < math.inf, "at least 0 and finite"),
        "saturation": (0 <= self.saturation < math.inf, "at least 0 and finite"),
        "hue": (0 <= self.hue <= 0.5, "in [0, 0.5]"),
        "erasing": (0 <= self.erasing <= 1, "a probability"),
        "erase_to": (self.erase_to in ("black", "mean"), "'black' or 'mean'"),
      },
    )


# Of arXiv 2606.12278, on CIFAR-10: A for ResNet-18 and VGG-like, B for VGG-19.
PIPELINES = {
  "A": Augmentation(
    crop=4,
    flip=True,
    rotation=15.0,
    brightness=0.2,
    contrast=0.2,
    saturation=0.2,
    hue=0.1,
    erasing=0.5,
  )
}
PIPELINES["B"] = dataclasses.replace(PIPELINES["A"], translation=0.1, erasing=0.1, erase_to="mean")


def augment(
  key: jax.Array,
  images: jax.Array,
  augmentation: Augmentation,
  *,
  mean: Sequence[float] | jax.Array,
) -> jax.Array:
  """Augments a batch: crop, flip, rotation, colour jitter, translation, erasing, in this order.

  Steps that are off cost nothing. Each has a key of its own, in that order those of
  `jax.random.split(key, 6)`, so that switching a step off leaves what the others draw as it is.

  Args:
    key: a random key.
    images: (batch, height, width, channels), uint8 in [0, 255] or float32 in [0, 1].
    augmentation: which steps to take.
    mean: the mean of each channel, with pixels in [0, 1]: what `erase_to="mean"` fills in.

  Returns:
    Images of the same shape, always float32 in [0, 1]. Colours are not rounded between the steps.

  Raises:
    ValueError: if saturation or hue are to change in images that have no three channels.

  Example:
    >>> images = jnp.full([2, 32, 32, 1], 51, jnp.uint8)
    >>> out = augment(jax.random.key(0), images, Augmentation(crop=4, flip=True), mean=[0.5])
    >>> f"{out.dtype}, from {out.min():.1f} to {out.max():.1f}"
    'float32, from 0.0 to 0.2'
  """
  a = augmentation
  crop_key, flip_key, rotation_key, color_key, translation_key, erasing_key = jax.random.split(
    key, 6
  )
  # What only moves pixels comes first, while a pixel of most data sets is still a byte.
  if a.crop:
    images = geometry.random_crop(crop_key, images, padding=a.crop)
  if a.flip:
    images = geometry.random_flip(flip_key, images)
  if a.rotation:
    images = geometry.random_rotation(rotation_key, images, degrees=a.rotation)
  images = colors.to_float(images)
  images = colors.random_jitter(
    color_key,
    images,
    brightness=a.brightness,
    contrast=a.contrast,
    saturation=a.saturation,
    hue=a.hue,
  )
  if a.translation:
    images = geometry.random_translation(translation_key, images, fraction=a.translation)
  if a.erasing:
    value = mean if a.erase_to == "mean" else 0
    images = geometry.random_erasing(erasing_key, images, probability=a.erasing, value=value)
  return images


def normalize(
  images: jax.Array, mean: Sequence[float] | jax.Array, std: Sequence[float] | jax.Array
) -> jax.Array:
  """Returns (images - mean) / std in float32, of pixels in [0, 1].

  Args:
    images: (batch, height, width, channels), uint8 in [0, 255] or float32 in [0, 1].
    mean: the mean of each channel, with pixels in [0, 1].
    std: the standard deviation of each channel, with pixels in [0, 1].
  """
  mean, std = (jnp.asarray(x, jnp.float32) for x in (mean, std))
  return (colors.to_float(images) - mean) / std


@dataclasses.dataclass(frozen=True)
class Options:
  """Draws a sheet of CIFAR-10 images under each step and under the published pipelines."""

  data_dir: pathlib.Path | None = None
  """Directory of the data set; see the README."""
  out: pathlib.Path = pathlib.Path("experiments/results/augmentations.png")
  """The PNG to write."""

  def __post_init__(self):
    commands.check_fields(self, {"out": (self.out.suffix == ".png", "a file that ends in .png")})


def draw_sheet(dataset: Dataset, *, rows: int = 6, draws: int = 4, zoom: int = 2) -> Image.Image:
  """A row for each of the first training images; each step alone, then draws of the pipelines."""
  steps = dataclasses.asdict(PIPELINES["B"])
  del steps["erasing"], steps["erase_to"]
  columns = [("original", Augmentation())]
  columns += [
    (f"{name}\n{'' if amount is True else amount}", Augmentation(**{name: amount}))
    for name, amount in steps.items()
  ]
  for fill in ("black", "mean"):
    columns.append((f"erasing\nto {fill}", Augmentation(erasing=1.0, erase_to=fill)))
  for name, pipeline in PIPELINES.items():
    columns += [(f"pipeline {name}\ndraw {i + 1}", pipeline) for i in range(draws)]

  images = jnp.asarray(dataset.train_images[:rows])
  _, height, width, _ = images.shape
  gap, header = 4, 34
  cell_height, cell_width = zoom * height + gap, zoom * width + gap
  sheet = Image.new(
    "RGB", (len(columns) * cell_width + gap, rows * cell_height + gap + header), "white"
  )
  draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
  for i, (title, pipeline) in enumerate(columns):
    left = gap + i * cell_width
    draw.multiline_text((left, gap), title, "black", font, spacing=2)
    augmented = augment(jax.random.key(i), images, pipeline, mean=dataset.mean)
    pixels = np.asarray(jnp.round(augmented * 255).astype(jnp.uint8))
    for j, image in enumerate(pixels.repeat(zoom, axis=1).repeat(zoom, axis=2)):
      sheet.paste(Image.fromarray(image), (left, header + gap + j * cell_height))
  return sheet


def main(args: list[str] | None = None) -> None:
  with commands.errors_as_messages():
    options = tyro.cli(Options, prog="python -m experiments.augment", args=args)
    commands.check_writable("out", options.out, options.out.parent)
    sheet = draw_sheet(data.load("cifar10", options.data_dir))
    sheet.save(options.out, optimize=True)
    print(f"Wrote {options.out}.")


if __name__ == "__main__":
  main()
