"""What the library is to reach, and whether the numbers of a run say that it does."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from experiments.benchmark import figures
from experiments.benchmark.figures import Record, Row, progressive_steps


class Target(NamedTuple):
  """What is to be reached.

  Attributes:
    text: says so.
    limit: of the median.
    find: from a record to the figures: what each is of, and its value in each round.
    write: from such values to text.
    at_least: whether the limit is the least, and not the most.
  """

  text: str
  limit: float
  find: Callable[[Record], Iterator[tuple[str, Sequence[float]]]]
  write: Callable[[Sequence[float]], str] = figures.spread
  at_least: bool = False

  def is_reached(self, values: Sequence[float]) -> bool:
    value = figures.median(values)
    return value >= self.limit if self.at_least else value <= self.limit


def _readings(record):
  for row in progressive_steps(record):
    # The passes over small trees take a GPU as long as it takes to launch them.
    if record["hardware"]["platform"] != "gpu" or _is_large(row):
      yield row["tree"], figures.update_readings(row)


def _shares_of_steady_steps(record):
  for row, alone in _trainings(record):
    of = f"{row['recipe']}, {row['dtype']}, batches of {row['batch_size']}"
    yield f"{of}: in the whole step", figures.shares(row["seconds"], "kept", "dense")
    if alone:
      added = figures.differences(alone["seconds"]["kept"], alone["seconds"]["bare"])
      yield f"{of}: by the optimizer alone", figures.ratios(added, row["seconds"]["dense"])


def _shares_of_updates(record):
  for row, alone in _trainings(record):
    of = f"{row['recipe']}, {row['dtype']}, batches of {row['batch_size']}"
    yield f"{of}: in the whole step", figures.epoch_shares(row, figures.update_seconds(row))
    if alone:
      update = figures.update_seconds(alone)
      yield f"{of}: by the optimizer alone", figures.epoch_shares(row, update)


def _trainings(record: Record) -> Iterator[tuple[Row, Row | None]]:
  """Steps of training, with those of the optimizer alone, if they were measured."""
  alone = {row["tree"]: row for row in progressive_steps(record)}
  for row in record["measured"].get("network", []):
    yield row, alone.get(row["tree"])


def _times_faster(record):
  for row in record["measured"].get("selection", []):
    if _is_large(row):
      yield row["tree"], figures.ratios(row["seconds"]["argsort"], row["seconds"]["select"])


def _compile_seconds(record):
  measured = record["measured"]
  for row in measured.get("step", []) + measured.get("abstract", []):
    if _is_large(row) and row.get("steps_a_call", 1) == 1:
      devices = f" on {row['devices']} devices" if "devices" in row else ""
      yield f"{row['method']}, {row['tree']}{devices}", row["pruned"]["compile_seconds"]


def _is_large(row: Row) -> bool:
  return row["parameters"] >= 100e6


TARGETS = (
  Target("one mask update costs at most 12 readings of the weights' memory", 12, _readings),
  Target(
    "pruning makes a steady step of training at most 3 % longer",
    0.03,
    _shares_of_steady_steps,
    figures.in_per_cent,
  ),
  Target(
    "a mask update every epoch costs under 0.1 % of the epoch",
    0.001,
    _shares_of_updates,
    figures.in_per_cent,
  ),
  Target(
    "selection from 124 million weights is at least 50 times faster than argsort",
    50,
    _times_faster,
    at_least=True,
  ),
  Target(
    "a step compiles in under 20 s, for 124 million weights and a thousand million",
    20,
    _compile_seconds,
    figures.in_seconds,
  ),
)


def target_rows(record: Record) -> list[list[str]]:
  """Lines of a table: target, of what, figure, verdict."""
  lines = []
  for target in TARGETS:
    found = [
      [target.text, of, target.write(values), "reached" if target.is_reached(values) else "missed"]
      for of, values in target.find(record)
    ]
    lines += found or [[target.text, "-", "-", "not run"]]
  return lines
