"""VGG with batch norm, for images of 32x32: one network, and the forms that papers made of it."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from experiments.models import layers


class VGG(nn.Module):
  """Five stages of 3x3 convolutions, each with batch norm and ReLU; a pooling after each stage.

  The stages have 64, 128, 256, 512 and 512 channels. Biases start at zero, scales of batch norm at
  one unless `scale_init` says otherwise.

  Attributes:
    classes: number of logits.
    convolutions: number of convolutions in each stage.
    conv_bias: whether convolutions have a bias, which batch norm takes away again.
    pointwise: whether the last convolution of the stages 3, 4 and 5 is 1x1.
    last_pool: the pooling after the last stage: "max" as after the others, or "average" over all
      positions that are left, 2x2 of an image of 32x32.
    hidden: units of each hidden dense layer; a ReLU follows it.
    hidden_norm: whether batch norm comes between a hidden dense layer and its ReLU.
    dropout: rate before each dense layer in turn, the last included, in training, which then needs
      `rngs={"dropout": key}`; none if empty.
    width: multiplies the channels and units of every layer.
    kernel_init: of convolutions.
    dense_init: of dense layers.
    scale_init: of the scales of batch norm.
    dtype: of the computation; parameters, statistics and logits are float32.

  References:
    Simonyan & Zisserman, `Very Deep Convolutional Networks for Large-Scale Image Recognition
    <https://arxiv.org/abs/1409.1556>`_, 2014
  """

  classes: int
  convolutions: tuple[int, ...]
  conv_bias: bool = True
  pointwise: bool = False
  last_pool: Literal["max", "average"] = "max"
  hidden: tuple[int, ...] = ()
  hidden_norm: bool = False
  dropout: tuple[float, ...] = ()
  width: float = 1.0
  kernel_init: layers.Initializer = layers.KAIMING_FAN_OUT
  dense_init: layers.Initializer = layers.KAIMING_FAN_OUT
  scale_init: layers.Initializer = nn.initializers.ones
  dtype: jax.typing.DTypeLike = jnp.float32

  def __post_init__(self):
    if len(self.convolutions) != 5:
      raise ValueError(
        f"convolutions={self.convolutions} must have one number for each of 5 stages"
      )
    if self.last_pool not in ("max", "average"):
      raise ValueError(f"last_pool={self.last_pool!r} must be 'max' or 'average'")
    if len(self.dropout) not in (0, len(self.hidden) + 1):
      raise ValueError(
        f"dropout={self.dropout} must be empty, or have a rate for each of the "
        f"{len(self.hidden) + 1} dense layers"
      )
    super().__post_init__()

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    """Maps images (batch, height, width, channels) to logits (batch, classes).

    Training takes the statistics of the batch, and updates the collection "batch_stats".
    """
    norm = functools.partial(layers.BatchNorm, train, scale_init=self.scale_init, dtype=self.dtype)
    dense = functools.partial(nn.Dense, kernel_init=self.dense_init, dtype=self.dtype)
    x = images
    for stage, (count, channels) in enumerate(
      zip(self.convolutions, (64, 128, 256, 512, 512)), start=1
    ):
      for i in range(1, count + 1):
        x = layers.convolution(
          layers.scaled(channels, self.width),
          size=1 if self.pointwise and stage > 2 and i == count else 3,
          use_bias=self.conv_bias,
          kernel_init=self.kernel_init,
          dtype=self.dtype,
          name=f"stage{stage}_conv{i}",
        )(x)
        x = nn.relu(norm(name=f"stage{stage}_norm{i}")(x))
      if stage < 5 or self.last_pool == "max":
        x = layers.max_pool(x)
    x = layers.average_pool(x) if self.last_pool == "average" else x.reshape(x.shape[0], -1)
    *rates, last_rate = self.dropout or (0.0,) * (len(self.hidden) + 1)
    for i, (features, rate) in enumerate(zip(self.hidden, rates), start=1):
      x = nn.Dropout(rate, deterministic=not train)(x)
      x = dense(layers.scaled(features, self.width), name=f"dense{i}")(x)
      x = nn.relu(norm(name=f"dense{i}_norm")(x) if self.hidden_norm else x)
    x = nn.Dropout(last_rate, deterministic=not train)(x)
    return dense(self.classes, name="classifier")(x).astype(jnp.float32)


# Convolutions of each stage.
SIXTEEN = (2, 2, 3, 3, 3)
NINETEEN = (2, 2, 4, 4, 4)

# arXiv 2606.12278: 14,990,922 and 20,567,882 parameters.
VGGLike = functools.partial(VGG, convolutions=SIXTEEN, hidden=(512,), dropout=(0.5, 0.5))
VGG19 = functools.partial(
  VGG,
  convolutions=NINETEEN,
  hidden=(512, 512),
  hidden_norm=True,
  dropout=(0.3, 0.3, 0.0),
  dense_init=layers.NORMAL_001,
)

# Lee et al., "SNIP: Single-shot Network Pruning based on Connection Sensitivity", 2019: 15,255,626
# parameters for D, 10,537,034 for C and 14,991,946 for "like". In its TensorFlow, batch norm has a
# momentum of 0.99 and an epsilon of 1e-3; the ports to PyTorch have 0.9 and 1e-5, as here, but put
# it after the ReLU of the dense layers.
VGGDSNIP = functools.partial(
  VGG,
  convolutions=SIXTEEN,
  hidden=(512, 512),
  hidden_norm=True,
  kernel_init=layers.TRUNCATED_FAN_IN,
  dense_init=layers.TRUNCATED_FAN_IN,
)
VGGCSNIP = functools.partial(VGGDSNIP, pointwise=True)
VGGLikeSNIP = functools.partial(VGGDSNIP, hidden=(512,))

# Wang et al., "Picking Winning Tickets Before Training by Preserving Gradient Flow" (GraSP), 2020;
# GraNet has taken them over. 14,724,042 and 20,035,018 parameters.
VGG16GraSP = functools.partial(
  VGG,
  convolutions=SIXTEEN,
  conv_bias=False,
  last_pool="average",
  dense_init=layers.NORMAL_001,
)
VGG19GraSP = functools.partial(VGG16GraSP, convolutions=NINETEEN)

# open_lth, the framework of Frankle et al.: 14,728,266 and 20,040,522 parameters.
VGG16LTH = functools.partial(
  VGG,
  convolutions=SIXTEEN,
  last_pool="average",
  kernel_init=layers.KAIMING_FAN_IN,
  dense_init=layers.KAIMING_FAN_IN,
  scale_init=nn.initializers.uniform(1.0),
)
VGG19LTH = functools.partial(VGG16LTH, convolutions=NINETEEN)

# kuangliu/pytorch-cifar: as many parameters, but five max-poolings and torch's default.
VGG16Kuangliu = functools.partial(
  VGG,
  convolutions=SIXTEEN,
  kernel_init=layers.TORCH_DEFAULT,
  dense_init=layers.TORCH_DEFAULT,
)
VGG19Kuangliu = functools.partial(VGG16Kuangliu, convolutions=NINETEEN)
