"""How times, memory and traffic grow with the number of weights, and with the number of devices."""

from collections.abc import Callable, Sequence

from experiments.benchmark import figures
from experiments.benchmark.figures import Record, Row, median

Quantity = tuple[str, Callable[[Row], float]]


def _seconds(name: str) -> Callable[[Row], float]:
  return lambda row: median(row["seconds"][name])


_OF_SELECTION: tuple[Quantity, ...] = (
  ("argsort", _seconds("argsort")),
  ("`select_smallest`", _seconds("select")),
)
_OF_STEPS: tuple[Quantity, ...] = (
  ("one reading", _seconds("reading")),
  ("bare step", _seconds("bare")),
  ("steady step", _seconds("kept")),
  ("mask update", lambda row: median(figures.update_seconds(row))),
  ("compilation", lambda row: median(row["pruned"]["compile_seconds"])),
)
_OF_DEVICES: tuple[Quantity, ...] = (
  *_OF_STEPS,
  ("temporary bytes of a device", lambda row: row["pruned"]["temporary_bytes"]),
  ("bytes sent by a mask update, at most", figures.most_sent),
)


def growth_with_weights(record: Record) -> list[str]:
  """A section, if there are several trees."""
  lines, header = [], []
  for quantities, rows in (
    (_OF_SELECTION, record["measured"].get("selection", [])),
    (_OF_STEPS, figures.progressive_steps(record)),
  ):
    if len(rows) < 2:
      continue
    sizes = [row["weights"] for row in rows]
    header = [f"{row['tree']} ({row['weights'] / 1e6:.3g} M)" for row in rows]
    for name, value in quantities:
      values = [value(row) for row in rows]
      cells = [f"{1e9 * value / size:.3g}" for value, size in zip(values, sizes)]
      power = figures.growth(sizes, values)
      lines.append([name, *cells, "-" if power is None else f"N^{power:.2f}"])
  if not lines:
    return []
  return [
    "## Growth with the number of weights",
    "Nanoseconds per weight, with progressive pruning; and the power of the number of weights with"
    " which the whole grows, by least squares of the logarithms, unless a difference of two times"
    " came to nothing.",
    figures.table(["time per weight, ns", *header, "the whole grows as"], lines),
  ]


def growth_with_devices(record: Record) -> list[str]:
  """A section, if there are several numbers of devices."""
  groups: dict[tuple[str, ...], list[Row]] = {}
  for row in record["measured"].get("devices", []):
    if "changed" in row["seconds"]:
      groups.setdefault((row["tree"], row["method"], row["placement"]), []).append(row)
  counts = sorted({row["devices"] for rows in groups.values() for row in rows})
  if len(counts) < 2:
    return []
  lines = []
  for names, rows in groups.items():
    rows.sort(key=lambda row: row["devices"])
    for quantity, value in _OF_DEVICES:
      lines.append([*names, quantity, *_relative([value(row) for row in rows])])
  header = ["tree", "method", "each has", "quantity", *map(str, counts)]
  return [
    "## Growth with the number of devices",
    "As a multiple of what it is on the fewest, where it is anything.",
    figures.table(header, lines),
  ]


def _relative(values: Sequence[float]) -> list[str]:
  first = next((value for value in values if value > 0), 1)
  return [f"{value / first:.3g}" for value in values]
