r"""What is pruned together, and what has to stay: single weights, N:M, blocks, channels.

Transformations and `sparsejax.masks_from_scores` take a `pattern`. By default weights are pruned
one by one. Hardware and libraries that make use of sparsity may want more order than that:

`NM(2, 4)`
  Of each 4 successive weights along an axis, 2 stay: what the sparse tensor cores of GPUs multiply.
  At the sparsity :math:`1 - N/M` that is so everywhere. Below it, on the way there, each group has
  N weights left or more, and the overall count is exact. What dynamic sparse training drops in a
  group grows in the same group.
`Blocks((16, 16))`
  Tiles of the last axes are pruned as a whole.
`Channels()`
  All weights at one index of an axis, by default the output units of a layer.

Blocks and channels have the mean score of their weights, and a sparsity is the fraction of them
that is pruned. (An allocation gives each layer a fraction of its own, by the shapes of the kernels;
overall the sparsity is that of the weights then, up to whole blocks.) Scores are added up in an
order that may depend on the sharding where a block or a channel is shared by devices; masks of N:M
do not depend on it.

References:
  Mishra et al., `Accelerating Sparse Deep Neural Networks
  <https://arxiv.org/abs/2104.08378>`_, 2021
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import arguments, counts, ordinals, trees
from sparsejax import masks as masks_lib
from sparsejax.counts import Count
from sparsejax.masks import Prunable, is_kernel
from sparsejax.trees import PyTree


@dataclasses.dataclass(frozen=True)
class Pattern:
  """Single weights, every one for itself. The other patterns override what differs."""

  @property
  def regrows_in_groups(self) -> bool:
    """Whether what is dropped in a group grows in the same group."""
    return False

  def units(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of an array with one entry for all that is pruned together, for a kernel's shape.

    Raises:
      ValueError: if the pattern does not fit the shape.
    """
    return shape

  def pool(self, scores: jax.Array) -> jax.Array:
    """The score of each unit."""
    return scores

  def pool_mask(self, mask: jax.Array) -> jax.Array:
    """Whether a unit has active weights."""
    return mask

  def spread(self, mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The mask of the weights, given that of the units."""
    return mask

  def exempt(self, scores: jax.Array, active: jax.Array | None) -> jax.Array:
    """The scores by which to prune, with NaN, which ranks highest, for what has to stay."""
    return scores

  def limit(self, pruned: np.ndarray | Count, shapes: Sequence[tuple[int, ...]]):
    """The numbers of units to be pruned, if there may be as many; see `allocation.count_pruned`.

    Raises:
      ValueError: if it is known that there may not.
    """
    return pruned

  def follows(self, mask: jax.Array) -> jax.Array:
    """Whether a mask has this pattern."""
    return jnp.all(self.spread(self.pool_mask(mask), mask.shape) == mask)


SINGLE = Pattern()


@dataclasses.dataclass(frozen=True)
class NM(Pattern):
  """N of each M successive weights along an axis stay.

  Attributes:
    n: how many stay.
    m: of so many.
    axis: along which they lie, by default the last but one: that of the inputs of dense layers and
      convolutions, over which these sum. A kernel that is split into heads, such as those of the
      queries, keys and values of attention in Flax, has the heads there, and its inputs first: it
      may have a link of its own, by `prunable`.

  Raises:
    ValueError: if not 1 <= n < m, or if one of them is no integer.
  """

  n: int
  m: int
  axis: int = -2

  def __post_init__(self):
    m = arguments.check_integer("m", self.m, at_least=2)
    if arguments.check_integer("n", self.n, at_least=1) >= m:
      raise ValueError(f"n must be less than m, got {self.n} of {m}.")
    arguments.check_integer("axis", self.axis, at_least=-(2**31))

  @property
  def regrows_in_groups(self) -> bool:
    return True

  def units(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    _check_divides(shape, {_axis(shape, self.axis): self.m}, self)
    return shape

  def exempt(self, scores: jax.Array, active: jax.Array | None) -> jax.Array:
    keys = ordinals.ordinal(scores)
    if active is not None:
      keys = jnp.where(active, keys, keys.dtype.type(0))
    # As where weights are pruned: of equal ones, the last stay.
    stays = self._rank(
      keys, lambda other, own, is_before: (other > own) | (other == own) & ~is_before
    )
    stays = stays < self.n
    stays = stays if active is None else stays & active
    # NaN among the others is kept as long as they can go, but not in place of what has to stay.
    # By a comparison, since a minimum may flush denormals to zero.
    others = jnp.where(scores == jnp.inf, jnp.finfo(scores.dtype).max, scores)
    return jnp.where(stays, jnp.nan, jnp.where(jnp.isnan(scores), jnp.inf, others))

  def limit(self, pruned: np.ndarray | Count, shapes: Sequence[tuple[int, ...]]):
    room = np.array([math.prod(shape) // self.m * (self.m - self.n) for shape in shapes], np.uint64)
    if np.shape(pruned if isinstance(pruned, np.ndarray) else pruned.low) == (1,):
      room = room.sum(keepdims=True)
    if isinstance(pruned, Count):
      return counts.minimum(pruned, counts.from_ints(room))
    if np.any(pruned > room):
      raise ValueError(
        f"of each {self.m} weights {self.n} stay, so that no more than {1 - self.n / self.m:g} of a"
        " layer can be pruned: lower the sparsity, or share it out uniformly."
      )
    return pruned

  def regrown(self, scores: jax.Array, dropped: jax.Array, candidates: jax.Array) -> jax.Array:
    """Selects in each group as many candidates of lowest score as were dropped in it."""
    keys = ordinals.ordinal(scores)
    keys = jnp.where(candidates, keys, keys.dtype.type(np.iinfo(keys.dtype).max))
    rank = self._rank(
      keys, lambda other, own, is_before: (other < own) | (other == own) & is_before
    )
    groups = self._split(dropped)
    number = jnp.sum(groups, axis=self._along(dropped), keepdims=True, dtype=jnp.int32)
    return candidates & (rank < jnp.broadcast_to(number, groups.shape).reshape(dropped.shape))

  def follows(self, mask: jax.Array) -> jax.Array:
    return jnp.all(jnp.sum(self._split(mask), axis=self._along(mask), dtype=jnp.int32) == self.n)

  def _rank(self, keys: jax.Array, precedes: Callable[..., jax.Array]) -> jax.Array:
    """How many of its group precede each weight, by their keys and whether they lie before it."""
    groups, along = self._split(keys), self._along(keys)
    position = jax.lax.broadcasted_iota(jnp.int32, groups.shape, along)
    rank = jnp.zeros_like(groups, dtype=jnp.int32)
    for i in range(self.m):
      other = jax.lax.slice_in_dim(groups, i, i + 1, axis=along)
      rank += (precedes(other, groups, i < position) & (i != position)).astype(jnp.int32)
    return rank.reshape(keys.shape)

  def _along(self, x: jax.Array) -> int:
    """The axis of a group's members, of an array that is split into groups."""
    return _axis(x.shape, self.axis) + 1

  def _split(self, x: jax.Array) -> jax.Array:
    axis = _axis(x.shape, self.axis)
    return x.reshape(*x.shape[:axis], x.shape[axis] // self.m, self.m, *x.shape[axis + 1 :])


class _Tiles(Pattern, abc.ABC):
  """Weights that are pruned together or not at all."""

  @abc.abstractmethod
  def tile(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """How long a unit is along each axis of a kernel."""

  def units(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    tile = self.tile(shape)
    _check_divides(shape, dict(enumerate(tile)), self)
    return tuple(size // t for size, t in zip(shape, tile))

  def pool(self, scores: jax.Array) -> jax.Array:
    # In half precision, the means of many units would be equal.
    dtype = np.promote_types(scores.dtype, np.float32)
    return jnp.mean(self._split(scores), axis=_inside(scores.ndim), dtype=dtype)

  def pool_mask(self, mask: jax.Array) -> jax.Array:
    return jnp.any(self._split(mask), axis=_inside(mask.ndim))

  def spread(self, mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    split = [n for pair in zip(mask.shape, self.tile(shape)) for n in pair]
    return jnp.broadcast_to(jnp.expand_dims(mask, _inside(mask.ndim)), split).reshape(shape)

  def _split(self, x: jax.Array) -> jax.Array:
    tile = self.tile(x.shape)
    return x.reshape([n for size, t in zip(x.shape, tile) for n in (size // t, t)])


@dataclasses.dataclass(frozen=True)
class Blocks(_Tiles):
  """Tiles of the last axes are pruned as a whole.

  Attributes:
    shape: of a tile; it must divide the last axes of each kernel.

  Raises:
    ValueError: if it is not of positive integers.
  """

  shape: tuple[int, ...]

  def __post_init__(self):
    if not isinstance(self.shape, Sequence):
      raise ValueError(f"the shape of a block must be a tuple, got {self.shape!r}.")
    object.__setattr__(self, "shape", tuple(self.shape))
    for size in self.shape:
      arguments.check_integer("the shape of a block", size, at_least=1)

  def tile(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(self.shape) > len(shape):
      raise ValueError(f"{self} does not fit a kernel of shape {shape}.")
    return (*(1 for _ in shape[len(self.shape) :]), *self.shape)


@dataclasses.dataclass(frozen=True)
class Channels(_Tiles):
  """All weights at one index of an axis are pruned as a whole.

  Attributes:
    axis: by default the last, that of the output units of a layer.

  Raises:
    ValueError: if it is no integer.
  """

  axis: int = -1

  def __post_init__(self):
    arguments.check_integer("axis", self.axis, at_least=-(2**31))

  def tile(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    axis = _axis(shape, self.axis)
    # Of a kernel without weights, the tiles have none either, but a length.
    return tuple(1 if i == axis else max(size, 1) for i, size in enumerate(shape))


def check(masks: PyTree, pattern: Pattern, prunable: Prunable = is_kernel) -> None:
  """Checks that masks have a pattern.

  Args:
    masks: a full boolean tree.
    pattern: which; with N:M, each group has to have exactly N.
    prunable: the leaves that it is about.

  Raises:
    ValueError: if they do not; it names the first leaf.

  Example:
    >>> import jax.numpy as jnp
    >>> import sparsejax
    >>> from sparsejax import patterns
    >>> scores = {"kernel": jnp.array([[3.0], [1.0], [2.0], [4.0]])}
    >>> masks = sparsejax.masks_from_scores(scores, 0.5, pattern=patterns.NM(2, 4))
    >>> patterns.check(masks, patterns.NM(2, 4))
    >>> patterns.check(masks, patterns.NM(1, 4))
    Traceback (most recent call last):
    ...
    ValueError: the mask of 'kernel' does not have the pattern NM(n=1, m=4, axis=-2).
  """
  masks_lib.check_boolean(masks)
  pool = trees.leaves_by_name(masks_lib.select_prunable(masks, prunable))
  check_fit(pool, pattern)
  for name, mask in pool.items():
    if not pattern.follows(mask):
      raise ValueError(f"the mask of {trees.quoted(name)} does not have the pattern {pattern}.")


def check_is_pattern(pattern: Any) -> None:
  """Raises a ValueError if this is none."""
  if not isinstance(pattern, Pattern):
    raise ValueError(
      f"pattern must be one of sparsejax.patterns, such as NM(2, 4) or Channels(), got {pattern!r}."
    )


def check_fit(pool: PyTree, pattern: Pattern) -> None:
  """Raises a ValueError that names a leaf whose shape the pattern does not fit."""
  for name, leaf in trees.leaves_by_name(pool).items():
    try:
      pattern.units(np.shape(leaf))
    except ValueError as error:
      raise ValueError(f"{trees.quoted(name)}: {error} Exclude it by `prunable`.") from error


def _axis(shape: tuple[int, ...], axis: int) -> int:
  if not -len(shape) <= axis < len(shape):
    raise ValueError(f"a kernel of shape {shape} has no axis {axis}.")
  return axis % len(shape)


def _inside(ndim: int) -> tuple[int, ...]:
  """The axes within tiles, of an array of which each axis is split into tiles."""
  return tuple(range(1, 2 * ndim, 2))


def _check_divides(shape: tuple[int, ...], sizes: dict[int, int], pattern: Pattern) -> None:
  for axis, size in sizes.items():
    if shape[axis] % size:
      raise ValueError(
        f"{pattern} needs axis {axis} of a kernel of shape {shape} to be a multiple of {size}."
      )
