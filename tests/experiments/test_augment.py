import colorsys
import dataclasses
import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from PIL import Image, ImageEnhance
from sklearn import datasets

from experiments import augment, colors, data, geometry, published

# Compiled once for each shape, because a step on its own compiles operation by operation.
ADJUSTMENTS = [
  jax.jit(adjust)
  for adjust in (
    colors.adjust_brightness,
    colors.adjust_contrast,
    colors.adjust_saturation,
    colors.adjust_hue,
  )
]
rotate = jax.jit(geometry.rotate)
JITTER = dict(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1)
RANDOM = {
  "crop": functools.partial(geometry.random_crop, padding=4),
  "flip": geometry.random_flip,
  "rotation": functools.partial(geometry.random_rotation, degrees=15.0),
  "color": functools.partial(colors.random_jitter, **JITTER),
  "translation": functools.partial(geometry.random_translation, fraction=0.1),
  "erasing": functools.partial(geometry.random_erasing, probability=0.5),
}
COMPILED = {name: jax.jit(step) for name, step in RANDOM.items()}


@pytest.fixture(scope="module")
def digits():
  return data.load("digits").train_images[:12]


@pytest.fixture(scope="module")
def photos():
  """Thirty patches of two photographs, at a quarter of their resolution: (30, 32, 32, 3), uint8."""
  small = [image[::4, ::4] for image in datasets.load_sample_images().images]
  corners = itertools.product(range(0, 96, 32), range(0, 160, 32))
  return np.stack([image[y : y + 32, x : x + 32] for y, x in corners for image in small])


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def places(count, height, width):
  """Images in which each pixel says where it lies: 1, 2, 3, ... in C order."""
  image = np.arange(1, height * width + 1, dtype=np.float32).reshape(1, height, width, 1)
  return np.repeat(image, count, axis=0)


def assert_uniform(values, low, high):
  """Kolmogorov and Smirnov's distance at four standard errors: p = 3e-14."""
  values = np.sort(np.asarray(values, np.float64).ravel())
  assert values[0] >= low - 1e-5 * (high - low) and values[-1] <= high + 1e-5 * (high - low)
  expected = (values - low) / (high - low)
  distance = np.abs(expected - (np.arange(len(values)) + 0.5) / len(values)).max()
  assert distance < 4 / np.sqrt(len(values))


def shifted(image, down, right):
  """Through a padded copy, so large that nothing falls off it."""
  height, width, _ = image.shape
  wide = np.pad(image, ((height, height), (width, width), (0, 0)))
  down, right = np.clip(down, -height, height), np.clip(right, -width, width)
  return wide[height - down : 2 * height - down, width - right : 2 * width - right]


# The steps with explicit parameters.


def test_a_crop_is_cut_out_of_the_padded_image(photos, rng):
  offsets = rng.integers(-4, 5, (len(photos), 2))
  padded = np.pad(photos, ((0, 0), (4, 4), (4, 4), (0, 0)))
  want = [image[y + 4 : y + 36, x + 4 : x + 36] for image, (y, x) in zip(padded, offsets)]
  np.testing.assert_array_equal(geometry.crop(photos, jnp.asarray(offsets)), want)


@pytest.mark.parametrize("extent", [3, 40])
def test_a_translation_moves_down_and_right_and_fills_with_zeros(photos, digits, rng, extent):
  for images in (photos[:, :20], digits):
    shifts = rng.integers(-extent, extent + 1, (len(images), 2))
    want = [shifted(image, *shift) for image, shift in zip(images, shifts)]
    np.testing.assert_array_equal(geometry.translate(images, jnp.asarray(shifts)), want)


def test_a_flip_mirrors_left_to_right(photos):
  flips = np.arange(len(photos)) % 2 == 0
  want = [np.fliplr(image) if flip else image for image, flip in zip(photos, flips)]
  np.testing.assert_array_equal(geometry.flip(photos, jnp.asarray(flips)), want)


