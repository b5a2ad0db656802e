"""What compaction has left of a network, as a table."""

import dataclasses
import math

from sparsejax.report import table


@dataclasses.dataclass(frozen=True)
class CompactionRow:
  """What is left of one leaf of the parameters.

  Attributes:
    name: the path of the leaf, such as "dense/kernel".
    shape: of the leaf.
    new_shapes: of the arrays that are left of it; none if nothing is, or if it is part of another.
    extra: numbers that are stored with it: indices of the inputs that are taken, and what the units
      add that are left out.
    dense_flops: floating-point operations for one example in the original, where it is the weight
      of a product or of a convolution; for all inputs of a function that is compacted for their
      shapes alone.
    flops: those that are left.
  """

  name: str
  shape: tuple[int, ...]
  new_shapes: tuple[tuple[int, ...], ...]
  extra: int = 0
  dense_flops: int | None = None
  flops: int | None = None

  @property
  def parameters(self) -> int:
    """How many numbers the leaf had."""
    return math.prod(self.shape)

  @property
  def new_parameters(self) -> int:
    """How many numbers are left, those that are stored with it included."""
    return sum(map(math.prod, self.new_shapes)) + self.extra


@dataclasses.dataclass(frozen=True)
class CompactionReport:
  """A table of the parameters; `str` and `print` show it.

  Attributes:
    rows: of the leaves of the parameters, and of the arrays that the function closes over.
    unknown: the operations about which nothing is known, by name, with the shapes of the arrays
      that they touch, which are kept as they are; those shapes are for a batch of two or more.
    array_flops: the operations that are left, by the array in `Compacted.params` that is the
      weight.
  """

  rows: tuple[CompactionRow, ...]
  unknown: dict[str, tuple[tuple[int, ...], ...]]
  array_flops: dict[str, int]

  @property
  def parameters(self) -> int:
    """Of the original, in all."""
    return sum(row.parameters for row in self.rows)

  @property
  def new_parameters(self) -> int:
    """Numbers that are stored now, in all."""
    return sum(row.new_parameters for row in self.rows)

  @property
  def dense_flops(self) -> int:
    """Of products and convolutions with weights in the original, for one example."""
    return sum(row.dense_flops or 0 for row in self.rows)

  @property
  def flops(self) -> int:
    """Those that are left."""
    return sum(row.flops or 0 for row in self.rows)

  def __str__(self) -> str:
    header = ("weight", "shape", "new shape", "parameters", "new", "extra", "FLOPs", "dense FLOPs")
    body = [
      (
        row.name,
        _times(row.shape),
        ", ".join(map(_times, row.new_shapes)) or "-",
        f"{row.parameters:,}",
        f"{row.new_parameters:,}",
        f"{row.extra:,}",
        "-" if row.flops is None else f"{row.flops:,}",
        "-" if row.dense_flops is None else f"{row.dense_flops:,}",
      )
      for row in self.rows
    ]
    extra = sum(row.extra for row in self.rows)
    counts = (self.parameters, self.new_parameters, extra, self.flops, self.dense_flops)
    lines = table(header, body, [("total", "", "", *(f"{count:,}" for count in counts))], left=3)
    for name, shapes in self.unknown.items():
      lines.append(f"{name} is not known: kept whole {', '.join(map(_times, shapes))}")
    return "\n".join(lines)


def _times(shape):
  return "x".join(map(str, shape)) or "scalar"
