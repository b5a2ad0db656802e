"""Packed masks: every bit in its place, whatever the shape and the sharding."""

import os
import subprocess
import sys

import compiling
import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sparsejax
from sparsejax import packing


@hypothesis.given(
  hnp.arrays(bool, hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=19))
)
@hypothesis.settings(max_examples=30)
def test_packed_bits_are_those_of_numpy_and_come_back(mask):
  packed = packing.pack({"kernel": jnp.asarray(mask)})["kernel"]
  np.testing.assert_array_equal(packed, np.packbits(mask, axis=-1, bitorder="little"))
  unpacked = packing.unpack({"kernel": packed}, {"kernel": jax.ShapeDtypeStruct(mask.shape, "f4")})
  np.testing.assert_array_equal(unpacked["kernel"], mask)


def test_scalars_stay_boolean():
  masks = packing.pack({"scale": jnp.asarray(True), "kernel": jnp.ones((2, 3), bool)})
  assert masks["scale"].dtype == jnp.bool_
  unpacked = packing.unpack(masks, {"scale": jnp.ones([]), "kernel": jnp.ones((2, 3))})
  assert unpacked["scale"] and unpacked["kernel"].all()


@pytest.mark.parametrize("under_jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(
  "shape,spec,kept",
  [
    ((16, 13), P("data"), P("data")),
    ((4, 32), P(None, "model"), P(None, "model")),
    ((8, 64), P("data", "model"), P("data", "model")),
    ((8, 128), P(None, ("data", "model")), P(None, ("data", "model"))),
    # Parts of 10, of 4 and of 3 weights are no whole bytes.
    ((8, 20), P("data", "model"), P("data")),
    ((8, 8), P(None, "model"), P()),
    ((8, 24), P(None, ("data", "model")), P()),
  ],
)
def test_sharded_masks_are_packed_with_the_same_bits(shape, spec, kept, mode, under_jit):
  mask = np.random.default_rng(0).random(shape) < 0.5
  mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(mode,) * 2)
  jit = jax.jit if under_jit else lambda function: function
  with jax.set_mesh(mesh):
    sharded = jax.device_put(jnp.asarray(mask), NamedSharding(mesh, spec))
    packed = jit(packing.pack)([sharded])
    np.testing.assert_array_equal(packed[0], np.packbits(mask, axis=-1, bitorder="little"))
    if mode == AxisType.Explicit:
      assert packed[0].sharding.is_equivalent_to(NamedSharding(mesh, kept), mask.ndim)
    unpacked = jit(lambda packed: packing.unpack(packed, [jax.ShapeDtypeStruct(shape, "f4")]))(
      packed
    )
    np.testing.assert_array_equal(unpacked[0], mask)


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_training_on_eight_devices_with_packed_masks_is_that_with_others(mode):
  mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(mode,) * 2)
  rng = np.random.default_rng(0)
  with jax.set_mesh(mesh):
    params = {
      name: jax.device_put(rng.normal(size=shape).astype("f4"), NamedSharding(mesh, spec))
      for name, shape, spec in (
        ("rows", (16, 20), P("data")),
        ("both", (8, 32), P("data", "model")),
        ("parts of bytes", (8, 20), P("data", "model")),
      )
    }

    def train(**options):
      tx = optax.chain(
        optax.sgd(0.1), sparsejax.progressive_pruning(0.8, steps=4, every=2, **options)
      )
      state, update, now = tx.init(params), jax.jit(tx.update), params
      for _ in range(4):
        updates, state = update(jax.tree.map(jnp.sin, now), state, now)
        now = optax.apply_updates(now, updates)
      return now, sparsejax.get_masks(state, now)

    jax.tree.map(np.testing.assert_array_equal, train(pack=True), train())


def _kept(pack):
  """A compiled step with fixed masks, and the number of its weights."""
  params = {"kernel": jnp.ones((256, 1024))}
  tx = sparsejax.fixed_masks({"kernel": jnp.ones((256, 1024), bool)}, pack=pack)
  update = jax.jit(lambda updates, state, params: tx.update(updates, state, params)[0])
  lowered = update.lower(params, tx.init(params), params)
  return lowered.compile(compiling.AS_USERS), 256 * 1024


def test_unpacking_is_fused_into_the_update():
  compiled, size = _kept(pack=True)
  memory = compiled.memory_analysis()
  assert memory.temp_size_in_bytes < 0.01 * size
  without = _kept(pack=False)[0].memory_analysis()
  saved = without.argument_size_in_bytes - memory.argument_size_in_bytes
  assert saved == size - size // 8


def test_what_goes_into_the_branch_that_changes_masks_is_packed():
  params = {"kernel": jnp.ones((16, 24))}
  tx = sparsejax.progressive_pruning(0.5, steps=2, every=1, pack=True)
  jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
  (cond,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "cond"]
  shapes = [(v.aval.shape, str(v.aval.dtype)) for v in [*cond.invars, *cond.outvars]]
  assert ((16, 3), "uint8") in shapes
  assert ((16, 24), "bool") not in shapes


def test_weights_in_float16_are_updated_under_packed_masks():
  # Compiled as users do, in a process of its own, since XLA may end that.
  code = """
import jax, jax.numpy as jnp, optax, sparsejax
params = {"kernel": jnp.linspace(-1, 1, 128, dtype=jnp.float16).reshape(16, 8)}
masks = {"kernel": params["kernel"] > 0}
tx = optax.chain(optax.adam(0.1), sparsejax.fixed_masks(masks, pack=True))
@jax.jit
def step(params, state):
  updates, state = tx.update(params, state, params)
  return optax.apply_updates(params, updates), state
params, _ = step(params, tx.init(params))
print(int((params["kernel"] == 0).sum()))
"""
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
  assert (done.stdout, done.returncode) == (b"64\n", 0), done.stderr


@pytest.mark.parametrize("pack", [False, True])
def test_a_state_that_is_packed_otherwise_is_an_error_that_says_so(pack):
  one, other = (sparsejax.one_shot_pruning(0.5, at=0, pack=packed) for packed in (pack, not pack))
  params = {"kernel": jnp.ones((4, 8))}
  with pytest.raises(ValueError, match=f"with pack={not pack}, but .* has pack={pack}"):
    jax.jit(one.update)(params, other.init(params), params)


def test_a_scalar_may_be_pruned_beside_packed_masks():
  params = {"kernel": jnp.ones((4, 12)), "scale": jnp.ones([])}
  masks = {"kernel": jnp.ones((4, 12), bool), "scale": jnp.array(False)}
  tx = sparsejax.fixed_masks(masks, pack=True)
  updates, _ = tx.update(params, tx.init(params), params)
  assert updates["scale"] == -1
  np.testing.assert_array_equal(updates["kernel"], 1)
