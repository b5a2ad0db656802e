"""Arrays that are shared out among threads."""

import functools
import itertools
import os
import queue
import threading
from collections.abc import Callable
from typing import Any

import numpy as np


def in_parts(function: Callable[..., Any], threads: int, *arrays: np.ndarray) -> list[Any]:
  """What a function returns for equal parts of arrays along their first axis, each in a thread."""
  ends = [len(arrays[0]) * i // threads for i in range(threads + 1)]
  first, *others = ([x[i:j] for x in arrays] for i, j in itertools.pairwise(ends))
  answers = [queue.SimpleQueue() for _ in others]
  for part, answer in zip(others, answers):
    _calls(threads - 1).put((function, part, answer))
  results = [function(*first)]
  for answer in answers:
    result, error = answer.get()
    if error is not None:
      raise error
    results.append(result)
  return results


@functools.cache
def _calls(threads: int) -> queue.SimpleQueue:
  """Takes calls, each with a queue for its result and its error, which so many threads make.

  The executors of `concurrent.futures` take longer to hand over a call, which counts where the call
  itself is as short as that of a small network.
  """
  calls = queue.SimpleQueue()

  def make_calls():
    while True:
      function, arguments, answer = calls.get()
      try:
        answer.put((function(*arguments), None))
      except BaseException as error:
        answer.put((None, error))

  for _ in range(threads):
    threading.Thread(target=make_calls, daemon=True).start()
  return calls


if hasattr(os, "register_at_fork"):  # A process that is forked has none of them.
  os.register_at_fork(after_in_child=_calls.cache_clear)
