"""Scores and masks that the original code of each method made; `oracles/README.md` says whose."""

import contextlib
import functools
import hashlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsejax
from sparsejax import allocation, foresight

FOLDER = pathlib.Path(__file__).parent / "oracles"
META = json.loads((FOLDER / "foresight.json").read_text())
NETS = ["mlp", "cnn"]
ROUNDS = [10, 100]
KEPT_COUNTS = META["snip_kept_counts"]


@functools.cache
def load(name):
  with np.load(FOLDER / f"{name}.npz") as file:
    return dict(file)


@pytest.fixture(params=["float32", "float64"])
def tolerance(request):
  """Runs a test in both precisions; how far scores may be off, as a share of the largest."""
  with jax.enable_x64(request.param == "float64"):
    yield {"float32": 1e-4, "float64": 1e-9}[request.param]


def floats(array):
  """An array in the widest type that is enabled."""
  return jnp.asarray(array, jnp.result_type(float))


def parameters(arrays):
  """The parameters, in the layout of the originals: (out, in) and OIHW."""
  params = {}
  for name, array in arrays.items():
    if name.startswith("w/"):
      layer, kind = name.removeprefix("w/").split(".")
      params.setdefault(layer, {})[kind] = floats(array)
  return params


def apply(params, inputs):
  """Either network, on images in NCHW: the kernels say which layers are convolutions."""
  x = inputs
  names = sorted(params, key=int)
  for name in names:
    kernel, bias = params[name]["weight"], params[name]["bias"]
    if kernel.ndim == 4:
      layout = ("NCHW", "OIHW", "NCHW")
      x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)
      x += bias[:, None, None]
    else:
      x = x.reshape(len(x), -1) @ kernel.T + bias
    if name != names[-1]:
      x = jax.nn.relu(x)
  return x


def cross_entropy(logits, labels):
  return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels])


def loss(params, batch, temperature=1):
  images, labels = batch
  return cross_entropy(apply(params, images) / temperature, labels)


def halves(images, labels):
  images, middle = floats(images), len(labels) // 2
  return [(images[:middle], labels[:middle]), (images[middle:], labels[middle:])]


def weights(tree):
  """The kernels by layer, as NumPy arrays."""
  return {name: np.asarray(layer["weight"]) for name, layer in tree.items()}


def stored(arrays, prefix):
  """What is stored under a prefix, by layer."""
  found = {
    name.removeprefix(prefix).removesuffix(".weight"): array
    for name, array in arrays.items()
    if name.startswith(prefix)
  }
  assert found, prefix
  return found


def relative(scores):
  largest = max(np.max(np.abs(score)) for score in scores.values())
  return {name: score / largest for name, score in scores.items()}


def assert_scores(actual, expected, tolerance):
  actual, expected = relative(actual), relative(expected)
  assert actual.keys() == expected.keys()
  for name in expected:
    np.testing.assert_allclose(actual[name], expected[name], rtol=0, atol=tolerance)


def assert_masks(actual, expected):
  assert actual.keys() == expected.keys()
  for name in expected:
    np.testing.assert_array_equal(actual[name], expected[name].astype(bool))


def kept(masks):
  return sum(int(mask.sum()) for mask in masks.values())


def sparsity_that_keeps(masks):
  return 1 - kept(masks) / sum(mask.size for mask in masks.values())


def masks_like(expected, scores):
  """Masks that keep as many weights as the expected ones: the test is which."""
  emptied = [f"{name}/weight" for name, mask in expected.items() if not mask.any()]
  warns = pytest.warns(UserWarning, match=f"no weight is left in '{'.*'.join(emptied)}'")
  with warns if emptied else contextlib.nullcontext():
    masks = sparsejax.masks_from_scores(scores, sparsity_that_keeps(expected))
  return weights(masks)


def test_float32_may_be_asked_for_the_same_masks():
  """The originals themselves made the same masks in single precision."""
  checked = 0
  for name, meta in META.items():
    if name.startswith(("synapticflow", "grasp", "snip_milad")):
      for summary in meta["masks_summary"].values():
        # None where the original draws other weights in another precision.
        assert summary["float32_mask_disagreements"] in (0, None)
        checked += 1
  assert checked == 2 * (16 + 12 + 3)


# Synaptic-Flow: magnitude, SNIP, GraSP and SynFlow.


def synapticflow(net):
  arrays = load(f"synapticflow_{net}")
  return arrays, parameters(arrays), jnp.ones((1, *arrays["x_nchw"].shape[1:]))


def score_as_synapticflow(method, arrays, params, ones):
  # It accumulates the gradients of two batches, then scores.
  batches = halves(arrays["x_nchw"], arrays["y"])
  if method == "mag":
    return foresight.magnitude(params)
  if method == "snip":
    return foresight.snip(lambda p, both: sum(loss(p, b) for b in both), params, batches)
  if method == "grasp":
    return foresight.grasp(functools.partial(loss, temperature=200), params, batches)
  return foresight.synflow_scores(apply, params, ones)