def test_a_rotation_is_that_of_pillow_but_next_to_the_border_of_two_pixels(photos, digits, rng):
  # Sources of pixels are in fixed point, in units of 2^-16. Cosine, sine and origin, here from
  # float32 and in Pillow from float64, may each be one unit apart, and the former two are
  # multiplied by up to 31: so a source may lie on the other side of a border within 63 units.
  pixels = different = 0
  for images in (photos, photos[:, :21], photos[:, :, :21], digits):
    images = np.concatenate([images] * 5)
    _, height, width, channels = images.shape
    angles = rng.uniform(-15, 15, len(images)).astype(np.float32)
    angles[::2] *= 12
    want = [
      np.asarray(Image.fromarray(image).rotate(float(angle), Image.Resampling.NEAREST))
      for image, angle in zip(images if channels == 3 else images[..., 0], angles)
    ]
    got = np.asarray(rotate(images, jnp.asarray(angles)))
    assert got.dtype == np.uint8
    index, row, column = np.nonzero((got != np.reshape(want, images.shape)).any(axis=-1))
    pixels, different = pixels + got[..., 0].size, different + index.size
    cos, sin = np.cos(np.deg2rad(angles[index])), np.sin(np.deg2rad(angles[index]))
    y, x = row + 0.5 - height / 2, column + 0.5 - width / 2
    sources = np.stack([cos * y + sin * x + height / 2, cos * x - sin * y + width / 2])
    away = np.abs(sources - np.round(sources)).min(axis=0)
    assert np.all(away < 2 * 63 / 65536)
  assert different < 1e-4 * pixels


def test_quarter_turns_are_exact_and_counter_clockwise(photos):
  for turns in range(-2, 3):
    got = rotate(photos, jnp.full(len(photos), 90.0 * turns))
    np.testing.assert_array_equal(got, np.rot90(photos, turns, axes=(1, 2)))


@pytest.mark.parametrize(
  "adjust, enhance",
  list(zip(ADJUSTMENTS, (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color))),
)
def test_a_blend_is_that_of_pillow_within_a_level(photos, adjust, enhance):
  # Pillow cuts off the fraction of the result, and rounds grey levels first.
  for factor in (0.0, 0.4, 0.8, 1.0, 1.2, 2.0):
    got = np.asarray(adjust(photos, jnp.full(len(photos), factor)))
    want = np.stack([enhance(Image.fromarray(image)).enhance(factor) for image in photos])
    np.testing.assert_allclose(got.astype(int), want.astype(int), atol=1)
    assert (got - want.astype(int)).mean() < 1 and got.dtype == np.uint8


def test_blends_of_floats_follow_their_formulas(photos, rng):
  factors = rng.uniform(0, 2, len(photos)).astype(np.float32)
  images = photos.astype(np.float64) / 255
  grey = (images @ np.array([0.299, 0.587, 0.114]))[..., None]
  targets = [0, grey.mean(axis=(1, 2, 3), keepdims=True), grey]
  f = factors[:, None, None, None].astype(np.float64)
  for adjust, target in zip(ADJUSTMENTS, targets):
    got = adjust(images.astype(np.float32), jnp.asarray(factors))
    np.testing.assert_allclose(got, np.clip(f * images + (1 - f) * target, 0, 1), atol=1e-6)


def test_grey_images_have_brightness_and_contrast(digits):
  images = np.asarray(digits / 255, np.float32)
  factors = jnp.full(len(images), 0.7)
  mean = images.mean(axis=(1, 2, 3), keepdims=True)
  np.testing.assert_allclose(colors.adjust_brightness(images, factors), 0.7 * images, atol=1e-6)
  np.testing.assert_allclose(
    colors.adjust_contrast(images, factors), 0.7 * images + 0.3 * mean, atol=1e-6
  )


