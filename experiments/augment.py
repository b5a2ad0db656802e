"""Augmentation of images, batched and jitted, on the device."""

import jax
import jax.numpy as jnp


def rotate_and_translate(
  key: jax.Array, images: jax.Array, *, degrees: float, fraction: float
) -> jax.Array:
  """Rotates each image about its centre by a random angle, then translates it.

  Pixels are taken from the nearest one in the source, and are zero outside of it.

  Args:
    key: a random key.
    images: (batch, height, width, channels), of any type.
    degrees: angles are uniform in [-degrees, degrees].
    fraction: shifts are uniform in [-fraction, fraction] times the height or the width, and are
      rounded to whole pixels.

  Returns:
    Images of the same shape and type.
  """
  batch, height, width, _ = images.shape
  angle_key, shift_key = jax.random.split(key)
  angles = jax.random.uniform(angle_key, [batch], minval=-degrees, maxval=degrees)
  extent = fraction * jnp.array([height, width])
  shifts = jnp.round(jax.random.uniform(shift_key, [batch, 2], minval=-extent, maxval=extent))
  return affine(images, jnp.deg2rad(angles), shifts)


def affine(images: jax.Array, angles: jax.Array, shifts: jax.Array) -> jax.Array:
  """Rotates images about their centres, then translates them: nearest pixel, zero outside.

  Args:
    images: (batch, height, width, channels).
    angles: (batch,), in radians, counter-clockwise as one sees the image.
    shifts: (batch, 2), in pixels down and to the right.

  Returns:
    Images of the same shape and type.
  """
  batch, height, width, channels = images.shape
  centre_y, centre_x = (height - 1) / 2, (width - 1) / 2
  y = jnp.arange(height)[None, :, None] - centre_y - shifts[:, 0, None, None]
  x = jnp.arange(width)[None, None, :] - centre_x - shifts[:, 1, None, None]
  cos, sin = jnp.cos(angles)[:, None, None], jnp.sin(angles)[:, None, None]
  # The inverse rotation says where each pixel comes from; rows count downwards.
  source_y = jnp.round(cos * y + sin * x + centre_y).astype(jnp.int32)
  source_x = jnp.round(cos * x - sin * y + centre_x).astype(jnp.int32)
  inside = (source_y >= 0) & (source_y < height) & (source_x >= 0) & (source_x < width)
  source = jnp.where(inside, source_y * width + source_x, 0).reshape(batch, -1, 1)
  pixels = jnp.take_along_axis(images.reshape(batch, -1, channels), source, axis=1)
  return jnp.where(inside[..., None], pixels.reshape(images.shape), jnp.zeros([], images.dtype))
