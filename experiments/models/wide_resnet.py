"""Wide residual networks, for CIFAR."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from experiments.models import layers


class WideBlock(nn.Module):
  """Batch norm and ReLU before each of two 3x3 convolutions, beside a shortcut.

  Where the shape changes, the shortcut is a 1x1 convolution of the first activations.
  """

  channels: int
  stride: int
  dropout: float
  kernel_init: layers.Initializer
  dtype: jax.typing.DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    conv = functools.partial(
      layers.convolution, self.channels, kernel_init=self.kernel_init, dtype=self.dtype
    )
    norm = functools.partial(layers.BatchNorm, train, dtype=self.dtype)
    activations = nn.relu(norm(name="norm1")(x))
    y = conv(3, self.stride, name="conv1")(activations)
    y = nn.relu(norm(name="norm2")(y))
    y = nn.Dropout(self.dropout, deterministic=not train)(y)
    y = conv(3, name="conv2")(y)
    if x.shape != y.shape:
      x = conv(1, self.stride, name="shortcut")(activations)
    return x + y


class WideResNet(nn.Module):
  """WRN-depth-widening: a stem, three stages of pre-activation blocks, the mean, one dense layer.

  The stages have 16, 32 and 64 channels, times `widening`. Convolutions have no bias; they start
  from Kaiming's normal rule with fan_out, and the dense layer from torch's default with a bias of
  zero, as in the code of "Sparse Networks from Scratch".

  Attributes:
    classes: number of logits.
    depth: 6 n + 4, with n blocks in each stage.
    widening: of the stages; the stem has 16 channels whatever it is.
    dropout: rate between the convolutions of a block, in training, which then needs
      `rngs={"dropout": key}`. "Sparse Networks from Scratch" has 0.3.
    width: multiplies the channels of every layer, the stem included.
    kernel_init: of convolutions.
    dense_init: of the dense layer.
    dtype: of the computation; parameters, statistics and logits are float32.

  References:
    Zagoruyko & Komodakis, `Wide Residual Networks <https://arxiv.org/abs/1605.07146>`_, 2016
    Dettmers & Zettlemoyer, `Sparse Networks from Scratch <https://arxiv.org/abs/1907.04840>`_, 2019
  """

  classes: int
  depth: int
  widening: int
  dropout: float = 0.0
  width: float = 1.0
  kernel_init: layers.Initializer = layers.KAIMING_FAN_OUT
  dense_init: layers.Initializer = layers.TORCH_DEFAULT
  dtype: jax.typing.DTypeLike = jnp.float32

  def __post_init__(self):
    if self.depth < 10 or self.depth % 6 != 4:
      raise ValueError(f"depth={self.depth} must be 10, 16, 22 and so on: 6 n + 4")
    super().__post_init__()

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    """Maps images (batch, height, width, channels) to logits (batch, classes).

    Training takes the statistics of the batch, and updates the collection "batch_stats".
    """
    options = dict(kernel_init=self.kernel_init, dtype=self.dtype)
    x = layers.convolution(layers.scaled(16, self.width), 3, name="stem", **options)(images)
    for stage in (1, 2, 3):
      for i in range(1, (self.depth - 4) // 6 + 1):
        x = WideBlock(
          layers.scaled(8 * 2**stage * self.widening, self.width),
          stride=2 if i == 1 and stage > 1 else 1,
          dropout=self.dropout,
          name=f"stage{stage}_block{i}",
          **options,
        )(x, train)
    x = nn.relu(layers.BatchNorm(train, dtype=self.dtype, name="final_norm")(x))
    dense = nn.Dense(self.classes, kernel_init=self.dense_init, dtype=self.dtype, name="classifier")
    return dense(layers.average_pool(x)).astype(jnp.float32)


# On CIFAR-10: 10,961,370, 17,116,634, 1,079,642, 17,158,106 and 1,467,610 parameters.
WRN16x8 = functools.partial(WideResNet, depth=16, widening=8)
WRN16x10 = functools.partial(WideResNet, depth=16, widening=10)
WRN22x2 = functools.partial(WideResNet, depth=22, widening=2)
WRN22x8 = functools.partial(WideResNet, depth=22, widening=8)
WRN28x2 = functools.partial(WideResNet, depth=28, widening=2)