@pytest.mark.parametrize("method", ["mag", "snip", "grasp", "synflow"])
@pytest.mark.parametrize("net", NETS)
def test_scores_and_global_masks_are_those_of_synapticflow(net, method, tolerance):
  arrays, params, ones = synapticflow(net)
  scores = score_as_synapticflow(method, arrays, params, ones)
  assert_scores(weights(scores), stored(arrays, f"score/{method}/"), tolerance)
  for density in ("0.5", "0.2", "0.05"):
    expected = stored(arrays, f"mask/{method}/d{density}/")
    summary = META[f"synapticflow_{net}"]["masks_summary"][f"{method}@{density}"]
    assert kept(expected) == summary["kept"]
    assert_masks(masks_like(expected, scores), expected)


@pytest.mark.parametrize("density", [0.2, 0.05])
@pytest.mark.parametrize("net", NETS)
def test_masks_per_layer_are_those_of_synapticflow(net, density, tolerance):
  arrays, params, _ = synapticflow(net)
  scores, expected = foresight.magnitude(params), stored(arrays, f"mask/mag_local/d{density}/")
  masks = weights(sparsejax.masks_from_scores(scores, 1 - density, allocation="uniform"))
  # It rounds what is pruned down, and in one case keeps one weight more in two layers.
  more = {name: int(expected[name].sum() - masks[name].sum()) for name in masks}
  both = ("0", "2") if (net, density) == ("cnn", 0.05) else ()
  assert more == {name: int(name in both) for name in masks}
  for name, number in more.items():
    if number:
      pruned = np.where(masks[name], -np.inf, weights(scores)[name])
      masks[name] = masks[name] | (pruned == pruned.max())
  assert_masks(masks, expected)


def rounds_of_synapticflow(params, ones, densities):
  """The rounds with its counts: what is pruned is rounded down, and not up or down.

  Yields the scores of each round, and the masks after it.
  """
  score = jax.jit(functools.partial(foresight.synflow_scores, apply, params, ones))
  masks = jax.tree.map(lambda p: jnp.ones_like(p, dtype=bool), params)
  total = sum(weight.size for weight in weights(params).values())
  for density in densities:
    scores = score(masks)
    pruned = int((1 - density) * total)
    pool = {name: layer["weight"] for name, layer in scores.items()}
    active = {name: layer["weight"] for name, layer in masks.items()}
    drop = sparsejax.select_smallest(pool, pruned - (total - kept(active)), among=active)
    masks = {
      name: {**layer, "weight": layer["weight"] & ~drop[name]} for name, layer in masks.items()
    }
    yield scores, masks


@pytest.mark.parametrize("schedule", ["exponential", "linear"])
@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("net", NETS)
def test_rounds_of_synflow_scores_give_the_masks_of_synapticflow(net, rounds, schedule, tolerance):
  arrays, params, ones = synapticflow(net)
  name = f"synflow_iter{rounds}_{schedule}"
  if schedule == "exponential":
    densities = [0.05 ** ((k + 1) / rounds) for k in range(rounds)]
  else:
    densities = [1 - (1 - 0.05) * ((k + 1) / rounds) for k in range(rounds)]
  history = list(rounds_of_synapticflow(params, ones, densities))
  if rounds == 10:
    for k in (1, 9):
      expected = stored(arrays, f"score/{name}/iter{k}/")
      assert_scores(weights(history[k][0]), expected, tolerance)
  assert_masks(weights(history[-1][1]), stored(arrays, f"mask/{name}/d0.05/"))


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("net", NETS)
def test_synflow_gives_the_masks_of_synapticflow(net, rounds, tolerance):
  arrays, params, ones = synapticflow(net)
  expected = stored(arrays, f"mask/synflow_iter{rounds}_exponential/d0.05/")
  masks = foresight.synflow(apply, params, ones, 0.95, rounds=rounds)
  assert_masks(weights(masks), expected)


# The authors' GraSP.


def grasp_cases():
  return ["T200_iters1", "T1_iters1", "T200_iters2", "T200_iters1_reinitfc"]


@pytest.mark.parametrize("case", grasp_cases())
@pytest.mark.parametrize("net", NETS)
def test_grasp_is_that_of_its_authors(net, case, tolerance):
  arrays = load(f"grasp_original_{net}")
  params = parameters(arrays)
  dense = [name for name in sorted(params, key=int) if params[name]["weight"].ndim == 2]
  if case.endswith("reinitfc"):  # Their code scores a copy with other weights in dense layers.
    for i, name in enumerate(dense):
      params[name]["weight"] = floats(arrays[f"reinit_fc/{case}/{i}"])
  batches = []
  for i in range(2 if "iters2" in case else 1):  # Of each batch, sorted by class, two halves.
    batches += halves(arrays[f"fetched_x/{case}/{i}"], arrays[f"fetched_y/{case}/{i}"])
  temperature = 200 if "T200" in case else 1
  scores = foresight.grasp(functools.partial(loss, temperature=temperature), params, batches)

  negative = {name: -score for name, score in stored(arrays, f"score_norm/{case}/").items()}
  assert_scores(weights(scores), negative, tolerance)
  for sparsity in ("0.5", "0.8", "0.95"):
    expected = stored(arrays, f"mask/{case}/s{sparsity}/")
    summary = META[f"grasp_original_{net}"]["masks_summary"][f"{case}@sparsity{sparsity}"]
    total = sum(mask.size for mask in expected.values())
    # Their comparison keeps one weight more than is asked for.
    assert kept(expected) == summary["kept"] == total - summary["num_params_to_rm"] + 1
    assert_masks(masks_like(expected, scores), expected)