def test_the_hue_is_shifted_as_in_colorsys(photos, rng):
  images = (photos[:6, ::2, ::2] / 255).astype(np.float32)
  images[0, 0] = 0.5  # Grey pixels, which have no hue,
  images[0, 1] = rng.integers(0, 2, (16, 3))  # and the corners of the cube.
  shifts = np.array([-0.5, -0.1, 0.0, 0.1, 1 / 3, 0.5], np.float32)
  want = np.zeros(images.shape)
  for i, row, column in np.ndindex(images.shape[:3]):
    h, s, v = colorsys.rgb_to_hsv(*images[i, row, column].tolist())
    want[i, row, column] = colorsys.hsv_to_rgb((h + float(shifts[i])) % 1, s, v)
  np.testing.assert_allclose(ADJUSTMENTS[3](images, jnp.asarray(shifts)), want, atol=3e-6)


@pytest.mark.parametrize("levels", [-128, -25, 0, 25, 100])
def test_the_hue_is_shifted_as_by_pillow_within_the_levels_of_its_hsv(photos, levels):
  # Pillow has 256 hues: rounded to one of them, a channel is off by up to 6/256 of the chroma, and
  # by as much again for the way back; a saturation in levels adds one or two.
  got = np.asarray(ADJUSTMENTS[3](photos, jnp.full(len(photos), levels / 256)))
  want = []
  for image in photos:
    hsv = np.array(Image.fromarray(image).convert("HSV"))
    hsv[..., 0] += np.array(levels).astype(np.uint8)
    want.append(Image.fromarray(hsv, "HSV").convert("RGB"))
  difference = np.abs(got.astype(int) - np.stack(want))
  assert difference.max() <= 8 and difference.mean() < 1


def test_red_becomes_green_and_then_blue():
  images = jnp.zeros([3, 1, 1, 3], jnp.uint8).at[..., 0].set(200)
  got = ADJUSTMENTS[3](images, jnp.array([0, 1 / 3, -1 / 3]))
  np.testing.assert_array_equal(got[:, 0, 0], 200 * np.eye(3))


@pytest.mark.parametrize("present", ["bcsh", "bcs", "bh", "cs", "sh"])
def test_adjustments_are_made_one_after_the_other_in_the_order_of_each_image(photos, rng, present):
  orders = np.array(list(itertools.permutations(range(4))))
  images = (photos[: len(orders)] / 255).astype(np.float32)
  # Far from 1, so that colours are clipped and the order matters.
  amounts = rng.uniform(1.2, 2.5, (4, len(orders))).astype(np.float32)
  amounts[3] = rng.uniform(-0.5, 0.5, len(orders))
  given = [jnp.asarray(a) if name in present else None for name, a in zip("bcsh", amounts)]
  got = jax.jit(colors.adjust_colors)(images, jnp.asarray(orders), *given)
  for i, order in enumerate(orders):
    want = images[i : i + 1]
    for adjustment in np.argsort(order):
      if "bcsh"[adjustment] in present:
        want = ADJUSTMENTS[adjustment](want, jnp.asarray(amounts[adjustment, i : i + 1]))
    np.testing.assert_allclose(got[i], want[0], atol=2e-5)


def test_several_adjustments_of_bytes_are_rounded_once(photos, rng):
  order = jnp.tile(jnp.arange(4), (len(photos), 1))
  amounts = [jnp.asarray(rng.uniform(0.1, 0.9, len(photos)).astype(np.float32)) for _ in range(4)]
  adjust = jax.jit(colors.adjust_colors)
  want = adjust((photos / 255).astype(np.float32), order, *amounts)
  np.testing.assert_allclose(adjust(photos, order, *amounts), 255 * want, atol=0.501)


@pytest.mark.parametrize("value", [0, 7.6, (1.0, 2.0, 3.0)])
def test_erasing_fills_the_box_and_nothing_else(photos, rng, value):
  corners = rng.integers(0, 16, (len(photos), 2))
  boxes = np.concatenate([corners, rng.integers(0, 17, (len(photos), 2))], axis=1)
  for images in (photos, (photos / 255).astype(np.float32)):
    filled = np.round(value) if images.dtype == np.uint8 else np.asarray(value)
    want = images.copy()
    for image, (top, left, height, width) in zip(want, boxes):
      image[top : top + height, left : left + width] = filled
    got = geometry.erase(images, jnp.asarray(boxes), value)
    assert got.dtype == images.dtype
    np.testing.assert_array_equal(got, want)


