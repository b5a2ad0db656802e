"""Compaction of networks of the literature, pruned hard, on real images; and their export."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import data
from experiments.models import MODELS
from sparsejax import deploy

NETWORKS = {
  "lenet300": dict(size=8, channels=1),
  "lenet5-caffe": dict(size=28, channels=1),
  "vgg-like": dict(size=32, channels=3, width=0.125),
  "resnet20": dict(size=32, channels=3),
}


def digits(count, size, channels):
  """Handwritten digits, enlarged."""
  images = np.float32(data.load("digits").test_images[:count]) / 255 - 0.3
  images = images.repeat(size // 8, axis=1).repeat(size // 8, axis=2)
  margin = (size - images.shape[1]) // 2
  images = np.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
  return images.repeat(channels, axis=3)


@functools.cache
def network(name):
  """The model, a jitted function of its variables and images, their shapes, and images."""
  options = dict(NETWORKS[name])
  images = digits(5, options.pop("size"), options.pop("channels"))
  model = MODELS[name](classes=10, **options)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images[:1])
  return model, jax.jit(model.apply), shapes, images


def pruned_variables(shapes, sparsity, how, seed=0):
  """Random kernels, of which each is pruned; random biases, and statistics of batch norm."""
  generator = np.random.default_rng(seed)

  def leaf_of(path, leaf):
    name = jax.tree_util.keystr(path)
    if len(leaf.shape) >= 2:
      # Of the variance that keeps signals alive, and the mean that makes some units die.
      kernel = generator.normal(size=leaf.shape)
      scores = np.abs(kernel) if how == "magnitude" else generator.random(leaf.shape)
      kernel *= scores > np.quantile(scores, sparsity)
      fan_in = np.prod(leaf.shape[:-1])
      return np.float32(kernel * np.sqrt(2 / fan_in / np.mean(kernel**2)))
    if "var" in name or "scale" in name:
      return np.float32(generator.uniform(0.5, 1.5, leaf.shape))
    return np.float32(generator.normal(0.0, 0.1, leaf.shape))

  return jax.tree_util.tree_map_with_path(leaf_of, shapes)


@pytest.mark.parametrize(
  "name, sparsity, how, ratio",
  [
    ("lenet300", 0.9, "random", 1.0),
    ("lenet300", 0.98, "magnitude", 3.0),
    ("lenet5-caffe", 0.95, "random", 1.0),
    ("lenet5-caffe", 0.99, "magnitude", 3.0),
    ("vgg-like", 0.95, "magnitude", 1.0),
    ("vgg-like", 0.98, "random", 1.2),
    ("resnet20", 0.95, "random", 1.0),
    ("resnet20", 0.99, "magnitude", 1.0),
  ],
)
def test_a_pruned_network_is_smaller_and_has_the_same_outputs(name, sparsity, how, ratio):
  model, apply, shapes, images = network(name)
  variables = pruned_variables(shapes, sparsity, how)
  compacted = deploy.compact(model.apply, variables, images[:1])
  expected, found = apply(variables, images), jax.jit(compacted)(images)
  assert np.ptp(expected, axis=0).max() > 1e-3 * np.abs(expected).max(), "nothing passes"
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
  assert not compacted.report.unknown
  assert compacted.report.parameters > ratio * compacted.report.new_parameters
  assert compacted.report.new_parameters == sum(p.size for p in compacted.params.values())
  assert compacted.report.flops < compacted.report.dense_flops


def test_what_is_left_of_a_pruned_lenet_is_what_lies_between_inputs_and_outputs():
  model, _, shapes, images = network("lenet300")
  variables = pruned_variables(shapes, 0.98, "magnitude", seed=1)
  kernels = [np.asarray(variables["params"][f"Dense_{i}"]["kernel"]) != 0 for i in range(3)]
  reached = [np.ones(64, bool)]
  for kernel in kernels:
    reached.append(reached[-1] @ kernel > 0)
  needed = [np.ones(10, bool)]
  for kernel in reversed(kernels):
    needed.append(kernel @ needed[-1] > 0)
  alive = [a & b for a, b in zip(reached, reversed(needed))]
  compacted = deploy.compact(model.apply, variables, images[:1])
  for i in range(3):
    shape = compacted.params[f"params/Dense_{i}/kernel"].shape
    assert shape == (alive[i].sum(), alive[i + 1].sum() if i < 2 else 10)


def test_a_pruned_network_is_exported_for_any_batch_and_loaded_without_this_library(tmp_path):
  pytest.importorskip("flatbuffers", reason="jax.export needs it to write a file")
  model, apply, shapes, images = network("lenet5-caffe")
  variables = pruned_variables(shapes, 0.99, "magnitude")
  compacted = deploy.compact(model.apply, variables, images[:1])
  shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 28, 28, 1"), jnp.float32)
  exported = jax.export.export(jax.jit(compacted), platforms=("cpu", "cuda"))(shape)
  (tmp_path / "network.bin").write_bytes(exported.serialize())
  np.save(tmp_path / "images.npy", images)
  program = """
import sys, jax, numpy as np
from jax import export
network = export.deserialize(bytearray(open("network.bin", "rb").read()))
assert network.platforms == ("cpu", "cuda")
for count in (1, 5):
  np.save(f"logits{count}.npy", network.call(np.load("images.npy")[:count]))
assert not {"sparsejax", "flax", "experiments"} & set(sys.modules)
"""
  subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
  expected = apply(variables, images)
  for count in (1, 5):
    np.testing.assert_allclose(
      np.load(tmp_path / f"logits{count}.npy"),
      expected[:count],
      rtol=0,
      atol=1e-5 * np.abs(expected).max(),
    )
