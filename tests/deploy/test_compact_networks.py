"""Compaction of networks of the literature, pruned hard, on real images; and their export."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import digits, network, pruned_variables

import sparsejax
from sparsejax import deploy

# What experiments.train has pruned: on MNIST at 98 and 99 %, in files of bfloat16; a narrow VGG at
# 98 % and ResNet-20 at 95 % on a fifth of CIFAR-10, for ten and five epochs. By network, how many
# times fewer parameters compaction must leave at least.
TRAINED = {"lenet300": 3.0, "lenet5-caffe": 5.0, "vgg-like-snip": 5.0, "resnet20": 1.01}


@pytest.mark.parametrize("name", TRAINED)
def test_a_network_that_was_trained_and_pruned_is_smaller_and_has_the_same_outputs(name):
  model, apply, _, images = network(name)
  if name == "lenet300":
    images = digits(5, 28, 1)
  path = pathlib.Path(__file__).parent / "trained" / f"{name}.safetensors"
  variables = jax.tree.map(lambda x: x.astype(np.float32), deploy.load(path))
  compacted = deploy.compact(model.apply, variables, images[:1])
  expected = check(compacted, model.apply, variables, images, apply)
  assert compacted.report.parameters > TRAINED[name] * compacted.report.new_parameters
  shape = (jax.export.symbolic_shape("b")[0], *images.shape[1:])
  exported = jax.export.export(jax.jit(compacted), platforms=("cpu", "cuda"))(
    jax.ShapeDtypeStruct(shape, jnp.float32)
  )
  assert_equal(exported.call(images[:3]), expected[:3])


@pytest.mark.parametrize(
  "name, sparsity, how, ratio",
  [
    ("lenet300", 0.98, "magnitude", 3.0),
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
  check(compacted, model.apply, variables, images, apply)
  assert compacted.report.parameters > ratio * compacted.report.new_parameters


def check(compacted, apply_fn, variables, images, apply):
  """Compares outputs, in JAX and in NumPy; returns those of the original."""
  expected, found = apply(variables, images), jax.jit(compacted)(images)
  assert np.ptp(expected, axis=0).max() > 1e-3 * np.abs(expected).max(), "nothing passes"
  assert_equal(found, expected)
  for kind, of, params in (
    ("sparse", apply_fn, variables),
    ("dense", compacted.apply, compacted.params),
  ):
    assert_equal(deploy.to_numpy(of, params, images, kind=kind)(images), expected)
  assert not compacted.report.unknown
  assert compacted.report.new_parameters == sum(p.size for p in compacted.params.values())
  assert compacted.report.flops < compacted.report.dense_flops
  return expected


def assert_equal(logits, expected):
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


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


@pytest.mark.parametrize("name", ["lenet5-caffe", "vgg-like"])
def test_a_network_whose_channels_were_pruned_is_a_plain_smaller_one(name):
  model, apply, shapes, images = network(name)
  variables = pruned_variables(shapes, 0.0, "magnitude")
  masks = sparsejax.masks_from_scores(
    jax.tree.map(np.abs, variables["params"]),
    0.5,
    allocation="uniform",
    pattern=sparsejax.patterns.Channels(),
    prunable=lambda path, leaf: sparsejax.is_kernel(path, leaf) and path[0].key != "classifier",
  )
  variables["params"] = sparsejax.apply_masks(variables["params"], masks)
  compacted = deploy.compact(model.apply, variables, images[:1])
  check(compacted, model.apply, variables, images, apply)
  kernels = {
    layer: leaves["kernel"] for layer, leaves in shapes["params"].items() if "kernel" in leaves
  }
  for layer, kernel in kernels.items():
    *window, inputs, outputs = kernel.shape
    inputs //= 1 if inputs == images.shape[-1] else 2
    outputs //= 1 if layer == "classifier" else 2
    assert compacted.params[f"params/{layer}/kernel"].shape == (*window, inputs, outputs)


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
    assert_equal(np.load(tmp_path / f"logits{count}.npy"), expected[:count])
