"""Steps on several devices, and programs for more weights than one holds, which are not run."""

import concurrent.futures
import itertools
import math
import multiprocessing
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.benchmark import steps, timing, trees
from experiments.benchmark.communication import bytes_sent
from experiments.benchmark.trees import Shape


def with_devices(count: int, function: Callable[..., Any], *args: Any) -> Any:
  """Calls a function where there are so many devices.

  If there are fewer here, that is another process, whose CPU stands for all of them: how many it
  stands for can only be said before JAX looks at it.
  """
  if jax.device_count() >= count:
    return function(*args)
  with concurrent.futures.ProcessPoolExecutor(
    1, multiprocessing.get_context("spawn"), initializer=_simulate, initargs=(count,)
  ) as pool:
    return pool.submit(function, *args).result()


def _simulate(count: int) -> None:
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", count)


def measure_devices(
  shapes: Sequence[Shape],
  methods: Sequence[str],
  counts: Sequence[int],
  *,
  sparsity: float,
  rounds: int,
) -> list[dict[str, Any]]:
  """Steps on each number of devices, each of which has all weights, or a part of every array.

  Args:
    shapes: of the parameters.
    methods: see `steps.measure_steps`.
    counts: numbers of devices.
    sparsity: see `steps.measure_steps`.
    rounds: see `steps.measure_steps`.

  Returns:
    Rows as `steps.measure_steps` makes them, with what is sent, for each method, number and
    placement.
  """
  rows = []
  for count, is_sharded in itertools.product(counts, (False, True)):
    shard = _sharding(count, is_sharded)
    measured = steps.measure_steps(
      shapes,
      methods,
      sparsity=sparsity,
      rounds=rounds,
      place=lambda tree, shard=shard: jax.tree.map(
        lambda leaf: jax.device_put(leaf, shard(leaf.shape)), tree
      ),
    )
    rows += [row | _facts(program, shapes, shard, count, is_sharded) for row, program in measured]
  return rows


def measure_abstract(
  shapes: Sequence[Shape], methods: Sequence[str], count: int, *, sparsity: float
) -> list[dict[str, Any]]:
  """Compiles steps for weights that are shared out among devices, with no memory for them here.

  Args:
    shapes: of the parameters.
    methods: names in `steps.METHODS`.
    count: of devices.
    sparsity: the final one.

  Returns:
    For each method a row with the seconds, the bytes and what is sent.
  """
  shard = _sharding(count, is_sharded=True)

  def placed(tree):
    return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shard(leaf.shape)), tree
    )

  params = placed([jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes])
  rows = []
  for name in methods:
    found = {}
    for variant, tx in (
      ("bare", steps.SGD),
      ("pruned", steps.METHODS[name].make(sparsity, params)),
    ):
      state = placed(jax.eval_shape(tx.init, params))
      program, seconds = steps.compile_steps(tx, params, state)
      found[variant] = {
        "compile_seconds": seconds,
        "temporary_bytes": timing.temporary_bytes(program),
        "argument_bytes": program.memory_analysis().argument_size_in_bytes,
        "state_bytes": trees.bytes_of(state),
      }
    facts = _facts(program, shapes, shard, count, is_sharded=True)
    rows.append({**trees.sizes_of(shapes), "method": name, **found, **facts})
  return rows


def _facts(
  program: Any,
  shapes: Sequence[Shape],
  shard: Callable[[Shape], NamedSharding],
  count: int,
  is_sharded: bool,
) -> dict[str, Any]:
  """What a row says of devices, and of what they send."""
  return {
    "devices": count,
    "platform": jax.default_backend(),
    "placement": "a part of each array" if is_sharded else "all weights",
    "local_parameters": sum(math.prod(shard(shape).shard_shape(shape)) for shape in shapes),
    "sent": bytes_sent(program),
  }


def _sharding(count: int, is_sharded: bool) -> Callable[[Shape], NamedSharding]:
  """From a shape to its sharding: along its longest axis that can be divided, if any."""
  mesh = jax.make_mesh((count,), ("data",), (AxisType.Auto,), devices=jax.devices()[:count])

  def sharding_of(shape: Shape) -> NamedSharding:
    axes = [axis for axis, size in enumerate(shape) if size % count == 0] if is_sharded else []
    longest = max(axes, key=lambda axis: shape[axis], default=None)
    return NamedSharding(
      mesh, P(*("data" if axis == longest else None for axis in range(len(shape))))
    )

  return sharding_of
