"""LeNet and its relatives: small networks for small images, without batch norm."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from experiments.models import layers
from experiments.models.mlp import MLP

# LeNet-300-100: two hidden layers with ReLU; 266,610 parameters on MNIST. LeCun et al.,
# "Gradient-based learning applied to document recognition", 1998. Kernels start from Kaiming's
# normal rule with fan_out, as in arXiv 2606.12278.
LeNet300 = functools.partial(MLP, features=(300, 100))
# As in Frankle & Carbin, "The Lottery Ticket Hypothesis", 2019.
LeNet300LTH = functools.partial(LeNet300, kernel_init=layers.GLOROT)
# As in Lee et al., "SNIP", 2019.
LeNet300SNIP = functools.partial(LeNet300, kernel_init=layers.TRUNCATED_FAN_IN)


class LeNet5Caffe(nn.Module):
  """Caffe's LeNet-5: unpadded 5x5 convolutions of 20 and 50 channels, each max-pooled, 500 units.

  431,080 parameters on MNIST. SNIP's own code has no ReLU after the convolutions, its ports to
  PyTorch have; the initialisation is SNIP's.

  Attributes:
    classes: number of logits.
    relu: whether a ReLU follows each convolution.
    width: multiplies the channels and units of every layer.
    kernel_init: of all kernels; biases start at zero.
    dtype: of the computation; parameters and logits are float32.
  """

  classes: int
  relu: bool = True
  width: float = 1.0
  kernel_init: layers.Initializer = layers.TRUNCATED_FAN_IN
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    """Maps images (batch, height, width, channels) to logits (batch, classes)."""
    del train
    options = dict(kernel_init=self.kernel_init, dtype=self.dtype)
    x = images
    for i, channels in enumerate((20, 50), start=1):
      channels = layers.scaled(channels, self.width)
      x = nn.Conv(channels, (5, 5), padding="VALID", name=f"conv{i}", **options)(x)
      x = layers.max_pool(nn.relu(x) if self.relu else x)
    x = x.reshape(x.shape[0], -1)
    x = nn.relu(nn.Dense(layers.scaled(500, self.width), name="dense1", **options)(x))
    return nn.Dense(self.classes, name="classifier", **options)(x).astype(jnp.float32)


# As in Nowak et al., "Fantastic Weights", 2023.
LeNet5CaffeTorch = functools.partial(LeNet5Caffe, kernel_init=layers.TORCH_DEFAULT)


class Conv(nn.Module):
  """Conv-2, Conv-4 and Conv-6: pairs of 3x3 convolutions, each pair max-pooled, and a dense head.

  The pairs have 64, 128 and 256 channels, the head 256, 256 and `classes` units, and a ReLU follows
  every layer but the last. On CIFAR-10 that makes 4,301,642, 2,425,930 and 2,262,602 parameters;
  for Conv-6 the paper says 1.7 million, of which 1.1 million, as here, are convolutions.

  Attributes:
    classes: number of logits.
    depth: number of convolutions.
    width: multiplies the channels and units of every layer.
    kernel_init: of all kernels; biases start at zero.
    dtype: of the computation; parameters and logits are float32.

  References:
    Frankle & Carbin, `The Lottery Ticket Hypothesis <https://arxiv.org/abs/1803.03635>`_, 2019
  """

  classes: int
  depth: int
  width: float = 1.0
  kernel_init: layers.Initializer = layers.GLOROT
  dtype: jax.typing.DTypeLike = jnp.float32

  def __post_init__(self):
    if self.depth < 2 or self.depth % 2:
      raise ValueError(f"depth={self.depth} must be even: convolutions come in pairs")
    super().__post_init__()

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    """Maps images (batch, height, width, channels) to logits (batch, classes)."""
    del train
    options = dict(kernel_init=self.kernel_init, dtype=self.dtype)
    x = images
    for stage in range(self.depth // 2):
      channels = layers.scaled(64 * 2**stage, self.width)
      for i in (1, 2):
        name = f"stage{stage + 1}_conv{i}"
        x = nn.relu(layers.convolution(channels, 3, use_bias=True, name=name, **options)(x))
      x = layers.max_pool(x)
    x = x.reshape(x.shape[0], -1)
    for i in (1, 2):
      x = nn.relu(nn.Dense(layers.scaled(256, self.width), name=f"dense{i}", **options)(x))
    return nn.Dense(self.classes, name="classifier", **options)(x).astype(jnp.float32)


Conv2 = functools.partial(Conv, depth=2)
Conv4 = functools.partial(Conv, depth=4)
Conv6 = functools.partial(Conv, depth=6)
