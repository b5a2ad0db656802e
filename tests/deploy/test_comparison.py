"""The report: what it counts, what it says, and what it refuses."""

import dataclasses
import gzip
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsejax
from sparsejax import deploy

SHAPES = {"hidden": (40, 30), "out": (30, 5)}


def apply(params, x):
  x = jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
  return x @ params["out"]["kernel"] + params["out"]["bias"]


@pytest.fixture(autouse=True)
def no_long_turns(monkeypatch):
  monkeypatch.setattr("sparsejax.deploy.comparison._TURN", 0.0)


@pytest.fixture
def masks(params):
  scores = jax.tree.map(jnp.abs, params)
  return sparsejax.masks_from_scores(scores, 0.95)


@pytest.fixture
def params():
  rng = np.random.default_rng(0)
  return {
    name: {"kernel": rng.normal(size=shape).astype(np.float32), "bias": np.ones(shape[1], "f")}
    for name, shape in SHAPES.items()
  }


@pytest.fixture
def pruned(params, masks):
  return sparsejax.apply_masks(params, masks)


def inputs(count=20):
  return np.random.default_rng(1).normal(size=(count, 40)).astype(np.float32)


def test_a_report_counts_what_is_there(pruned, masks, tmp_path):
  labels = np.array(np.argmax(apply(pruned, inputs()), -1))
  labels[:5] = (labels[:5] + 1) % 5  # A quarter is wrong.
  found = deploy.report(
    apply, pruned, inputs(), labels=labels, masks=masks, batches=(1, 30), rounds=2
  )
  dense, sparse, small, both = found.variants
  compacted = deploy.compact(apply, pruned, inputs(1))
  kept = 68  # 5 % of 1,350.
  assert (dense.parameters, dense.flops) == (1350 + 35, 2 * 1350)
  assert (sparse.parameters, sparse.flops) == (kept + 35, 2 * kept)
  assert small.parameters == sum(x.size for x in compacted.params.values()) < dense.parameters
  assert small.flops == compacted.report.flops
  kernels = [x for name, x in compacted.params.items() if name.endswith("kernel")]
  assert both.flops == 2 * sum(np.count_nonzero(x) for x in kernels) < small.flops
  for variant, of in ((sparse, pruned), (both, compacted.params)):
    path = tmp_path / variant.name
    assert variant.file_bytes == deploy.save(path, of)
    assert abs(variant.gzip_bytes - len(gzip.compress(path.read_bytes(), mtime=0))) < 10
  assert 4 * 1385 < dense.file_bytes < 4 * 1385 + 500
  assert [variant.accuracy for variant in found.variants] == [0.75] * 4
  assert all(variant.difference < 1e-5 for variant in found.variants)
  assert found.examples == 20 and found.batches == (1, 30)
  for variant, engines in zip(found.variants, (2, 1, 2, 1)):
    times = [each for of_engine in variant.seconds.values() for each in of_engine.values()]
    assert len(times) == 2 * engines and all(len(each) == 2 and min(each) > 0 for each in times)
    assert len(variant.choices[30]) == 2 and variant.threads[1] == 1


def test_without_masks_and_labels_what_is_not_zero_is_active(pruned):
  found = deploy.report(apply, pruned, inputs(), batches=(2,), rounds=1)
  assert found["sparse"].parameters == 68 + 35
  assert found["sparse"].accuracy is None
  assert "| -" not in str(found) and " - " in str(found)


def test_operations_of_each_part_of_a_shared_weight_are_counted():
  rng = np.random.default_rng(0)
  shared, first, last = (rng.normal(size=shape).astype("f") for shape in ((6, 7), (7, 3), (7, 3)))
  shared[:, 3:][rng.random((6, 4)) < 0.8] = 0
  first[3:] = 0  # Here only three of its outputs are read.
  params = {"shared": shared, "first": first, "last": last}
  apply_twice = lambda p, x: (
    jnp.tanh(x @ p["shared"]) @ p["first"] + jnp.sin(2 * x @ p["shared"]) @ p["last"]
  )
  examples = rng.normal(size=(4, 6)).astype("f")
  found = deploy.report(apply_twice, params, examples, batches=(1,), rounds=1)
  kept = deploy.compact(apply_twice, params, examples).params
  assert {"shared", "shared:2"} <= {*kept}
  weights = [x for name, x in kept.items() if name.split(":")[0] in params]
  assert found["compact, sparse"].flops == 2 * sum(np.count_nonzero(x) for x in weights)
  assert found["sparse"].flops == 2 * (
    2 * np.count_nonzero(shared) + np.count_nonzero(first) + np.count_nonzero(last)
  )


