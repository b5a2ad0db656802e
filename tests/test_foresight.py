"""Pruning before training against finite differences and slow NumPy, and what goes wrong."""

import collections
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax.core import freeze
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sparsejax
from sparsejax import allocation, foresight


def make_params(seed=0, dtype=jnp.float32, sizes=(6, 8, 4)):
  rng = np.random.default_rng(seed)
  return {
    f"dense{i}": {
      "kernel": jnp.asarray(rng.normal(size=shape), dtype),
      "bias": jnp.asarray(rng.normal(size=shape[1]) / 4, dtype),
    }
    for i, shape in enumerate(itertools.pairwise(sizes))
  }


def make_batch(seed=0, size=5, dtype=jnp.float32):
  rng = np.random.default_rng(100 + seed)
  return jnp.asarray(rng.normal(size=(size, 6)), dtype), jnp.asarray(rng.integers(4, size=size))


def forward(params, inputs, xp=jnp):
  hidden = xp.tanh(inputs @ params["dense0"]["kernel"] + params["dense0"]["bias"])
  return hidden @ params["dense1"]["kernel"] + params["dense1"]["bias"]


def loss(params, batch, xp=jnp):
  inputs, labels = batch
  logits = forward(params, inputs, xp)
  chosen = logits[xp.arange(len(labels)), labels]
  return xp.mean(xp.log(xp.sum(xp.exp(logits), axis=-1)) - chosen)


def score(method, params):
  if method == "snip":
    return foresight.snip(loss, params, make_batch())
  if method == "grasp":
    return foresight.grasp(loss, params, [make_batch(1), make_batch(2)])
  if method == "synflow":
    return foresight.synflow_scores(forward, params, jnp.ones((1, 6)))
  if method == "random":
    return foresight.random(params, jax.random.key(0))
  return foresight.magnitude(params)


METHODS = ["magnitude", "random", "snip", "grasp", "synflow"]
GRADIENTS = ["snip", "grasp", "synflow"]


