"""Which of several functions takes the least time."""

import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def choose(
  ways: Mapping[str, Callable[[], Callable[[np.ndarray], np.ndarray]]],
  x: np.ndarray,
  kind: str = "fastest",
  rounds: int = 5,
) -> tuple[str, Callable[[np.ndarray], np.ndarray]]:
  """Which of several functions to take.

  Args:
    ways: makes each of them.
    x: what they are to be fast for.
    kind: the name of one, or "fastest": the one that takes less time.
    rounds: how often to time each.

  Returns:
    Its name and itself.

  Raises:
    ValueError: if none has that name, or as `take_turns` does.
  """
  if kind in ways:
    return kind, ways[kind]()
  if kind != "fastest":
    raise ValueError(f"kind must be 'fastest' or one of {list(ways)}, got {kind!r}.")
  functions = {name: make() for name, make in ways.items()}
  calls = {name: functools.partial(function, x) for name, function in functions.items()}
  times = take_turns(calls, rounds, turn=1e-2)
  choice = min(functions, key=lambda name: min(times[name]))
  return choice, functions[choice]


def take_turns(
  functions: Mapping[str, Callable[[], Any]], rounds: int, *, turn: float
) -> dict[str, list[float]]:
  """The time of a call of each function in each round, in seconds.

  In a round each function has a turn, so that what disturbs the machine for a while disturbs all of
  them; and of a turn the fastest call counts, which is disturbed the least. Threads that wait for
  each other, as those of dense products do, suffer more than others when the cores are shared.

  Args:
    functions: by name.
    rounds: how many.
    turn: how many seconds of calls make up a turn; it is one call at least.

  Raises:
    ValueError: if there are no rounds.
  """
  if rounds < 1:
    raise ValueError(f"rounds must be at least 1, got {rounds}.")

  def fastest(function):
    best, end = math.inf, time.perf_counter() + turn
    while True:
      started = time.perf_counter()
      function()
      now = time.perf_counter()
      best = min(best, now - started)
      if now >= end:
        return best

  for function in functions.values():
    function()  # The first call of all is longer.
  times = [{name: fastest(function) for name, function in functions.items()} for _ in range(rounds)]
  return {name: [each[name] for each in times] for name in functions}