def with_times(report, **seconds):
  """The same report with other times, by variant and engine."""
  variants = [
    dataclasses.replace(
      variant,
      seconds={
        engine: {256: seconds[f"{engine}_{re.sub(', ', '_', variant.name)}"]}
        for engine in variant.seconds
      },
    )
    for variant in report.variants
  ]
  return dataclasses.replace(report, variants=tuple(variants))


def test_the_conclusion_says_what_is_bought_and_what_is_not(pruned):
  measured = deploy.report(apply, pruned, inputs(), batches=(256,), rounds=1)
  found = with_times(
    measured,
    numpy_dense=[8.0, 4.0, 90.0],
    numpy_sparse=[2.0, 1.0, 1.0],
    numpy_compact=[4.0, 4.0, 4.0],
    numpy_compact_sparse=[3.0, 3.0, 3.0],
    jax_dense=[1.0, 1.0, 1.0],
    jax_compact=[1.0, 1.0, 1.0],
  )
  assert found.times_faster("sparse", 256) == 4  # The median of 4, 4 and 90.
  assert found.times_faster("sparse", 256, than="jax") == 1
  assert found.fastest(256) == "sparse"
  bought, missed = found.conclusion.split(" It does not buy: ")
  assert "speed in NumPy at batch 256 (sparse): 4 times" in bought
  assert "speed in JAX at batch 256 (compact): 1 times" in missed
  assert "against the dense network in JAX: 1 times" in missed
  assert "a smaller file" in bought
  text = str(found)
  assert text.splitlines()[0].split()[:2] == ["network", "accuracy"]
  assert "8 s" in text and text.endswith(found.conclusion)


def test_weights_that_are_not_as_sparse_as_the_masks_say_are_named(params, masks):
  with pytest.raises(ValueError, match="weights of 'hidden/kernel' should be pruned, but"):
    deploy.report(apply, params, inputs(), masks=masks)


def test_masks_of_other_parameters_are_an_error(pruned, masks):
  del masks["out"]["bias"]
  with pytest.raises(ValueError, match="have 'out/bias', but the masks have not"):
    deploy.report(apply, pruned, inputs(), masks=masks)


def test_nan_weights_and_parameters_of_another_function_are_errors(pruned):
  with pytest.raises(ValueError, match="do the parameters belong to the function"):
    deploy.report(apply, {"other": pruned["out"]["kernel"]}, inputs())
  pruned["out"]["kernel"] = pruned["out"]["kernel"].at[0, 0].set(jnp.nan)
  with pytest.raises(ValueError, match="'out/kernel' holds NaN"):
    deploy.report(apply, pruned, inputs())


def test_labels_that_do_not_fit_are_an_error(pruned):
  with pytest.raises(ValueError, match=r"20 examples, but labels of shape \(19,\)"):
    deploy.report(apply, pruned, inputs(), labels=np.zeros(19, int))
  with pytest.raises(ValueError, match=r"batches\[1\] must be at least 1 .*, got 0"):
    deploy.report(apply, pruned, inputs(), batches=(1, 0))
  with pytest.raises(ValueError, match="must be logits"):
    deploy.report(
      lambda p, x: apply(p, x)[:, 0], pruned, inputs(), labels=np.zeros(20, int), batches=1
    )
  with pytest.raises(ValueError, match="the same number of examples"):
    deploy.report(apply, pruned, (inputs(3), inputs(4)))


def test_it_needs_no_file_of_its_own(pruned, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  deploy.report(apply, pruned, inputs(), batches=(1,), rounds=1)
  assert not list(tmp_path.iterdir())
