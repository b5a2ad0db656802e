"""From raw numbers to figures: ratios of the same round, and medians with quartiles."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
Record = dict[str, Any]

# Of a weight, in bytes.
FLOAT = 4


def progressive_steps(record: Record) -> list[Row]:
  """Of each tree, the row of single steps with progressive pruning."""
  return [
    row
    for row in record["measured"].get("step", [])
    if row["method"] == "progressive" and row["steps_a_call"] == 1
  ]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
  """The first one, the median and the third one."""
  if len(values) == 1:
    return (values[0],) * 3
  return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def median(values: Sequence[float]) -> float:
  return statistics.median(values)


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
  """In each round that has both."""
  return [a / b for a, b in zip(above, below)]


def differences(more: Sequence[float], less: Sequence[float]) -> list[float]:
  """In each round that has both."""
  return [a - b for a, b in zip(more, less)]


def update_seconds(row: Row) -> list[float]:
  """What a call that changes the masks costs more than one that keeps them."""
  return differences(row["seconds"]["changed"], row["seconds"]["kept"])


def update_readings(row: Row) -> list[float]:
  """The same in readings of the memory of all weights."""
  return ratios(update_seconds(row), row["seconds"]["reading"])


def shares(seconds: dict[str, list[float]], longer: str, shorter: str) -> list[float]:
  """By how much one takes longer than another, as a part of that."""
  return [ratio - 1 for ratio in ratios(seconds[longer], seconds[shorter])]


def epoch_shares(row: Row, seconds: Sequence[float]) -> list[float]:
  """What so many seconds are of an epoch of training without pruning."""
  return ratios(seconds, [row["steps_an_epoch"] * step for step in row["seconds"]["dense"]])


def pool(row: Row) -> int:
  """The bytes of all weights that can be pruned."""
  return FLOAT * row["weights"]


def copy_bandwidth(row: Row) -> float:
  """Bytes that a copy of all that was measured on reads and writes in a second."""
  copied = row["weights"] if "select" in row else row["parameters"]
  return 2 * FLOAT * copied / median(row["seconds"]["copy"])


def least_traffic(row: Row) -> list[tuple[str, list[float], int]]:
  """Of selections, steps and mask updates: what each is, its seconds, and bytes in and out."""
  seconds = row["seconds"]
  if "select" in row:
    return [("selection", seconds["select"], pool(row) + row["weights"])]
  # Parameters and momentum, there and back, and the gradient.
  step = 5 * FLOAT * row["parameters"]
  masks = row["pruned"]["state_bytes"] - row["bare"]["state_bytes"]
  found = [
    ("bare step", seconds["bare"], step),
    (f"steady step, {row['method']}", seconds["kept"], step + masks),
  ]
  if "changed" in seconds:
    update = (f"mask update, {row['method']}", update_seconds(row), pool(row) + 2 * masks)
    found.append(update)
  return found


def most_sent(row: Row) -> int:
  """Bytes that a mask update leaves on a device, if it takes as many passes as it can."""
  # The first, by a sample; after that, each leaves half of the weights, or the next leaves a third
  # of the numbers that a score may be, or a place among ties.
  bits = row["weights"].bit_length()
  thirds = math.ceil(8 * FLOAT / math.log2(3)) + math.ceil(bits / math.log2(3))
  passes = 1 + bits + 2 * thirds
  return row["sent"]["once"] + passes * row["sent"]["each_pass"]


def growth(sizes: Sequence[float], values: Sequence[float]) -> float | None:
  """The exponent of the power law that fits best; none, if a value was lost in the noise."""
  if min(values) <= 0:
    return None
  return statistics.linear_regression(*([math.log(x) for x in each] for each in (sizes, values)))[0]


def in_seconds(values: Sequence[float]) -> str:
  """The median with quartiles, in a unit that suits it."""
  scale, unit = next(
    (scale, unit)
    for scale, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs"))
    if abs(median(values)) * scale >= 1 or unit == "µs"
  )
  return f"{spread([scale * v for v in values])} {unit}"


def spread(values: Sequence[float], form: str = ".3g") -> str:
  """The median with quartiles; alone, if there is one value."""
  low, middle, high = (format(value, form) for value in quartiles(values))
  return middle if len(values) == 1 else f"{middle} ({low} to {high})"


def in_per_cent(values: Sequence[float]) -> str:
  return f"{spread([100 * v for v in values], '.2g')} %"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table in Markdown."""
  lines = [header, ["---"] * len(header), *rows]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)
