"""Inference on the host: `deploy.to_numpy` beside dense NumPy and dense JAX."""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sparsejax
from sparsejax import deploy
from sparsejax.deploy import runtime

# A turn of a variant is made up of as many calls as take so many seconds.
_TURN = 0.2
# Numbers of inputs, of units of hidden layers, and of outputs.
NETWORKS = {"LeNet-300-100": (784, 300, 100, 10), "4096 x 4096": (4096, 4096)}


def measure_inference(
  sparsities: Sequence[float], batches: Sequence[int], *, rounds: int
) -> Iterator[dict[str, Any]]:
  """Times each network at each sparsity and batch size.

  Weights are random, of Kaiming's rule with fan_out, and pruned by magnitude, globally. That is
  what a training begins with; where the weights lie changes little of what they cost.

  Args:
    sparsities: fractions of pruned weights.
    batches: sizes of the batches.
    rounds: in each of which all variants have their turn.

  Yields:
    A row of seconds for each: of NumPy with dense matrices, of CSR in every layer, of the faster
    one in each layer in one or all threads, and of JAX with dense matrices.
  """
  for (name, units), sparsity in ((n, s) for n in NETWORKS.items() for s in sparsities):
    kernels = _pruned(units, sparsity)
    for batch in batches:
      yield {
        "network": name,
        "sparsity": sparsity,
        "weights": sum(kernel.size for kernel in kernels),
        "active": sum(int(np.count_nonzero(kernel)) for kernel in kernels),
        "batch_size": batch,
        **_measure(kernels, batch, rounds),
      }


def _pruned(units, sparsity):
  rng = np.random.default_rng(0)
  kernels = [
    np.float32(rng.standard_normal(shape) * math.sqrt(2 / shape[1]))
    for shape in itertools.pairwise(units)
  ]
  masks = sparsejax.masks_from_scores([abs(kernel) for kernel in kernels], sparsity)
  return [np.where(mask, kernel, 0) for mask, kernel in zip(masks, kernels)]


def _measure(kernels, batch, rounds):
  """Seconds, the faster kind of each layer, and the largest difference to the outputs of JAX."""
  x = np.random.default_rng(1).random((batch, len(kernels[0])), np.float32)
  translate = functools.partial(deploy.to_numpy, _apply, kernels, x, rounds=rounds)
  networks = {
    "dense": translate(kind="dense"),
    "sparse": translate(kind="sparse"),
    "fastest": translate(threads="fastest"),
  }
  in_jax = jax.jit(_apply)
  arrays = jax.device_put((kernels, x))
  functions = {kind: functools.partial(network, x) for kind, network in networks.items()}
  functions["jax"] = lambda: in_jax(*arrays).block_until_ready()
  expected = np.asarray(functions["jax"]())
  largest = np.abs(expected).max()
  return {
    "choices": networks["fastest"].choices,
    "threads": networks["fastest"].threads,
    "difference": max(
      float(np.abs(function() - expected).max() / largest) for function in functions.values()
    ),
    "device": jax.devices()[0].device_kind,
    "seconds": runtime.take_turns(functions, rounds, turn=_TURN),
  }


def _apply(kernels, x):
  for kernel in kernels[:-1]:
    x = jnp.maximum(x @ kernel, 0)
  return x @ kernels[-1]
