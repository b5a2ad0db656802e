"""JAX functions as NumPy operations: the same outputs, operation by operation and as networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sparsejax import deploy
from sparsejax.deploy.runtime.affine import SparseLayers


def random(*shape, seed=0):
  return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def conv(x, w, padding="SAME", strides=(1, 1), **options):
  numbers = options.pop("numbers", ("NHWC", "HWIO", "NHWC"))
  return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=numbers, **options)


W = random(6, 5)
FUNCTIONS = {
  "dense": lambda p, x: x[:, 0, 0] @ p,
  "dense_of_rows": lambda p, x: x @ p,
  "weights_first": lambda p, x: p.T @ x[0, 0].T,
  "to_two_axes": lambda p, x: jnp.einsum("bhwc,cio->bhwio", x, random(6, 2, 3)),
  "two_axes": lambda p, x: jnp.einsum("bhwc,whco->bo", x, random(3, 4, 6, 2)),
  "of_activations": lambda p, x: jnp.einsum("bhwc,bhvc->bhwv", x, jnp.tanh(x)),
  "conv": lambda p, x: conv(x, random(3, 2, 6, 5)),
  "conv_strides": lambda p, x: conv(x, random(3, 2, 6, 5), ((1, 2), (0, 1)), (2, 1)),
  "elementwise": lambda p, x: (
    jnp.exp(-x) * jnp.abs(x) + jnp.sqrt(x**2 + 1) / (1 + x**4) - lax.rsqrt(3 + jnp.sin(x))
  ),
  "number": lambda p, x: jnp.exp(jnp.mean(x) * 0.5) + 1,
  "negative_power": lambda p, x: (1 + jnp.abs(x)) ** -2,
  "activations": lambda p, x: jax.nn.silu(x) + jax.nn.relu(x) + jnp.tanh(x) + jax.nn.sigmoid(x),
  "softmax": lambda p, x: jax.nn.log_softmax(x) + jax.nn.softmax(x, axis=1),
  "select": lambda p, x: jnp.where((x > 0) & ~(x < -1) | (x == 2), x, 0.1 * x),
  "select_of_three": lambda p, x: lax.select_n(jnp.sign(x).astype(int) + 1, x, 2 * x, 3 * x),
  "clip": lambda p, x: jnp.clip(x, -0.5, 0.5) + lax.clamp(-1.0, x, 1.0),
  "moves": lambda p, x: jnp.concatenate(
    [
      x.transpose(0, 2, 1, 3)[:, ::-1, 1:, ::2],
      jnp.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :3, :3, :3],
    ],
    -1,
  ),
  "splits": lambda p, x: sum(jnp.split(x, 3, axis=-1)) + jnp.squeeze(x[:, :1], 1)[:, None, :, :2],
  "split_of_rows": lambda p, x: jnp.split(x, 2, axis=1),
  "reductions": lambda p, x: x.mean((1, 2)) + x.max(1).min(1) + jnp.sum(x > 0, (1, 2)),
  "max_pool": lambda p, x: lax.reduce_window(
    x, -jnp.inf, lax.max, (1, 3, 2, 1), (1, 2, 1, 1), "SAME"
  ),
  "pools_of_integers": lambda p, x: [
    lax.reduce_window(
      jnp.floor(3 * x).astype(dtype), dtype(start), function, (1, 3, 2, 1), (1,) * 4, "SAME"
    )
    for dtype in (np.int32, np.int8)
    for start, function in (
      (np.iinfo(dtype).min, lax.max),
      (np.iinfo(dtype).max, lax.min),
      (0, lax.add),
    )
  ],
  "mean_pool": lambda p, x: lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"),
  "take": lambda p, x: jnp.take(x, np.array([3, 1, 1], np.uint16), axis=2, mode="clip"),
  "take_of_batched": lambda p, x: jnp.einsum(
    "bhwc,bco->bhwo", jnp.take(x, np.array([0, 2]), axis=3, mode="clip"), random(2, 2, 5)
  ),
  "constants": lambda p, x: x + jnp.arange(6.0) + jnp.cumsum(p[:, 0]),
  "tree": lambda p, x: {"x": x, "constant": p, "both": (x * 2, x * 2 + 1)},
  "unused": lambda p, x: (jnp.sort(x), x)[1],
}


def layers(p, x, *between):
  """Layers of two widths, each followed by what is given."""
  x = x[:, 0, 0]
  for weights, function in zip((p, p.T, p), between):
    x = function(x @ weights)
  return x


@pytest.mark.parametrize(
  "between, calls",
  [
    ([jax.nn.relu, jax.nn.relu, lambda x: x], 1),
    ([lambda x: jax.nn.relu(x + 1 + random(5)), lambda x: x + random(1, 6), jax.nn.relu], 1),
    ([lambda x: jnp.maximum(0.3, random(5) + x), jax.nn.relu, lambda x: 2 * x + 1], 1),
    ([lambda x: jnp.take(x, np.arange(5), axis=1, mode="clip")] * 2, 1),
    ([lambda x: jnp.take(x + 1, np.arange(6) - 1, axis=1, mode="clip")[:, :5]] * 2, 2),
    ([lambda x: x + random(2, 5), jax.nn.relu], 2),  # What is added differs between examples.
    ([lambda x: jnp.maximum(x, random(5)), jax.nn.relu], 2),  # No number, but one for each output.
    ([jnp.tanh, jax.nn.relu], 2),
    ([lambda x: x[:, ::-1], jax.nn.relu], 2),
    ([lambda x: x + x, jax.nn.relu], 2),  # It is read twice.
    ([lambda x: x - 1, lambda x: jnp.minimum(x, 1), jax.nn.relu], 3),
  ],
)
def test_sparse_products_that_follow_each_other_are_one_call(between, calls, monkeypatch):
  called = []
  run = SparseLayers.__call__
  monkeypatch.setattr(SparseLayers, "__call__", lambda *args: called.append(args[0]) or run(*args))
  apply = lambda p, x: layers(p, x, *between)
  x = random(2, 4, 3, 6)
  for threads in (1, 2):
    translated = deploy.to_numpy(apply, W, x, kind="sparse", threads=threads, rounds=1)
    called.clear()
    assert_close(translated(x), apply(jnp.asarray(W), jnp.asarray(x)))
    assert len(called) == calls * translated._parts
    assert translated.choices == ("sparse",) * len(between)


def test_what_is_put_out_between_sparse_layers_is_there():
  apply = lambda p, x: ((h := jax.nn.relu(x @ p + 1)), (g := h @ p.T), g @ p)
  x = random(2, 6)
  for found, expected in zip(
    deploy.to_numpy(apply, W, x, kind="sparse")(x), apply(jnp.asarray(W), jnp.asarray(x))
  ):
    assert_close(found, expected)


def test_sparse_layers_are_taken_throughout_where_that_takes_less_time(monkeypatch):
  for faster in ("dense", "sparse"):
    monkeypatch.setattr(
      "sparsejax.deploy.runtime.timing.take_turns",
      lambda calls, rounds, turn, faster=faster: {
        way: [way not in ("dense", ("fastest" if faster == "dense" else "sparse", 1, 1))]
        for way in calls
      },
    )
    translated = deploy.to_numpy(lambda p, x: x @ p @ p.T, W, random(2, 6))
    assert translated.choices == (faster, faster)


def test_a_layer_is_computed_as_its_equations_where_numbers_are_out_of_the_ordinary():
  largest = np.float32(3e38)
  x = -largest * np.eye(2, 6, dtype=np.float32)
  for apply in (
    lambda p, x: x @ p + largest + largest,  # Both together are infinite.
    lambda p, x: jnp.maximum(x @ p, np.float32(np.nan)),
    lambda p, x: jnp.maximum(x @ p + jnp.inf, 1),
  ):
    for kind in ("dense", "sparse"):
      translated = deploy.to_numpy(apply, np.eye(6, 5, dtype=np.float32), x, kind=kind)
      assert_close(translated(x), apply(jnp.eye(6, 5), jnp.asarray(x)))


def test_products_to_another_type_are_an_error_also_between_layers():
  def apply(p, x):
    numbers = (((1,), (0,)), ((), ()))
    h = lax.dot_general(x, p, numbers, preferred_element_type=jnp.bfloat16)
    return lax.dot_general(h, p.T, numbers, preferred_element_type=jnp.float32)

  for kind in ("dense", "sparse"):
    with pytest.raises(ValueError, match="'dot_general' to bfloat16 cannot be translated"):
      deploy.to_numpy(apply, W, random(2, 6), kind=kind)


def with_params(function):
  """The function and something of its parameters, which not each of them uses."""
  return lambda p, x: (function(p, x), p + 1)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_outputs_are_those_of_jax(name, kind):
  function, x = with_params(FUNCTIONS[name]), random(2, 4, 3, 6)
  before = x.copy()
  translated = deploy.to_numpy(function, W, x, kind=kind)
  expected = function(jnp.asarray(W), jnp.asarray(x))
  for _ in range(2):  # Nothing that is held between calls is changed.
    jax.tree.map(assert_close, translated(x), expected)
  np.testing.assert_array_equal(x, before)


def take_corners(x):
  """One of two rows at each index, of an array of two."""
  numbers = lax.GatherDimensionNumbers((0,), (1,), (1,))
  return lax.gather(x, np.array([[0], [2], [3], [1]]), numbers, (1, 1), mode="clip")


def take_columns(x):
  """Columns as rows."""
  numbers = lax.GatherDimensionNumbers((1,), (1,), (1,))
  return lax.gather(x, np.array([[0], [2], [3]]), numbers, (len(x), 1), mode="clip")


def assert_close(found, expected):
  assert found.shape == expected.shape and found.dtype == expected.dtype
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_value_that_is_read_again_is_not_overwritten():
  def apply(p, x):
    h = x @ p
    return jax.nn.relu(h) + h.T.reshape(3, 3) + (h + 1) * h - jnp.square(h)

  x, p = random(3, 3, seed=1), random(3, 3)
  np.testing.assert_allclose(deploy.to_numpy(apply, p, x)(x), apply(p, x), rtol=1e-5, atol=1e-5)


def test_a_value_that_is_read_in_another_shape_is_not_overwritten():
  def apply(p, x):
    h = x @ p
    rows = h.reshape(4)
    return h * 2, jnp.tanh(rows)

  x, p = random(2, 3), random(3, 2)
  jax.tree.map(assert_close, deploy.to_numpy(apply, p, x)(x), apply(jnp.asarray(p), x))


def test_the_faster_kind_is_chosen_in_each_layer(monkeypatch):
  monkeypatch.setattr(
    "sparsejax.deploy.runtime.timing.take_turns",
    lambda ways, rounds, turn: {name: [len(name)] * rounds for name in ways},
  )
  translated = deploy.to_numpy(lambda p, x: x @ p @ p.T, W, random(2, 6))
  assert translated.choices == ("dense", "dense")  # It has the shorter name.


def test_indices_that_are_taken_are_built_into_a_sparse_matrix_and_taken_for_a_dense_one():
  indices = np.array([4, 1, 1, 0])

  def apply(p, x):
    taken = jnp.take(x, indices, axis=1, mode="clip")
    both = jnp.take(x, indices[:3], axis=1, mode="clip")  # It is read twice.
    return taken @ p[:4] + both @ p[:3] + jnp.sum(both, 1, keepdims=True)

  x = random(3, 5)
  for kind in ("dense", "sparse"):
    translated = deploy.to_numpy(apply, W, x, kind=kind)
    assert_close(translated(x), apply(jnp.asarray(W), x))


def test_indices_beyond_the_ends_are_the_last_ones_on_each_side():
  apply = lambda p, x: jnp.take(x, np.array([-1, 2, 9]), axis=1, mode="clip") @ p[:3]
  x = random(3, 4)
  for kind in ("dense", "sparse"):
    assert_close(deploy.to_numpy(apply, W, x, kind=kind)(x), apply(jnp.asarray(W), x))


def test_weights_of_a_type_without_products_in_numpy_or_scipy_are_an_error():
  x, weights = jnp.asarray(random(2, 6), jnp.bfloat16), jnp.asarray(W, jnp.bfloat16)
  apply = lambda p, x: x @ p
  with pytest.raises(ValueError, match="'dot_general' to bfloat16 cannot be translated"):
    deploy.to_numpy(apply, weights, x, kind="dense")
  for kind in ("sparse", "fastest"):
    with pytest.raises(ValueError, match="not of bfloat16: convert them"):
      deploy.to_numpy(apply, weights, x, kind=kind)


def test_examples_are_shared_out_among_threads(monkeypatch):
  apply = lambda p, x, y: {"out": jnp.tanh(x @ p), "y": (x + y).sum(1)}
  x, y = random(6, 6), random(6, 1)
  expected = apply(jnp.asarray(W), x, y)
  for threads in (1, 2, 3):
    translated = deploy.to_numpy(apply, W, (x, y), kind="sparse", threads=threads)
    assert translated.threads == threads
    jax.tree.map(assert_close, translated(x, y), expected)
  with pytest.raises(ValueError, match="threads=4 do not divide"):
    deploy.to_numpy(apply, W, (x, y), threads=4)
  with pytest.raises(ValueError, match="threads=0 do not divide"):
    deploy.to_numpy(apply, W, (x, y), threads=0)
  monkeypatch.setattr("sparsejax.deploy.translation._count_cores", lambda: 3)
  for faster in [(1, 1), (3, 1), (1, 3)]:
    monkeypatch.setattr(
      "sparsejax.deploy.runtime.timing.take_turns",
      lambda calls, rounds, turn, faster=faster: {way: [way[1:] != faster] for way in calls},
    )
    translated = deploy.to_numpy(apply, W, (x, y), kind="sparse", threads="fastest")
    assert translated.threads == max(faster)
    jax.tree.map(assert_close, translated(x, y), expected)
  few = x[:5], y[:5]  # Three do not divide them.
  assert deploy.to_numpy(apply, W, few, kind="dense", threads="fastest").threads == 1


@pytest.mark.parametrize(
  "function, match",
  [
    (lambda p, x: jnp.sort(x), "sort cannot be translated"),
    (lambda p, x: conv(x, random(3, 3, 6, 2), rhs_dilation=(2, 2)), "without dilation"),
    (lambda p, x: conv(x, random(3, 3, 1, 6), feature_group_count=6), "and groups"),
    (
      lambda p, x: conv(x[..., :3], random(3, 3, 3, 3), numbers=("NHWC", "OIHW", "NHWC")),
      "with channels last",
    ),
    (lambda p, x: conv(x, random(2, 2, 6, 2), ((-1, 0), (0, 0))), "negative padding"),
    (
      lambda p, x: lax.reduce_window(
        x, -jnp.inf, lax.max, (1, 2, 2, 1), (1,) * 4, ((0, 0), (-1, 0), (0, 0), (0, 0))
      ),
      "negative padding",
    ),
    (
      lambda p, x: lax.reduce_window(
        x, -jnp.inf, lax.max, (1, 1, 2, 1), (1,) * 4, "VALID", window_dilation=(1, 1, 2, 1)
      ),
      "windows with dilation",
    ),
    (lambda p, x: jnp.take(x, jnp.int32(x[:, 0, 0, 0]), axis=1), "gather"),
    (lambda p, x: x[:, [0, 1], [1, 2]], "gather"),
    (lambda p, x: take_corners(x[:, :, 0, 0]) @ random(4, 1), "gather"),
    (lambda p, x: take_columns(x[:, :, 0, 0]), "gather"),
    (lambda p, x: jnp.int32(x) // 1 + lax.div(jnp.int32(x), jnp.int32(2)), "cannot be translated"),
    (lambda p, x: lax.pad(x, 0.0, ((0, 0, 0), (0, 0, 1), (0, 0, 0), (0, 0, 0))), "a pad"),
  ],
)
def test_what_cannot_be_translated_is_named(function, match):
  with pytest.raises(ValueError, match=match):
    deploy.to_numpy(with_params(function), W, random(2, 4, 3, 6))


def test_inputs_unlike_the_example_are_an_error():
  translated = deploy.to_numpy(lambda p, x: x @ p, W, random(2, 6))
  with pytest.raises(ValueError, match=r"of shape \(3, 6\), but.*\(2, 6\): translate it"):
    translated(random(3, 6))
  with pytest.raises(ValueError, match="float64"):
    translated(np.ones((2, 6)))


def test_nan_and_parameters_of_another_function_are_errors():
  apply = lambda p, x: x @ p["w"]
  with pytest.raises(ValueError, match="'w' holds NaN"):
    deploy.to_numpy(apply, {"w": np.full((6, 2), np.nan)}, random(2, 6))
  with pytest.raises(ValueError, match="do the parameters belong to the function"):
    deploy.to_numpy(apply, {"w": random(5, 2)}, random(2, 6))
  with pytest.raises(ValueError, match="not of bfloat16"):
    deploy.to_numpy(apply, {"w": jnp.ones((6, 2), jnp.bfloat16)}, random(2, 6), kind="sparse")