def assert_close(actual, expected, rtol=1e-5):
  """Trees of scores that agree, as a share of the largest score."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  largest = max(float(np.max(np.abs(leaf))) for leaf in jax.tree.leaves(expected))
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(
      reference.as_float64(a), reference.as_float64(b), rtol=0, atol=rtol * largest
    )


def assert_same(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# The definitions, by finite differences in float64.


def flat(params):
  """The parameters as one vector, and the loss as NumPy computes it from the vector."""
  leaves, treedef = jax.tree.flatten(jax.tree.map(reference.as_float64, params))
  ends = np.cumsum([leaf.size for leaf in leaves])[:-1]

  def tree(vector):
    pieces = np.split(vector, ends)
    return jax.tree.unflatten(treedef, [p.reshape(x.shape) for p, x in zip(pieces, leaves)])

  return np.concatenate([leaf.ravel() for leaf in leaves]), tree


def numpy_loss(tree, batch):
  inputs, labels = batch
  return lambda vector: loss(tree(vector), (reference.as_float64(inputs), np.array(labels)), np)


def gradient(function, vector, step):
  moves = step * np.eye(vector.size)
  return np.array([(function(vector + m) - function(vector - m)) / (2 * step) for m in moves])


def test_snip_is_the_derivative_by_a_factor_in_front_of_each_weight():
  params, batch = make_params(), make_batch()
  vector, tree = flat(params)
  function = numpy_loss(tree, batch)
  # c is what SNIP calls the connection: the weight is c * w, at c = 1.
  by_connection = gradient(lambda c: function(c * vector), np.ones_like(vector), 1e-6)
  assert_close(foresight.snip(loss, params, batch), tree(np.abs(by_connection)), 1e-5)


@pytest.mark.parametrize("everything", [False, True])
def test_grasp_is_the_weight_times_the_hessian_times_the_gradient_of_the_pool(everything):
  params = make_params(1)
  batches = [make_batch(1), make_batch(2, size=3)]
  vector, tree = flat(params)
  functions = [numpy_loss(tree, batch) for batch in batches]
  total = lambda v: sum(function(v) for function in functions)
  slope = lambda v: gradient(total, v, 1e-5)
  direction = slope(vector)
  if not everything:
    pool = jax.tree.map(lambda p: np.full(p.shape, p.ndim >= 2), params)
    direction = direction * np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(pool)])
  hessian = gradient(slope, vector, 1e-3)
  np.testing.assert_allclose(hessian, hessian.T, atol=1e-4)
  prunable = (lambda path, leaf: True) if everything else sparsejax.is_kernel
  scores = foresight.grasp(loss, params, batches, prunable=prunable)
  assert_close(scores, tree(vector * (hessian @ direction)), 1e-4)


def test_grasp_of_a_quadratic_is_its_matrix_twice():
  rng = np.random.default_rng(3)
  batches = [(m + m.T, rng.normal(size=4)) for m in rng.normal(size=(3, 4, 4))]
  weights = rng.normal(size=(2, 2))

  def quadratic(params, batch):
    matrix, offset = batch
    w = params["w"].ravel()
    return w @ matrix @ w / 2 + offset @ w

  matrix, offset = sum(b[0] for b in batches), sum(b[1] for b in batches)
  expected = weights.ravel() * (matrix @ (matrix @ weights.ravel() + offset))
  with jax.enable_x64(True):
    scores = foresight.grasp(quadratic, {"w": weights}, batches)
    np.testing.assert_allclose(scores["w"].ravel(), expected, rtol=1e-12)


def test_grasp_sums_gradients_over_batches_and_not_scores():
  params, batches = make_params(), [make_batch(i) for i in range(4)]
  scores = foresight.grasp(loss, params, batches)
  at_once = foresight.grasp(
    lambda p, all_of_them: sum(loss(p, b) for b in all_of_them), params, [batches]
  )
  assert_close(scores, at_once)
  one_by_one = [foresight.grasp(loss, params, [batch]) for batch in batches]
  summed = jax.tree.map(lambda *s: sum(s), *one_by_one)
  assert np.max(np.abs(summed["dense0"]["kernel"] - scores["dense0"]["kernel"])) > 0.1
  twice = foresight.grasp(loss, params, [batches[0]] * 2)  # H and g are twice as large.
  assert_close(twice, jax.tree.map(lambda s: 4 * s, one_by_one[0]))


def test_grasp_prunes_first_what_lowers_the_norm_of_the_gradient_least():
  weights, scale = jnp.array([[2.0, -1.0, 0.5]]), jnp.array([[1.0, -2.0, 8.0]])
  curved = lambda p, scale: jnp.sum(scale * p["kernel"] ** 3) / 6
  scores = foresight.grasp(curved, {"kernel": weights}, [scale])["kernel"]
  norm = lambda w: jnp.sum(jax.grad(lambda w: curved({"kernel": w}, scale))(w) ** 2)
  # To first order, removing a weight takes 2 w H g from the squared norm of the gradient.
  np.testing.assert_allclose(2 * scores, weights * jax.grad(norm)(weights), rtol=1e-6)


def test_magnitude_and_random_scores():
  params = {"a": jnp.array([[-3.0, 2.0]]), "b": jnp.array([[1.0, -0.0]]), "c": jnp.zeros((40, 50))}
  assert_same(foresight.magnitude(params), jax.tree.map(jnp.abs, params))
  scores = foresight.random(params, jax.random.key(1))
  assert_same(scores, foresight.random(params, jax.random.key(1)))
  assert np.all(scores["a"] != foresight.random(params, jax.random.key(2))["a"])
  assert np.all(scores["a"] != scores["b"])  # The key is another one in each leaf.
  values = np.sort(np.ravel(scores["c"]))
  assert len(np.unique(values)) > 1990
  np.testing.assert_allclose(values, np.linspace(0, 1, 2000), atol=0.05)
  legacy = foresight.random(params, jax.random.PRNGKey(1))
  assert_same(legacy, scores)


# Trees, data types, transformations of JAX, devices.

Pair = collections.namedtuple("Pair", ["kernel", "bias"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
  "wrap",
  [freeze, lambda p: jax.tree.map(np.asarray, p), lambda p: collections.OrderedDict(p)],
  ids=["frozen", "numpy", "ordered"],
)
def test_scores_have_the_structure_of_the_parameters(method, wrap):
  params = make_params()
  scores = score(method, wrap(params))
  assert jax.tree.structure(scores) == jax.tree.structure(wrap(params))
  assert jax.tree.map(np.shape, scores) == jax.tree.map(np.shape, wrap(params))
  assert_same(jax.tree.leaves(scores), jax.tree.leaves(score(method, params)))


def test_parameters_may_be_lists_and_tuples():
  params = [Pair(**layer) for layer in make_params().values()]

  def apply(params, inputs):
    return forward({f"dense{i}": p._asdict() for i, p in enumerate(params)}, inputs)

  scores = foresight.snip(
    lambda p, b: loss({f"dense{i}": q._asdict() for i, q in enumerate(p)}, b), params, make_batch()
  )
  expected = score("snip", make_params())
  assert isinstance(scores[0], Pair)
  np.testing.assert_array_equal(scores[1].kernel, expected["dense1"]["kernel"])
  masks = foresight.synflow(apply, params, jnp.ones((1, 6)), 0.5, rounds=3)
  assert jax.tree.structure(masks) == jax.tree.structure(params)


@pytest.mark.parametrize("method", GRADIENTS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_reaches_the_function_and_scores_are_in_single_precision(method, dtype):
  params, seen = make_params(dtype=dtype), []

  def watched(params, inputs):
    seen.append({leaf.dtype for leaf in jax.tree.leaves(params)})
    return forward(params, inputs)

  ones = jnp.ones((1, 6), dtype)
  if method == "synflow":
    scores = foresight.synflow_scores(watched, params, ones)
  else:
    watched_loss = lambda params, batch: watched(params, batch[0]) @ jnp.arange(1, 5, dtype=dtype)
    square = lambda params, batch: jnp.mean(watched_loss(params, batch) ** 2)
    batch = (make_batch(dtype=dtype)[0],)
    scores = (
      foresight.snip(square, params, batch)
      if method == "snip"
      else foresight.grasp(square, params, [batch])
    )
  assert seen and all(dtypes == {jnp.dtype(dtype)} for dtypes in seen)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(scores))
  wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
  if method == "synflow":
    expected = foresight.synflow_scores(forward, wide, ones.astype(jnp.float32))
  else:
    batch = (batch[0].astype(jnp.float32),)
    square = lambda p, b: jnp.mean((forward(p, b[0]) @ jnp.arange(1.0, 5.0)) ** 2)
    expected = (
      foresight.snip(square, wide, batch)
      if method == "snip"
      else foresight.grasp(square, wide, [batch])
    )
  assert_close(scores, expected, 0.1 if dtype == jnp.bfloat16 else 0.01)


def test_grasp_adds_up_half_precision_gradients_in_single_precision():
  params = {"w": jnp.ones((1, 1), jnp.bfloat16)}
  half = lambda params, batch: jnp.sum(params["w"] ** 2) / 2
  scores = foresight.grasp(half, params, [jnp.ones(1)] * 300)
  assert float(scores["w"][0, 0]) == 300 * 300  # In bfloat16 a sum of ones ends at 256.


def test_snip_of_half_precision_does_not_underflow_in_the_product():
  params = {"w": jnp.full((1, 1), 1e-4, jnp.float16)}
  scores = foresight.snip(lambda p, b: jnp.sum(p["w"]) * jnp.float16(1e-4), params, None)
  np.testing.assert_allclose(scores["w"], 1e-8, rtol=1e-2)  # Zero, in half precision.


@pytest.mark.parametrize("method", METHODS)
def test_scores_under_jit_and_vmap_are_those_without(method):
  networks = [make_params(seed) for seed in range(3)]
  compiled = jax.jit(functools.partial(score, method))
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *networks)
  lanes = jax.vmap(functools.partial(score, method))(stacked)
  for i, params in enumerate(networks):
    expected = score(method, params)
    assert_close(compiled(params), expected, 1e-6)
    assert_close(jax.tree.map(lambda lane, i=i: lane[i], lanes), expected, 1e-5)
  shapes = jax.eval_shape(functools.partial(score, method), networks[0])
  assert jax.tree.map(lambda s: s.shape, shapes) == jax.tree.map(lambda p: p.shape, networks[0])


def test_synflow_under_jit_and_vmap_is_that_without():
  prune = lambda params: foresight.synflow(forward, params, jnp.ones((1, 6)), 0.75, rounds=5)
  networks = [make_params(seed) for seed in range(3)]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *networks)
  lanes, compiled = jax.jit(jax.vmap(prune))(stacked), jax.jit(prune)
  for i, params in enumerate(networks):
    assert_same(compiled(params), prune(params))
    assert_same(jax.tree.map(lambda lane, i=i: lane[i], lanes), prune(params))


def test_checks_of_values_are_left_out_under_jit():
  scores = jax.jit(lambda p: foresight.snip(lambda p, b: jnp.sum(p["w"]) * b, p, jnp.nan))
  assert np.all(np.isnan(scores({"w": jnp.ones((2, 2))})["w"]))
  dead = jax.jit(lambda p: foresight.synflow(lambda p, x: x @ p["w"], p, jnp.ones((1, 2)), 0.5))
  assert int(jnp.sum(dead({"w": jnp.zeros((2, 2))})["w"])) == 2


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_parameters_are_scored_and_pruned_alike(kind):
  mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
  params = make_params(sizes=(16, 24, 8))
  batch = (jax.random.normal(jax.random.key(0), (8, 16)), jnp.arange(8))
  shard = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
  sharded = jax.tree.map(lambda p: shard(p, P("data") if p.ndim == 2 else P()), params)

  def forward(params, inputs):
    kernels = [params[f"dense{i}"]["kernel"] for i in range(2)]
    if kind is AxisType.Explicit:
      kernels = [jax.sharding.reshard(kernel, P()) for kernel in kernels]
    hidden = jnp.tanh(inputs @ kernels[0] + params["dense0"]["bias"])
    return hidden @ kernels[1] + params["dense1"]["bias"]

  def loss(params, batch):
    logits = jax.nn.log_softmax(forward(params, batch[0]))
    return -jnp.mean(jnp.sum(logits * jax.nn.one_hot(batch[1], 8), axis=-1))

  ones = jnp.ones((1, 16))
  with jax.set_mesh(mesh):
    spread = jax.tree.map(lambda x: shard(x, P()), (batch, ones))
    snip = foresight.snip(loss, sharded, spread[0])
    grasp = foresight.grasp(loss, sharded, [spread[0]] * 2)
    masks = foresight.synflow(forward, sharded, spread[1], 0.75, rounds=4)
    random = foresight.random(sharded, jax.random.key(0))
    pruned = sparsejax.masks_from_scores(snip, 0.5)
    snip, grasp, masks, random, pruned = jax.device_get((snip, grasp, masks, random, pruned))
  kind = AxisType.Auto
  assert_close(snip, foresight.snip(loss, params, batch))
  assert_close(grasp, foresight.grasp(loss, params, [batch] * 2))
  assert_same(masks, foresight.synflow(forward, params, ones, 0.75, rounds=4))
  assert_same(random, foresight.random(params, jax.random.key(0)))
  assert_same(pruned, sparsejax.masks_from_scores(foresight.snip(loss, params, batch), 0.5))


def test_batches_of_one_shape_are_compiled_once():
  traces = []

  def counted(params, batch):
    traces.append(batch)
    return loss(params, batch)

  foresight.grasp(counted, make_params(), [make_batch(0)])
  once, passes = len(traces), 2
  assert once == passes
  foresight.grasp(counted, make_params(), [make_batch(i) for i in range(7)])
  assert len(traces) == 2 * once
  foresight.grasp(counted, make_params(), [make_batch(i, size=5 + i % 2) for i in range(7)])
  assert len(traces) == 4 * once  # Two shapes.


def test_all_rounds_of_synflow_trace_the_network_as_often_as_one():
  def traces(rounds):
    seen = []

    def counted(params, inputs):
      seen.append(inputs)
      return forward(params, inputs)

    foresight.synflow(counted, make_params(), jnp.ones((1, 6)), 0.5, rounds=rounds)
    return len(seen)

  assert traces(50) == traces(1) <= 4


class Batches:
  """Starts anew each time, and holds one batch at a time."""

  def __init__(self):
    self.begun = 0

  def __iter__(self):
    self.begun += 1
    return (make_batch(i) for i in range(3))


def test_batches_may_be_anything_that_starts_anew():
  expected = foresight.grasp(loss, make_params(), [make_batch(i) for i in range(3)])
  batches = Batches()
  assert_same(foresight.grasp(loss, make_params(), batches), expected)
  assert batches.begun == 2
  assert_same(foresight.grasp(loss, make_params(), tuple(batches)), expected)


# The network is the caller's function.


class Net(nn.Module):
  """A residual network with batch normalisation and dropout."""

  blocks: int = 2
  train: bool = False

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(8)(x)
    for _ in range(self.blocks):
      y = nn.BatchNorm(use_running_average=not self.train)(nn.Dense(8)(x))
      x = x + nn.relu(y)
    x = nn.Dropout(0.5, deterministic=not self.train)(x)
    return nn.Dense(4)(x)


def make_net(**arguments):
  net = Net(**arguments)
  variables = net.init(
    {"params": jax.random.key(0), "dropout": jax.random.key(1)}, jnp.ones((1, 6))
  )
  rng = np.random.default_rng(0)
  statistics = jax.tree.map(
    lambda s: jnp.asarray(rng.normal(size=s.shape) ** 2, jnp.float32), variables["batch_stats"]
  )
  return net, variables["params"], statistics


def test_batch_norm_and_dropout_are_those_of_the_callers_function():
  net, params, statistics = make_net(blocks=1, train=True)

  def loss_fn(params, batch, key=3):
    inputs, labels = batch
    logits, _ = net.apply(
      {"params": params, "batch_stats": statistics},
      inputs,
      mutable="batch_stats",
      rngs={"dropout": jax.random.key(key)},
    )
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels])

  batch = make_batch(size=8)
  scores = foresight.snip(loss_fn, params, batch)
  expected = jax.tree.map(lambda w, g: jnp.abs(w * g), params, jax.grad(loss_fn)(params, batch))
  assert_close(scores, expected)
  other = foresight.snip(functools.partial(loss_fn, key=4), params, batch)
  assert np.max(np.abs(other["Dense_2"]["kernel"] - scores["Dense_2"]["kernel"])) > 1e-3
  masks = sparsejax.masks_from_scores(foresight.grasp(loss_fn, params, [batch]), 0.5)
  np.testing.assert_allclose(sparsejax.sparsity(masks), 0.5, rtol=1e-6)


def test_a_shared_weight_is_scored_by_the_sum_of_its_gradients():
  params = {"shared": jnp.array([[2.0, 0.0], [0.5, 1.0]])}
  twice = lambda p, x: jnp.sum(x @ p["shared"] @ p["shared"])
  x = jnp.array([[1.0, 3.0]])
  scores = foresight.snip(twice, params, x)
  w, ones = np.asarray(params["shared"]), np.ones((1, 2))
  gradient = np.asarray(x).T @ (ones @ w.T) + (np.asarray(x) @ w).T @ ones
  np.testing.assert_allclose(scores["shared"], np.abs(w * gradient), rtol=1e-6)


# SynFlow.


def numpy_flow(kernels, masks):
  """Scores of a chain of layers on an input of ones, in float64."""
  kernels = [np.abs(reference.as_float64(w)) * m for w, m in zip(kernels, masks)]
  before = [np.ones(len(kernels[0]))]
  for w in kernels:
    before.append(before[-1] @ w)
  after = [np.ones(kernels[-1].shape[1])]
  for w in reversed(kernels):
    after.append(w @ after[-1])
  scores = [np.outer(h, c) * w for h, w, c in zip(before, kernels, after[-2::-1])]
  return scores, before[-1].sum()


def numpy_synflow(kernels, sparsity, rounds):
  masks = [np.ones(w.shape, bool) for w in kernels]
  total = sum(w.size for w in kernels)
  for k in range(1, rounds + 1):
    scores, _ = numpy_flow(kernels, masks)
    pruned = total - round((1 - sparsity) ** (k / rounds) * total)
    already = total - sum(int(m.sum()) for m in masks)
    drop = reference.select_smallest(scores, pruned - already, among=masks)
    masks = [m & ~d for m, d in zip(masks, drop)]
  return masks


def make_chain(depth, width=12, seed=0, scale=1.0):
  rng = np.random.default_rng(seed)
  return [(rng.normal(size=(width, width)) * scale).astype(np.float32) for _ in range(depth)]


def chain(kernels, inputs):
  # This rectifier turns NaN into zero, as XLA's may do: what overflows can look as if it were dead.
  step = lambda x, kernel: (jnp.where(x @ kernel > 0, x @ kernel, 0), None)
  return jax.lax.scan(step, inputs, jnp.stack(kernels))[0]  # A loop compiles faster.


@pytest.mark.parametrize("rounds", [1, 7, 100])
@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_synflow_is_the_slow_one(sparsity, rounds):
  # Not sparser: a unit that has one weight before and one behind it ties them, but for rounding.
  kernels = make_chain(4)
  masks = foresight.synflow(chain, kernels, jnp.ones((1, 12)), sparsity, rounds=rounds)
  assert_same(masks, numpy_synflow(kernels, sparsity, rounds))


# Their R is about 1e60, 1e-48 and 1e-5; it falls by many orders of magnitude as they get sparser.
DEEP = {"overflows": 1.0, "underflows": 2.0**-6, "fits": 2.0**-3.6}


@pytest.mark.parametrize("case", DEEP)
def test_masks_of_sixty_layers_are_those_of_float64_although_the_flow_leaves_float32(case):
  kernels = make_chain(60, scale=DEEP[case])
  _, total = numpy_flow(kernels, [np.ones(w.shape, bool) for w in kernels])
  ones = jnp.ones((1, 12))
  if case == "overflows":
    assert total > 1e50
    assert not np.isfinite(jnp.sum(chain([abs(w) for w in kernels], ones)))
  if case == "underflows":
    assert total < 1e-48
    assert float(jnp.sum(chain([abs(w) for w in kernels], ones))) == 0
  masks = foresight.synflow(chain, kernels, ones, 0.8, rounds=10)
  assert_same(masks, numpy_synflow(kernels, 0.8, 10))


def test_scores_keep_their_bits_whatever_power_of_two_the_weights_are_scaled_by():
  kernels = make_chain(60)
  scores = {}
  for power in (-6, -5, -4, -3, -2, -1, 0):  # R from 2^-170 to 2^190.
    scaled = [w * np.float32(2.0**power) for w in kernels]
    scores[power] = foresight.synflow_scores(chain, scaled, jnp.ones((1, 12)))
  for power in scores:
    assert_same(scores[power], scores[-3])
  expected, total = numpy_flow(kernels, [np.ones(w.shape, bool) for w in kernels])
  for a, b in zip(scores[-3], expected, strict=True):
    np.testing.assert_allclose(a.sum(), scores[-3][0].sum(), rtol=1e-4)  # The flow is conserved.
    np.testing.assert_allclose(a / a.sum(), b / total, rtol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_a_deep_residual_network_with_batch_norm_is_scored_as_in_float64(scale):
  net, params, statistics = make_net(blocks=12)
  params = jax.tree.map(lambda p: p * scale if p.ndim == 2 else p, params)
  ones = jnp.ones((1, 6))

  def apply(statistics, params, inputs):
    # Means that are not zero would be shifts.
    statistics = {name: {"mean": 0 * s["mean"], "var": s["var"]} for name, s in statistics.items()}
    return net.apply({"params": params, "batch_stats": statistics}, inputs)

  absolute = jax.tree.map(jnp.abs, params)
  assert np.isfinite(jnp.sum(apply(statistics, absolute, ones))) == (scale == 1)
  narrow = foresight.synflow(functools.partial(apply, statistics), params, ones, 0.7, rounds=5)
  with jax.enable_x64(True):
    wide_params, wide_statistics, wide_ones = jax.tree.map(
      lambda x: jnp.asarray(x, jnp.float64), (params, statistics, ones)
    )
    wide = foresight.synflow(
      functools.partial(apply, wide_statistics), wide_params, wide_ones, 0.7, rounds=5
    )
  assert_same(narrow, wide)


def with_biases(value, scale=1.0):
  kernels = make_chain(16, scale=scale)
  return [{"kernel": w, "bias": np.full(12, value, np.float32)} for w in kernels]


def biased(layers, inputs):
  step = lambda x, layer: (jax.nn.relu(x @ layer["kernel"] + layer["bias"]), None)
  return jax.lax.scan(step, inputs, jax.tree.map(lambda *x: jnp.stack(x), *layers))[0]


@pytest.mark.parametrize("scale", [2.0**8, 2.0**-14])
def test_biases_make_an_error_where_the_inputs_would_have_to_be_scaled(scale):
  layers, ones = with_biases(0.0, scale), jnp.ones((1, 12))
  scores = foresight.synflow_scores(biased, layers, ones)
  expected = foresight.synflow_scores(chain, [layer["kernel"] for layer in layers], ones)
  assert_same([layer["kernel"] for layer in scores], expected)
  layers[5]["bias"] = np.full(12, 1e-3, np.float32)
  message = r"round 1 .* leaves the range of its numbers, and .* biases .* float64"
  with pytest.raises(ValueError, match=message):
    foresight.synflow_scores(biased, layers, ones)
  with pytest.raises(ValueError, match=message):
    foresight.synflow(biased, layers, ones, 0.5, rounds=2)
  with jax.enable_x64(True):  # The remedy that it names.
    wide = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), layers)
    scores = foresight.synflow_scores(biased, wide, jnp.ones((1, 12)))
    assert float(jnp.sum(scores[5]["bias"])) > 0


def test_biases_are_no_error_where_the_flow_stays_in_range():
  layers = with_biases(0.25)[:4]
  scores = foresight.synflow_scores(biased, layers, jnp.ones((1, 12)))
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), layers)
    total = lambda p: jnp.sum(biased(p, jnp.ones((1, 12))))
    absolute = jax.tree.map(jnp.abs, wide)
    expected = jax.tree.map(lambda w, g: w * g, absolute, jax.grad(total)(absolute))
    power = np.floor(np.log2(float(total(absolute)))) + 1
    expected = jax.device_get(jax.tree.map(lambda s: s * 2.0**-power, expected))
  assert_close(scores, expected)


@pytest.mark.parametrize("case", ["beyond", "infinite", "zero"])
def test_a_flow_that_no_scaling_can_save_is_an_error(case):
  kernels, ones = make_chain(30, width=16, scale=2.0**6), jnp.ones((1, 16))
  message = "round 1 .* leaves the range of its numbers, and it cannot be brought back"
  if case == "infinite":
    kernels = make_chain(3, width=16)
    kernels[1][3, 3] = np.inf
  if case == "zero":
    kernels = make_chain(3, width=16)
    kernels[1][:] = 0
    message = "all scores are zero: no path"
  with pytest.raises(ValueError, match=message):
    foresight.synflow(chain, kernels, ones, 0.5, rounds=2)
  with pytest.raises(ValueError, match=message):
    foresight.synflow_scores(chain, kernels, ones)


def test_when_no_path_is_left_a_warning_says_from_which_round_on():
  kernels = make_chain(8, width=3)  # 72 weights, of which 5 are left, fewer than there are layers.
  with pytest.warns(UserWarning) as record:
    masks = foresight.synflow(chain, kernels, jnp.ones((1, 3)), 0.93, rounds=100)
  messages = [str(warning.message) for warning in record]
  assert any("all scores are zero, and the first weights go" in message for message in messages)
  assert any("no weight is left in '" in message for message in messages)
  assert {warning.filename for warning in record} == {__file__}
  assert sum(int(jnp.sum(mask)) for mask in masks) == 5


def test_pruned_weights_stay_pruned_and_counts_are_exact_in_each_round():
  kernels, ones, rounds = make_chain(3, width=9), jnp.ones((1, 9)), 3
  total, previous = 3 * 81, None
  for k in range(1, rounds + 1):
    # The first k rounds of 3 are k rounds to the density that they reach.
    masks = foresight.synflow(chain, kernels, ones, 1 - 0.1 ** (k / rounds), rounds=k)
    assert sum(int(jnp.sum(mask)) for mask in masks) == round(0.1 ** (k / rounds) * total)
    if previous is not None:
      assert not any(np.any(m & ~p) for m, p in zip(masks, previous, strict=True))
    previous = masks


def test_units_that_lead_nowhere_go_first():
  kernels = make_chain(2, width=6)
  kernels[1][3:] = 0
  weights = jax.tree.map(jnp.asarray, kernels)
  masks = foresight.synflow(chain, weights, jnp.ones((1, 6)), 0.75, rounds=10)
  assert_same(masks, numpy_synflow(kernels, 0.75, 10))
  assert sum(int(jnp.sum(mask)) for mask in masks) == 18
  assert not np.any(np.asarray(masks[0])[:, 3:]) and not np.any(np.asarray(masks[1])[3:])


def test_what_dies_later_does_not_revive_what_is_pruned_and_comes_after_it():
  # The first round prunes the last weight of the first layer, and all that leaves the first unit.
  # Then the weights into that unit score 0 as well, and come before it in the order of ties.
  kernels = [np.array([[1.0, 1.0], [1.0, 0.05]]), np.array([[0.1, 0.1], [1.0, 1.0]])]
  steps = lambda shapes, density: [0.75 if density > 0.6 else 0.5, 0.5]
  masks = foresight.synflow(chain, kernels, jnp.ones((1, 2)), 0.5, rounds=2, allocation=steps)
  assert_same(
    masks, [np.array([[False, True], [True, False]]), np.array([[False] * 2, [True] * 2])]
  )


def test_one_round_is_the_masks_from_its_scores():
  params, ones = make_params(), jnp.ones((1, 6))
  scores = foresight.synflow_scores(forward, params, ones)
  masks = foresight.synflow(forward, params, ones, 0.6, rounds=1)
  assert_same(masks, sparsejax.masks_from_scores(scores, 0.6))
  two = foresight.synflow(forward, params, ones, 1 - 0.4, rounds=2)
  half = foresight.synflow(forward, params, ones, 1 - 0.4**0.5, rounds=1)
  again = foresight.synflow_scores(forward, params, ones, half)
  count = sum(int(jnp.sum(~m)) for m in jax.tree.leaves(two))
  kernel_scores = {name: layer["kernel"] for name, layer in again.items()}
  active = {name: layer["kernel"] for name, layer in half.items()}
  drop = sparsejax.select_smallest(
    kernel_scores, count - sum(int(jnp.sum(~m)) for m in active.values()), among=active
  )
  for name in drop:
    np.testing.assert_array_equal(two[name]["kernel"], active[name] & ~drop[name])


@pytest.mark.parametrize("kind", ["uniform", "erk"])
def test_allocations_give_each_layer_its_share(kind):
  params = make_params(sizes=(6, 20, 4))
  masks = foresight.synflow(forward, params, jnp.ones((1, 6)), 0.7, rounds=8, allocation=kind)
  shapes = [(6, 20), (20, 4)]
  densities = allocation.densities(shapes, 1 - 0.7, kind)
  kept = [int(jnp.sum(masks[name]["kernel"])) for name in ("dense0", "dense1")]
  assert kept == [round(float(d) * np.prod(s)) for d, s in zip(densities, shapes)]
  assert bool(jnp.all(masks["dense0"]["bias"]))


def test_a_tree_of_sparsities_and_a_choice_of_leaves():
  params, ones = make_params(), jnp.ones((1, 6))
  sparsity = {"dense0": {"kernel": 0.75, "bias": 0.0}, "dense1": {"kernel": 0.25, "bias": 0.0}}
  masks = foresight.synflow(forward, params, ones, sparsity, rounds=4)
  assert [int(jnp.sum(masks[n]["kernel"])) for n in ("dense0", "dense1")] == [12, 24]
  second = lambda path, leaf: leaf.ndim == 2 and "dense1" in jax.tree_util.keystr(path)
  masks = foresight.synflow(forward, params, ones, 0.5, rounds=4, prunable=second)
  assert [int(jnp.sum(masks[n]["kernel"])) for n in ("dense0", "dense1")] == [48, 16]
  none = foresight.synflow(forward, params, ones, 0.5, prunable=lambda path, leaf: False)
  assert all(bool(jnp.all(mask)) for mask in jax.tree.leaves(none))
  everything = foresight.synflow(forward, params, ones, 0.0, rounds=3)
  assert all(bool(jnp.all(mask)) for mask in jax.tree.leaves(everything))


def test_synflow_warns_of_emptied_layers_but_not_under_jit():
  params = {"a": jnp.ones((2, 2)), "b": jnp.full((2, 8), 1.0)}
  side_by_side = lambda p, x: jnp.concatenate([x @ p["a"] * 1e-3, x @ p["b"]], axis=-1)
  prune = lambda params: foresight.synflow(side_by_side, params, jnp.ones((1, 2)), 0.25, rounds=3)
  with pytest.warns(UserWarning, match="no weight is left in 'a': ") as record:
    masks = prune(params)
  assert [warning.filename for warning in record] == [__file__]
  assert_same(jax.jit(prune)(params), masks)
  assert int(jnp.sum(masks["b"])) == 15


# What goes wrong.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [jnp.int32, bool])
def test_parameters_that_are_not_floating_point_are_refused_by_name(method, dtype):
  params = make_params()
  params["dense0"]["steps"] = jnp.ones(3, dtype)
  with pytest.raises(ValueError, match=f"'dense0/steps' has dtype {jnp.dtype(dtype)}"):
    score(method, params)
  with pytest.raises(ValueError, match="'dense0/steps'"):
    foresight.synflow(forward, params, jnp.ones((1, 6)), 0.5)


def score_loss(method, loss_fn, params, batch):
  if method == "snip":
    return foresight.snip(loss_fn, params, batch)
  return foresight.grasp(loss_fn, params, [batch])


@pytest.mark.parametrize("method", ["snip", "grasp"])
@pytest.mark.parametrize(
  ("returned", "shown"),
  [
    (lambda x: jnp.stack([x, x]), r"float32\[2\]"),
    (lambda x: x.astype(jnp.int32), r"int32\[\]"),
    (lambda x: (x, {"accuracy": jnp.ones(3)}), r"float32\[\], float32\[3\]"),
    (lambda x: [x], r"float32\[\]"),
    (lambda x: None, "nothing"),
  ],
  ids=["vector", "integer", "auxiliary", "list", "none"],
)
def test_a_loss_that_is_no_scalar_is_an_error_that_shows_it(method, returned, shown):
  with pytest.raises(ValueError, match=f"must be one floating-point number, .* returned {shown}: "):
    score_loss(method, lambda p, b: returned(loss(p, b)), make_params(), make_batch())


@pytest.mark.parametrize("method", ["snip", "grasp"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_is_an_error(method, value):
  inputs, labels = make_batch()
  with pytest.raises(ValueError, match=r"the loss.* is (nan|inf)"):
    score_loss(method, lambda p, b: loss(p, b) * value, make_params(), (inputs, labels))
  with pytest.raises(ValueError, match="the loss of batch 1 is nan"):
    foresight.grasp(loss, make_params(), [make_batch(), (inputs * np.nan, labels)])


@pytest.mark.parametrize("method", ["snip", "grasp"])
def test_scores_that_are_not_finite_are_an_error_that_names_the_leaf(method):
  params = make_params()
  params["dense1"]["bias"] = jnp.zeros(4)
  rooted = lambda p, b: loss(p, b) + jnp.sum(jnp.sqrt(p["dense1"]["bias"]))
  with pytest.raises(ValueError, match=r"scores of '.*' are not finite, although the loss is"):
    score_loss(method, rooted, params, make_batch())


def test_scores_that_overflow_are_an_error_although_the_loss_does_not():
  steep = lambda params, batch: 2e38 * jnp.sum(params["w"] ** 4)  # Its derivative is 8e38.
  with pytest.raises(ValueError, match="scores of 'w' are not finite, although the loss is"):
    foresight.snip(steep, {"w": jnp.ones((1, 1))}, None)


def test_scores_that_are_all_negative_are_as_good_as_others():
  # At 1 the gradient of each weight is -1, and the Hessian one.
  loss = lambda params, batch: jnp.sum(params["w"] ** 2 / 2 - 2 * params["w"])
  scores = foresight.grasp(loss, {"w": jnp.ones((2, 2))}, [None])
  np.testing.assert_array_equal(scores["w"], -np.ones((2, 2)))
  # And of those that are not finite the sign does not matter.
  steep = lambda params, batch: 1e38 * jnp.sum(params["w"] - params["w"] ** 2 / 2)
  with pytest.raises(ValueError, match="scores of 'w' are not finite, although the loss is"):
    foresight.grasp(steep, {"w": jnp.full((1, 1), 0.5)}, [None])


@pytest.mark.parametrize("method", ["snip", "grasp"])
def test_a_parameter_without_entries_has_scores_without_entries(method):
  params = {"w": jnp.ones((2, 2)), "none": jnp.ones((0, 2))}
  square = lambda params, batch: sum(jnp.sum(leaf**2) for leaf in params.values())
  scores = score_loss(method, square, params, None)
  assert scores["none"].shape == (0, 2)
  # w times 2 w, and w times 2 times 2 w.
  np.testing.assert_array_equal(scores["w"], np.full((2, 2), 2 if method == "snip" else 4))


@pytest.mark.parametrize("method", ["snip", "grasp"])
def test_a_batch_of_the_wrong_shape_is_an_error_with_its_shapes(method):
  batch = (jnp.ones((5, 7)), jnp.zeros(5, jnp.int32))
  with pytest.raises(
    ValueError, match=r"the loss failed on .* float32\[5,7\], int32\[5\]"
  ) as error:
    score_loss(method, loss, make_params(), batch)
  assert isinstance(error.value.__cause__, TypeError)
  assert "dot_general" in str(error.value)
  with pytest.raises(ValueError, match=r"the network failed on an input of float32\[1,7\]: "):
    foresight.synflow(forward, make_params(), jnp.ones((1, 7)), 0.5)


def test_scores_that_are_zero_everywhere_are_an_error():
  constant = lambda params, batch: jnp.float32(1)
  for method in ("snip", "grasp"):
    with pytest.raises(ValueError, match=r"all scores are zero, because .* gradient of the loss"):
      score_loss(method, constant, make_params(), make_batch())
    with pytest.raises(ValueError, match="all scores are zero"):
      score_loss(method, loss, jax.tree.map(jnp.zeros_like, make_params()), make_batch())
  linear = lambda params, batch: jnp.sum(params["dense0"]["kernel"])
  with pytest.raises(ValueError, match="times its Hessian"):
    foresight.grasp(linear, make_params(), [make_batch()])
  assert np.all(foresight.snip(linear, make_params(), None)["dense0"]["kernel"] > 0)


def test_batches_that_cannot_be_gone_through_twice_are_an_error():
  params = make_params()
  one_shot = (make_batch(i) for i in range(3))
  with pytest.raises(ValueError, match="gone through twice, but generator is an iterator"):
    foresight.grasp(loss, params, one_shot)
  assert len(list(one_shot)) == 3  # Nothing was taken from it.
  with pytest.raises(ValueError, match="list_iterator is an iterator"):
    foresight.grasp(loss, params, iter([make_batch()]))
  with pytest.raises(ValueError, match="`batches` is empty"):
    foresight.grasp(loss, params, [])
  with pytest.raises(ValueError, match=r"got dict: pass \[batch\]"):
    foresight.grasp(loss, params, {"inputs": make_batch()[0]})
  with pytest.raises(ValueError, match="got function"):
    foresight.grasp(loss, params, lambda: iter([make_batch()]))

  class Shrinking(Batches):
    def __iter__(self):
      return (make_batch(i) for i in range(3 - len(list(super().__iter__())) + 3 - self.begun))

  with pytest.raises(ValueError, match="gave 2 batches at first, but 1 when gone through again"):
    foresight.grasp(loss, params, Shrinking())


def test_a_key_that_is_no_key_is_an_error():
  with pytest.raises(ValueError, match="key must be one random key, got 0"):
    foresight.random(make_params(), 0)


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 72.9, float("nan"), True, "half"])
def test_a_sparsity_out_of_range_is_an_error_that_shows_it(sparsity):
  with pytest.raises(ValueError, match=f"sparsity .*{sparsity}"):
    foresight.synflow(forward, make_params(), jnp.ones((1, 6)), sparsity)


@pytest.mark.parametrize("rounds", [0, -1, 1.5, True, None])
def test_a_number_of_rounds_that_is_none_is_an_error_that_shows_it(rounds):
  with pytest.raises(ValueError, match=rf"rounds must be .*, got {rounds}"):
    foresight.synflow(forward, make_params(), jnp.ones((1, 6)), 0.5, rounds=rounds)


def test_what_synflow_cannot_use_is_an_error_that_says_why():
  params, ones = make_params(), jnp.ones((1, 6))
  with pytest.raises(ValueError, match="unknown allocation 'erdos'"):
    foresight.synflow(forward, params, ones, 0.5, allocation="erdos")
  with pytest.raises(ValueError, match="floating-point inputs, but they have dtype int32"):
    foresight.synflow(forward, params, jnp.ones((1, 6), jnp.int32), 0.5)
  with pytest.raises(
    ValueError, match=r"returned float32\[1,4\], float32\[\]: leave anything else"
  ):
    foresight.synflow(lambda p, x: (forward(p, x), jnp.float32(0)), params, ones, 0.5)
  with pytest.raises(ValueError, match=r"returned int32\[1\]"):
    foresight.synflow(lambda p, x: jnp.argmax(forward(p, x), -1), params, ones, 0.5)
  with pytest.raises(ValueError, match="Python number"):
    jax.jit(lambda s: foresight.synflow(forward, params, ones, s))(0.5)
  with pytest.raises(ValueError, match="masks must be boolean"):
    foresight.synflow_scores(forward, params, ones, params)
  masks = jax.tree.map(lambda p: jnp.ones_like(p, dtype=bool), params)
  with pytest.raises(ValueError, match="'dense1/bias'"):
    foresight.synflow_scores(
      forward, params, ones, {**masks, "dense1": {"kernel": masks["dense1"]["kernel"]}}
    )


def test_grasp_without_anything_to_prune_is_an_error():
  loss = lambda params, batch: jnp.sum(params["kernel"] ** 2)
  with pytest.raises(ValueError, match="there is nothing to prune"):
    foresight.grasp(loss, {"kernel": jnp.ones((2, 2))}, [0.0], prunable=lambda path, leaf: False)


def test_grasp_with_scores_of_other_leaves_alone_is_an_error():
  loss = lambda params, batch: jnp.sum(params["bias"] ** 2)
  params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
  with pytest.raises(ValueError, match="all scores are zero"):
    foresight.grasp(loss, params, [0.0])


def test_a_tree_of_sparsities_of_another_network_is_an_error_of_synflow():
  sparsity = {"dense0": {"kernel": 0.5, "bias": 0.0}}
  with pytest.raises(ValueError, match="none for 'dense1/kernel'"):
    foresight.synflow(forward, make_params(), jnp.ones((1, 6)), sparsity)


def test_a_sparsity_of_synflow_that_leaves_nothing_is_an_error():
  apply_fn = lambda params, inputs: inputs @ params["kernel"]
  with pytest.raises(ValueError, match="none of the 4 prunable weights would be left"):
    foresight.synflow(apply_fn, {"kernel": jnp.ones((2, 2))}, jnp.ones((1, 2)), 0.99)
