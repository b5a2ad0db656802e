"""Trees of parameters to measure on, by name, from 0.1 million weights to a thousand million."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.models import MODELS

PyTree = Any
Shape = tuple[int, ...]

# The standard deviation of random weights.
SCALE = 0.05


def _network(model: str, image: Shape, classes: int) -> list[Shape]:
  """The shapes of the parameters of a network."""
  init = MODELS[model](classes=classes).init
  params = jax.eval_shape(init, jax.random.key(0), jnp.zeros([1, *image]))["params"]
  return [leaf.shape for leaf in jax.tree.leaves(params)]


def _transformer(
  width: int, blocks: int, *, vocabulary: int = 50257, context: int = 1024
) -> list[Shape]:
  """Those of GPT-2, whose output layer is its token embedding."""

  def layer(inputs, outputs):
    return [(inputs, outputs), (outputs,)]

  norm = [(width,), (width,)]
  attention = layer(width, 3 * width) + layer(width, width)
  mlp = layer(width, 4 * width) + layer(4 * width, width)
  block = norm + attention + norm + mlp
  return [(vocabulary, width), (context, width), *(blocks * block), *norm]


# From the smallest to the largest.
TREES: dict[str, Callable[[], list[Shape]]] = {
  "convnet-small": functools.partial(_network, "convnet-small", (32, 32, 3), 10),
  "lenet300": functools.partial(_network, "lenet300", (28, 28, 1), 10),
  "resnet18": functools.partial(_network, "resnet18", (32, 32, 3), 10),
  "resnet50": functools.partial(_network, "resnet50-imagenet", (224, 224, 3), 1000),
  "gpt2": functools.partial(_transformer, 768, 12),
  "gpt-1b": functools.partial(_transformer, 2048, 18),
}


def shapes_of(tree: str) -> list[Shape]:
  """Shapes of the parameters of a tree."""
  return TREES[tree]()


def sizes_of(shapes: Sequence[Shape]) -> dict[str, int]:
  """How many parameters, prunable weights and leaves there are."""
  return {
    "parameters": sum(map(math.prod, shapes)),
    "weights": sum(math.prod(shape) for shape in shapes if len(shape) >= 2),
    "leaves": len(shapes),
  }


def random_leaves(shapes: Sequence[Shape]) -> list[jax.Array]:
  """Normal float32 numbers of standard deviation `SCALE`."""
  rng = np.random.default_rng(0)
  return [jnp.asarray(SCALE * rng.standard_normal(shape, np.float32)) for shape in shapes]


def bytes_of(tree: PyTree) -> int:
  """The memory of all arrays of a tree, or of those that its shapes stand for."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
