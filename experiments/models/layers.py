"""What the networks share: initialisers, convolutions padded as in torch, batch norm."""

import jax
import jax.numpy as jnp
from flax import linen as nn

Initializer = nn.initializers.Initializer

# Kaiming et al., "Delving Deep into Rectifiers", 2015, as torch's kaiming_normal_ with fan_out and
# with its default, fan_in.
KAIMING_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
KAIMING_FAN_IN = nn.initializers.variance_scaling(2.0, "fan_in", "normal")

# Glorot & Bengio, 2010: the normal variant, truncated as in TensorFlow.
GLOROT = nn.initializers.glorot_normal()

# TensorFlow's default of variance scaling: a truncated normal of variance 1 / fan_in.
TRUNCATED_FAN_IN = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")

# What torch's convolutions and linear layers start from if nobody says otherwise: uniform between
# -1 / sqrt(fan_in) and 1 / sqrt(fan_in), a sixth of the variance of KAIMING_FAN_IN. (torch draws
# biases likewise; those of the networks here start at zero.)
TORCH_DEFAULT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

# For linear layers: a standard deviation of 0.01, whatever their size.
NORMAL_001 = nn.initializers.normal(0.01)


def scaled(features: int, width: float) -> int:
  """The number of channels or units in a network whose width is multiplied; at least one.

  >>> scaled(64, 1.0), scaled(64, 0.25), scaled(64, 0.001)
  (64, 16, 1)
  """
  return max(1, round(features * width))


def convolution(
  features: int,
  size: int,
  stride: int = 1,
  *,
  use_bias: bool = False,
  kernel_init: Initializer,
  dtype: jax.typing.DTypeLike,
  name: str,
) -> nn.Conv:
  """A square convolution with torch's `padding=size // 2`, for odd sizes.

  It pads each side alike. "SAME" does so at stride 1 only: at stride 2 it pads an even image on the
  right and at the bottom alone, and samples other pixels.
  """
  return nn.Conv(
    features,
    kernel_size=(size, size),
    strides=stride,
    padding=size // 2,
    use_bias=use_bias,
    kernel_init=kernel_init,
    dtype=dtype,
    name=name,
  )


class BatchNorm(nn.Module):
  """Batch norm as torch's default: a momentum of 0.1 there is 0.9 here, epsilon is 1e-5.

  Statistics and normalisation are computed in float32; the result has `dtype`. Under jit with a
  sharded batch the statistics are those of the whole batch.

  Parameters and statistics are those of `flax.linen.BatchNorm`, and so are the values but for
  rounding. It is written as a product and a sum with one number each for a channel: forward and
  backward then take two passes over the activations each, and the backward pass of Flax's form,
  (x - mean) * factor + bias, takes three on a GPU.

  Attributes:
    train: whether to take the statistics of the batch, and to update the running ones.
    dtype: of the result.
    scale_init: of the scales.
  """

  train: bool
  dtype: jax.typing.DTypeLike
  scale_init: Initializer = nn.initializers.ones

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises the last axis of (..., channels)."""
    channels = x.shape[-1:]
    scale = self.param("scale", self.scale_init, channels)
    bias = self.param("bias", nn.initializers.zeros, channels)
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
    running_var = self.variable("batch_stats", "var", jnp.ones, channels)
    x = x.astype(jnp.float32)
    mean, var = running_mean.value, running_var.value
    if self.train:
      axes = tuple(range(x.ndim - 1))
      mean = jnp.mean(x, axes)
      var = jnp.maximum(jnp.mean(jnp.square(x), axes) - jnp.square(mean), 0)
      # The running variance averages the biased variances of the batches. torch averages the
      # unbiased ones, larger by n / (n - 1), where n counts the images and their positions: by
      # 1.00003 for 128 images of 16x16, by 1.002 for 128 images of 2x2, by 1.008 after a dense
      # layer. Training does not read it, only evaluation does.
      if not self.is_initializing():
        running_mean.value = 0.9 * running_mean.value + 0.1 * mean
        running_var.value = 0.9 * running_var.value + 0.1 * var
    factor = scale * jax.lax.rsqrt(var + 1e-5)
    return (x * factor + (bias - mean * factor)).astype(self.dtype)


def max_pool(x: jax.Array, size: int = 2, stride: int = 2, padding: int = 0) -> jax.Array:
  """Max-pooling as in torch: what is padded never wins."""
  return nn.max_pool(x, (size, size), (stride, stride), ((padding, padding),) * 2)


def average_pool(x: jax.Array) -> jax.Array:
  """The mean over all positions: (batch, height, width, channels) -> (batch, channels)."""
  return jnp.mean(x, axis=(1, 2))
