import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax
from sparsejax import deploy


def trained(**options):
  params = {"out": {"kernel": jnp.arange(1.0, 41).reshape(8, 5), "bias": jnp.ones(5)}}
  tx = optax.chain(optax.sgd(0.1), sparsejax.one_shot_pruning(0.5, at=0, **options))
  state = tx.init(params)
  updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
  return params, optax.apply_updates(params, updates), state


@pytest.mark.parametrize("pack", [False, True])
def test_weights_that_are_as_sparse_as_the_masks_say_come_back(pack):
  _, params, state = trained(pack=pack)
  final = deploy.finalize(params, state)
  jax.tree.map(np.testing.assert_array_equal, final, params)
  assert int((final["out"]["kernel"] == 0).sum()) == 20


def test_active_weights_may_be_zero():
  _, params, state = trained()
  deploy.finalize(jax.tree.map(jnp.zeros_like, params), state)


@pytest.mark.parametrize("sign", [1, -1])
def test_weights_that_are_not_are_an_error_that_names_the_leaf(sign):
  before, _, state = trained()
  before = jax.tree.map(lambda x: sign * x, before)
  with pytest.raises(ValueError, match="20 of 40 weights of 'out/kernel' should be pruned, but 20"):
    deploy.finalize(before, state)


def test_nan_is_an_error_that_names_the_leaf():
  _, params, state = trained()
  params["out"]["bias"] = params["out"]["bias"].at[2].set(jnp.nan)
  with pytest.raises(ValueError, match="'out/bias' holds NaN"):
    deploy.finalize(params, state)


def test_a_state_without_masks_or_of_other_parameters_is_an_error():
  _, params, state = trained()
  with pytest.raises(ValueError, match="no masks in this optimizer state"):
    deploy.finalize(params, optax.sgd(0.1).init(params))
  with pytest.raises(ValueError, match="out/kernel"):
    deploy.finalize({"out": {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(5)}}, state)