def test_normalization_subtracts_the_mean_and_divides_by_the_deviation(photos):
  mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
  want = (photos / 255 - mean) / std
  for images in (photos, (photos / 255).astype(np.float32)):
    got = augment.normalize(images, mean, std)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=1e-5)


# The random steps.


def test_all_offsets_of_a_crop_are_equally_likely():
  count = 8100
  got = geometry.random_crop(jax.random.key(0), places(count, 9, 9), padding=4)
  centers = np.asarray(got)[:, 4, 4, 0].astype(int)  # Padding 4 takes it to every pixel.
  counts = np.bincount(centers, minlength=82)
  assert counts[0] == 0 and counts[1:].min() > 50 and counts[1:].max() < 150


def test_a_crop_without_padding_changes_nothing(photos):
  np.testing.assert_array_equal(geometry.random_crop(jax.random.key(0), photos, padding=0), photos)


def test_half_of_the_images_are_flipped():
  got = np.asarray(geometry.random_flip(jax.random.key(0), places(4000, 1, 2)))
  flipped = got[:, 0, 0, 0] == 2
  assert abs(flipped.sum() - 2000) < 160
  assert abs((flipped[1:] == flipped[:-1]).sum() - 2000) < 160  # Each by its own.


def test_angles_are_uniform_up_to_their_bound():
  height, width, degrees = 101, 301, 15.0
  images = jnp.tile(places(1, height, width), (400, 1, 1, 1))
  got = np.asarray(geometry.random_rotation(jax.random.key(0), images, degrees=degrees))
  source = got[:, height // 2, -1, 0].astype(int) - 1  # Where the end of the middle row comes from.
  y, x = source // width - height // 2, source % width - width // 2
  # Half a pixel at a radius of 150 is 0.2 degrees.
  angles = np.rad2deg(np.arctan2(y, x))
  assert_uniform(angles, -degrees - 0.3, degrees + 0.3)
  assert angles.min() < 0.98 * -degrees and angles.max() > 0.98 * degrees


def test_shifts_are_whole_pixels_uniform_up_to_a_fraction_of_each_side():
  height, width = 21, 11
  got = geometry.random_translation(jax.random.key(0), places(6000, height, width), fraction=0.15)
  source = np.asarray(got)[:, 10, 5, 0].astype(int) - 1
  down, right = 10 - source // width, 5 - source % width
  # Uniform in [-3.15, 3.15] and in [-1.65, 1.65], then rounded.
  for shifts, counts in (
    (down, 6000 / 6.3 * np.array([0.65, 1, 1, 1, 1, 1, 0.65])),
    (right, 6000 / 3.3 * np.array([0.15, 1, 1, 1, 0.15])),
  ):
    values, got_counts = np.unique(shifts, return_counts=True)
    np.testing.assert_array_equal(values, np.arange(len(counts)) - len(counts) // 2)
    np.testing.assert_allclose(got_counts, counts, atol=150)
  assert abs(np.corrcoef(down, right)[0, 1]) < 0.06


EXTENTS = dict(brightness=0.9, contrast=1.5, saturation=0.9, hue=0.4)


@pytest.fixture(scope="module")
def amounts():
  """What `random_jitter` draws, (4, 2000), from images of two pixels under one step at a time."""
  pixels = jnp.array([[[0.25, 0.2, 0.2], [0.2, 0.2, 0.2]]], jnp.float32)
  images = jnp.tile(pixels, (2000, 1, 1, 1))

  def one(name):
    jitter = functools.partial(colors.random_jitter, **{name: EXTENTS[name]})
    return np.asarray(jax.jit(jitter)(jax.random.key(0), images))[:, 0]

  brightness, contrast, saturation = (
    one(name) for name in ("brightness", "contrast", "saturation")
  )
  hues = np.array([colorsys.rgb_to_hsv(*pixel)[0] for pixel in one("hue")[:, 0].tolist()])
  return np.array(
    [
      brightness[:, 0, 0] / 0.25,
      (contrast[:, 0, 0] - contrast[:, 1, 0]) / 0.05,
      (saturation[:, 0, 0] - saturation[:, 0, 1]) / 0.05,
      (hues + 0.5) % 1 - 0.5,
    ],
    np.float32,
  )


def test_amounts_of_colour_are_uniform_and_independent(amounts):
  for values, (low, high) in zip(amounts, [(0.1, 1.9), (0, 2.5), (0.1, 1.9), (-0.4, 0.4)]):
    assert_uniform(values, low - 1e-4, high + 1e-4)
    assert values.min() < low + 0.01 and values.max() > high - 0.01
  assert np.abs(np.corrcoef(amounts) - np.eye(4)).max() < 0.09  # Four standard errors.
  assert np.abs([np.corrcoef(a[1:], a[:-1])[0, 1] for a in amounts]).max() < 0.09


def test_all_orders_of_colour_steps_are_equally_likely(amounts, rng):
  # Unless colours are clipped, some orders give the same: so they come from all of the colour cube.
  image = jnp.asarray(rng.integers(0, 4, (5, 5, 3)) / 3, jnp.float32)
  images = jnp.tile(image, (amounts.shape[1], 1, 1, 1))
  jitter = jax.jit(functools.partial(colors.random_jitter, **EXTENTS))
  got = np.asarray(jitter(jax.random.key(0), images))
  results = []
  for order in itertools.permutations(range(4)):
    result = images
    for i in order:
      result = ADJUSTMENTS[i](result, jnp.asarray(amounts[i]))
    results.append(np.asarray(result))
  apart = [np.abs(a - b).max(axis=(1, 2, 3)) for a, b in itertools.combinations(results, 2)]
  clear = np.min(apart, axis=0) > 3e-3  # Whether with these amounts all orders differ.
  distances = np.array([np.abs(result - got).max(axis=(1, 2, 3)) for result in results])
  assert clear.sum() > 300
  assert distances.min(axis=0).max() < 1e-3
  counts = np.bincount(distances[:, clear].argmin(axis=0), minlength=24)
  expected = clear.sum() / 24
  assert np.all(np.abs(counts - expected) < 4 * np.sqrt(expected)) and counts.min() > 0


def drawn_boxes(images, key=0, **options):
  """Top, left, height and width of what is erased to 0 in images of ones; none where unchanged."""
  erasing = jax.jit(functools.partial(geometry.random_erasing, **options))
  erased = np.asarray(erasing(jax.random.key(key), images))[..., 0] == 0
  erased = erased[erased.any(axis=(1, 2))]
  rows, columns = erased.any(axis=2), erased.any(axis=1)
  height, width = rows.sum(axis=1), columns.sum(axis=1)
  np.testing.assert_array_equal(erased.sum(axis=(1, 2)), height * width)  # Full rectangles.
  return np.stack([rows.argmax(axis=1), columns.argmax(axis=1), height, width])


def test_erased_rectangles_are_drawn_as_published(rng):
  size, count = 128, 1500  # Large, so that sides in whole pixels say enough about area and aspect.
  boxes = drawn_boxes(jnp.ones([count, size, size, 1], jnp.uint8), probability=1.0)
  assert boxes.shape == (4, count)
  top, left, height, width = boxes
  areas, aspects = height * width / size**2, height / width
  assert_uniform(areas, 0.0185, 0.335)
  assert areas.min() < 0.023 and areas.max() > 0.32
  assert_uniform(np.log(aspects), np.log(0.285), np.log(3.5))
  assert aspects.min() < 0.31 and aspects.max() > 3.2
  for first, side in ((top, height), (left, width)):
    assert first.min() == 0 and (first + side).max() == size
    assert_uniform((first + rng.random(count)) / (size - side + 1), 0, 1)
  independent = [areas, aspects, top / (size - height), left / (size - width)]
  assert np.abs(np.corrcoef(independent) - np.eye(4)).max() < 0.15


def test_a_rectangle_is_drawn_anew_up_to_ten_times_until_it_fits(rng):
  height, width = 20, 30
  # Not symmetric, so that height and width differ.
  count, area, aspect = 10_000, (0.6, 1.8), (0.3, 0.9)
  areas = rng.uniform(*area, 1_000_000) * height * width
  aspects = np.exp(rng.uniform(*np.log(aspect), len(areas)))
  sides = np.round([np.sqrt(areas * aspects), np.sqrt(areas / aspects)])
  fit = np.mean((sides[0] < height) & (sides[1] < width))
  assert 0.02 < fit < 0.15
  images = jnp.ones([count, height, width, 1], jnp.uint8)
  boxes = drawn_boxes(images, probability=1.0, area=area, aspect=aspect)
  assert abs(boxes.shape[1] / count - (1 - (1 - fit) ** 10)) < 0.015
  assert boxes[2].max() == height - 1 and boxes[3].max() == width - 1


def test_an_image_in_which_no_rectangle_fits_stays_as_it_is():
  images = jnp.ones([50, 20, 20, 1])
  assert drawn_boxes(images, probability=1.0, area=(2.0, 3.0)).size == 0


@pytest.mark.parametrize("probability", [0.0, 0.1, 1.0])
def test_the_probability_of_erasing_is_kept(probability):
  count = drawn_boxes(jnp.ones([4000, 32, 32, 1]), probability=probability).shape[1]
  assert abs(count - 4000 * probability) <= 100 * (0 < probability < 1)


@pytest.mark.parametrize("name", RANDOM)
def test_a_random_step_depends_on_its_key_and_treats_each_image_by_itself(photos, name):
  images = np.tile(photos[0], (64, 1, 1, 1))
  keys = [jax.random.key(seed) for seed in (0, 0, 1)]
  first, again, other = (np.asarray(COMPILED[name](key, images)) for key in keys)
  np.testing.assert_array_equal(first, again)
  assert np.any(first != other)
  assert len(np.unique(first.reshape(64, -1), axis=0)) > (1 if name == "flip" else 20)


@pytest.mark.parametrize("name", RANDOM)
def test_a_random_step_returns_the_type_and_the_shape_that_it_gets(photos, name):
  images = np.tile(photos[0], (64, 1, 1, 1))
  out = COMPILED[name](jax.random.key(0), images)
  assert out.dtype == np.uint8 and out.shape == images.shape
  floats = COMPILED[name](jax.random.key(0), (images / 255).astype(np.float32))
  assert floats.dtype == np.float32 and floats.min() >= 0 and floats.max() <= 1
  # The same happens to both.
  np.testing.assert_allclose(255 * floats, out.astype(np.float32), atol=0.501)


def test_a_jitter_by_nothing_changes_nothing(photos):
  assert colors.random_jitter(jax.random.key(0), photos) is photos


# The pipeline.

MNIST = augment.Augmentation(rotation=10.0, translation=0.1)
SETTINGS = {**augment.PIPELINES, "MNIST": MNIST}


@pytest.mark.parametrize("name, dtype", [("A", np.uint8), ("B", np.float32), ("MNIST", np.uint8)])
def test_the_pipeline_takes_its_steps_in_order_each_with_its_own_key(photos, name, dtype):
  a, mean = SETTINGS[name], (0.4, 0.5, 0.6)

  @jax.jit
  def one_by_one(key, images):
    # A step that is off has used up its key.
    crop, flip, rotation, color, translation, erasing = jax.random.split(key, 6)
    if a.crop:
      images = geometry.random_crop(crop, images, padding=a.crop)
    if a.flip:
      images = geometry.random_flip(flip, images)
    if a.rotation:
      images = geometry.random_rotation(rotation, images, degrees=a.rotation)
    jitter = {field: getattr(a, field) for field in JITTER}
    images = colors.random_jitter(color, images, **jitter)
    if a.translation:
      images = geometry.random_translation(translation, images, fraction=a.translation)
    if a.erasing:
      value = mean if a.erase_to == "mean" else 0
      images = geometry.random_erasing(erasing, images, probability=a.erasing, value=value)
    return images

  images = (photos / 255).astype(np.float32)
  key = jax.random.key(7)
  want = one_by_one(key, images)
  pipeline = jax.jit(functools.partial(augment.augment, augmentation=a, mean=mean))
  got = pipeline(key, photos if dtype == np.uint8 else images)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, want, atol=1e-5)
  assert np.mean(np.abs(want - images)) > 0.01


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_pipeline_with_nothing_on_only_converts(photos, digits, dtype):
  for images in (photos, digits):
    given = images if dtype == np.uint8 else (images / 255).astype(np.float32)
    got = augment.augment(jax.random.key(0), given, augment.Augmentation(), mean=(0.0,))
    np.testing.assert_array_equal(got, images.astype(np.float32) / np.float32(255))
    assert got.dtype == np.float32


def test_steps_that_are_off_compute_nothing(photos):
  def operations(**fields):
    a = augment.Augmentation(**fields)
    return str(
      jax.make_jaxpr(lambda key, images: augment.augment(key, images, a, mean=(0.5,) * 3))(
        jax.random.key(0), photos
      )
    )

  assert "random_bits" not in operations()
  assert "gather" not in operations(flip=True, brightness=0.1)
  assert "reduce_sum" not in operations(brightness=0.1, saturation=0.1, hue=0.1)
  assert "reduce_sum" in operations(contrast=0.1)


def test_the_mnist_pipeline_rotates_grey_images_then_translates_them(digits):
  rotation, translation = (jax.random.split(jax.random.key(0), 6)[i] for i in (2, 4))
  angles = jax.random.uniform(rotation, [len(digits)], minval=-10.0, maxval=10.0)
  shifts = jax.random.uniform(translation, [len(digits), 2], minval=-0.8, maxval=0.8)
  want = [
    shifted(
      np.asarray(Image.fromarray(image[..., 0]).rotate(angle, Image.Resampling.NEAREST))[..., None],
      *np.round(shift).astype(int),
    )
    for image, angle, shift in zip(digits, angles.tolist(), np.asarray(shifts))
  ]
  got = augment.augment(jax.random.key(0), digits, MNIST, mean=(0.3,))
  np.testing.assert_array_equal(np.round(255 * got), want)


def test_erased_pixels_are_black_or_the_mean_which_normalizes_to_zero(photos):
  mean, std = (0.4, 0.5, 0.6), (0.2, 0.2, 0.2)
  black = augment.Augmentation(erasing=1.0)
  to_mean = dataclasses.replace(black, erase_to="mean")
  images = np.full_like(photos, 255)
  outs = [
    jax.jit(functools.partial(augment.augment, augmentation=a, mean=mean))(
      jax.random.key(0), images
    )
    for a in (black, to_mean)
  ]
  erased = np.asarray(outs[0]) != 1
  assert erased.any(axis=(1, 2, 3)).all() and not erased.all(axis=(1, 2, 3)).any()
  assert np.all(np.asarray(outs[0])[erased] == 0)
  np.testing.assert_allclose(augment.normalize(outs[1], mean, std)[erased], 0, atol=1e-6)


def test_a_pipeline_runs_in_a_scan_as_it_does_alone(photos):
  keys = jax.random.split(jax.random.key(0), 3)
  a = dataclasses.replace(augment.PIPELINES["A"], hue=0.0, erasing=0.0)

  @jax.jit
  def pipeline(key):
    return augment.augment(key, photos, a, mean=(0.5, 0.5, 0.5))

  _, scanned = jax.lax.scan(lambda carry, key: (carry, pipeline(key)), 0, keys)
  for got, key in zip(scanned, keys):
    np.testing.assert_allclose(got, pipeline(key), atol=1e-5)


# Errors.


@pytest.mark.parametrize(
  "field, value",
  [
    ("crop", -1),
    ("rotation", -0.5),
    ("translation", 1.1),
    ("translation", -0.1),
    ("brightness", -0.1),
    ("contrast", -0.1),
    ("saturation", -0.1),
    ("hue", 0.6),
    ("hue", -0.1),
    ("erasing", 1.5),
    ("erasing", -0.5),
    ("erasing", float("nan")),
    ("erase_to", "white"),
    *((field, float("inf")) for field in ("rotation", "brightness", "contrast", "saturation")),
  ],
)
def test_an_augmentation_names_the_field_and_the_value_that_are_wrong(field, value):
  with pytest.raises(ValueError, match=rf"^{field}={value!r} must be "):
    augment.Augmentation(**{field: value})


@pytest.mark.parametrize("bounds", [{"translation": 1.0, "hue": 0.5, "erasing": 1.0, "crop": 0}])
def test_the_bounds_themselves_are_allowed(bounds):
  augment.Augmentation(**bounds)


@pytest.mark.parametrize("name", ["saturation", "hue"])
def test_grey_images_have_no_saturation_and_no_hue(digits, name):
  match = "1 channels: saturation and hue"
  with pytest.raises(ValueError, match=match):
    colors.random_jitter(jax.random.key(0), digits, **{name: 0.1})
  with pytest.raises(ValueError, match=match):
    getattr(colors, f"adjust_{name}")(digits, jnp.ones(len(digits)))
  a = augment.Augmentation(**{name: 0.1})
  with pytest.raises(ValueError, match=match):
    augment.augment(jax.random.key(0), digits, a, mean=(0.5,))


def test_images_of_another_type_are_refused(digits):
  with pytest.raises(ValueError, match="images are int32: they must be uint8"):
    augment.normalize(jnp.asarray(digits, jnp.int32), (0.5,), (0.5,))


# The command.


def test_fields_are_options_of_the_command_line(capsys):
  options = ["--crop", "4", "--flip", "--erase-to", "mean"]
  want = augment.Augmentation(crop=4, flip=True, erase_to="mean")
  assert tyro.cli(augment.Augmentation, args=options) == want
  with pytest.raises(SystemExit):
    tyro.cli(augment.Augmentation, args=["--help"])
  assert "Half of the images are mirrored" in capsys.readouterr().out


def test_a_sheet_that_cannot_be_written_is_an_error_before_it_is_drawn(tmp_path, monkeypatch):
  monkeypatch.setattr(augment, "draw_sheet", None)
  (tmp_path / "file").touch()
  with pytest.raises(SystemExit, match=r"out=.*a\.png cannot be written"):
    augment.main(["--out", str(tmp_path / "file" / "a.png")])
  with pytest.raises(ValueError, match=r"out=.*'sheet'\) must be a file that ends in \.png"):
    augment.Options(out=pathlib.Path("sheet"))


def test_the_command_draws_originals_then_steps_then_pipelines(
  photos, tmp_path, monkeypatch, capsys
):
  labels = np.zeros(len(photos), np.int32)
  dataset = published.make_dataset("cifar10", (photos, labels), (photos, labels))
  loaded, drawn = [], []

  def draw(key, images, augmentation, *, mean):
    del key
    assert mean == dataset.mean
    drawn.append(augmentation)
    return images.astype(jnp.float32) / 255

  monkeypatch.setattr(augment.data, "load", lambda *args: loaded.append(args) or dataset)
  monkeypatch.setattr(augment, "augment", draw)
  out = tmp_path / "pictures" / "sheet.png"
  augment.main(["--data-dir", str(tmp_path), "--out", str(out)])
  assert loaded == [("cifar10", tmp_path)]
  assert str(out) in capsys.readouterr().out
  assert drawn[0] == augment.Augmentation()
  assert drawn[-8:] == [augment.PIPELINES["A"]] * 4 + [augment.PIPELINES["B"]] * 4
  sheet = np.asarray(Image.open(out))
  assert sheet.shape[1] == 4 + 68 * len(drawn)
  for row, image in enumerate(photos[:6]):
    for column in range(len(drawn)):
      top, left = 38 + 68 * row, 4 + 68 * column
      np.testing.assert_array_equal(sheet[top : top + 64 : 2, left : left + 64 : 2], image)
