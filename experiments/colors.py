"""Colours of images: brightness, contrast, saturation and hue, in an order of each image's own."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def random_jitter(
  key: jax.Array,
  images: jax.Array,
  *,
  brightness: float = 0.0,
  contrast: float = 0.0,
  saturation: float = 0.0,
  hue: float = 0.0,
) -> jax.Array:
  """Changes the colours of each image, by random amounts and in a random order.

  Args:
    key: a random key.
    images: (batch, height, width, channels); three channels for saturation and hue.
    brightness: factors are uniform in [max(0, 1 - brightness), 1 + brightness]. At 0 this step is
      left out, as are the others.
    contrast: as `brightness`.
    saturation: as `brightness`.
    hue: shifts are uniform in [-hue, hue], as a fraction of the colour circle; at most 0.5.
  """
  extents = np.array([brightness, contrast, saturation, hue])
  if not extents.any():
    return images
  middle = np.array([1, 1, 1, 0])
  low, high = np.maximum(middle - extents, [0, 0, 0, -hue]), middle + extents
  amount_key, order_key = jax.random.split(key)
  amounts = jax.random.uniform(amount_key, [len(images), 4], minval=low, maxval=high)
  given = [amount if extent else None for amount, extent in zip(amounts.T, extents)]
  order = jnp.tile(jnp.arange(4), (len(images), 1))
  order = jax.random.permutation(order_key, order, axis=1, independent=True)
  return adjust_colors(images, order, *given)


def adjust_colors(
  images: jax.Array,
  order: jax.Array,
  brightness: jax.Array | None = None,
  contrast: jax.Array | None = None,
  saturation: jax.Array | None = None,
  hue: jax.Array | None = None,
) -> jax.Array:
  """Adjusts brightness, contrast, saturation and hue, in an order of its own for each image.

  Args:
    images: (batch, height, width, channels).
    order: (batch, 4), for each image the places of the adjustments as they are listed here: four
      different numbers, of which the lowest goes first.
    brightness: (batch,), as in `adjust_brightness`. What is None is left out.
    contrast: (batch,), as in `adjust_contrast`.
    saturation: (batch,), as in `adjust_saturation`.
    hue: (batch,), as in `adjust_hue`.
  """
  if saturation is not None or hue is not None:
    _check_colors(images)
  blends = [
    (place, target, factors)
    for place, target, factors in (
      (order[:, 0], lambda planes: 0.0, brightness),
      (order[:, 1], _mean_grey, contrast),
      (order[:, 2], _grey, saturation),
    )
    if factors is not None
  ]
  hue_place = order[:, 3]

  def blend(planes, due):
    def blend_once(turn, planes):
      # What is not due has a factor of 1, which leaves an image exactly as it is.
      target, factor = 0.0, 1.0
      for place, target_of, factors in blends:
        rank = sum((other < place).astype(jnp.int32) for other, _, _ in blends)
        now = per_image((rank == turn) & due(place))
        target = jnp.where(now, target_of(planes), target)
        factor = jnp.where(now, per_image(factors), factor)
      return _blend(planes, target, factor)

    # A loop, because a compiler would otherwise fuse all turns, and repeat the first ones for each
    # mean grey level of the later ones.
    return jax.lax.fori_loop(0, len(blends), blend_once, planes)

  def adjust(planes):
    if hue is None:
      return blend(planes, lambda place: True)
    # The hue costs more than all the blends, and any of them may come before or after it: so they
    # are gone through twice, and the hue is shifted once.
    planes = blend(planes, lambda place: place < hue_place)
    planes = _shift_hue(planes, hue)
    return blend(planes, lambda place: place > hue_place)

  return _recolor(images, adjust)


def adjust_brightness(images: jax.Array, factors: jax.Array) -> jax.Array:
  """Blends images with black: pixels are multiplied by `factors`, (batch,)."""
  return _recolor(images, lambda planes: _blend(planes, 0.0, per_image(factors)))


def adjust_contrast(images: jax.Array, factors: jax.Array) -> jax.Array:
  """Blends images with their mean grey level: 0 leaves only that, 1 changes nothing.

  Args:
    images: (batch, height, width, channels), with one channel or three.
    factors: (batch,).
  """
  return _recolor(images, lambda planes: _blend(planes, _mean_grey(planes), per_image(factors)))


def adjust_saturation(images: jax.Array, factors: jax.Array) -> jax.Array:
  """Blends images with themselves in grey: 0 leaves only that, 1 changes nothing.

  Args:
    images: (batch, height, width, 3).
    factors: (batch,).
  """
  _check_colors(images)
  return _recolor(images, lambda planes: _blend(planes, _grey(planes), per_image(factors)))


def adjust_hue(images: jax.Array, shifts: jax.Array) -> jax.Array:
  """Shifts the hue, in the hexagonal space HSV; value and saturation stay.

  Args:
    images: (batch, height, width, 3).
    shifts: (batch,), as a fraction of the colour circle: 1/3 makes red green.
  """
  _check_colors(images)
  return _recolor(images, lambda planes: _shift_hue(planes, shifts))


def to_float(images: jax.Array) -> jax.Array:
  if images.dtype == jnp.uint8:
    return images.astype(jnp.float32) / 255
  if images.dtype == jnp.float32:
    return jnp.asarray(images)
  raise ValueError(
    f"images are {images.dtype}: they must be uint8 in [0, 255] or float32 in [0, 1]"
  )


def _recolor(images: jax.Array, adjust: Callable[[jax.Array], jax.Array]) -> jax.Array:
  """Applies a function of planes, float32 and (channels, batch, height, width)."""
  # Channels go first because three innermost elements leave vector instructions no work.
  planes = adjust(jnp.moveaxis(to_float(images), -1, 0))
  out = jnp.moveaxis(planes, 0, -1)
  return jnp.round(out * 255).astype(jnp.uint8) if images.dtype == jnp.uint8 else out


def per_image(values: jax.Array) -> jax.Array:
  """(batch,) to (batch, 1, 1)."""
  return values[:, None, None]


def _blend(planes: jax.Array, target: jax.Array | float, factor: jax.Array) -> jax.Array:
  return jnp.clip(factor * planes + (1 - factor) * target, 0, 1)


def _grey(planes: jax.Array) -> jax.Array:
  """The luma of ITU-R BT.601, as PIL's mode "L": (batch, height, width)."""
  if len(planes) == 1:
    return planes[0]
  return 0.299 * planes[0] + 0.587 * planes[1] + 0.114 * planes[2]


