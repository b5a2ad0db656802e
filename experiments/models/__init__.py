"""Networks of the literature, in Flax Linen, by name.

A network is made with `classes`, and optionally `width`, which multiplies the channels and units of
every layer, and `dtype`, which may be bfloat16. It maps images (batch, height, width, channels) to
float32 logits (batch, classes).

>>> import jax, jax.numpy as jnp
>>> model = MODELS["resnet18"](classes=10, dtype=jnp.bfloat16)
>>> images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
>>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
>>> sorted(variables), f"{sum(p.size for p in jax.tree.leaves(variables['params'])):,}"
(['batch_stats', 'params'], '11,173,962')
"""

from collections.abc import Callable

from flax import linen as nn

from experiments.models import convnet, lenet, mlp, resnet, vgg, wide_resnet

MODELS: dict[str, Callable[..., nn.Module]] = {
  "lenet300": lenet.LeNet300,
  "lenet300-lth": lenet.LeNet300LTH,
  "lenet300-snip": lenet.LeNet300SNIP,
  "lenet5-caffe": lenet.LeNet5Caffe,
  "lenet5-caffe-torch": lenet.LeNet5CaffeTorch,
  "conv2": lenet.Conv2,
  "conv4": lenet.Conv4,
  "conv6": lenet.Conv6,
  "mlp": mlp.MLPCifar,
  "convnet-small": convnet.SmallConvNet,
  "resnet18": resnet.ResNet18,
  "resnet20": resnet.ResNet20,
  "resnet32": resnet.ResNet32,
  "resnet32-wide": resnet.ResNet32Wide,
  "resnet50": resnet.ResNet50,
  "resnet56": resnet.ResNet56,
  "resnet18-imagenet": resnet.ImageNetResNet18,
  "resnet50-imagenet": resnet.ImageNetResNet50,
  "vgg-like": vgg.VGGLike,
  "vgg19": vgg.VGG19,
  "vgg-like-snip": vgg.VGGLikeSNIP,
  "vgg-c-snip": vgg.VGGCSNIP,
  "vgg-d-snip": vgg.VGGDSNIP,
  "vgg16-grasp": vgg.VGG16GraSP,
  "vgg19-grasp": vgg.VGG19GraSP,
  "vgg16-lth": vgg.VGG16LTH,
  "vgg19-lth": vgg.VGG19LTH,
  "vgg16": vgg.VGG16Kuangliu,
  "vgg19-kuangliu": vgg.VGG19Kuangliu,
  "wrn-16-8": wide_resnet.WRN16x8,
  "wrn-16-10": wide_resnet.WRN16x10,
  "wrn-22-2": wide_resnet.WRN22x2,
  "wrn-22-8": wide_resnet.WRN22x8,
  "wrn-28-2": wide_resnet.WRN28x2,
}
