"""Steps of an optimizer alone and with pruning, at calls that keep the masks and that change them.

All steps are SGD with momentum and `optax.apply_updates`, in donated buffers. A mask update is what
a step that changes masks costs more than one that keeps them.
"""

import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparsejax
from experiments.benchmark import timing, trees
from experiments.benchmark.trees import SCALE, PyTree, Shape
from experiments.benchmark.yardsticks import make_yardsticks

# With a schedule, so that each state has a count of steps, which decides whether masks are due.
SGD = optax.sgd(optax.constant_schedule(1e-3), momentum=0.9)

# A ramp so long that each of its changes prunes some weights more. Masks change at even calls.
RAMP = 2**14


def _fixed(sparsity: float, params: PyTree) -> optax.GradientTransformation:
  threshold = statistics.NormalDist(sigma=SCALE).inv_cdf(sparsity)
  return optax.chain(SGD, sparsejax.fixed_masks(jax.tree.map(lambda w: w >= threshold, params)))


def _progressive(sparsity: float, params: PyTree, **options: Any) -> optax.GradientTransformation:
  del params
  return optax.chain(SGD, sparsejax.progressive_pruning(sparsity, steps=RAMP, every=2, **options))


def _granet(sparsity: float, params: PyTree, **options: Any) -> optax.GradientTransformation:
  del params
  # It counts from 1.
  return sparsejax.granet(
    SGD, sparsity=sparsity, steps=RAMP, begin=1, every=2, fraction=0.3, **options
  )


def _rigl(sparsity: float, params: PyTree) -> optax.GradientTransformation:
  del params
  return sparsejax.rigl(
    SGD, sparsity=sparsity, every=2, end=RAMP, fraction=0.3, key=jax.random.key(0)
  )


class Method(NamedTuple):
  """How to prune.

  Attributes:
    make: from the sparsity and the parameters to the optimizer with its pruning.
    changes: whether there are calls at which masks change.
  """

  make: Callable[[float, PyTree], optax.GradientTransformation]
  changes: bool = True


METHODS = {
  "fixed": Method(_fixed, changes=False),
  "progressive": Method(_progressive),
  "progressive-packed": Method(functools.partial(_progressive, pack=True)),
  "granet": Method(_granet),
  "granet-packed": Method(functools.partial(_granet, pack=True)),
  "rigl": Method(_rigl),
}


def measure_steps(
  shapes: Sequence[Shape],
  methods: Sequence[str],
  *,
  sparsity: float,
  rounds: int,
  length: int = 1,
  place: Callable[[PyTree], PyTree] = lambda tree: tree,
) -> Iterator[tuple[dict[str, Any], Any]]:
  """Times steps with each method, and without one.

  Args:
    shapes: of the parameters.
    methods: names in `METHODS`.
    sparsity: the final one.
    rounds: see `timing.take_turns`.
    length: how many steps a call makes, in a scan.
    place: puts a tree of arrays on its devices.

  Yields:
    For each method a row of raw numbers, and its compiled program. Seconds are those of a step.
  """
  grads = place(trees.random_leaves(shapes))
  yardsticks = make_yardsticks(grads)

  def start(tx, params):
    state = place(tx.init(params))
    program, seconds = compile_steps(tx, params, state, length=length, rounds=rounds)
    facts = {
      "compile_seconds": seconds,
      "temporary_bytes": timing.temporary_bytes(program),
      "state_bytes": trees.bytes_of(state),
    }
    return _runner(program, params, state, grads), program, facts

  run_bare, _, facts_of_bare = start(SGD, place(trees.random_leaves(shapes)))
  for name in methods:
    method, params = METHODS[name], place(trees.random_leaves(shapes))
    run, program, facts = start(method.make(sparsity, params), params)
    del params  # The first step uses them up.
    variants = {
      "bare": functools.partial(run_bare, idle_calls(length)),
      **make_variants(run, length),
    }
    if not method.changes:
      del variants["changed"]
    times = timing.take_turns(variants | yardsticks, rounds)
    for variant in variants:
      times[variant] = [seconds / length for seconds in times[variant]]
    row = {
      **trees.sizes_of(shapes),
      "method": name,
      "steps_a_call": length,
      "seconds": times,
      "bare": facts_of_bare,
      "pruned": facts,
    }
    yield row, program


def due_calls(length: int = 1) -> Iterator[np.ndarray]:
  """Numbers of calls at which masks change, so many at a time, from the middle of the ramp on."""
  for start in range(RAMP // 2, RAMP - 2 * length, 2 * length):
    yield np.arange(start, start + 2 * length, 2, dtype=np.int32)
  raise ValueError("there are too many rounds: the ramp of sparsity has come to its end.")


def idle_calls(length: int = 1) -> np.ndarray:
  """As many numbers of calls at which no masks change."""
  return np.full([length], RAMP // 2 + 1, np.int32)


def compile_steps(
  tx: optax.GradientTransformation,
  params: PyTree,
  state: PyTree,
  *,
  length: int = 1,
  rounds: int = 1,
) -> tuple[Any, list[float]]:
  """Compiles (parameters, state, gradients, numbers of calls) -> (parameters, state).

  Args:
    tx: the optimizer.
    params: the parameters, or their shapes, with their shardings.
    state: that of the optimizer, likewise.
    length: how many steps a call makes.
    rounds: see `timing.compile_afresh`, which also says what is returned.
  """

  def steps(params, state, grads, calls):
    def step(carry, call):
      params, state = carry
      updates, state = tx.update(grads, optax.tree.set(state, count=call), params)
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), calls)[0]

  return timing.compile_afresh(
    steps,
    *(params, state, params, jax.ShapeDtypeStruct([length], jnp.int32)),
    rounds=rounds,
    donate_argnums=(0, 1),
    out_shardings=jax.tree.map(lambda leaf: leaf.sharding, (params, state)),
  )


def _runner(
  program: Any, params: PyTree, state: PyTree, grads: PyTree
) -> Callable[[np.ndarray], Any]:
  """A function that makes the steps of given numbers, in place."""
  held = [params, state]

  def run(calls):
    held[:] = program(*held, grads, calls)
    return held

  return run


def make_variants(
  run: Callable[[np.ndarray], Any], length: int = 1
) -> dict[str, Callable[[], Any]]:
  idle, due = idle_calls(length), due_calls(length)
  return {"kept": lambda: run(idle), "changed": lambda: run(next(due))}
