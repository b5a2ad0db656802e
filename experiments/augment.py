"""Augmentation of images on the device: batched, jitted, with parameters of its own for each image.

    python -m experiments.augment [--data-dir DIR] [--out PATH]

draws a sheet of CIFAR-10 images under each step and under the published pipelines.

Images are (batch, height, width, channels), uint8 in [0, 255] or float32 in [0, 1], and all
functions but `augment` and `normalize` return the type they got. For each step there is a function
with explicit parameters, one for each image, and one that draws them. Steps are those of
torchvision on PIL images (https://docs.pytorch.org/vision/stable/transforms.html), as published
pipelines use them. Colours differ by a level or a few, because only the final result is rounded,
to the nearest: PIL cuts off the fraction after every step, rounds the mean grey level and has 256
hues.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFont

from experiments import colors, commands, data
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
        "rotation": (self.rotation >= 0, "at least 0"),
        "translation": (0 <= self.translation <= 1, "in [0, 1]"),
        "brightness": (self.brightness >= 0, "at least 0"),
        "contrast": (self.contrast >= 0, "at least 0"),
        "saturation": (self.saturation >= 0, "at least 0"),
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
    images = random_crop(crop_key, images, padding=a.crop)
  if a.flip:
    images = random_flip(flip_key, images)
  if a.rotation:
    images = random_rotation(rotation_key, images, degrees=a.rotation)
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
    images = random_translation(translation_key, images, fraction=a.translation)
  if a.erasing:
    value = mean if a.erase_to == "mean" else 0
    images = random_erasing(erasing_key, images, probability=a.erasing, value=value)
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


def random_crop(key: jax.Array, images: jax.Array, *, padding: int) -> jax.Array:
  """Pads images with zeros on each side, and crops each at random to its size again."""
  offsets = jax.random.randint(key, [len(images), 2], -padding, padding + 1)
  return crop(images, offsets)


def crop(images: jax.Array, offsets: jax.Array) -> jax.Array:
  """Crops images to their own size; what lies outside of them is zero.

  Args:
    images: (batch, height, width, channels).
    offsets: int32, (batch, 2), the first row and column of each crop, in pixels of its image.
  """
  _, height, width, _ = images.shape
  rows = jnp.arange(height)[:, None] + offsets[:, 0, None, None]
  columns = jnp.arange(width) + offsets[:, 1, None, None]
  return _take(images, rows, columns)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
  """Mirrors each image, left to right, with probability 1/2."""
  return flip(images, jax.random.bernoulli(key, shape=[len(images)]))


def flip(images: jax.Array, flips: jax.Array) -> jax.Array:
  """Mirrors, left to right, the images for which `flips`, boolean and (batch,), is True."""
  return jnp.where(flips[:, None, None, None], images[:, :, ::-1], images)


def random_rotation(key: jax.Array, images: jax.Array, *, degrees: float) -> jax.Array:
  """Rotates each image by an angle uniform in [-degrees, degrees]: see `rotate`."""
  angles = jax.random.uniform(key, [len(images)], minval=-degrees, maxval=degrees)
  return rotate(images, angles)


def rotate(images: jax.Array, angles: jax.Array) -> jax.Array:
  """Rotates images about their centres: nearest pixel, zero outside.

  Args:
    images: (batch, height, width, channels), up to 16,384 pixels high and wide.
    angles: (batch,), in degrees, counter-clockwise as one sees the image.
  """
  _, height, width, _ = images.shape
  angles = jnp.deg2rad(angles)[:, None, None]
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  center_y, center_x = height / 2, width / 2
  first_y = center_y - cos * (center_y - 0.5) - sin * (center_x - 0.5)
  first_x = center_x - cos * (center_x - 0.5) + sin * (center_y - 0.5)
  # The inverse rotation says where each pixel comes from; rows count downwards. In the fixed point
  # of PIL, because a coordinate next to the border of two pixels has to fall on the same side as
  # there, and in a compiled program whatever it does with the order of multiplications.
  cos, sin, first_y, first_x = (
    jnp.round(65536 * value).astype(jnp.int32) for value in (cos, sin, first_y, first_x)
  )
  y, x = jnp.arange(height)[:, None], jnp.arange(width)
  rows = (first_y + cos * y + sin * x) >> 16
  columns = (first_x - sin * y + cos * x) >> 16
  return _take(images, rows, columns)


def random_translation(key: jax.Array, images: jax.Array, *, fraction: float) -> jax.Array:
  """Shifts each image by whole pixels, up to `fraction` of its height and of its width."""
  extent = fraction * jnp.array(images.shape[1:3])
  shifts = jax.random.uniform(key, [len(images), 2], minval=-extent, maxval=extent)
  return translate(images, jnp.round(shifts).astype(jnp.int32))


def translate(images: jax.Array, shifts: jax.Array) -> jax.Array:
  """Shifts images by `shifts`, int32 and (batch, 2), pixels down and to the right; zero outside."""
  return crop(images, -shifts)


def random_erasing(
  key: jax.Array,
  images: jax.Array,
  *,
  probability: float,
  area: tuple[float, float] = (0.02, 0.33),
  aspect: tuple[float, float] = (0.3, 3.3),
  value: float | Sequence[float] | jax.Array = 0,
) -> jax.Array:
  """Erases a random rectangle of an image, with the given probability.

  A rectangle whose area and aspect ratio were drawn is taken if it is smaller than the image both
  ways. If ten in a row are not, the image stays as it is.

  Args:
    key: a random key.
    images: (batch, height, width, channels).
    probability: of erasing.
    area: bounds of the rectangle's area, as a fraction of the image's, between which it is uniform.
    aspect: bounds of its height divided by its width, between which the logarithm is uniform.
    value: what to fill in: a number, or one for each channel, in the range of the images.

  References:
    Zhong et al., Random Erasing Data Augmentation, 2017: https://arxiv.org/abs/1708.04896
  """
  batch, height, width, _ = images.shape
  erased_key, shape_key, place_key = jax.random.split(key, 3)
  erased = jax.random.bernoulli(erased_key, probability, [batch])
  low, high = np.transpose([area, np.log(aspect)])
  shapes = jax.random.uniform(shape_key, [batch, 10, 2], minval=low, maxval=high)
  areas, aspects = shapes[..., 0] * height * width, jnp.exp(shapes[..., 1])
  sizes = jnp.stack([jnp.sqrt(areas * aspects), jnp.sqrt(areas / aspects)], axis=-1)
  sizes = jnp.round(sizes).astype(jnp.int32)
  fits = jnp.all(sizes < jnp.array([height, width]), axis=-1)
  first = jnp.argmax(fits, axis=1)
  size = jnp.take_along_axis(sizes, first[:, None, None], axis=1)[:, 0]
  size = jnp.where((erased & jnp.any(fits, axis=1))[:, None], size, 0)
  place = jax.random.uniform(place_key, [batch, 2])
  corner = jnp.floor(place * (jnp.array([height, width]) - size + 1)).astype(jnp.int32)
  return erase(images, jnp.concatenate([corner, size], axis=1), value)


def erase(
  images: jax.Array, boxes: jax.Array, value: float | Sequence[float] | jax.Array = 0
) -> jax.Array:
  """Fills a rectangle of each image.

  Args:
    images: (batch, height, width, channels).
    boxes: int32, (batch, 4): first row, first column, height and width, in pixels; a height or a
      width of 0 leaves the image as it is.
    value: a number, or one for each channel, in the range of the images; rounded for uint8.
  """
  _, height, width, _ = images.shape
  top, left, box_height, box_width = (colors.per_image(side) for side in boxes.T)
  row, column = jnp.arange(height)[:, None], jnp.arange(width)
  inside = (row >= top) & (row < top + box_height) & (column >= left) & (column < left + box_width)
  value = jnp.asarray(value)
  if images.dtype == jnp.uint8:
    value = jnp.round(value)
  return jnp.where(inside[..., None], value.astype(images.dtype), images)


def _take(images: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
  """The pixels of each image at `rows` and `columns`; zero where these lie outside of it.

  Args:
    images: (batch, height, width, channels).
    rows: int32; together with `columns` of the shape (batch, height, width).
    columns: int32.
  """
  batch, height, width, channels = images.shape
  inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
  index = jnp.where(inside, rows * width + columns, 0).reshape(batch, -1, 1)
  pixels = jnp.take_along_axis(
    images.reshape(batch, -1, channels), index, axis=1, mode="promise_in_bounds"
  )
  return jnp.where(inside[..., None], pixels.reshape(images.shape), jnp.zeros([], images.dtype))


@dataclasses.dataclass(frozen=True)
class Options:
  """Draws a sheet of CIFAR-10 images under each step and under the published pipelines."""

  data_dir: pathlib.Path | None = None
  """Directory of the data set; see the README."""
  out: pathlib.Path = pathlib.Path("experiments/results/augmentations.png")
  """The PNG to write."""


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
    sheet = draw_sheet(data.load("cifar10", options.data_dir))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(options.out, optimize=True)
    print(f"Wrote {options.out}.")


if __name__ == "__main__":
  main()
