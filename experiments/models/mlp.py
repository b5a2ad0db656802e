"""Fully connected networks."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from experiments.models import layers


class MLP(nn.Module):
  """Dense layers with ReLU between them; biases start at zero.

  Attributes:
    classes: number of logits.
    features: units of each hidden layer.
    width: multiplies the units of every hidden layer.
    kernel_init: of all kernels.
    dtype: of the computation; parameters and logits are float32.
  """

  classes: int
  features: tuple[int, ...]
  width: float = 1.0
  kernel_init: layers.Initializer = layers.KAIMING_FAN_OUT
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    """Maps images (batch, height, width, channels) to logits (batch, classes)."""
    del train
    dense = functools.partial(nn.Dense, kernel_init=self.kernel_init, dtype=self.dtype)
    x = images.reshape(images.shape[0], -1)
    for features in self.features:
      x = nn.relu(dense(layers.scaled(features, self.width))(x))
    return dense(self.classes)(x).astype(jnp.float32)


# 3072-1024-512-10 on CIFAR-10, the MLP of Nowak et al., "Fantastic Weights and How to Find Them",
# 2023: 3,676,682 parameters. Kernels start from torch's default, as there.
MLPCifar = functools.partial(MLP, features=(1024, 512), kernel_init=layers.TORCH_DEFAULT)
