import json
import pathlib

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from experiments.models import MODELS, layers, lenet, mlp, resnet, vgg, wide_resnet

ORACLES = pathlib.Path(__file__).parents[1] / "oracles"
ORACLE = json.loads((ORACLES / "architectures_layers.json").read_text())
TENSORFLOW = " (TensorFlow)"

PARAMETERS = {
  "lenet300": 266_610,
  "lenet300-lth": 266_610,
  "lenet300-snip": 266_610,
  "lenet5-caffe": 431_080,
  "lenet5-caffe-torch": 431_080,
  "conv2": 4_301_642,
  "conv4": 2_425_930,
  "conv6": 2_262_602,
  "mlp": 3_676_682,
  "convnet-small": 94_538,
  "resnet18": 11_173_962,
  "resnet20": 272_474,
  "resnet32": 466_906,
  "resnet32-wide": 1_860_522,
  "resnet50": 23_520_842,
  "resnet56": 855_770,
  "resnet18-imagenet": 11_689_512,
  "resnet50-imagenet": 25_557_032,
  "vgg-like": 14_990_922,
  "vgg19": 20_567_882,
  "vgg-like-snip": 14_991_946,
  "vgg-c-snip": 10_537_034,
  "vgg-d-snip": 15_255_626,
  "vgg16-grasp": 14_724_042,
  "vgg19-grasp": 20_035_018,
  "vgg16-lth": 14_728_266,
  "vgg19-lth": 20_040_522,
  "vgg16": 14_728_266,
  "vgg19-kuangliu": 20_040_522,
  "wrn-16-8": 10_961_370,
  "wrn-16-10": 17_116_634,
  "wrn-22-2": 1_079_642,
  "wrn-22-8": 17_158_106,
  "wrn-28-2": 1_467_610,
}


def image_shape(name):
  if name.startswith("lenet"):
    return (28, 28, 1)
  return (224, 224, 3) if name.endswith("imagenet") else (32, 32, 3)


def classes_of(name):
  return 1000 if name.endswith("imagenet") else 10


def shapes_of(model, images):
  """The shapes of a network's variables; nothing is computed."""
  return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(images, jnp.float32))


def calls_of(model, images, *, train=False):
  """The calls of a network's modules in their order, as (module, parameters, output's shape)."""
  calls = []

  def record(call, args, kwargs, context):
    out = call(*args, **kwargs)
    if context.method_name == "__call__":
      parameters = context.module.variables.get("params", {})
      calls.append((context.module.clone(parent=None), parameters, jax.typeof(out)))
    return out

  rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
  with nn.intercept_methods(record):
    jax.eval_shape(lambda x: model.init(rngs, x, train), jax.ShapeDtypeStruct(images, jnp.float32))
  return calls


def dimensions(shape):
  return "x".join(map(str, shape))


def describe(module, params, out):
  """A layer in the words of the oracle, or None."""
  if isinstance(module, layers.BatchNorm):
    return f"norm {params['scale'].size}"
  if not isinstance(module, nn.Conv | nn.Dense):
    return None
  kernel = dimensions(params["kernel"].shape)
  bias = params["bias"].size if "bias" in params else 0
  if isinstance(module, nn.Dense):
    return f"dense {kernel} bias {bias}"
  stride = 1 if module.strides in (1, (1, 1)) else module.strides
  padding = 0 if module.padding == "VALID" else module.padding
  position = dimensions(out.shape[1:])
  return f"conv {kernel} stride {stride} padding {padding} bias {bias} to {position}"


def random_variables(model, images, seed=0):
  """Variables of which none is at the value that it starts with."""
  rng = np.random.default_rng(seed)

  def values(path, leaf):
    noise = rng.standard_normal(leaf.shape)
    if leaf.ndim > 1:
      noise *= np.sqrt(2 / np.prod(leaf.shape[:-1]))
    else:
      noise = {"scale": 1, "var": 1}.get(path[-1].key, 0) + 0.2 * np.clip(noise, -3, 3)
    return noise.astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(values, shapes_of(model, images))


def jit(function):
  """Compiles without optimization: what takes time here is the compilation."""
  options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
  return jax.jit(function, compiler_options=options)


