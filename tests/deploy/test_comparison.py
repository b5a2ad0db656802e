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
from sparsejax.deploy import comparison

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


def test_inputs_beyond_what_is_computed_at_once_count_too(pruned, monkeypatch):
  monkeypatch.setattr(comparison, "_CHUNK", 7)
  found = comparison._outputs(apply, pruned, (inputs(),))
  hidden = np.maximum(inputs() @ pruned["hidden"]["kernel"] + 1, 0)
  np.testing.assert_allclose(found, hidden @ pruned["out"]["kernel"] + 1, rtol=1e-4, atol=1e-5)


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


def made(**of_variants):
  """A report that was not measured: fields by variant."""
  fields = dict(parameters=1, flops=1, file_bytes=1, gzip_bytes=1, accuracy=None, difference=0.0)
  seconds = {"numpy": {1: [1.0]}, "jax": {1: [1.0]}}
  variants = [
    comparison.Variant(
      **{"name": name, "seconds": seconds, "choices": {}, "threads": {}} | fields | changed
    )
    for name, changed in of_variants.items()
  ]
  return comparison.Report(tuple(variants), None, 1, "cpu")


def test_times_have_a_unit_that_suits_them():
  times = (2.5, 0.9996), (0.9, 2.5e-3), (1e-3, 4e-6)
  variants = {
    name: dict(seconds={"numpy": {1: [of_numpy]}, "jax": {1: [of_jax]}})
    for name, (of_numpy, of_jax) in zip(("dense", "sparse", "compact"), times)
  }
  cells = [(row["NumPy, batch 1"], row["JAX, batch 1"]) for row in made(**variants).cells]
  assert cells == [("2.5 s", "1 s"), ("900 ms", "2.5 ms"), ("1 ms", "4 µs")]


def test_the_fastest_is_one_of_the_others_also_where_the_dense_network_is_faster():
  seconds = {"dense": 1.0, "sparse": 3.0, "compact": 2.0}
  found = made(**{name: dict(seconds={"numpy": {1: [x]}}) for name, x in seconds.items()})
  assert found.fastest(1) == "compact"
  assert found.times_faster("compact", 1) == 0.5


def test_gains_are_those_over_the_dense_network():
  names = ("parameters", "flops", "file_bytes", "gzip_bytes")
  numbers = {
    "dense": (90, 80, 110, 60),
    "sparse": (30, 20, 100, 20),
    "compact": (45, 0, 50, 40),
    "compact, sparse": (20, 0, 24, 30),
  }
  found = made(**{n: dict(zip(names, each), accuracy=0.0) for n, each in numbers.items()})
  assert found.gains[:4] == [
    ("a smaller file", 1.1),
    ("a file smaller than gzip makes the dense one", 60 / 24),
    ("fewer parameters in dense arrays, by compaction", 2),
    ("fewer operations in dense arrays, by compaction", 80),
  ]
  assert found.conclusion.count("a smaller file: 1.1 times") == 1
  assert [row["accuracy"] for row in found.cells] == ["0.00%"] * 4


def test_a_difference_is_a_part_of_the_largest_output():
  original = np.array([[4.0, -8.0]])
  assert comparison._difference(np.array([[4.0, 8.0]]), original) == 2
  assert comparison._difference(original, 0 * original) == 0


def test_the_largest_difference_of_all_batches_counts(pruned, monkeypatch):
  monkeypatch.setattr(comparison, "_difference", lambda outputs, original: float(len(outputs)))
  found = deploy.report(apply, pruned, inputs(), batches=(30, 2), rounds=1)
  assert [variant.difference for variant in found.variants] == [30] * 4


def test_accuracy_and_difference_are_those_of_what_is_read_from_the_file(pruned, monkeypatch):
  zeros = lambda path, like: jax.tree.map(np.zeros_like, like)
  monkeypatch.setattr(comparison.files, "load", zeros)
  labels = np.argmax(apply(pruned, inputs()), -1)
  found = deploy.report(apply, pruned, inputs(), labels=labels, batches=(1,), rounds=1)
  assert found["dense"].accuracy == 1 and found["dense"].difference < 1e-5
  # Equal outputs are taken for the first class.
  assert found["sparse"].accuracy == np.mean(labels == 0) < 1
  assert found["sparse"].difference == 1


def test_a_parameter_without_entries_takes_no_operations(pruned):
  none = {"kernel": np.zeros((0, 3), np.float32)}
  found = deploy.report(apply, pruned | {"none": none}, inputs(), batches=(1,), rounds=1)
  assert found["dense"].flops == 2 * 1350 and found["sparse"].flops == 2 * 68


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
  with pytest.raises(ValueError, match="the same number of examples"):
    deploy.report(apply, pruned, inputs(0))
  with pytest.raises(ValueError, match="the same number of examples"):
    deploy.report(lambda p, x, scale: scale * apply(p, x), pruned, (inputs(1), np.float32(2)))
  with pytest.raises(ValueError, match="must be logits, one row for each"):
    deploy.report(
      lambda p, x: apply(p, x)[:2], pruned, inputs(), labels=np.zeros(20, int), batches=1
    )


def test_it_needs_no_file_of_its_own(pruned, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  deploy.report(apply, pruned, inputs(), batches=(1,), rounds=1)
  assert not list(tmp_path.iterdir())
