"""Selection of the smallest scores, against `jnp.argsort` of their concatenation."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import sparsejax
from experiments.benchmark import timing, trees
from experiments.benchmark.trees import Shape
from experiments.benchmark.yardsticks import make_yardsticks


def measure_selection(shapes: Sequence[Shape], *, sparsity: float, rounds: int) -> dict[str, Any]:
  """A row of raw numbers, for given magnitudes of all weights of rank two or more."""
  scores = [jnp.abs(w) for w in trees.random_leaves([s for s in shapes if len(s) >= 2])]
  k = jnp.int32(round(sparsity * sum(s.size for s in scores)))
  programs = {
    name: timing.compile_afresh(function, scores, k)
    for name, function in {"argsort": _argsort, "select": sparsejax.select_smallest}.items()
  }
  calls = {name: functools.partial(program, scores, k) for name, (program, _) in programs.items()}
  return {
    **trees.sizes_of(shapes),
    "seconds": timing.take_turns(calls | make_yardsticks(scores), rounds),
    **{
      name: {"compile_seconds": seconds, "temporary_bytes": timing.temporary_bytes(program)}
      for name, (program, seconds) in programs.items()
    },
  }


def _argsort(scores: list[jax.Array], k: jax.Array) -> jax.Array:
  """What selection would otherwise begin with."""
  del k
  return jnp.argsort(jnp.concatenate([s.reshape(-1) for s in scores]))
