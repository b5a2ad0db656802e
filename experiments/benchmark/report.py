"""The report: what a run measured, in Markdown, made from its JSON alone."""

import itertools
from collections.abc import Sequence

from experiments.benchmark import figures
from experiments.benchmark.figures import Record, Row
from experiments.benchmark.growth import growth_with_devices, growth_with_weights
from experiments.benchmark.tables import TABLES
from experiments.benchmark.targets import target_rows


def to_markdown(record: Record) -> str:
  """The whole report of a run."""
  parts = ["# Benchmarks", _provenance(record)]
  if record["measured"].keys() != {"inference"}:  # Which has its targets in `experiments.deploy`.
    header = ["target", "of", "figure", "verdict"]
    parts += ["## Targets", figures.table(header, target_rows(record))]
  return "\n\n".join([*parts, *sections(record)]) + "\n"


def sections(record: Record) -> list[str]:
  """Tables of what was measured, under their titles."""
  parts = []
  for table in TABLES:
    measured = [record["measured"].get(name, []) for name in table.measurements]
    rows = [row for row in itertools.chain(*measured) if table.holds(row)]
    if rows:
      cells = [[write(row) for _, write in table.columns] for row in rows]
      header = [name for name, _ in table.columns]
      parts += [f"## {table.title}", table.text, figures.table(header, cells)]
  return parts + growth_with_weights(record) + growth_with_devices(record) + _bandwidth(record)


def _provenance(record: Record) -> str:
  hardware, versions = record["hardware"], record["versions"]
  packages = ", ".join(f"{name} {version}" for name, version in versions.items())
  flags = f" XLA_FLAGS: `{hardware['xla_flags']}`." if hardware["xla_flags"] else ""
  minutes = sum(record["seconds"].values()) / 60
  # Results that are older do not have it.
  load = f", {hardware['load']:.1f} processes at work on them after" if "load" in hardware else ""
  sparsity = f"Sparsity {record['sparsity']:.1%}, " if _has_one_sparsity(record) else ""
  return (
    f"Device {hardware['device']}; host {hardware['processor']}, cores {hardware['cores']}{load};"
    f" made in {minutes:.1f} minutes, commit {record['commit']}, {packages}.{flags}\n\n"
    f"{sparsity}{record['rounds']} rounds, in each of which all variants"
    " of a row have their turn; what takes very long has fewer. A figure is the median with the"
    " first and the third quartile, a ratio is one of two times of the same round, and a single"
    " number was measured once."
  )


def _has_one_sparsity(record: Record) -> bool:
  return not all("sparsity" in row for row in itertools.chain(*record["measured"].values()))


def _bandwidth(record: Record) -> list[str]:
  title = "## Against the memory bandwidth of a GPU"
  rows = record["measured"].get("selection", []) + record["measured"].get("step", [])
  if not rows:
    return []
  if record["hardware"]["platform"] != "gpu":
    return [title, f"Not run: the device is a {record['hardware']['device']}."]
  return [
    title,
    "The bytes that have to be moved are those that go in and come out, once each. At the bandwidth"
    " of a copy in the same rounds that takes a part of the time; the rest are further passes and"
    " launches.",
    bandwidth_table(rows),
  ]


def bandwidth_table(rows: Sequence[Row]) -> str:
  """How near selections, steps and mask updates come to what the memory allows."""
  lines = []
  for row in rows:
    bandwidth = figures.copy_bandwidth(row)
    for name, seconds, moved in figures.least_traffic(row):
      lines.append(
        [
          row["tree"],
          name,
          f"{bandwidth / 1e9:,.0f} GB/s",
          f"{moved / 1e6:,.1f} MB",
          figures.in_seconds(seconds),
          figures.in_per_cent([moved / bandwidth / s for s in seconds]),
        ]
      )
  header = ["tree", "of", "copy", "bytes to move", "time", "part that moving them takes"]
  return figures.table(header, lines)
