"""LeNet: small networks for small images."""

import jax
from flax import linen as nn

# Kaiming et al., "Delving Deep into Rectifiers", 2015, as torch's kaiming_normal_ with fan_out.
KAIMING_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class LeNet300(nn.Module):
  """LeNet-300-100: two hidden layers with ReLU; 266,610 parameters on MNIST.

  Kernels are initialised by Kaiming's normal rule with fan_out, biases at zero.

  References:
    LeCun et al., `Gradient-based learning applied to document recognition
    <http://yann.lecun.com/exdb/publis/pdf/lecun-98.pdf>`_, 1998
  """

  classes: int

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps images (batch, height, width, channels) to logits (batch, classes)."""
    x = images.reshape(images.shape[0], -1)
    for features in (300, 100):
      x = nn.relu(nn.Dense(features, kernel_init=KAIMING_FAN_OUT)(x))
    return nn.Dense(self.classes, kernel_init=KAIMING_FAN_OUT)(x)
