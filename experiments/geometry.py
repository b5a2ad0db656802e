"""Where pixels go: crops, mirror images, rotations, translations, and erased rectangles.

Images are (batch, height, width, channels), uint8 in [0, 255] or float32 in [0, 1], and stay of the
type that they have. For each step there is a function with explicit parameters, one for each image,
and one that draws them.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments import colors


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