def random_images(shape, seed=1):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# The slow, obvious networks: NumPy in float64, padding by hand.


def reference_conv(x, kernel, stride=1, padding=0):
  x = np.pad(x.astype(np.float64), ((0, 0), (padding, padding), (padding, padding), (0, 0)))
  size = kernel.shape[0]
  height, width = ((n - size) // stride + 1 for n in x.shape[1:3])
  out = np.zeros((x.shape[0], height, width, kernel.shape[-1]))
  for i in range(height):
    for j in range(width):
      window = x[:, i * stride : i * stride + size, j * stride : j * stride + size]
      out[:, i, j] = np.tensordot(window, kernel.astype(np.float64), axes=3)
  return out


def reference_max_pool(x, size=2, stride=2, padding=0):
  pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
  x = np.pad(x, pads, constant_values=-np.inf)
  height, width = ((n - size) // stride + 1 for n in x.shape[1:3])
  rows = [
    [
      x[:, i * stride : i * stride + size, j * stride : j * stride + size].max((1, 2))
      for j in range(width)
    ]
    for i in range(height)
  ]
  return np.stack([np.stack(row, axis=1) for row in rows], axis=1)


class Reference:
  """Layers of a network by their names, with its variables."""

  def __init__(self, variables, train):
    self.params = flax.traverse_util.flatten_dict(variables["params"], sep="/")
    self.stats = flax.traverse_util.flatten_dict(variables.get("batch_stats", {}), sep="/")
    self.train = train

  def conv(self, x, name, stride=1, padding=None):
    kernel = self.params[f"{name}/kernel"]
    padding = kernel.shape[0] // 2 if padding is None else padding
    return reference_conv(x, kernel, stride, padding) + self.params.get(f"{name}/bias", 0)

  def norm(self, x, name):
    axes = tuple(range(x.ndim - 1))
    mean, var = self.stats[f"{name}/mean"], self.stats[f"{name}/var"]
    if self.train:
      mean, var = x.mean(axes), x.var(axes)
    x = (x - mean) / np.sqrt(var + 1e-5)
    return x * self.params[f"{name}/scale"] + self.params[f"{name}/bias"]

  def dense(self, x, name):
    return x @ self.params[f"{name}/kernel"].astype(np.float64) + self.params[f"{name}/bias"]


def relu(x):
  return np.maximum(x, 0)


def reference_resnet(net, x, blocks, bottleneck, imagenet):
  x = relu(net.norm(net.conv(x, "stem", 2 if imagenet else 1), "stem_norm"))
  if imagenet:
    x = reference_max_pool(x, 3, 2, 1)
  strides = (1, 2, 1) if bottleneck else (2, 1)
  for stage, count in enumerate(blocks, start=1):
    for block in range(1, count + 1):
      name, shortcut, y = f"stage{stage}_block{block}", x, x
      halved = stage > 1 and block == 1
      for i, stride in enumerate(strides, start=1):
        y = net.norm(net.conv(y, f"{name}/conv{i}", stride if halved else 1), f"{name}/norm{i}")
        y = relu(y) if i < len(strides) else y
      if block == 1 and (stage > 1 or bottleneck):
        shortcut = net.conv(x, f"{name}/shortcut", 2 if halved else 1)
        shortcut = net.norm(shortcut, f"{name}/shortcut_norm")
      x = relu(shortcut + y)
  return net.dense(x.mean((1, 2)), "classifier")


def reference_wide_resnet(net, x, count):
  x = net.conv(x, "stem")
  for stage in (1, 2, 3):
    for block in range(1, count + 1):
      name, stride = f"stage{stage}_block{block}", 2 if stage > 1 and block == 1 else 1
      activations = relu(net.norm(x, f"{name}/norm1"))
      y = relu(net.norm(net.conv(activations, f"{name}/conv1", stride), f"{name}/norm2"))
      y = net.conv(y, f"{name}/conv2")
      x = y + (net.conv(activations, f"{name}/shortcut", stride) if block == 1 else x)
  return net.dense(relu(net.norm(x, "final_norm")).mean((1, 2)), "classifier")


def reference_small_convnet(net, x):
  x = reference_max_pool(relu(net.conv(x, "conv1", padding=0)))
  x = reference_max_pool(relu(net.conv(x, "conv2", padding=0)))
  x = relu(net.conv(x, "conv3", padding=0))
  assert x.shape[1:3] == (4, 4)
  return net.dense(x.mean((1, 2)), "classifier")


def reference_vgg(net, x, convolutions, last_pool, hidden, hidden_norm):
  for stage, count in enumerate(convolutions, start=1):
    for i in range(1, count + 1):
      x = relu(net.norm(net.conv(x, f"stage{stage}_conv{i}"), f"stage{stage}_norm{i}"))
    if stage < 5 or last_pool == "max":
      x = reference_max_pool(x)
    else:
      x = (x[:, :1, :1] + x[:, :1, 1:] + x[:, 1:, :1] + x[:, 1:, 1:]) / 4
  assert x.shape[1:3] == (1, 1)
  x = x[:, 0, 0]
  for i in range(1, hidden + 1):
    x = net.dense(x, f"dense{i}")
    x = relu(net.norm(x, f"dense{i}_norm") if hidden_norm else x)
  return net.dense(x, "classifier")


# name: (arguments, image, function)
NETWORKS = {
  "resnet20": (
    dict(width=0.25),
    (8, 8, 3),
    lambda net, x: reference_resnet(net, x, (3, 3, 3), False, False),
  ),
  "resnet50": (
    dict(width=1 / 16, blocks=(2, 1, 2, 1)),
    (8, 8, 3),
    lambda net, x: reference_resnet(net, x, (2, 1, 2, 1), True, False),
  ),
  "resnet50-imagenet": (
    dict(width=1 / 16, blocks=(1, 2, 1, 1)),
    (45, 64, 3),
    lambda net, x: reference_resnet(net, x, (1, 2, 1, 1), True, True),
  ),
  "wrn-16-8": (
    dict(width=1 / 16),
    (8, 8, 3),
    lambda net, x: reference_wide_resnet(net, x, 2),
  ),
  "convnet-small": (
    dict(width=1 / 8),
    (32, 32, 3),
    lambda net, x: reference_small_convnet(net, x),
  ),
  "vgg-c-snip": (
    dict(width=1 / 16),
    (32, 32, 3),
    lambda net, x: reference_vgg(net, x, (2, 2, 3, 3, 3), "max", 2, True),
  ),
  "vgg-like": (
    dict(width=1 / 16, dropout=()),
    (32, 32, 3),
    lambda net, x: reference_vgg(net, x, (2, 2, 3, 3, 3), "max", 1, False),
  ),
  "vgg19-grasp": (
    dict(width=1 / 16),
    (32, 32, 3),
    lambda net, x: reference_vgg(net, x, (2, 2, 4, 4, 4), "average", 0, False),
  ),
}


def test_every_network_has_its_number_of_parameters_pinned():
  assert list(MODELS) == list(PARAMETERS)


@pytest.mark.parametrize("name", MODELS)
def test_a_network_has_the_published_number_of_parameters(name):
  params = shapes_of(MODELS[name](classes=classes_of(name)), (1, *image_shape(name)))["params"]
  assert sum(p.size for p in jax.tree.leaves(params)) == PARAMETERS[name]


@pytest.mark.parametrize("name", [n for n in ORACLE if "layers" in ORACLE[n]])
def test_layers_are_those_of_the_original_code_in_its_order(name):
  oracle = ORACLE[name]
  shape = tuple(int(n) for n in oracle["input"].split("x"))
  calls = calls_of(MODELS[name](classes=oracle["classes"]), (1, *shape))
  assert [text for call in calls if (text := describe(*call))] == oracle["layers"]
  params = calls[-1][1]  # The network's own call returns last.
  assert sum(p.size for p in jax.tree.leaves(params)) == oracle["total"]


@pytest.mark.parametrize("name", [n for n in ORACLE if n.endswith(TENSORFLOW)])
def test_layers_are_those_of_snips_own_code(name):
  oracle, name = ORACLE[name], name.removesuffix(TENSORFLOW)
  calls = calls_of(MODELS[name](classes=10), (1, *image_shape(name)))
  kernels = [params for module, params, _ in calls if isinstance(module, nn.Conv | nn.Dense)]
  assert [dimensions(p["kernel"].shape) for p in kernels] == oracle["kernels"]
  assert all(p["bias"].size == p["kernel"].shape[-1] for p in kernels)
  norms = [params for module, params, _ in calls if isinstance(module, layers.BatchNorm)]
  assert [p["scale"].size for p in norms] == oracle["norms"]
  assert sum(p.size for p in jax.tree.leaves(calls[-1][1])) == oracle["total"]


def test_the_vggs_of_progressive_pruning_add_up():
  # Convolutions of VGG-16 and VGG-19: nine weights for each pair of channels; biases; scales and
  # biases of batch norm.
  pairs = 3 * 64 + 64 * 64 + 64 * 128 + 128 * 128 + 128 * 256 + 256 * 512
  sixteen = 9 * (pairs + 2 * 256 * 256 + (2 + 3) * 512 * 512)
  nineteen = 9 * (pairs + 3 * 256 * 256 + (3 + 4) * 512 * 512)
  channels16 = 2 * 64 + 2 * 128 + 3 * 256 + 6 * 512
  channels19 = 2 * 64 + 2 * 128 + 4 * 256 + 8 * 512
  hidden, classifier = 512 * 512 + 512, 512 * 10 + 10
  assert (sixteen, channels16, nineteen, channels19) == (14_710_464, 4_224, 20_018_880, 5_504)
  assert PARAMETERS["vgg-like"] == sixteen + 3 * channels16 + hidden + classifier
  assert PARAMETERS["vgg19"] == nineteen + 3 * channels19 + 2 * (hidden + 2 * 512) + classifier
  # 97.97 % is the published share of zeros among kernels and scales, with 98 % of the kernels'.
  kernels = nineteen + 2 * 512 * 512 + 512 * 10
  assert round(100 * 0.98 * kernels / (kernels + channels19 + 2 * 512), 2) == 97.97


def test_wrn_22_2_and_the_mlp_add_up():
  stages, inputs = 9 * 3 * 16, 16
  for channels in (32, 64, 128):
    weights = 9 * inputs * channels + 5 * 9 * channels * channels + inputs * channels
    stages += weights + 2 * inputs + 5 * 2 * channels  # six batch norms, the first on the inputs
    inputs = channels
  assert PARAMETERS["wrn-22-2"] == stages + 2 * 128 + 128 * 10 + 10
  assert PARAMETERS["mlp"] == 3073 * 1024 + 1025 * 512 + 513 * 10


def test_the_small_convnet_adds_up():
  convolutions = (9 * 3 + 1) * 32 + (9 * 32 + 1) * 64 + (9 * 64 + 1) * 128
  assert PARAMETERS["convnet-small"] == convolutions + 129 * 10
  # The published comment counts the dense layer that would follow a fourth convolution.
  fourth = (9 * 128 + 1) * 256
  assert convolutions + 257 * 10 == 95_818
  assert convolutions + fourth + 257 * 10 == 390_986


def test_dense_layers_of_lenet300_keep_their_names():
  params = shapes_of(MODELS["lenet300"](classes=10), (1, 28, 28, 1))["params"]
  assert list(params) == ["Dense_0", "Dense_1", "Dense_2"]


def test_paths_of_parameters_say_where_they_are():
  params = shapes_of(MODELS["resnet18"](classes=10), (1, 32, 32, 3))["params"]
  paths = flax.traverse_util.flatten_dict(params, sep="/")
  assert {"stem/kernel", "stem_norm/scale", "classifier/kernel"} <= set(paths)
  assert {"stage2_block1/conv1/kernel", "stage2_block1/shortcut/kernel"} <= set(paths)


@pytest.mark.parametrize("name", MODELS)
def test_activations_are_bfloat16_and_parameters_statistics_and_logits_float32(name):
  model = MODELS[name](classes=7, width=0.25, dtype=jnp.bfloat16)
  *inner, (_, _, logits) = calls_of(model, (2, *image_shape(name)), train=True)
  assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)
  assert {out.dtype for _, _, out in inner} == {jnp.dtype(jnp.bfloat16)}
  variables = shapes_of(model, (2, *image_shape(name)))
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("name", ["lenet5-caffe", "resnet50", "vgg19", "wrn-16-8"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_convolutions_and_products_are_computed_in_the_given_type(name, dtype):
  model, images = MODELS[name](classes=7, width=0.25, dtype=dtype), (2, *image_shape(name))
  jaxpr = jax.make_jaxpr(model.apply)(shapes_of(model, images), jnp.zeros(images))
  operands = [
    operand.aval.dtype
    for equation in jaxpr.eqns
    if equation.primitive.name in ("conv_general_dilated", "dot_general")
    for operand in equation.invars
  ]
  layers_of_model = [call for call in calls_of(model, images) if "kernel" in call[1]]
  assert operands == 2 * len(layers_of_model) * [jnp.dtype(dtype)]


@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("image", [(8, 8), (7, 10)])
def test_convolutions_pad_as_torch_does(size, stride, image):
  conv = layers.convolution(
    5, size, stride, use_bias=True, kernel_init=nn.initializers.zeros, dtype=jnp.float32, name="c"
  )
  variables = random_variables(conv, (1, *image, 3))
  x = random_images((2, *image, 3))
  expected = Reference({"params": {"c": variables["params"]}}, False).conv(x, "c", stride)
  np.testing.assert_allclose(conv.apply(variables, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arguments", [(2, 2, 0), (3, 2, 1)])
@pytest.mark.parametrize("image", [(8, 8), (7, 10)])
def test_max_pooling_is_torchs(arguments, image):
  # Negative images: padding with zeros would win.
  x = -np.abs(random_images((2, *image, 3)))
  expected = reference_max_pool(x, *arguments)
  np.testing.assert_array_equal(layers.max_pool(x, *arguments), expected)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_logits_equal_those_of_the_network_in_numpy(name, train):
  arguments, image, reference = NETWORKS[name]
  model = MODELS[name](classes=10, **arguments)
  variables, x = random_variables(model, (1, *image)), random_images((5, *image))
  logits, _ = jit(lambda v, x: model.apply(v, x, train, mutable=["batch_stats"]))(variables, x)
  expected = reference(Reference(variables, train), x)
  assert np.std(expected, axis=0).min() > 1e-3  # The images make a difference.
  np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("relu_after", [True, False])
def test_lenet5_equals_the_network_in_numpy_with_and_without_its_relus(relu_after):
  model = lenet.LeNet5Caffe(classes=10, width=0.2, relu=relu_after)
  variables, x = random_variables(model, (1, 28, 28, 1)), random_images((3, 28, 28, 1))
  net, y = Reference(variables, False), x
  for i in (1, 2):
    y = net.conv(y, f"conv{i}", padding=0)
    y = reference_max_pool(relu(y) if relu_after else y)
  expected = net.dense(relu(net.dense(y.reshape(3, -1), "dense1")), "classifier")
  np.testing.assert_allclose(jit(model.apply)(variables, x), expected, rtol=1e-4, atol=1e-4)


def test_conv4_equals_the_network_in_numpy():
  model = MODELS["conv4"](classes=10, width=1 / 16)
  variables, x = random_variables(model, (1, 16, 16, 3)), random_images((3, 16, 16, 3))
  net, y = Reference(variables, False), x
  for stage in (1, 2):
    y = relu(net.conv(relu(net.conv(y, f"stage{stage}_conv1")), f"stage{stage}_conv2"))
    y = reference_max_pool(y)
  y = relu(net.dense(relu(net.dense(y.reshape(3, -1), "dense1")), "dense2"))
  expected = net.dense(y, "classifier")
  np.testing.assert_allclose(jit(model.apply)(variables, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [3e-3, 7])  # With the first, epsilon shows.
def test_batch_norm_has_torchs_momentum_and_epsilon_and_a_biased_variance(size):
  x = np.float32(size) * (random_images((4, 2, 2, 3)) + np.arange(3, dtype=np.float32))
  exact = x.astype(np.float64)
  mean, var = exact.mean((0, 1, 2)), exact.var((0, 1, 2))
  norm = layers.BatchNorm(True, dtype=jnp.float32, name="n")
  variables = norm.init(jax.random.key(0), x)
  y, updated = norm.apply(variables, x, mutable=["batch_stats"])
  np.testing.assert_allclose(y, (exact - mean) / np.sqrt(var + 1e-5), rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(updated["batch_stats"]["mean"], 0.1 * mean, rtol=1e-5)
  np.testing.assert_allclose(updated["batch_stats"]["var"], 0.9 + 0.1 * var, rtol=1e-5)
  norm = layers.BatchNorm(False, dtype=jnp.float32, name="n")
  stats = {"mean": jnp.full(3, 0.5), "var": jnp.full(3, 2e-5)}
  y = norm.apply({**variables, "batch_stats": stats}, x)
  np.testing.assert_allclose(y, (exact - 0.5) / np.sqrt(3e-5), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_is_that_of_flax_with_its_gradients(train):
  x = 2 * random_images((16, 5, 5, 3)) + np.arange(3, dtype=np.float32)
  ours = layers.BatchNorm(train, dtype=jnp.float32)
  theirs = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)
  variables = theirs.init(jax.random.key(0), x)
  chex.assert_trees_all_equal(variables, ours.init(jax.random.key(0), x))
  rng = np.random.default_rng(0)
  variables = jax.tree.map(lambda v: rng.uniform(0.5, 2, v.shape).astype(np.float32), variables)
  weights = rng.normal(size=x.shape).astype(np.float32)

  def of(norm):
    def loss(params, x):
      y, updated = norm.apply({**variables, "params": params}, x, mutable=["batch_stats"])
      return jnp.mean(weights * jnp.sin(y)), (y, updated)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(variables["params"], x)

  chex.assert_trees_all_close(of(ours), of(theirs), rtol=1e-4, atol=1e-6)


def test_statistics_of_bfloat16_activations_are_float32():
  norm = layers.BatchNorm(True, dtype=jnp.bfloat16, name="n")
  x = jnp.asarray(random_images((64, 16, 16, 1)) + 1, jnp.bfloat16)
  y, updated = norm.apply(norm.init(jax.random.key(0), x), x, mutable=["batch_stats"])
  exact = np.asarray(x, np.float64)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(updated["batch_stats"]["mean"], 0.1 * exact.mean(), rtol=1e-5)
  np.testing.assert_allclose(updated["batch_stats"]["var"], 0.9 + 0.1 * exact.var(), rtol=1e-5)
  normalised = (exact - exact.mean()) / np.sqrt(exact.var() + 1e-5)
  # One rounding to bfloat16, at the end: half of 2^-7.
  np.testing.assert_allclose(np.asarray(y, np.float64), normalised, rtol=2**-8 + 1e-5, atol=1e-5)


def test_statistics_of_a_sharded_batch_are_those_of_the_whole_batch():
  model = resnet.ResNet(classes=3, blocks=(1, 1), channels=(4, 8))
  x = random_images((16, 8, 8, 3)) * np.arange(1, 17, dtype=np.float32)[:, None, None, None]
  variables = random_variables(model, (1, 8, 8, 3))
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ("batch",))
  sharded = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P("batch")))
  assert len(sharded.sharding.device_set) == 8
  apply = jit(lambda v, x: model.apply(v, x, True, mutable=["batch_stats"]))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
    apply(variables, sharded),
    apply(variables, x),
  )


@pytest.mark.parametrize("name", ["resnet20", "vgg-c-snip", "wrn-22-2"])
def test_running_averages_change_in_training_only(name):
  model = MODELS[name](classes=10, width=1 / 16)
  variables, x = random_variables(model, (1, 32, 32, 3)), random_images((2, 32, 32, 3))
  for train in (False, True):
    apply = jit(lambda v, x, train=train: model.apply(v, x, train, mutable=["batch_stats"]))
    _, updated = apply(variables, x)
    before, after = (jax.tree.leaves(v["batch_stats"]) for v in (variables, updated))
    assert all(bool(np.any(a != b)) == train for a, b in zip(before, after))
  # Evaluation needs no mutable collection.
  assert jax.eval_shape(lambda: model.apply(variables, x)).shape == (2, 10)


@pytest.mark.parametrize(
  "model", [MODELS["vgg-like"](classes=10, width=0.1), wide_resnet.WideResNet(10, 10, 1, 0.3)]
)
def test_dropout_acts_in_training_only(model):
  variables, x = random_variables(model, (1, 32, 32, 3)), random_images((2, 32, 32, 3))
  apply = jit(
    lambda seed: model.apply(
      variables, x, True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(seed)}
    )[0]
  )
  np.testing.assert_array_equal(apply(0), apply(0))
  assert np.any(apply(0) != apply(1))
  with pytest.raises(flax.errors.InvalidRngError):
    jax.eval_shape(lambda: model.apply(variables, x, True, mutable=["batch_stats"]))
  # Evaluation needs no key.
  assert jax.eval_shape(lambda: model.apply(variables, x)).shape == (2, 10)


@pytest.mark.parametrize(
  ("name", "head"),
  [
    ("vgg-like", "drop 0.5, dense1, drop 0.5, classifier"),
    ("vgg19", "drop 0.3, dense1, norm, drop 0.3, dense2, norm, drop 0.0, classifier"),
    ("vgg-like-snip", "drop 0.0, dense1, norm, drop 0.0, classifier"),
    ("vgg19-grasp", "drop 0.0, classifier"),
  ],
)
def test_heads_of_vggs_have_their_layers_in_order(name, head):
  words, last_conv = [], None
  for module, params, out in calls_of(MODELS[name](classes=10), (1, 32, 32, 3)):
    if isinstance(module, nn.Conv):
      words, last_conv = [], out.shape
    elif isinstance(module, nn.Dropout):
      words.append(f"drop {module.rate}")
    elif isinstance(module, nn.Dense):
      assert params["kernel"].shape[0] == 512
      words.append(module.name)
    elif isinstance(module, layers.BatchNorm):
      words.append("norm")
  # The last stage works on 2x2, and leaves 1x1x512 to the head.
  assert last_conv == (1, 2, 2, 512)
  assert ", ".join(words).removeprefix("norm, ") == head


@pytest.mark.parametrize(
  ("rule", "variance", "bound"),
  [
    (layers.KAIMING_FAN_OUT, lambda fan_in, fan_out: 2 / fan_out, None),
    (layers.KAIMING_FAN_IN, lambda fan_in, fan_out: 2 / fan_in, None),
    # Truncated at two standard deviations of the normal, whose variance shrinks to 0.774 by that.
    (layers.GLOROT, lambda fan_in, fan_out: 2 / (fan_in + fan_out), 2 / np.sqrt(0.774)),
    (layers.TRUNCATED_FAN_IN, lambda fan_in, fan_out: 1 / fan_in, 2 / np.sqrt(0.774)),
    (layers.TORCH_DEFAULT, lambda fan_in, fan_out: 1 / (3 * fan_in), np.sqrt(3)),
    (layers.NORMAL_001, lambda fan_in, fan_out: 1e-4, None),
  ],
)
@pytest.mark.parametrize("shape", [(3, 3, 32, 128), (300, 100)])
def test_initialisers_have_the_variance_of_their_rule(rule, variance, bound, shape):
  kernel = rule(jax.random.key(0), shape)
  field = np.prod(shape[:-2])
  expected = variance(field * shape[-2], field * shape[-1])
  # Four standard errors of a sample's variance, if it is normal.
  assert np.var(kernel) == pytest.approx(expected, rel=4 * np.sqrt(2 / kernel.size))
  assert abs(np.mean(kernel)) < 4 * np.sqrt(expected / kernel.size)
  largest = np.abs(kernel).max() / np.sqrt(expected)
  assert largest > 3.5 if bound is None else 0.99 * bound < largest < 1.001 * bound


# name: (initialisers of convolutions, of dense layers)
INITIALISERS = {
  **dict.fromkeys(["lenet300", "resnet18", "vgg-like"], ("KAIMING_FAN_OUT", "KAIMING_FAN_OUT")),
  **dict.fromkeys(["lenet300-lth", "conv2", "conv4", "conv6"], ("GLOROT", "GLOROT")),
  **dict.fromkeys(
    ["lenet300-snip", "lenet5-caffe", "vgg-like-snip", "vgg-c-snip", "vgg-d-snip"],
    ("TRUNCATED_FAN_IN", "TRUNCATED_FAN_IN"),
  ),
  **dict.fromkeys(
    ["lenet5-caffe-torch", "mlp", "convnet-small", "resnet50", "vgg16", "vgg19-kuangliu"],
    ("TORCH_DEFAULT", "TORCH_DEFAULT"),
  ),
  **dict.fromkeys(
    ["resnet20", "resnet32", "resnet56", "vgg16-lth", "vgg19-lth"],
    ("KAIMING_FAN_IN", "KAIMING_FAN_IN"),
  ),
  **dict.fromkeys(
    ["resnet32-wide", "vgg19", "vgg16-grasp", "vgg19-grasp"], ("KAIMING_FAN_OUT", "NORMAL_001")
  ),
  **dict.fromkeys(
    [
      "resnet18-imagenet",
      "resnet50-imagenet",
      "wrn-16-8",
      "wrn-16-10",
      "wrn-22-2",
      "wrn-22-8",
      "wrn-28-2",
    ],
    ("KAIMING_FAN_OUT", "TORCH_DEFAULT"),
  ),
}
UNIFORM_SCALES = ("resnet20", "resnet32", "vgg16-lth", "vgg19-lth")


@pytest.mark.parametrize("name", MODELS)
def test_kernels_start_as_their_source_says(name):
  convolutions, dense = (getattr(layers, rule) for rule in INITIALISERS[name])
  for module, _, _ in calls_of(MODELS[name](classes=10), (1, *image_shape(name))):
    if isinstance(module, nn.Conv | nn.Dense):
      assert module.kernel_init is (convolutions if isinstance(module, nn.Conv) else dense)
      assert module.bias_init is nn.initializers.zeros
    elif isinstance(module, layers.BatchNorm):
      assert (module.scale_init is nn.initializers.ones) == (name not in UNIFORM_SCALES)


def test_scales_of_open_lth_start_uniform_and_others_at_one():
  for name, low, high in (("resnet20", 0, 1), ("wrn-16-8", 1, 1)):
    calls = calls_of(MODELS[name](classes=10), (1, 32, 32, 3))
    norm = next(module for module, _, _ in calls if isinstance(module, layers.BatchNorm))
    scales = norm.scale_init(jax.random.key(0), (1000,), jnp.float32)
    np.testing.assert_allclose((np.min(scales), np.max(scales)), (low, high), atol=0.01)


def test_the_initialisation_can_be_chosen():
  constant = nn.initializers.constant(3.0)
  for name in MODELS:
    model = MODELS[name](classes=10, kernel_init=constant)
    if hasattr(model, "dense_init"):
      model = MODELS[name](classes=10, kernel_init=constant, dense_init=constant)
    calls = calls_of(model, (1, *image_shape(name)))
    assert {m.kernel_init for m, p, _ in calls if "kernel" in p} == {constant}


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: lenet.Conv(10, depth=3), "depth=3 must be even"),
    (lambda: resnet.ResNet(10, blocks=(2, 2), channels=(16,)), "differ in length"),
    (lambda: wide_resnet.WideResNet(10, depth=18, widening=2), "depth=18 must be"),
    (lambda: vgg.VGG(10, convolutions=(2, 2)), "each of 5 stages"),
    (lambda: vgg.VGG(10, convolutions=vgg.SIXTEEN, last_pool="mean"), "'max' or 'average'"),
    (lambda: vgg.VGG(10, convolutions=vgg.SIXTEEN, dropout=(0.1, 0.2)), "each of the 1 dense"),
  ],
)
def test_wrong_arguments_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_a_network_can_be_any_mlp():
  calls = calls_of(mlp.MLP(classes=2, features=(5, 4, 3)), (1, 2, 2, 1))
  kernels = [params["kernel"].shape for module, params, _ in calls if isinstance(module, nn.Dense)]
  assert kernels == [(4, 5), (5, 4), (4, 3), (3, 2)]
