"""Which indices of which axes have to be kept or removed together."""

from collections.abc import Hashable

import numpy as np

from sparsejax.deploy.program import Shape

# A variable of the program, or one use of a stored constant: (number of the equation, operand).
Place = Hashable


class Channels:
  """Classes of nodes; a node is one index of one axis of one place.

  Nodes that are joined are kept or removed together. A class with a pinned node is kept.
  """

  def __init__(self):
    self._starts: dict[Place, list[int]] = {}
    self._shapes: dict[Place, Shape] = {}
    self._size = 0
    self._joins: list[tuple[np.ndarray, np.ndarray]] = []
    self._pins: list[np.ndarray] = []
    self._classes: np.ndarray | None = None

  def __contains__(self, place: Place) -> bool:
    return place in self._shapes

  @property
  def places(self) -> list[Place]:
    return list(self._shapes)

  def shape(self, place: Place) -> Shape:
    return self._shapes[place]

  def add(self, place: Place, shape: Shape) -> None:
    """Makes the nodes of a place. Axes of size 1 are those of broadcasting: they are pinned."""
    self._shapes[place], self._starts[place] = shape, []
    for axis, size in enumerate(shape):
      self._starts[place].append(self._size)
      self._size += size
      if size == 1:
        self.pin(place, axis)

  def nodes(self, place: Place, axis: int) -> np.ndarray:
    """The nodes of an axis in order."""
    return self._starts[place][axis] + np.arange(self._shapes[place][axis])

  def join(self, nodes: np.ndarray, others: np.ndarray) -> None:
    """Joins each node with the other at the same position."""
    self._joins.append((nodes, others))
    self._classes = None

  def pin(self, place: Place, axis: int, where: np.ndarray | slice = slice(None)) -> None:
    """Pins an axis, or the part of it that `where` selects."""
    self._pins.append(self.nodes(place, axis)[where])
    self._classes = None

  def classes(self) -> np.ndarray:
    """The smallest node in the class of each node."""
    if self._classes is None:
      labels = np.arange(self._size)
      joins = self._joins or [(labels[:0], labels[:0])]
      left, right = (np.concatenate(side) for side in zip(*joins))
      while True:
        before = labels.copy()
        low = np.minimum(labels[left], labels[right])
        # Not only the nodes but also what they pointed to, so that whole classes move at once.
        for target in (left, right, before[left], before[right]):
          np.minimum.at(labels, target, low)
        labels = labels[labels]
        if np.array_equal(labels, before):
          break
      self._classes = labels
    return self._classes

  def with_any(self, marked: np.ndarray) -> np.ndarray:
    """For each node whether any node of its class is marked.  # shape=(nodes,), dtype=bool"""
    classes = self.classes()
    found = np.zeros(self._size, bool)
    found[classes[marked]] = True
    return found[classes]

  def pinned(self) -> np.ndarray:
    """For each node whether its class is pinned.  # shape=(nodes,), dtype=bool"""
    marked = np.zeros(self._size, bool)
    for nodes in self._pins:
      marked[nodes] = True
    return self.with_any(marked)

  def is_pinned(self, place: Place, axis: int) -> bool:
    """Whether all of an axis is pinned."""
    return bool(self.pinned()[self.nodes(place, axis)].all())
