"""How times are taken: variants take turns, and compilations start from nothing."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

# A turn of a short function is made up of as many calls as take so many seconds.
_TURN = 0.05
# A function that would be called for longer than so many seconds in all has fewer rounds.
_LIMIT = 10.0
_COMPILATION_LIMIT = 4.0


def take_turns(
  functions: Mapping[str, Callable[[], Any]], rounds: int, limit: float = _LIMIT
) -> dict[str, list[float]]:
  """The time of a call of each function in each round, in seconds.

  In a round each function has a turn, so that what disturbs the machine for a while disturbs all of
  them; every other round goes backwards, so that none always follows the same one.

  Args:
    functions: by name.
    rounds: how many.
    limit: seconds for each function; those that would take longer in all have only the first
      rounds, but two of them at least.
  """

  # The devices of a CPU wait for each other in threads, which calls in a queue would take.
  queues = jax.device_count() == 1 or jax.default_backend() != "cpu"

  def timed(function, repetitions):
    started = time.perf_counter()
    for _ in range(repetitions):
      result = function()
      if not queues:
        jax.block_until_ready(result)
    jax.block_until_ready(result)
    return (time.perf_counter() - started) / repetitions

  # The first call of all is longer.
  first = {name: timed(function, 1) for name, function in functions.items()}
  for name, function in functions.items():
    if first[name] < 1:
      first[name] = timed(function, 3)
  times: dict[str, list[float]] = {name: [] for name in functions}
  for done in range(rounds):
    turns = list(functions.items())
    for name, function in turns[::-1] if done % 2 else turns:
      if done < max(2, limit / first[name]):
        times[name].append(timed(function, max(1, math.ceil(_TURN / first[name]))))
  return times


def compile_afresh(
  function: Callable[..., Any], *args: Any, rounds: int = 1, **options: Any
) -> tuple[Any, list[float]]:
  """Compiles a function, with no help from anything that was compiled or traced before.

  Args:
    function: what to compile.
    *args: its arguments, or their shapes.
    rounds: how often to do so; once, where that takes long.
    **options: of `jax.jit`.

  Returns:
    What is compiled, and the seconds that tracing, lowering and compiling took, of each round.
  """
  seconds: list[float] = []
  with _without_cache():
    while not seconds or (len(seconds) < rounds and sum(seconds) < _COMPILATION_LIMIT):
      jax.clear_caches()
      started = time.perf_counter()
      compiled = jax.jit(function, **options).lower(*args).compile()
      seconds.append(time.perf_counter() - started)
  return compiled, seconds


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
  """Keeps compiled programs from being read from disk, or written there."""
  enabled = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  # JAX looks at the setting once, until it is told to forget what it found.
  compilation_cache.reset_cache()
  try:
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", enabled)
    compilation_cache.reset_cache()


def temporary_bytes(compiled: Any) -> int:
  """The memory that a compiled program takes on one device beside its arguments and results."""
  return compiled.memory_analysis().temp_size_in_bytes
