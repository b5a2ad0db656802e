"""What is left of a network: parameters, sparsity and FLOPs per layer, as a table."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from sparsejax import masks as masks_lib
from sparsejax import state, trees
from sparsejax.masks import Prunable, is_kernel
from sparsejax.trees import PyTree


@dataclasses.dataclass(frozen=True)
class Row:
  """One layer of a summary, or the total.

  Attributes:
    name: the path of the leaf, such as "dense/kernel".
    shape: of the leaf.
    parameters: how many there are.
    active: how many are not pruned.
    dense_flops: floating-point operations for one example without pruning (a multiplication and an
      addition for each weight and position), or None where they are not known.
    flops: those of the active weights.
  """

  name: str
  shape: tuple[int, ...]
  parameters: int
  active: int
  dense_flops: int | None = None
  flops: int | None = None

  @property
  def sparsity(self) -> float:
    """The pruned fraction."""
    return 1 - self.active / self.parameters if self.parameters else 0.0


@dataclasses.dataclass(frozen=True)
class Summary:
  """A table of layers; `str` and `print` show it.

  Attributes:
    layers: the prunable leaves.
    pool: their total: the sparsity that the transformations speak of.
    others: the total of the leaves that are never pruned, such as biases.
    total: all parameters.
    mask_bytes: the memory that masks take in the optimizer state, or None if it is not known.
  """

  layers: tuple[Row, ...]
  pool: Row
  others: Row
  total: Row
  mask_bytes: int | None = None

  @property
  def empty(self) -> tuple[str, ...]:
    """The names of the layers without any active weight, through which nothing passes."""
    return tuple(row.name for row in self.layers if row.parameters and not row.active)

  def __str__(self) -> str:
    header = ("layer", "shape", "parameters", "active", "sparsity", "FLOPs", "dense FLOPs")
    rows = [*self.layers, self.pool, self.others, self.total]
    cells = [
      (
        row.name,
        "x".join(map(str, row.shape)),
        f"{row.parameters:,}",
        f"{row.active:,}",
        f"{row.sparsity:.2%}",
        "-" if row.flops is None else f"{row.flops:,}",
        "-" if row.dense_flops is None else f"{row.dense_flops:,}",
      )
      for row in rows
    ]
    lines = table(header, cells[: len(self.layers)], cells[len(self.layers) :])
    if self.empty:
      lines.append(f"no active weight in {', '.join(self.empty)}")
    if self.mask_bytes is not None:
      lines.append(f"masks in the optimizer state: {self.mask_bytes:,} bytes")
    return "\n".join(lines)


def table(
  header: Sequence[str],
  body: Sequence[Sequence[str]],
  totals: Sequence[Sequence[str]],
  left: int = 2,
) -> list[str]:
  """The lines of a table: a header, rows, their totals; the first `left` columns are names."""
  widths = [max(map(len, column)) for column in zip(header, *body, *totals)]

  def aligned(line):
    cells = [cell.ljust(width) for cell, width in zip(line[:left], widths)]
    cells += [cell.rjust(width) for cell, width in zip(line[left:], widths[left:])]
    return "  ".join(cells).rstrip()

  rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
  return [aligned(header), rule, *map(aligned, body), rule, *map(aligned, totals)]


def summary(
  params: PyTree,
  masks: PyTree,
  *,
  positions: Mapping[str, int] | None = None,
  opt_state: PyTree | None = None,
  prunable: Prunable = is_kernel,
) -> Summary:
  """Counts parameters, active weights and FLOPs per layer.

  Args:
    params: the parameters; their shapes suffice.
    masks: a full boolean tree with their structure, as from `sparsejax.get_masks`.
    positions: by the name of a kernel, at how many positions of the output it is applied for one
      example: 1 for a dense layer, height times width of the output for a convolution. The FLOPs of
      a layer are known only with it; kernels of rank 2 count as dense layers by default.
    opt_state: the optimizer state, if the memory is to be shown that masks take in it.
    prunable: which leaves are in the pool.

  Returns:
    A `Summary`.

  Raises:
    ValueError: if masks and parameters differ in structure, or if `positions` names no kernel.

  Example:
    >>> import jax.numpy as jnp
    >>> import sparsejax
    >>> params = {"dense": {"kernel": jnp.arange(8.).reshape(4, 2), "bias": jnp.zeros(2)}}
    >>> print(sparsejax.summary(params, sparsejax.masks_from_scores(params, 0.75)))
    layer         shape  parameters  active  sparsity  FLOPs  dense FLOPs
    ---------------------------------------------------------------------
    dense/kernel  4x2             8       2    75.00%      4           16
    ---------------------------------------------------------------------
    prunable                      8       2    75.00%      4           16
    others                        2       2     0.00%      -            -
    total                        10       4    60.00%      4           16
  """
  masks_lib.check_boolean(masks)
  trees.check_same_structure(masks, params, "the masks", "the parameters")
  positions = dict(positions or {})
  kept = jax.device_get(jax.tree.map(masks_lib.count_kept, trees.leaves_by_name(masks)))
  layers, others = [], []
  for path, leaf in trees.leaves_with_path(params):
    name, shape = trees.path_name(path), tuple(np.shape(leaf))
    row = Row(name, shape, math.prod(shape), int(kept[name]))
    if not prunable(path, leaf):
      others.append(row)
      continue
    places = positions.pop(name, 1 if len(shape) == 2 else None)
    if places is not None:
      row = dataclasses.replace(
        row, dense_flops=2 * row.parameters * places, flops=2 * row.active * places
      )
    layers.append(row)
  if positions:
    raise ValueError(
      f"positions are given for {sorted(positions)}, but the prunable leaves are"
      f" {[row.name for row in layers]}."
    )
  pool = _add("prunable", layers)
  total = _add("total", [*layers, *others])
  return Summary(
    tuple(layers),
    pool,
    _add("others", others),
    dataclasses.replace(total, dense_flops=pool.dense_flops, flops=pool.flops),
    None if opt_state is None else state.mask_bytes(opt_state),
  )


def _add(name: str, rows: list[Row]) -> Row:
  known = bool(rows) and all(row.flops is not None for row in rows)
  return Row(
    name,
    (),
    sum(row.parameters for row in rows),
    sum(row.active for row in rows),
    sum(row.dense_flops for row in rows) if known else None,
    sum(row.flops for row in rows) if known else None,
  )
