"""Residual networks, for CIFAR and for ImageNet."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from experiments.models import layers


class Block(nn.Module):
  """Convolutions with batch norm beside a shortcut; a ReLU after the sum.

  Two 3x3 convolutions; or as a bottleneck 1x1, 3x3 and 1x1 to four times the channels. The first
  3x3 convolution has the stride. Where the shape changes, the shortcut is a 1x1 convolution with
  batch norm.
  """

  channels: int
  stride: int
  bottleneck: bool
  kernel_init: layers.Initializer
  scale_init: layers.Initializer
  dtype: jax.typing.DTypeLike

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    conv = functools.partial(layers.convolution, kernel_init=self.kernel_init, dtype=self.dtype)
    norm = functools.partial(layers.BatchNorm, train, scale_init=self.scale_init, dtype=self.dtype)
    channels, stride = self.channels, self.stride
    if self.bottleneck:
      convolutions = ((channels, 1, 1), (channels, 3, stride), (4 * channels, 1, 1))
    else:
      convolutions = ((channels, 3, stride), (channels, 3, 1))
    y = x
    for i, (features, size, step) in enumerate(convolutions, start=1):
      y = nn.relu(y) if i > 1 else y
      y = norm(name=f"norm{i}")(conv(features, size, step, name=f"conv{i}")(y))
    if x.shape != y.shape:
      x = norm(name="shortcut_norm")(conv(y.shape[-1], 1, stride, name="shortcut")(x))
    return nn.relu(x + y)


class ResNet(nn.Module):
  """A residual network: stem, stages of blocks, mean over the positions, one dense layer.

  Every stage but the first halves the image. Convolutions have no bias; the bias of the dense layer
  starts at zero.

  Attributes:
    classes: number of logits.
    blocks: number of blocks in each stage.
    channels: of the 3x3 convolutions in each stage; the stem has those of the first.
    bottleneck: whether blocks are bottlenecks.
    imagenet_stem: whether the stem is a 7x7 convolution at stride 2 and a 3x3 max-pooling at stride
      2, instead of one 3x3 convolution.
    width: multiplies the channels of every layer.
    kernel_init: of convolutions.
    dense_init: of the dense layer.
    scale_init: of the scales of batch norm.
    dtype: of the computation; parameters, statistics and logits are float32.

  References:
    He et al., `Deep Residual Learning for Image Recognition <https://arxiv.org/abs/1512.03385>`_,
    2015
  """

  classes: int
  blocks: tuple[int, ...]
  channels: tuple[int, ...]
  bottleneck: bool = False
  imagenet_stem: bool = False
  width: float = 1.0
  kernel_init: layers.Initializer = layers.KAIMING_FAN_OUT
  dense_init: layers.Initializer = layers.KAIMING_FAN_OUT
  scale_init: layers.Initializer = nn.initializers.ones
  dtype: jax.typing.DTypeLike = jnp.float32

  def __post_init__(self):
    if len(self.blocks) != len(self.channels):
      raise ValueError(f"blocks={self.blocks} and channels={self.channels} differ in length")
    super().__post_init__()

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    """Maps images (batch, height, width, channels) to logits (batch, classes).

    Training takes the statistics of the batch, and updates the collection "batch_stats".
    """
    channels = [layers.scaled(c, self.width) for c in self.channels]
    options = dict(kernel_init=self.kernel_init, dtype=self.dtype)
    size, stride = (7, 2) if self.imagenet_stem else (3, 1)
    x = layers.convolution(channels[0], size, stride, name="stem", **options)(images)
    x = layers.BatchNorm(train, scale_init=self.scale_init, dtype=self.dtype, name="stem_norm")(x)
    x = nn.relu(x)
    if self.imagenet_stem:
      x = layers.max_pool(x, size=3, stride=2, padding=1)
    for stage, (count, features) in enumerate(zip(self.blocks, channels), start=1):
      for i in range(1, count + 1):
        x = Block(
          features,
          stride=2 if i == 1 and stage > 1 else 1,
          bottleneck=self.bottleneck,
          scale_init=self.scale_init,
          name=f"stage{stage}_block{i}",
          **options,
        )(x, train)
    dense = nn.Dense(self.classes, kernel_init=self.dense_init, dtype=self.dtype, name="classifier")
    return dense(layers.average_pool(x)).astype(jnp.float32)


# ResNet-18 and ResNet-50 for CIFAR: 11,173,962 and 23,520,842 parameters. The initialisation of
# ResNet-18 is that of arXiv 2606.12278; the implementations of ResNet-50 keep torch's default.
ResNet18 = functools.partial(ResNet, blocks=(2, 2, 2, 2), channels=(64, 128, 256, 512))
ResNet50 = functools.partial(
  ResNet,
  blocks=(3, 4, 6, 3),
  channels=(64, 128, 256, 512),
  bottleneck=True,
  kernel_init=layers.TORCH_DEFAULT,
  dense_init=layers.TORCH_DEFAULT,
)

# ResNet-20, -32 and -56 with shortcuts by projection: 272,474, 466,906 and 855,770 parameters. The
# first two are initialised as in open_lth, its uniform scales of batch norm included, and the last
# with scales of one, as in Nowak et al., "Fantastic Weights", 2023. (ResNet-20 is what "The Lottery
# Ticket Hypothesis" calls Resnet-18, and initialises by Glorot's rule.)
CifarResNet = functools.partial(
  ResNet,
  channels=(16, 32, 64),
  kernel_init=layers.KAIMING_FAN_IN,
  dense_init=layers.KAIMING_FAN_IN,
)
_UNIFORM = nn.initializers.uniform(1.0)
ResNet20 = functools.partial(CifarResNet, blocks=(3, 3, 3), scale_init=_UNIFORM)
ResNet32 = functools.partial(CifarResNet, blocks=(5, 5, 5), scale_init=_UNIFORM)
ResNet56 = functools.partial(CifarResNet, blocks=(9, 9, 9))

# The ResNet-32 of Wang et al., "Picking Winning Tickets Before Training by Preserving Gradient
# Flow" (GraSP), 2020: of double width, 1,860,522 parameters.
ResNet32Wide = functools.partial(
  ResNet,
  blocks=(5, 5, 5),
  channels=(32, 64, 128),
  dense_init=layers.NORMAL_001,
)

# For ImageNet, as in torchvision: 11,689,512 and 25,557,032 parameters with 1000 classes. GraNet
# starts its ResNet-50 from Kaiming's rule with fan_in instead.
ImageNetResNet18 = functools.partial(ResNet18, imagenet_stem=True, dense_init=layers.TORCH_DEFAULT)
ImageNetResNet50 = functools.partial(
  ResNet50, imagenet_stem=True, kernel_init=layers.KAIMING_FAN_OUT
)