def _mean_grey(planes: jax.Array) -> jax.Array:
  return jnp.mean(_grey(planes), axis=(1, 2), keepdims=True)


def _shift_hue(planes: jax.Array, shifts: jax.Array) -> jax.Array:
  red, green, blue = planes
  high = jnp.maximum(jnp.maximum(red, green), blue)
  low = jnp.minimum(jnp.minimum(red, green), blue)
  chroma = high - low
  scale = 1 / jnp.where(chroma > 0, chroma, 1)
  # In sixths of the circle, from red over green at 2 to blue at 4.
  hue = jnp.where(
    high == red,
    (green - blue) * scale,
    jnp.where(high == green, 2 + (blue - red) * scale, 4 + (red - green) * scale),
  )
  hue = hue + 6 * per_image(shifts)

  def channel(at):
    # Full within a sixth of its own hue, absent beyond two sixths, linear between.
    away = hue - at
    away = jnp.abs(away - 6 * jnp.round(away / 6))
    return low + chroma * jnp.clip(2 - away, 0, 1)

  return jnp.stack([channel(0), channel(2), channel(4)])


def _check_colors(images: jax.Array) -> None:
  if images.shape[-1] != 3:
    raise ValueError(
      f"images have {images.shape[-1]} channels: saturation and hue change only in images of three"
    )
