"""Runs side by side under `jax.vmap`, each in a lane."""

import jax
import jax.numpy as jnp


@jax.custom_batching.custom_vmap
def in_any_lane(predicate: jax.Array) -> jax.Array:
  """The predicate; under vmap, whether it holds in any lane.

  A `lax.cond` on a batched predicate becomes a select, and each lane would pay for the rule at each
  step. On this one it stays a `lax.cond`.
  """
  return predicate


@in_any_lane.def_vmap
def _(axis_size, in_batched, predicate):
  del axis_size
  # Called again, so that the vmap around this one reduces its lanes too.
  return in_any_lane(jnp.any(predicate, axis=0) if in_batched[0] else predicate), False
