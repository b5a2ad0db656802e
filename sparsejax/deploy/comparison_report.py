"""What sparsity buys, in a table and in words: what `comparison` has measured."""

import dataclasses
import functools
import statistics

from sparsejax import report as report_lib
from sparsejax.deploy.compaction_report import CompactionReport

# The least gain that is worth the name.
_GAIN = 1.1


@dataclasses.dataclass(frozen=True)
class Variant:
  """One form of a network.

  Attributes:
    name: "dense": as trained, with its zeros; "sparse": without them; "compact": without the units
      that no longer matter, in dense arrays; "compact, sparse": without either.
    parameters: the numbers that it computes with; in a compact one, indices and what was folded
      too.
    flops: multiplications and additions of products and convolutions with weights, for one example;
      see `CompactionRow`.
    file_bytes: dense float32 arrays in a safetensors file, or what `save` writes.
    gzip_bytes: the same file after gzip.
    accuracy: in [0, 1], of the weights as they are read from the file; None without labels.
    difference: the largest difference to an output of the dense network, as a part of the largest
      of these: of the weights read from the file, and of each engine.
    seconds: of the fastest call in each round, by engine, "numpy" or "jax", and by batch size.
    choices: "dense" or "sparse" for each product in NumPy, by batch size.
    threads: among how many threads examples are shared out in NumPy, by batch size.
  """

  name: str
  parameters: int
  flops: int
  file_bytes: int
  gzip_bytes: int
  accuracy: float | None
  difference: float
  seconds: dict[str, dict[int, list[float]]]
  choices: dict[int, tuple[str, ...]]
  threads: dict[int, int]


@dataclasses.dataclass(frozen=True)
class Report:
  """A table of what sparsity buys; `str` and `print` show it.

  Attributes:
    variants: of one network.
    compaction: what has become of each leaf of the parameters.
    examples: how many inputs accuracy and differences are of.
    device: on which JAX computes.
  """

  variants: tuple[Variant, ...]
  compaction: CompactionReport
  examples: int
  device: str

  def __getitem__(self, name: str) -> Variant:
    """The variant of a name."""
    return {variant.name: variant for variant in self.variants}[name]

  @property
  def batches(self) -> tuple[int, ...]:
    """The batch sizes that were timed."""
    return tuple(self["dense"].seconds["numpy"])

  def times_faster(self, name: str, batch: int, engine: str = "numpy", than: str = "") -> float:
    """How many times as fast as the dense network: the median over rounds.

    Args:
      name: of the variant.
      batch: size of the batch.
      engine: that computes it.
      than: the engine that computes the dense network; by default the same.
    """
    dense = self["dense"].seconds[than or engine][batch]
    return statistics.median(a / b for a, b in zip(dense, self[name].seconds[engine][batch]))

  def fastest(self, batch: int) -> str:
    """The name of the variant other than the dense one that takes the least time in NumPy."""
    names = [variant.name for variant in self.variants[1:]]
    return max(names, key=lambda name: self.times_faster(name, batch))

  @property
  def cells(self) -> list[dict[str, str]]:
    """The table, a dictionary for each variant."""
    rows = []
    for variant in self.variants:
      row = {
        "network": variant.name,
        "accuracy": "-" if variant.accuracy is None else f"{variant.accuracy:.2%}",
        "parameters": f"{variant.parameters:,}",
        "FLOPs": f"{variant.flops:,}",
        "file": f"{variant.file_bytes:,}",
        "gzip": f"{variant.gzip_bytes:,}",
      }
      for engine, title in (("numpy", "NumPy"), ("jax", "JAX")):
        for batch in self.batches:
          seconds = variant.seconds.get(engine, {}).get(batch)
          row[f"{title}, batch {batch}"] = "-" if seconds is None else _time(seconds)
      row["difference"] = f"{variant.difference:.1e}" if variant.difference else "0"
      rows.append(row)
    return rows

  @property
  def gains(self) -> list[tuple[str, float]]:
    """What sparsity is to buy, each with the factor that it buys."""
    dense, sparse, small = self["dense"], self["sparse"], self["compact"]
    smallest = min(self.variants, key=lambda variant: variant.file_bytes)
    gains = [
      ("a smaller file", dense.file_bytes / sparse.file_bytes),
      ("a file smaller than gzip makes the dense one", dense.gzip_bytes / smallest.file_bytes),
      ("fewer parameters in dense arrays, by compaction", dense.parameters / small.parameters),
      ("fewer operations in dense arrays, by compaction", dense.flops / max(small.flops, 1)),
    ]
    for batch in self.batches:
      speed = functools.partial(self.times_faster, batch=batch)
      best = self.fastest(batch)
      gains += [
        (f"speed in NumPy at batch {batch} ({best})", speed(best)),
        (f"speed in JAX at batch {batch} (compact)", speed("compact", engine="jax")),
        (
          f"speed in NumPy at batch {batch} ({best}) against the dense network in JAX",
          speed(best, than="jax"),
        ),
      ]
    return gains

  @property
  def conclusion(self) -> str:
    """What sparsity buys here, and what it does not."""
    bought = [f"{what}: {factor:.3g} times" for what, factor in self.gains if factor >= _GAIN]
    missed = [f"{what}: {factor:.3g} times" for what, factor in self.gains if factor < _GAIN]
    texts = [f"The sparsity buys: {'; '.join(bought)}."] if bought else []
    texts += [f"It does not buy: {'; '.join(missed)}."] if missed else []
    return " ".join(texts)

  def __str__(self) -> str:
    header = list(self.cells[0])
    rows = [list(row.values()) for row in self.cells]
    return "\n".join([*report_lib.table(header, rows, [], left=1)[:-1], self.conclusion])


def _time(seconds):
  """The median in a unit that suits it."""
  value = float(f"{statistics.median(seconds):.3g}")
  scale, unit = (1e6, "µs") if value < 1e-3 else (1e3, "ms") if value < 1 else (1, "s")
  return f"{value * scale:.3g} {unit}"
