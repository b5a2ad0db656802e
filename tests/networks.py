"""Networks of the literature with pruned weights, and images for them."""

import functools

import jax
import numpy as np

from experiments import data
from experiments.models import MODELS

NETWORKS = {
  "lenet300": dict(size=8, channels=1),
  "lenet5-caffe": dict(size=28, channels=1),
  "vgg-like": dict(size=32, channels=3, width=0.125),
  "vgg-like-snip": dict(size=32, channels=3, width=0.25),
  "resnet20": dict(size=32, channels=3),
}


def digits(count, size, channels):
  """Handwritten digits, enlarged."""
  images = np.float32(data.load("digits").test_images[:count]) / 255 - 0.3
  images = images.repeat(size // 8, axis=1).repeat(size // 8, axis=2)
  margin = (size - images.shape[1]) // 2
  images = np.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
  return images.repeat(channels, axis=3)


@functools.cache
def network(name):
  """The model, a jitted function of its variables and images, their shapes, and images."""
  options = dict(NETWORKS[name])
  images = digits(5, options.pop("size"), options.pop("channels"))
  model = MODELS[name](classes=10, **options)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images[:1])
  return model, jax.jit(model.apply), shapes, images


def pruned_variables(shapes, sparsity, how, seed=0):
  """Random kernels, of which each is pruned; random biases, and statistics of batch norm."""
  generator = np.random.default_rng(seed)

  def leaf_of(path, leaf):
    name = jax.tree_util.keystr(path)
    if len(leaf.shape) >= 2:
      # Of the variance that keeps signals alive, and the mean that makes some units die.
      kernel = generator.normal(size=leaf.shape)
      scores = np.abs(kernel) if how == "magnitude" else generator.random(leaf.shape)
      kernel *= scores > np.quantile(scores, sparsity)
      fan_in = np.prod(leaf.shape[:-1])
      return np.float32(kernel * np.sqrt(2 / fan_in / np.mean(kernel**2)))
    if "var" in name or "scale" in name:
      return np.float32(generator.uniform(0.5, 1.5, leaf.shape))
    return np.float32(generator.normal(0.0, 0.1, leaf.shape))

  return jax.tree_util.tree_map_with_path(leaf_of, shapes)