# SNIP: the widely used PyTorch code, and the authors' own.


@pytest.mark.parametrize("net", NETS)
def test_snip_is_that_of_mi_lad(net, tolerance):
  arrays = load(f"snip_milad_{net}")
  batch = floats(arrays["x_nchw"]), arrays["y"]
  scores = foresight.snip(loss, parameters(arrays), batch)
  expected = stored(arrays, "score_norm/")
  assert_scores(weights(scores), expected, tolerance)
  total = sum(score.sum() for score in weights(scores).values())
  for name, score in weights(scores).items():  # Divided by their sum, the scores of the paper.
    np.testing.assert_allclose(
      score / total, expected[name], rtol=0, atol=tolerance * expected[name].max()
    )
  for keep in ("0.5", "0.1", "0.03"):
    expected = stored(arrays, f"mask/k{keep}/")
    assert kept(expected) == META[f"snip_milad_{net}"]["masks_summary"][f"keep{keep}"]["kept"]
    assert_masks(masks_like(expected, scores), expected)


def sha256(array):
  return hashlib.sha256(array.tobytes()).hexdigest()


def lenet300():
  """The weights and images that the rule in the manifest makes."""
  meta = META["snip_original_tf_lenet300"]
  state, params = np.random.RandomState(501), {}
  for name, shape in meta["shapes"].items():
    scale = np.sqrt(1 / np.prod(shape[:-1])) if len(shape) > 1 else 0.05
    params[name] = (state.randn(*shape) * scale).astype(np.float32)
    assert sha256(params[name]) == meta["weight_sha256"][name]
  images = np.random.RandomState(502).randn(100, 28, 28, 1).astype(np.float32)
  assert sha256(images) == meta["x_sha256"]
  return params, images


def apply_lenet300(params, images):
  x = images.reshape(len(images), -1)
  for i in (1, 2):
    x = jax.nn.relu(x @ params[f"w{i}"] + params[f"b{i}"])
  return x @ params["w3"] + params["b3"]


@pytest.mark.parametrize("x64", [False, True])
def test_snip_is_that_of_its_authors_on_lenet_300_100(x64):
  arrays = load("snip_original_tf_lenet300") | load("snip_original_tf_lenet300_w1")
  params, images = lenet300()
  with jax.enable_x64(x64):
    params, images = jax.tree.map(floats, (params, images))
    np.testing.assert_allclose(apply_lenet300(params, images), arrays["logits"], atol=1e-5)
    scores = foresight.snip(
      lambda p, batch: cross_entropy(apply_lenet300(p, batch[0]), batch[1]),
      params,
      (images, jnp.arange(100) % 10),
    )
    np.testing.assert_array_equal(arrays["y"], np.arange(100) % 10)
    total = sum(float(jnp.sum(score)) for score in scores.values())
    largest = max(float(jnp.max(score)) for score in scores.values())
    stored_scores = {name: arrays[f"score_norm/{name}"] for name in scores if name != "w1"}
    for name, expected in stored_scores.items():
      np.testing.assert_allclose(
        scores[name] / total, expected, rtol=0, atol=1e-5 * largest / total
      )
    every_4th = arrays["score_norm_every_4th_row/w1"]
    assert every_4th.shape == (196, 300)
    np.testing.assert_allclose(
      scores["w1"][::4] / total, every_4th, rtol=0, atol=1e-5 * largest / total
    )
    for sparsity in ("0.5", "0.9", "0.98"):
      # Their pool is weights and biases.
      masks = sparsejax.masks_from_scores(scores, float(sparsity), prunable=lambda path, leaf: True)
      summary = META["snip_original_tf_lenet300"]["masks_summary"][f"s{sparsity}"]
      counts = {name: int(mask.sum()) for name, mask in masks.items()}
      assert counts == summary["kept_per_tensor"]
      for name, mask in masks.items():
        bits = arrays[f"mask_packbits/s{sparsity}/{name}"]
        expected = np.unpackbits(bits, count=mask.size).reshape(mask.shape)
        np.testing.assert_array_equal(np.asarray(mask), expected.astype(bool))


@pytest.mark.parametrize("name", KEPT_COUNTS["kept"])
def test_the_networks_of_snip_keep_as_many_weights_and_biases(name):
  kernels = [tuple(shape) for shape in KEPT_COUNTS["kernels"][name]]
  shapes = kernels + [shape[-1:] for shape in kernels]
  total = sum(int(np.prod(shape)) for shape in shapes)
  (pruned,) = allocation.count_pruned(shapes, KEPT_COUNTS["sparsity"][name], "global")
  assert total - pruned == KEPT_COUNTS["kept"][name]
