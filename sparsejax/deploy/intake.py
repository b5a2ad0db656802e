"""Which inputs a matrix product or a convolution takes, of those that are kept."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from sparsejax.deploy import sites
from sparsejax.deploy.contraction import Contraction
from sparsejax.deploy.sites import Indices


@dataclasses.dataclass(frozen=True)
class Inputs:
  """What a contraction takes, and what the rest adds.

  Attributes:
    contraction: the contraction.
    take: by axis of the data, the indices that it takes, of those in the original.
    gathers: the axes of which it does not take all that is kept.
    left: the indices of the axes of the weights that are left.
    folded: what the constants add that are left out, or None.
  """

  contraction: Contraction
  take: dict[int, np.ndarray]
  gathers: tuple[int, ...]
  left: Indices
  folded: np.ndarray | None

  @property
  def is_empty(self) -> bool:
    return any(not indices.size for indices in self.take.values())


def choose_inputs(
  contraction: Contraction,
  weights: np.ndarray,
  constants: np.ndarray,
  *,
  matters: np.ndarray,
  kept: Mapping[int, np.ndarray],
  pinned: Mapping[int, bool],
  left: Indices,
) -> Inputs:
  """Decides what a contraction takes.

  It takes what matters to it, by a gather, if that has fewer indices than it saves weights, and if
  it drops at least a quarter of what is kept; or at all where nothing can be removed, such as from
  the inputs of the function. Otherwise it takes all that is kept.

  Args:
    contraction: the contraction.
    weights: of the original.
    constants: what data that does not vary may add; see `Contraction.constants`.
    matters: where the data varies and matters to the output.  # dtype=bool
    kept: by axis of the data, the mask of the indices that are kept.
    pinned: by axis of the data, whether nothing could be removed from it.
    left: the indices of the weights that are kept; those of the axes that are summed over do not
      count.

  Returns:
    What it takes, and what the rest adds.
  """
  left = list(left)
  for _, axis in contraction.axes:
    left[axis] = None
  take, gathers = {}, []
  for axis, among in kept.items():
    wanted = among & (any_along(matters, axis) | contraction.uneven(constants, axis))
    count, dropped = wanted.sum(), among.sum() - wanted.sum()
    each = math.prod(sites.cut(weights.shape, left)) // max(among.size, 1)
    is_few = not pinned[axis] and 4 * dropped < among.sum()
    if count and (dropped * each <= count or is_few):
      wanted = among
    elif dropped:
      gathers.append(axis)
    take[axis] = np.flatnonzero(wanted)
  taken = np.ones(constants.shape, bool)
  for axis, indices in take.items():
    taken &= along(np.isin(np.arange(taken.shape[axis]), indices), axis, taken.ndim)
  folded = _fold(contraction, np.where(taken, 0, constants), weights, left)
  for axis, other in contraction.axes:
    if take[axis].size < taken.shape[axis]:
      left[other] = take[axis]
  return Inputs(contraction, take, tuple(gathers), tuple(left), folded)


def any_along(marks: np.ndarray, axis: int) -> np.ndarray:
  """For each index of an axis whether there is a mark."""
  return marks.any(axis=tuple(a for a in range(marks.ndim) if a != axis))


def along(marks: np.ndarray, axis: int, ndim: int) -> np.ndarray:
  """Marks of an axis, with the rank of an array."""
  return marks.reshape([-1 if a == axis else 1 for a in range(ndim)])


def _fold(contraction, constants, weights, left):
  if not constants.any():
    return None
  for axis, indices in enumerate(left):
    if indices is not None:
      weights = np.take(weights, indices, axis)
  for axis, other in contraction.shared:
    if left[other] is not None:
      constants = np.take(constants, left[other], axis)
  folded = contraction.fold(contraction.first(constants), weights)
  return folded if folded.any() else None
