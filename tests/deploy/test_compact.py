"""Compaction rule by rule: functions with dead units, and the sizes that must be left of them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sparsejax import deploy

UNITS = 8
CONSTANT = 1  # This unit reads nothing, and has a positive bias.
UNREAD = 6  # Nothing reads this one.


def random_weights(*shape, seed=0):
  return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def check_equal(apply, params, *inputs, compacted=None, batches=(3,)):
  """Compacts, and compares the outputs for batches of random inputs like the given ones."""
  compacted = compacted or deploy.compact(apply, params, inputs)
  for batch in batches:
    new = [random_weights(batch, *np.shape(x)[1:], seed=batch) for x in inputs]
    expected, found = apply(params, *new), compacted(*new)
    jax.tree.map(assert_close, found, expected)
  return compacted


def assert_close(found, expected):
  assert found.shape == expected.shape and found.dtype == expected.dtype
  largest = float(jnp.max(jnp.abs(expected)))
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * largest)


def shapes(compacted):
  return {name: array.shape for name, array in compacted.params.items()}


class Middle(NamedTuple):
  """What lies between two layers.

  Attributes:
    function: of the hidden units (batch, 8), and of an array of constants of its output's width.
    units: which unit each of its outputs is made of; None for one that is made of none.
  """

  name: str
  function: Callable[[Any, Any], Any]
  units: Sequence[int | None]


ALL = tuple(range(UNITS))
MIDDLES = (
  Middle("elementwise", lambda h, c: jnp.tanh(h) ** 3 / (1 + jnp.abs(h)), ALL),
  Middle("constants", lambda h, c: jnp.maximum((h - c) * c + c, 0.5), ALL),
  Middle("select", lambda h, c: jnp.where(h > c, h, 0.1 * h), ALL),
  Middle("constant_predicate", lambda h, c: jnp.where(c > 0, h, -h), ALL),
  Middle("clamp", lambda h, c: lax.clamp(-1.0, h, 2.0), ALL),
  Middle("transpose", lambda h, c: jnp.transpose(jnp.exp(h.T)), ALL),
  Middle("residual", lambda h, c: h + jnp.sin(h), ALL),
  Middle("product", lambda h, c: h * jax.nn.sigmoid(h), ALL),
  Middle("checkpoint", lambda h, c: jax.checkpoint(jax.nn.gelu)(h), ALL),
  Middle("concatenate", lambda h, c: jnp.concatenate([h, 2 * h[:, :4]], 1), (*ALL, 0, 1, 2, 3)),
  Middle("pad", lambda h, c: jnp.pad(h, ((0, 0), (1, 2))), (None, *ALL, None, None)),
  Middle("slice", lambda h, c: jnp.concatenate([h[:, 2:4], h[:, 4:]], 1), (2, 3, 4, 5, 6, 7)),
  Middle(
    "split", lambda h, c: jnp.concatenate(jnp.split(h, [3], 1)[::-1], 1), (3, 4, 5, 6, 7, 0, 1, 2)
  ),
  Middle("squeeze", lambda h, c: lax.squeeze(jnp.stack([h], 1), (1,)), ALL),
  Middle("reduce", lambda h, c: jnp.sum(jnp.stack([h, h**2], 1), 1), ALL),
  Middle(
    "pooling",
    lambda h, c: lax.reduce_window(
      jnp.stack([h, -h, h], 1), -jnp.inf, lax.max, (1, 3, 1), (1, 1, 1), "VALID"
    )[:, 0],
    ALL,
  ),
  Middle("broadcast", lambda h, c: jnp.mean(jnp.broadcast_to(h[:, None], (len(h), 3, 8)), 1), ALL),
  Middle("unstack", lambda h, c: sum(jnp.unstack(jnp.stack([h, h**2]), axis=0)), ALL),
  Middle("reverse", lambda h, c: h[:, ::-1], ALL[::-1]),
  Middle("tile", lambda h, c: jnp.tile(h, (1, 2)), ALL + ALL),
  Middle("stop_gradient", lambda h, c: lax.stop_gradient(h), ALL),
  Middle("unit_axis", lambda h, c: h.reshape(len(h), 1, 8, 1).reshape(len(h), 8), ALL),
)


@pytest.mark.parametrize("middle", MIDDLES, ids=lambda middle: middle.name)
def test_dead_units_are_removed_through(middle):
  units = np.array([-1 if unit is None else unit for unit in middle.units])
  params = {
    "w1": random_weights(5, UNITS),
    "b1": random_weights(UNITS),
    "c": np.where(units == CONSTANT, 0.5, random_weights(len(units))).astype(np.float32),
    "w2": random_weights(len(units), 3),
  }
  params["w1"][:, CONSTANT] = 0
  params["b1"][CONSTANT] = 3
  params["w2"][units == UNREAD] = 0

  def apply(p, x):
    return middle.function(jax.nn.relu(x @ p["w1"] + p["b1"]), p["c"]) @ p["w2"]

  compacted = check_equal(apply, params, np.ones((1, 5)))
  left = [unit for unit in middle.units if unit not in (CONSTANT, UNREAD, None)]
  found = shapes(compacted)
  assert found["w1"] == (5, len(set(left)))
  assert found["b1"] == (1, len(set(left)))
  assert found["w2"] == (len(left), 3)
  assert not compacted.report.unknown


def test_a_positive_bias_of_a_dead_unit_is_folded_into_what_follows():
  params = {"w1": np.zeros((4, 2), np.float32), "b1": np.array([2.0, -1.0], np.float32)}
  params["w1"][0, 1] = 1
  params["w2"] = np.array([[3.0, 5.0], [7.0, 11.0]], np.float32)
  compacted = check_equal(
    lambda p, x: jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"], params, np.ones((1, 4))
  )
  np.testing.assert_array_equal(compacted.params["w2/folded"], [[6, 10]])
  # Only one of the inputs is read.
  np.testing.assert_array_equal(compacted.params["w1/inputs"], [0])
  assert shapes(compacted)["w1"] == (1, 1) and shapes(compacted)["w2"] == (1, 2)
  assert compacted.report.parameters == 4 * 2 + 2 + 2 * 2
  assert compacted.report.new_parameters == (1 + 1) + 1 + (2 + 2)


def test_a_unit_whose_only_reader_is_dead_is_removed_too():
  params = {f"w{i}": random_weights(6, 6, seed=i) for i in range(4)}
  params["w3"][2] = 0  # So nothing reads unit 2 of the third layer,
  params["w2"][4, [0, 1, 3, 4, 5]] = 0  # which alone reads unit 4 of the second,
  params["w1"][5, [0, 1, 2, 3, 5]] = 0  # which alone reads unit 5 of the first.

  def apply(p, x):
    for i in range(3):
      x = jnp.tanh(x @ p[f"w{i}"])
    return x @ p["w3"]

  compacted = check_equal(apply, params, np.ones((1, 6)))
  assert shapes(compacted) == {"w0": (6, 5), "w1": (5, 5), "w2": (5, 5), "w3": (5, 6)}


@pytest.mark.parametrize(
  "function",
  [
    lambda h, c: h * c + 1,
    lambda h, c: jnp.where(c != 0, h, -2.0),
    lambda h, c: h * jax.nn.relu(h * c),
  ],
  ids=["scale", "predicate", "gate"],
)
def test_a_unit_that_zeros_take_out_is_removed(function):
  params = {"w1": random_weights(3, 4), "c": np.float32([1, 0, 2, 0]), "w2": random_weights(4, 2)}
  apply = lambda p, x: function(jnp.tanh(x @ p["w1"]), p["c"]) @ p["w2"]
  found = shapes(check_equal(apply, params, np.ones((1, 3))))
  assert found["w1"] == (3, 2) and found["w2"] == (2, 2)


def test_what_is_kept_for_the_sake_of_others_is_computed_right():
  params = {"w1": random_weights(3, 4), "w2": np.abs(random_weights(4, 8))}
  params["w3"] = random_weights(2, 4, 3)
  params["w2"][3], params["w2"][:, 1] = 0, 0
  params["w2"][3, 1] = 1  # The second of the first head reads the last unit, and nothing else does.
  params["w3"][0, 1] = 0  # Nothing reads it, but it stays for the second of the second head.

  def apply(p, x):
    heads = (jnp.tanh(x @ p["w1"]) ** 2 @ p["w2"]).reshape(len(x), 2, 4)
    return jnp.einsum("bhd,hdo->bo", jnp.log(heads), p["w3"])  # The logarithm of 0 times 0 is NaN.

  check_equal(apply, params, np.ones((1, 3)))


def test_a_unit_of_a_residual_stream_is_removed_only_if_all_branches_leave_it():
  params = {name: random_weights(4, 4, seed=i) for i, name in enumerate(("a", "b", "out"))}
  params["a"][:, [1, 2]] = 0
  params["b"][:, [2, 3]] = 0
  compacted = check_equal(
    lambda p, x: jax.nn.relu(x @ p["a"] + x @ p["b"]) @ p["out"], params, np.ones((1, 4))
  )
  assert shapes(compacted) == {"a": (4, 3), "b": (4, 3), "out": (3, 4)}


def conv(x, w, padding="SAME", layout="NHWC", **options):
  return lax.conv_general_dilated(
    x,
    w,
    options.pop("strides", (1, 1)),
    padding,
    dimension_numbers=(layout, "HWIO", layout),
    **options,
  )


def conv_params():
  """Two kernels; channel 1 between them is constant and channel 3 not read."""
  params = {"w1": random_weights(3, 3, 2, 5), "b1": random_weights(5)}
  params["w2"] = random_weights(3, 3, 5, 4)
  params["w1"][..., 1], params["b1"][1] = 0, 2
  params["w2"][:, :, 3] = 0
  return params


@pytest.mark.parametrize(
  "options, folded",
  [
    (dict(padding="SAME"), (3, 3, 1, 4)),
    (dict(padding="SAME", strides=(2, 2)), (3, 3, 1, 4)),
    (dict(padding="VALID"), (1, 1, 1, 4)),
    (dict(padding=((2, 2), (1, 1)), lhs_dilation=(2, 2)), (3, 3, 1, 4)),
    (dict(padding="VALID", rhs_dilation=(2, 1)), (1, 1, 1, 4)),
  ],
)
def test_a_constant_channel_is_folded_through_a_convolution_position_by_position(options, folded):
  compacted = check_equal(
    lambda p, x: conv(jax.nn.relu(conv(x, p["w1"]) + p["b1"]), p["w2"], **options),
    conv_params(),
    np.ones((1, 7, 6, 2)),
  )
  assert shapes(compacted) == {
    "w1": (3, 3, 2, 3),
    "b1": (1, 1, 1, 3),
    "w2": (3, 3, 3, 4),
    "w2/folded": folded,
  }


@pytest.mark.parametrize(
  "dtype, wide, constant",
  [(jnp.int8, jnp.int32, 100), (jnp.float16, jnp.float32, 6e4), (jnp.bfloat16, jnp.float32, 0.3)],
  ids=["int8", "f16", "bf16"],
)
@pytest.mark.parametrize("padding", [None, "VALID", "SAME"], ids=["dense", "conv", "padded"])
def test_a_constant_is_folded_in_the_type_that_its_sum_has(dtype, wide, constant, padding):
  shape = (8, 3) if padding is None else (3, 3, 8, 3)
  kernel = 100 * random_weights(*shape) if dtype == jnp.int8 else 2 + random_weights(*shape)
  params = {"w1": random_weights(5, 8), "w2": jnp.asarray(np.clip(kernel, -127, 127), dtype)}
  params["b1"] = np.zeros(8, np.float32)
  params["w1"][:, 3], params["b1"][3] = 0, constant

  def apply(p, x):
    h = (jnp.round(4 * jnp.tanh(x @ p["w1"])) + p["b1"]).astype(dtype)
    if padding is None:
      return lax.dot(h, p["w2"], preferred_element_type=wide)
    h = jnp.broadcast_to(h[:, None, None], (len(h), 5, 5, 8))
    return conv(h, p["w2"], padding, preferred_element_type=wide)

  compacted = check_equal(apply, params, np.ones((1, 5)))
  assert shapes(compacted)["w2"] == (*shape[:-2], 7, 3)
  assert compacted.params["w2/folded"].dtype == wide


def test_a_constant_that_differs_between_positions_keeps_its_channel():
  params = {"a": random_weights(3, 3, 1, 3), "bias": np.full(3, 2.0, np.float32)}
  params |= {"b": random_weights(3, 3, 3, 3, seed=1), "c": random_weights(3, 3, 3, 2, seed=2)}
  params["a"][..., 0] = 0
  params["b"][:, :, 1:, 0] = 0  # Channel 0 is made of a constant and of the zeros of the padding.

  def apply(p, x):
    return conv(conv(jax.nn.relu(conv(x, p["a"]) + p["bias"]), p["b"]), p["c"])

  found = shapes(check_equal(apply, params, np.ones((1, 5, 5, 1))))
  assert found["a"] == (3, 3, 1, 2) and found["b"] == (3, 3, 2, 3) and found["c"] == (3, 3, 3, 2)


def test_a_depthwise_convolution_loses_whole_groups():
  params = conv_params() | {"w2": random_weights(3, 3, 1, 10), "w3": random_weights(1, 1, 10, 3)}
  params["w3"][:, :, 6:8] = 0  # What the group of channel 3 makes.
  params["w2"][..., 0] = 0  # One of the two that are made of channel 0, which keeps both.

  def apply(p, x):
    y = conv(jax.nn.relu(conv(x, p["w1"]) + p["b1"]), p["w2"], "VALID", feature_group_count=5)
    return conv(jax.nn.relu(y), p["w3"])

  compacted = check_equal(apply, params, np.ones((1, 5, 5, 2)))
  found = shapes(compacted)
  assert found["w1"] == (3, 3, 2, 3) and found["w2"] == (3, 3, 1, 6)
  flops = {row.name: (row.dense_flops, row.flops) for row in compacted.report.rows}
  pixels = 3 * 3  # Of the second output.
  assert flops["w2"] == (2 * pixels * 9 * 10, 2 * pixels * 9 * 6)
  assert flops["w3"] == (2 * pixels * 10 * 3, 2 * pixels * found["w3"][2] * 3)
  assert compacted.report.array_flops["w2"] == flops["w2"][1]


def test_a_grouped_convolution_keeps_a_group_of_which_one_input_matters():
  params = {"w1": random_weights(1, 1, 2, 6), "w2": random_weights(3, 3, 2, 6)}
  params["w1"][..., [1, 4, 5]] = 0  # Groups are 0 and 1, 2 and 3, 4 and 5.
  apply = lambda p, x: (
    jnp.mean(conv(jnp.tanh(conv(x, p["w1"])), p["w2"], feature_group_count=3), (1, 2))
    @ jnp.ones((6, 2))
  )
  found = shapes(check_equal(apply, params, np.ones((1, 5, 5, 2))))
  assert found["w1"] == (1, 1, 2, 4) and found["w2"] == (3, 3, 2, 4)


def test_a_convolution_of_weights_with_a_kernel_of_the_inputs_stays():
  params = {"image": random_weights(1, 3, 3, 4), "w": random_weights(5, 4)}

  def apply(p, x):
    kernel = (x @ p["w"]).T.reshape(1, 1, 4, -1)  # An output channel for each example.
    return jnp.moveaxis(conv(p["image"], kernel), -1, 0)

  compacted = check_equal(apply, params, np.ones((1, 5)))
  assert "conv_general_dilated" in compacted.report.unknown


def test_units_that_a_pad_moves_and_drops_stay():
  params = {"w1": random_weights(5, 4), "w2": random_weights(4, 3), "w3": random_weights(4, 3)}
  params["w1"][:, 1] = 0

  def apply(p, x):
    h = jnp.tanh(x @ p["w1"])
    return lax.pad(h, 0.0, ((0, 0, 0), (-1, 1, 0))) @ p["w2"] + h @ p["w3"]

  check_equal(apply, params, np.ones((1, 5)))


def test_something_is_left_of_a_layer_whose_output_is_only_moved():
  params = {"w1": np.zeros((3, 3, 2, 4), np.float32), "w2": random_weights(3, 3, 1, 4)}
  params["w3"] = random_weights(1, 1, 6, 3)

  def apply(p, x):
    constant = conv(jnp.cos(conv(x, p["w1"])), p["w2"], "VALID", feature_group_count=4)
    return conv(jnp.concatenate([x[:, 1:-1, 1:-1], constant], -1), p["w3"])

  found = shapes(check_equal(apply, params, np.ones((1, 5, 5, 2))))
  assert found["w3"] == (1, 1, 2, 3) and "w1" not in found


def test_an_axis_that_is_merged_with_the_batch_stays():
  params = {"w1": random_weights(3, 4, 5), "w2": random_weights(5, 2)}

  def apply(p, x):
    h = jnp.einsum("bc,tcd->btd", x, p["w1"])  # Of the three, only the first is used.
    return (h.reshape(-1, 5) @ p["w2"]).reshape(len(x), 3, 2)[:, 0]

  check_equal(apply, params, np.ones((1, 4)), batches=(1, 4))


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_a_channel_is_removed_through_a_flattening(layout):
  params = conv_params() | {"w2": random_weights(5, 4 * 4, 3)}
  params["w2"][3] = 0
  if layout == "NHWC":
    params["w2"] = params["w2"].transpose(1, 0, 2)
  params["w2"] = params["w2"].reshape(-1, 3)

  def apply(p, x):
    bias = p["b1"] if layout == "NHWC" else p["b1"][:, None, None]
    y = jax.nn.relu(conv(x, p["w1"], "VALID", layout) + bias)
    return y.reshape(len(y), -1) @ p["w2"]

  example = np.ones((1, 6, 6, 2) if layout == "NHWC" else (1, 2, 6, 6))
  found = shapes(check_equal(apply, params, example))
  assert found["w1"] == (3, 3, 2, 3) and found["w2"] == (4 * 4 * 3, 3)


def test_a_dead_head_is_removed_beside_a_constant_in_the_others():
  params = {"w1": random_weights(5, 3, 4), "b1": np.abs(random_weights(3, 4)) + 0.1}
  params |= {"w2": random_weights(3, 4, 6), "w3": random_weights(3, 6, 2)}
  params["w1"][:, :, 1] = 0  # The second unit of each head is the same for all inputs.
  params["w3"][1] = 0  # Nothing reads the second head.

  def apply(p, x):
    h = jnp.tanh(jnp.einsum("bi,ihc->bhc", x, p["w1"]) + p["b1"])
    return jnp.einsum("bhd,hdo->bo", jnp.tanh(jnp.einsum("bhc,hcd->bhd", h, p["w2"])), p["w3"])

  found = shapes(check_equal(apply, params, np.ones((1, 5))))
  assert found["w1"] == (5, 2, 3) and found["w2"] == (2, 3, 6) and found["w3"] == (2, 6, 2)
  assert found["w2/folded"] == (2, 6, 1)


def test_a_split_axis_loses_what_is_dead_in_all_of_its_parts():
  params = {"w1": random_weights(3, 8), "w2": random_weights(2, 4, 5)}
  params["w1"][:, [1, 2, 5]] = 0  # Of 0 to 3 and 4 to 7, both parts lose 1; the first loses 2.

  def apply(p, x):
    heads = (x @ p["w1"]).reshape(len(x), 2, 4)
    return jnp.einsum("bhd,hdo->bo", jnp.tanh(heads), p["w2"])

  found = shapes(check_equal(apply, params, np.ones((1, 3))))
  assert found["w1"] == (3, 6) and found["w2"] == (2, 3, 5)


def test_a_product_of_two_activations_loses_what_is_zero_in_one_of_them():
  params = {"q": random_weights(3, 4), "k": random_weights(3, 4, seed=1)}
  params |= {"bias": np.zeros(4, np.float32), "out": random_weights(4, 2)}
  params["q"][:, [1, 2]] = params["k"][:, 2] = 0
  params["bias"][2] = 1.5  # Both are constant here, and their product is not zero.

  def apply(p, x):
    q, k = x @ p["q"] + p["bias"], x @ p["k"] + p["bias"]
    return jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k)) @ (x @ p["k"] @ p["out"])

  found = shapes(check_equal(apply, params, np.ones((1, 5, 3))))
  assert found["q"] == (3, 3)


@pytest.mark.parametrize(
  "name, function",
  [
    ("sort", lambda h: jnp.sort(h, -1)),
    ("cumsum", lambda h: jnp.cumsum(h, -1)),
    ("scan", lambda h: lax.scan(lambda s, x: (s + x, s * x), jnp.zeros(len(h)), h.T)[1].T),
  ],
)
def test_an_unknown_operation_keeps_what_it_touches_and_is_named(name, function):
  params = {"w1": random_weights(4, 6), "w2": random_weights(6, 6), "w3": random_weights(6, 2)}
  params["w1"][:, 1] = 0
  params["w2"][:, 2] = 0
  params["w3"][3] = 0
  apply = lambda p, x: function(jnp.tanh(x @ p["w1"]) @ p["w2"]) @ p["w3"]
  compacted = check_equal(apply, params, np.ones((2, 4)))
  assert name in compacted.report.unknown
  assert f"{name} is not known" in str(compacted.report)
  found = shapes(compacted)
  # Before it, units are removed; its own are not.
  assert found["w1"] == (4, 5) and found["w2"] == (5, 6)


def test_a_layer_of_which_nothing_is_left_becomes_a_constant():
  params = {"w1": random_weights(4, 6), "w2": np.zeros((6, 5), np.float32)}
  params |= {"b2": random_weights(5), "w3": random_weights(5, 3)}
  apply = lambda p, x: jnp.exp(jnp.tanh(x @ p["w1"]) @ p["w2"] + p["b2"]) @ p["w3"]
  compacted = check_equal(apply, params, np.ones((1, 4)))
  assert shapes(compacted) == {"w3/folded": (1, 3)}


@pytest.mark.parametrize(
  "term",
  [
    lambda x: jnp.sum(jnp.ones((len(x), 3)), 0),
    lambda x: jnp.where(jnp.arange(len(x)) < 3, 0.0, 1.0)[:, None],
    lambda x: 1.0 / len(x),
    lambda x: jnp.cumsum(jnp.ones((len(x), 3)), 0),
    lambda x: lax.scan(lambda s, _: (s + 1, s), jnp.zeros(3), length=len(x))[0],
  ],
  ids=["sum", "number", "literal", "unknown", "steps"],
)
def test_what_depends_on_the_batch_size_is_not_folded(term):
  params = {"w1": random_weights(4, 3), "w2": random_weights(3, 4)}
  params["w1"][:, 1] = 0
  apply = lambda p, x: (x @ p["w1"] + term(x)) @ p["w2"]
  check_equal(apply, params, np.ones((1, 4)), batches=(2, 5))


@pytest.mark.parametrize(
  "layer",
  [
    lambda h, b: h + b[:3] ** len(h),
    lambda h, b: (h + b[:3]) ** len(h),
    lambda h, b: h + lax.slice(b, (len(h),), (len(h) + 3,)),
    lambda h, b: h + lax.fori_loop(0, len(h), lambda i, s: s + 1, b[:3]),
    lambda h, b: h + lax.scan(lambda s, _: (s / len(h), None), b[:3], length=2)[0],
  ],
  ids=["power", "power of a constant", "slice", "loop", "number in a loop"],
)
def test_what_is_computed_of_weights_by_the_batch_size_is_not_stored(layer):
  params = {"w1": random_weights(4, 3), "w2": random_weights(3, 2), "b": random_weights(9)}
  params["w1"][:, 1] = 0
  apply = lambda p, x: layer(x @ p["w1"], p["b"]) @ p["w2"]
  check_equal(apply, params, np.ones((2, 4)), batches=(3, 5))


def test_one_example_and_a_symbolic_batch_are_computed_where_jax_has_other_equations_for_them():
  params = {"w": random_weights(3, 3)}
  # `@` multiplies matrices if there is one example; `[:, 0]` gathers if the batch is symbolic.
  apply = lambda p, x: (jnp.tanh(x @ p["w"]) @ x)[:, 0] + jnp.sum(jnp.ones(x.shape[0]))
  compacted = check_equal(apply, params, np.ones((1, 3, 3)), batches=(1, 2, 4))
  shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 3, 3"), jnp.float32)
  exported = jax.export.export(jax.jit(compacted))(shape)
  for batch in (1, 5):
    x = random_weights(batch, 3, 3)
    assert_close(exported.call(x), apply(params, x))


def test_what_cannot_be_known_of_one_example_is_an_error():
  apply = lambda p, x: jnp.tanh(x @ p["w"]) @ x / len(x)
  compacted = deploy.compact(apply, {"w": random_weights(3, 3)}, np.ones((1, 3, 3)))
  with pytest.raises(ValueError, match=r"has other equations.* constant of the function depends"):
    compacted(np.ones((1, 3, 3)))


def test_weights_that_are_used_twice_and_results_that_are_constant_are_right():
  params = {"w": random_weights(4, 4), "unused": random_weights(7)}
  params["w"][:, 1] = 0

  def apply(p, x):
    return {"twice": jnp.tanh(x @ p["w"]) @ p["w"].T, "weights": p["w"], "x": x}

  compacted = check_equal(apply, params, np.ones((1, 4)))
  rows = {row.name: row.new_shapes for row in compacted.report.rows}
  assert rows["unused"] == ()


def test_a_function_of_several_inputs_and_captured_weights_is_compacted():
  captured = jnp.asarray(random_weights(5, 3))
  params = {"a": random_weights(4, 5), "b": random_weights(2, 5)}
  params["a"][:, 2] = params["b"][:, 2] = 0
  apply = lambda p, x, y: jax.nn.relu(x @ p["a"] + y @ p["b"]) @ captured
  compacted = check_equal(apply, params, np.ones((1, 4)), np.ones((1, 2)))
  assert shapes(compacted) == {"a": (4, 4), "b": (2, 4), "captured0": (4, 3)}


def test_what_is_left_is_stored_in_a_file_and_computes_the_same(tmp_path):
  params = {"w1": random_weights(9, 6), "w2": random_weights(6, 4)}
  params["w1"][[1, 2, 5, 7]] = params["w1"][:, 3] = 0
  apply = lambda p, x: jnp.tanh(x @ p["w1"]) @ p["w2"]
  compacted = check_equal(apply, params, np.ones((1, 9)))
  assert compacted.params["w1/inputs"].dtype == jnp.uint16
  deploy.save(tmp_path / "small", compacted.params)
  read = deploy.load(tmp_path / "small", like=compacted.params)
  x = random_weights(3, 9)
  np.testing.assert_array_equal(compacted.apply(read, x), compacted(x))


def test_indices_of_long_axes_have_more_bits():
  params = {"w": np.zeros((70_000, 2), np.float32)}
  params["w"][[3, 69_000]] = 1
  compacted = check_equal(lambda p, x: x @ p["w"], params, np.ones((1, 70_000)))
  assert compacted.params["w/inputs"].dtype == jnp.int32


def test_all_that_is_stored_is_counted():
  captured = jnp.asarray(random_weights(3))
  scale = lambda: jax.lax.exp(lax.add(1.0, 2.0))  # Computed from literals.
  apply = lambda p, x: jnp.tanh(x @ p["w"] + captured) * jax.jit(scale)()
  compacted = check_equal(apply, {"w": random_weights(4, 3), "unused": np.ones(7)}, np.ones((1, 4)))
  assert compacted.report.parameters == 4 * 3 + 7 + 3
  assert compacted.report.new_parameters == sum(p.size for p in compacted.params.values()) == 16


def test_a_leaf_that_has_the_name_of_what_is_captured_is_counted_too():
  captured = jnp.asarray(random_weights(3, 2))
  apply = lambda p, x: jnp.tanh(x @ p["captured0"]) @ captured
  report = check_equal(apply, {"captured0": random_weights(4, 3)}, np.ones((1, 4))).report
  assert {row.name: row.parameters for row in report.rows} == {"captured0": 12, "captured0:2": 6}
  assert report.new_parameters == 18


def test_of_a_function_for_one_size_all_operations_are_counted():
  apply = lambda p, x: x.reshape(4, 10) @ p["w"]
  report = deploy.compact(apply, {"w": random_weights(10, 8)}, np.ones((4, 2, 5))).report
  assert report.dense_flops == report.flops == 2 * 4 * 10 * 8


def test_a_layer_without_inputs_is_a_constant():
  params = {"w": np.zeros((0, 3), np.float32), "b": random_weights(3), "v": random_weights(3, 2)}
  apply = lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]
  assert shapes(check_equal(apply, params, np.ones((1, 0)))) == {"v/folded": (1, 2)}


LAYERS = {
  "dense": lambda x, w: x @ w,
  "bias": lambda x, w: x + w[0],
  "relu": lambda x, w: jax.nn.relu(x),
  "tanh": lambda x, w: jnp.tanh(x * w[0]),
  "residual": lambda x, w: x + jax.nn.relu(x @ w),
  "concatenate": lambda x, w: jnp.concatenate([x[:, :3], x @ w], 1)[:, 2:8],
  "heads": lambda x, w: (x.reshape(len(x), 2, 3) + 1).swapaxes(1, 2).reshape(len(x), 6),
  "gate": lambda x, w: x * jax.nn.sigmoid(x @ w),
  "pad": lambda x, w: jnp.pad(x, ((0, 0), (2, 0)))[:, :6] - w[1],
  "norm": lambda x, w: x / (1 + jnp.sum(x**2, -1, keepdims=True)),
  "maximum": lambda x, w: jnp.max(jnp.stack([x, x @ w, x * w[2]], 1), 1),
}


@hypothesis.given(
  layers=st.lists(st.sampled_from(sorted(LAYERS)), min_size=2, max_size=7),
  density=st.sampled_from([0.1, 0.3, 0.6]),
  seed=st.integers(0, 1000),
)
@hypothesis.settings(max_examples=10)
def test_random_networks_with_random_masks_keep_their_outputs(layers, density, seed):
  generator = np.random.default_rng(seed)
  shape = (len(layers) + 2, 6, 6)
  weights = generator.normal(size=shape) * (generator.random(shape) < density)

  def apply(params, x):
    x = x @ params[0]
    for name, w in zip(layers, params[1:]):
      x = LAYERS[name](x, w)
    return x @ params[-1]

  compacted = deploy.compact(apply, list(np.float32(weights)), np.ones((1, 6)))
  x = np.float32(generator.normal(size=(4, 6)))
  expected = apply(jnp.float32(weights), x)
  largest = float(jnp.max(jnp.abs(expected)))
  np.testing.assert_allclose(compacted(x), expected, rtol=0, atol=1e-5 * largest + 1e-30)


def dense(params, x):
  return x @ params["layer"]["kernel"] + params["layer"]["bias"]


def dense_params():
  return {"layer": {"kernel": random_weights(4, 3), "bias": random_weights(3)}}


@pytest.mark.parametrize("value, word", [(np.nan, "NaN"), (np.inf, "infinite")])
def test_weights_that_are_not_finite_are_named(value, word):
  params = dense_params()
  params["layer"]["kernel"][1, 2] = value
  with pytest.raises(ValueError, match=f"'layer/kernel' has weights that are {word}"):
    deploy.compact(dense, params, np.ones((1, 4)))


@pytest.mark.parametrize(
  "params",
  [{"kernel": np.ones((4, 3))}, {"layer": {"kernel": np.ones((5, 3)), "bias": np.ones(3)}}],
)
def test_parameters_of_another_function_are_an_error(params):
  with pytest.raises(ValueError, match="do the parameters belong to the function"):
    deploy.compact(dense, params, np.ones((1, 4)))


def test_a_function_that_uses_no_parameter_is_an_error():
  with pytest.raises(ValueError, match="uses none of the parameters"):
    deploy.compact(lambda p, x: x + 1, dense_params(), np.ones((1, 4)))


def test_a_leaf_that_is_no_array_is_named():
  with pytest.raises(ValueError, match="'layer/bias' is no array"):
    deploy.compact(dense, {"layer": {"kernel": np.ones((4, 3)), "bias": "b"}}, np.ones((1, 4)))


def test_inputs_unlike_the_example_are_an_error():
  compacted = deploy.compact(dense, dense_params(), np.ones((1, 4)))
  with pytest.raises(ValueError, match=r"shape \(2, 5\).* more than the batch size"):
    compacted(np.ones((2, 5)))
  with pytest.raises(ValueError, match="int32"):
    compacted(np.ones((2, 4), np.int32))
  with pytest.raises(ValueError, match="those of the example were"):
    compacted(np.ones((2, 4)), np.ones((2, 4)))


def test_compact_parameters_of_another_network_are_an_error_that_names_the_leaf():
  compacted = deploy.compact(dense, dense_params(), np.ones((1, 4)))
  other = compacted.params | {"layer/kernel": np.ones((4, 5), np.float32)}
  with pytest.raises(ValueError, match=r"'layer/kernel' has shape \(4, 5\) in the parameters"):
    compacted.apply(other, np.ones((1, 4)))
  with pytest.raises(ValueError, match="'layer/bias'"):
    compacted.apply({"layer/kernel": compacted.params["layer/kernel"]}, np.ones((1, 4)))


def test_a_function_for_one_size_takes_only_that():
  apply = lambda p, x: (x @ p["w"]).reshape(3, 2)
  compacted = check_equal(apply, {"w": random_weights(4, 2)}, np.ones((3, 4)), batches=(3,))
  with pytest.raises(ValueError, match=r"shape \(2, 4\)"):
    compacted(np.ones((2, 4)))


def test_a_function_that_does_other_things_at_another_size_is_an_error():
  apply = lambda p, x: x @ p["w"] if len(x) < 5 else jnp.tanh(x @ p["w"])
  compacted = deploy.compact(apply, {"w": random_weights(4, 2)}, np.ones((1, 4)))
  with pytest.raises(ValueError, match="has other equations"):
    compacted(np.ones((5, 4)))
