import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import augment, data


@pytest.fixture(scope="module")
def images():
  return data.load("digits").train_images[:12]


def slow_affine(image, angle, shift):
  """Pixel by pixel: where does it come from?"""
  height, width, _ = image.shape
  centre_y, centre_x = (height - 1) / 2, (width - 1) / 2
  out = np.zeros_like(image)
  for row in range(height):
    for column in range(width):
      y, x = row - shift[0] - centre_y, column - shift[1] - centre_x
      from_y = int(np.round(np.cos(angle) * y + np.sin(angle) * x + centre_y))
      from_x = int(np.round(np.cos(angle) * x - np.sin(angle) * y + centre_x))
      if 0 <= from_y < height and 0 <= from_x < width:
        out[row, column] = image[from_y, from_x]
  return out


def test_rotation_and_translation_agree_with_a_slow_version_on_real_images(images):
  rng = np.random.default_rng(0)
  angles = rng.uniform(-np.pi, np.pi, len(images)).astype(np.float32)
  shifts = rng.integers(-3, 4, (len(images), 2)).astype(np.float32)
  got = augment.affine(jnp.asarray(images), jnp.asarray(angles), jnp.asarray(shifts))
  want = [slow_affine(*arguments) for arguments in zip(images, angles, shifts)]
  np.testing.assert_array_equal(got, want)
  assert got.dtype == np.uint8


def test_a_quarter_turn_is_counter_clockwise(images):
  got = augment.affine(jnp.asarray(images), jnp.full(len(images), np.pi / 2), jnp.zeros((12, 2)))
  np.testing.assert_array_equal(got, np.rot90(images, axes=(1, 2)))


def test_a_shift_moves_down_and_right_and_fills_with_zeros(images):
  got = augment.affine(jnp.asarray(images), jnp.zeros(12), jnp.tile(jnp.array([2.0, 1.0]), (12, 1)))
  want = np.zeros_like(images)
  want[:, 2:, 1:] = images[:, :-2, :-1]
  np.testing.assert_array_equal(got, want)


def test_angles_and_shifts_stay_within_their_bounds_and_reach_them():
  point = np.zeros((2000, 21, 21, 1), np.float32)
  point[:, 10, 10] = 1.0
  moved = augment.rotate_and_translate(jax.random.key(0), point, degrees=10.0, fraction=0.15)
  rows, columns = np.nonzero(np.asarray(moved[..., 0]))[1:]
  assert len(rows) == 2000
  for places in (rows, columns):
    assert set(places - 10) == set(range(-3, 4))


def test_without_angle_and_shift_images_are_unchanged(images):
  got = augment.rotate_and_translate(jax.random.key(0), images, degrees=0.0, fraction=0.0)
  np.testing.assert_array_equal(got, images)
