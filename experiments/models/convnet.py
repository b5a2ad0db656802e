"""The small convolutional network of "Fantastic Weights": no padding, no batch norm."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from experiments.models import layers


class SmallConvNet(nn.Module):
  """Unpadded 3x3 convolutions of 32, 64 and 128 channels, each with a ReLU, and a dense layer.

  The first two are max-pooled; the mean over all positions of the third, 4x4 on CIFAR-10, leaves
  128 features. This is the network of the authors' code (alooow/fantastic_weights_paper at
  565c21f), and has 94,538 parameters. A comment there says 95,818, which takes a dense layer on 256
  features, and 390,986 with a fourth convolution, which is right if that has 256 channels. So the
  first number seems to be the second less the convolution, with the dense layer left as it was.

  Attributes:
    classes: number of logits.
    width: multiplies the channels of every convolution.
    kernel_init: of all kernels; biases start at zero.
    dtype: of the computation; parameters and logits are float32.

  References:
    Nowak et al., `Fantastic Weights and How to Find Them: Where to Prune in Dynamic Sparse Training
    <https://arxiv.org/abs/2306.12230>`_, 2023
  """

  classes: int
  width: float = 1.0
  kernel_init: layers.Initializer = layers.TORCH_DEFAULT
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    """Maps images (batch, height, width, channels) to logits (batch, classes)."""
    del train
    options = dict(kernel_init=self.kernel_init, dtype=self.dtype)
    x = images
    for i, channels in enumerate((32, 64, 128), start=1):
      channels = layers.scaled(channels, self.width)
      x = nn.relu(nn.Conv(channels, (3, 3), padding="VALID", name=f"conv{i}", **options)(x))
      x = layers.max_pool(x) if i < 3 else layers.average_pool(x)
    return nn.Dense(self.classes, name="classifier", **options)(x).astype(jnp.float32)
