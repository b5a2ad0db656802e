"""Inference without JAX: the outputs of JAX, and the faster matrix in each layer."""

import pathlib
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sparsejax.deploy import runtime
from sparsejax.deploy.runtime import (
  Conv,
  Dense,
  Network,
  Pool,
  affine,
  compiled,
  flatten,
  relu,
  timing,
)
from sparsejax.deploy.runtime.network import _Product
from sparsejax.deploy.runtime.threads import in_parts


def sparse(*shape, density=0.1, seed=0):
  rng = np.random.default_rng(seed)
  return np.where(rng.random(shape) < density, rng.normal(size=shape), 0).astype(np.float32)


def images(count=3):
  return np.random.default_rng(9).random((count, 12, 11, 4), np.float32)


@pytest.mark.parametrize("kind", ["dense", "sparse", "fastest"])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("padding", ["SAME", "VALID", ((1, 2), (0, 1))], ids=str)
def test_a_convolution_is_that_of_jax(padding, strides, kind):
  kernel, bias = sparse(3, 2, 4, 5), sparse(5, density=1)
  expected = bias + lax.conv_general_dilated(
    images(), kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  network = Network([Conv(kernel, bias, relu, strides, padding)], images(1), kind=kind)
  np.testing.assert_allclose(network(images()), jnp.maximum(expected, 0), atol=1e-5)


@pytest.mark.parametrize("strides", [None, (1, 2)])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("kind", ["max", "mean"])
def test_pooling_is_that_of_jax(kind, padding, strides):
  function, start = (lax.max, -jnp.inf) if kind == "max" else (lax.add, 0.0)
  expected = lax.reduce_window(
    images() - 0.5, start, function, (1, 3, 2, 1), (1, *(strides or (3, 2)), 1), padding
  )
  expected = expected / (6 if kind == "mean" else 1)
  got = Pool(kind, (3, 2), strides, padding)(images() - 0.5)
  np.testing.assert_allclose(got, expected, atol=1e-6)


def test_windows_that_are_smaller_than_their_strides_leave_pixels_out_as_those_of_jax():
  kernel = sparse(1, 1, 4, 5, density=1)
  expected = lax.conv_general_dilated(
    images(), kernel, (2, 3), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  network = Network([Conv(kernel, strides=(2, 3))], images(1), kind="dense")
  np.testing.assert_allclose(network(images()), expected, atol=1e-6)
  np.testing.assert_array_equal(
    Pool("max", (1, 1), (2, 3), "SAME")(images()), images()[:, ::2, ::3]
  )


@pytest.mark.parametrize("kind", ["dense", "sparse", "fastest"])
def test_a_network_of_all_kinds_of_layers_is_that_of_jax_for_any_batch(kind):
  layers = [
    Conv(sparse(3, 3, 4, 6), activation=relu),
    Pool("max", (2, 2)),
    flatten,
    Dense(sparse(180, 20, seed=1), sparse(20, density=1), relu),
    Dense(sparse(20, 7, seed=2, density=0.5)),
  ]
  network = Network(layers, images(2), kind=kind)
  for count in (1, 5):
    x = lax.conv_general_dilated(
      images(count), layers[0].kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = lax.reduce_window(jax.nn.relu(x), -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = jax.nn.relu(x.reshape(count, -1) @ layers[3].kernel + layers[3].bias) @ layers[4].kernel
    np.testing.assert_allclose(network(images(count)), x, atol=1e-4)


@pytest.fixture(params=["numba", "scipy"])
def by(request, monkeypatch):
  """By what sparse products are made."""
  if request.param == "scipy":
    monkeypatch.setattr(compiled, "run_of", lambda dtype: None)
  return request.param


def test_without_numba_nothing_is_compiled(monkeypatch):
  monkeypatch.setitem(sys.modules, "numba", None)
  assert compiled.run_of.__wrapped__(np.dtype(np.float32)) is None


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("count", [0, 1, 7, 64])
def test_a_sparse_product_is_the_dense_one_however_its_rows_lie_in_memory(count, dtype, by):
  matrix = sparse(23, 31, density=0.3).astype(dtype)
  matrix[:, 4] = matrix[5] = 0
  multiply = affine.sparse(affine.Affine(matrix))
  assert (compiled.run_of(matrix.dtype) is None) == (by == "scipy")
  rows = np.random.default_rng(1).normal(size=(count, 46)).astype(dtype)
  for x in (rows[:, :23], rows[:, ::2], np.asfortranarray(rows[:, 23:]), rows[:, 22::-1]):
    x.flags.writeable = False
    out = multiply(x)
    assert out.dtype == dtype
    np.testing.assert_allclose(out, x @ matrix, rtol=1e-5, atol=1e-5)


def test_a_sparse_product_has_inf_and_nan_where_they_belong(by):
  x = np.ones((2, 6), np.float32)
  x[0, 2], x[1, 3] = np.nan, -np.inf
  matrix = np.eye(6, 5, dtype=np.float32)
  expected = np.ones((2, 5), np.float32)
  expected[0, 2], expected[1, 3] = np.nan, -np.inf
  np.testing.assert_array_equal(affine.sparse(affine.Affine(matrix))(x), expected)


def test_a_sparse_product_takes_numbers_of_other_types_as_scipy_does(by):
  multiply = affine.sparse(affine.Affine(np.eye(3, dtype=np.float32)))
  for dtype in (np.float64, np.int32, np.float16):
    out = multiply(np.arange(6).reshape(2, 3).astype(dtype))
    assert out.dtype == np.result_type(np.float32, dtype)
    np.testing.assert_array_equal(out, [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 65, 200])
def test_sparse_layers_are_products_with_biases_and_floors_one_after_the_other(count, threads, by):
  layers = [
    affine.Affine(sparse(30, 20, density=0.3), sparse(20, density=1), 0.0),
    affine.Affine(sparse(20, 9, density=0.2, seed=1)),
    affine.Affine(sparse(9, 40, density=0.5, seed=2), floor=-0.5),
    affine.Affine(sparse(40, 3, density=0.1, seed=3), sparse(3, density=1)),
  ]
  x = np.random.default_rng(0).normal(size=(count, 2, 30)).astype(np.float32)
  x[1:2, 0, 1], x[1:2, 1, 2] = np.nan, np.inf
  expected = x
  with np.errstate(invalid="ignore"):
    for matrix, bias, floor in layers:
      # Nothing is not multiplied: 0 times inf would be NaN.
      expected = np.stack(
        [(expected[..., column != 0] * column[column != 0]).sum(-1) for column in matrix.T], -1
      )
      expected = expected if bias is None else expected + bias
      expected = expected if floor is None else np.maximum(expected, floor)
    found = affine.SparseLayers(layers, threads)(x)
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_sparse_layers_that_do_not_fit_are_an_error():
  layers = [affine.Affine(np.eye(2, dtype=dtype)) for dtype in (np.float32, np.float64)]
  with pytest.raises(ValueError, match="not of float32 and float64: convert them"):
    affine.SparseLayers(layers)
  with pytest.raises(ValueError, match="a layer takes 3 numbers, but gets 2"):
    affine.SparseLayers([affine.Affine(sparse(3, 2)), affine.Affine(sparse(3, 2))])
  with pytest.raises(ValueError, match="the first layer takes 3 numbers, but gets 2"):
    affine.SparseLayers([affine.Affine(sparse(3, 2))])(np.ones((1, 2), np.float32))


def test_sparse_layers_of_a_network_that_follow_each_other_are_one(by):
  layers = [
    Dense(sparse(9, 8, density=0.5), sparse(8, density=1), relu),
    Dense(sparse(8, 7, density=0.5)),
    Dense(sparse(7, 6, density=0.5), activation=np.tanh),
    Dense(sparse(6, 5, density=0.5).astype(np.float64)),
    Dense(sparse(5, 4, density=0.5), activation=relu),
  ]
  x = np.random.default_rng(0).normal(size=(3, 9)).astype(np.float32)
  network = Network(layers, x, kind="sparse")
  kinds = [isinstance(function, affine.SparseLayers) for function in network._layers]
  assert kinds == [True, False, True, True]  # tanh is no floor; then there are two types.
  np.testing.assert_allclose(network(x), Network(layers, x, kind="dense")(x), atol=1e-5)


def copy_runtime(folder):
  shutil.copytree(pathlib.Path(runtime.__file__).parent, folder / "runtime")


def test_parts_are_computed_in_threads_also_in_a_process_that_was_forked(tmp_path):
  numbers = np.arange(10)
  for threads in (1, 2, 3, 11):
    parts = in_parts(lambda x, y: x + y, threads, numbers, numbers)
    assert len(parts) == threads
    np.testing.assert_array_equal(np.concatenate(parts), 2 * numbers)
  for last in (4, 9):  # An error in the first part, and in the last.
    with pytest.raises(ZeroDivisionError):
      in_parts(lambda x, last=last: 1 // (last - int(x.max())), 2, numbers)
  copy_runtime(tmp_path)
  program = """
    import os, sys
    import numpy as np
    from runtime.threads import in_parts
    assert in_parts(len, 2, np.ones(4)) == [2, 2]
    child = os.fork()
    if not child:
      os._exit(in_parts(len, 2, np.ones(6)) != [3, 3])
    sys.exit(os.waitpid(child, 0)[1] != 0)
  """
  subprocess.run(
    [sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path, check=True, timeout=60
  )


def test_a_batch_may_be_empty():
  layers = [Conv(sparse(3, 3, 4, 2)), Pool("max", (2, 2)), flatten, Dense(sparse(8, 3))]
  network = Network(layers, np.ones((1, 4, 4, 4), np.float32), kind="dense")
  assert network(np.ones((0, 4, 4, 4), np.float32)).shape == (0, 3)


def scripted(monkeypatch, **seconds):
  """Functions whose calls take so many seconds, one after the other."""
  now = 0.0

  def function(of_calls):
    def call(*args):
      nonlocal now
      now += next(of_calls)

    return call

  monkeypatch.setattr("time.perf_counter", lambda: now)
  return {name: function(iter(of_calls)) for name, of_calls in seconds.items()}


def test_of_each_turn_the_fastest_call_counts_but_not_the_first_of_all(monkeypatch):
  functions = scripted(monkeypatch, a=[1, 3, 2, 5, 6], b=[0, 8, 9])
  # A turn is over as soon as its six seconds are.
  assert runtime.take_turns(functions, 2, turn=6) == {"a": [2, 6], "b": [8, 9]}


def test_the_fastest_of_all_rounds_decides(monkeypatch):
  functions = scripted(monkeypatch, a=[9, 3, 3, 1], b=[1, 2, 2, 2])
  ways = {name: lambda function=function: function for name, function in functions.items()}
  assert timing.choose(ways, np.ones(1), rounds=3) == ("a", functions["a"])


@pytest.mark.parametrize("faster", ["dense", "sparse"])
def test_each_layer_multiplies_in_the_way_that_takes_less_time(faster, monkeypatch):
  now = 0.0

  def takes(seconds, way):
    def slow(*args):
      nonlocal now
      now += seconds
      return way(*args)

    return slow

  monkeypatch.setattr("time.perf_counter", lambda: now)
  for name, of in (("dense", _Product), ("sparse", affine.SparseLayers)):
    monkeypatch.setattr(of, "__call__", takes(1 if name == faster else 2, of.__call__))
  layers = [Dense(sparse(9, 8)), flatten, Dense(sparse(8, 2))]
  assert Network(layers, np.ones((1, 9), np.float32)).choices == [faster, faster]


def test_a_layer_that_does_not_fit_or_has_nan_is_an_error_that_says_which():
  with pytest.raises(ValueError, match="layer 1 takes 8 numbers, but gets 7"):
    Network([Dense(sparse(9, 7)), Dense(sparse(8, 2))], np.ones((1, 9), np.float32))
  nan = np.full((2, 2), np.nan, np.float32)
  with pytest.raises(ValueError, match="activation of layer 0 must be a function, got 'relu'"):
    Network([Dense(np.ones((8, 4)), activation="relu")], np.ones((1, 8)))
  with pytest.raises(ValueError, match=r"bias of layer 0 must have shape \(4,\), got \(1, 4\)"):
    Network([Dense(np.ones((8, 4)), np.ones((1, 4)))], np.ones((1, 8)))
  with pytest.raises(ValueError, match=r"kind must be 'fastest' or one of .*, got 'spares'"):
    Network([Dense(np.ones((8, 4)))], np.ones((1, 8)), kind="spares")
  with pytest.raises(ValueError, match="layer 0 has NaN in its kernel"):
    Network([Dense(nan)], np.ones((1, 2), np.float32))
  with pytest.raises(ValueError, match="layer 0 has NaN in its bias"):
    Network([Dense(np.ones((2, 2), np.float32), nan[0])], np.ones((1, 2), np.float32))
  with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
    Network([Dense(np.ones((2, 2)))], np.ones((1, 2)), rounds=0)
  with pytest.raises(ValueError, match="not of float16"):
    Network([Dense(np.ones((2, 2), np.float16))], np.ones((1, 2), np.float16))


def test_the_folder_runs_by_itself_without_jax(tmp_path):
  copy_runtime(tmp_path)
  program = """
    import sys
    sys.modules["jax"] = sys.modules["sparsejax"] = None
    import numpy as np, runtime
    network = runtime.Network([runtime.Dense(np.eye(3))], np.ones((1, 3)))
    print(network(np.arange(3.0)[None]).tolist())
  """
  command = [sys.executable, "-c", textwrap.dedent(program)]
  done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
  assert done.stdout == "[[0.0, 1.0, 2.0]]\n"
