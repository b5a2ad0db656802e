"""Which indices of the operands and outputs of a primitive belong together."""

import math
from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np

from sparsejax.deploy.channels import Channels
from sparsejax.deploy.sites import Site


class Link(NamedTuple):
  """Indices of an operand's axis that belong together with indices of an output's axis."""

  operand: int
  axis: int
  indices: np.ndarray
  output: int
  output_axis: int
  output_indices: np.ndarray


def whole(operand: int, axis: int, size: int, output: int, output_axis: int) -> Link:
  """A link of two whole axes."""
  return Link(operand, axis, np.arange(size), output, output_axis, np.arange(size))


def none(site: Site, channels: Channels) -> Iterator[Link]:
  del site, channels
  return iter(())


def same_axes(site: Site, channels: Channels, skip: Collection[int] = ()) -> Iterator[Link]:
  del channels
  shape = site.shapes_out[0]
  for k, operand in enumerate(site.shapes_in):
    for axis, size in enumerate(operand):
      if size == shape[axis] > 1 and axis not in skip:
        yield whole(k, axis, size, 0, axis)


def permuted(site: Site, channels: Channels) -> Iterator[Link]:
  del channels
  for axis, source in enumerate(site.equation.params["permutation"]):
    yield whole(0, source, site.shapes_in[0][source], 0, axis)


def remaining(site: Site, channels: Channels) -> Iterator[Link]:
  """The axes that are not dropped, in their order."""
  del channels
  params = site.equation.params
  dropped = params["dimensions"] if "dimensions" in params else params["axes"]
  rest = [axis for axis in range(len(site.shapes_in[0])) if axis not in dropped]
  for axis, source in enumerate(rest):
    yield whole(0, source, site.shapes_in[0][source], 0, axis)


def broadcast(site: Site, channels: Channels) -> Iterator[Link]:
  del channels
  for source, axis in enumerate(site.equation.params["broadcast_dimensions"]):
    size = site.shapes_in[0][source]
    if size == site.shapes_out[0][axis] > 1:
      yield whole(0, source, size, 0, axis)


def unwindowed(site: Site, channels: Channels) -> Iterator[Link]:
  params = site.equation.params
  windowed = [
    axis
    for axis in range(len(site.shapes_out[0]))
    if any(
      params[key][axis] != 1
      for key in ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    )
    or params["padding"][axis] != (0, 0)
  ]
  return same_axes(site, channels, windowed)


def concatenated(site: Site, channels: Channels) -> Iterator[Link]:
  axis, start = site.equation.params["dimension"], 0
  yield from same_axes(site, channels, skip=(axis,))
  for k, shape in enumerate(site.shapes_in):
    yield Link(k, axis, np.arange(shape[axis]), 0, axis, start + np.arange(shape[axis]))
    start += shape[axis]


def parts(site: Site, channels: Channels) -> Iterator[Link]:
  axis, start = site.equation.params["axis"], 0
  for m, shape in enumerate(site.shapes_out):
    for a, size in enumerate(shape):
      if a == axis:
        yield Link(0, a, start + np.arange(size), m, a, np.arange(size))
      else:
        yield whole(0, a, size, m, a)
    start += shape[axis]


def stacked(site: Site, channels: Channels) -> Iterator[Link]:
  """All axes but that of the operands' numbers."""
  del channels
  new = site.equation.params["axis"]
  for k, shape in enumerate(site.shapes_in):
    for axis, size in enumerate(shape):
      yield whole(k, axis, size, 0, axis + (axis >= new))


def unstacked(site: Site, channels: Channels) -> Iterator[Link]:
  del channels
  gone = site.equation.params["axis"]
  for m, shape in enumerate(site.shapes_out):
    for axis, size in enumerate(shape):
      yield whole(0, axis + (axis >= gone), size, m, axis)


def tiled(site: Site, channels: Channels) -> Iterator[Link]:
  del channels
  for axis, (size, times) in enumerate(zip(site.shapes_in[0], site.equation.params["reps"])):
    yield Link(0, axis, np.tile(np.arange(size), times), 0, axis, np.arange(size * times))


def reversed_axes(site: Site, channels: Channels) -> Iterator[Link]:
  del channels
  for axis, size in enumerate(site.shapes_in[0]):
    step = -1 if axis in site.equation.params["dimensions"] else 1
    yield Link(0, axis, np.arange(size), 0, axis, np.arange(size)[::step])


def padded(site: Site, channels: Channels) -> Iterator[Link]:
  del channels
  for axis, (low, high, interior) in enumerate(site.equation.params["padding_config"]):
    if min(low, high) >= 0 and not interior:
      size = site.shapes_in[0][axis]
      yield Link(0, axis, np.arange(size), 0, axis, low + np.arange(size))


def sliced(site: Site, channels: Channels) -> Iterator[Link]:
  del channels
  params = site.equation.params
  strides = params["strides"] or (1,) * len(site.shapes_out[0])
  for axis, (start, stride) in enumerate(zip(params["start_indices"], strides)):
    if stride == 1:
      size = site.shapes_out[0][axis]
      yield Link(0, axis, start + np.arange(size), 0, axis, np.arange(size))


def reshaped(site: Site, channels: Channels) -> Iterator[Link]:
  """An axis that stays; or axes that are merged or split, of which one may lose indices.

  That is the one that is not pinned yet, or else the last.
  """
  for sources, axes in _factors(site.shapes_in[0], site.shapes_out[0]):
    if len(sources) == len(axes) == 1:
      yield whole(0, sources[0], site.shapes_in[0][sources[0]], 0, axes[0])
    elif len(sources) == 1 or len(axes) == 1:
      merges = len(axes) == 1
      place, parts = (site.inputs[0], sources) if merges else (site.outputs[0], axes)
      sizes = [channels.shape(place)[axis] for axis in parts]
      free = [i for i, axis in enumerate(parts) if not channels.is_pinned(place, axis)]
      chosen = free[-1] if free else len(parts) - 1
      indices = np.indices(sizes)[chosen].ravel()
      flat = np.arange(math.prod(sizes))
      if merges:
        yield Link(0, sources[chosen], indices, 0, axes[0], flat)
      else:
        yield Link(0, sources[0], flat, 0, axes[chosen], indices)


def _factors(shape, other):
  """Pairs of the shortest runs of axes with the same product, without axes of size 1."""
  left = [axis for axis, size in enumerate(shape) if size > 1]
  right = [axis for axis, size in enumerate(other) if size > 1]
  while left and right:
    ours, theirs = [left.pop(0)], [right.pop(0)]
    while (a := math.prod(shape[i] for i in ours)) != (b := math.prod(other[i] for i in theirs)):
      if a < b:
        ours.append(left.pop(0))
      else:
        theirs.append(right.pop(0))
    yield ours, theirs
