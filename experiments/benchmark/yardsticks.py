"""What plain JAX needs to read or copy a tree: how fast the memory is."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmark.trees import PyTree


def make_yardsticks(tree: PyTree) -> dict[str, Callable[[], Any]]:
  """Functions that read and that copy all arrays of a tree.

  The reading is a sum, the fastest pass over memory that plain JAX makes: on a CPU, a sum of
  absolute values takes twice as long. The copy writes to memory that is there already.
  """
  target = jax.tree.map(jnp.copy, tree)
  read = jax.jit(_total).lower(tree).compile()
  copy = jax.jit(
    lambda target, tree: jax.tree.map(jnp.copy, tree), donate_argnums=0, keep_unused=True
  )
  copy = copy.lower(target, tree).compile()
  held = [target]

  def copy_again():
    held[0] = copy(held[0], tree)
    return held[0]

  return {"reading": functools.partial(read, tree), "copy": copy_again}


def _total(tree: PyTree) -> jax.Array:
  return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(tree))
