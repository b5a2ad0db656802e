"""What is removed from a program, and what is done instead."""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from sparsejax.deploy import rules, sites
from sparsejax.deploy.channels import Channels, Place
from sparsejax.deploy.contraction import contraction_of, rule_of
from sparsejax.deploy.dependence import find_needed, find_varying, nonzero
from sparsejax.deploy.intake import Inputs, along, any_along, choose_inputs
from sparsejax.deploy.program import Program
from sparsejax.deploy.sites import Indices, Site


class Plan:
  """Decides which channels of which variables are removed.

  Attributes:
    program: all equations.
    values: of all variables, for the example.
    sites: the equations that are computed at run time.
    stored: the variables that do not have to be.
  """

  def __init__(self, program: Program, values: list[Any], other: Program | None):
    """Plans for a program.

    Args:
      program: all equations.
      values: of all variables, for some inputs.
      other: the same for another batch size; axes that differ follow the batch. None: the program
        is for this batch size only.
    """
    self.program, self.values = program, values
    self._other = other or program
    self.changing = sites.find_changing(program, self._other)
    self.stored, self.sites = sites.split(program, self._other, self.changing)
    self._contractions = [contraction_of(site) for site in self.sites]
    self.channels = Channels()
    self._tie()
    numbers = {
      i
      for site in self.sites
      for i in site.outputs
      if site.equation.name == "iota" and self._batch_axes(i)
    }
    sources = {*program.inputs, *self.changing, *numbers} - self.stored
    marks = {i: np.ones(program.shapes[i], bool) for i in sources}
    self.varying = find_varying(program, self.sites, values, marks, self._is_unsteady)
    self._pin_constants()
    self._remove()

  def kept(self, place: Place) -> Indices:
    """The indices of each axis that are kept; None for an axis of which all are."""
    return tuple(
      None if kept.all() else np.flatnonzero(kept)
      for kept in (
        self._kept[self.channels.nodes(place, axis)]
        for axis in range(len(self.channels.shape(place)))
      )
    )

  @functools.cached_property
  def inputs(self) -> dict[int, Inputs]:
    """What the contractions take, by the number of their site."""
    return {n: self._inputs(n, c) for n, c in enumerate(self._contractions) if c is not None}

  @functools.cached_property
  def executed(self) -> tuple[int, ...]:
    """The numbers of the sites that have to be computed."""
    used = set(self.program.outputs)
    numbers = []
    for number, site in reversed(list(enumerate(self.sites))):
      if used.isdisjoint(site.outputs) and not site.equation.has_effects:
        continue
      numbers.append(number)
      if number not in self.inputs or not self.inputs[number].is_empty:
        used.update(site.inputs[k] for k in site.moving)
    return tuple(reversed(numbers))

  @property
  def unknown(self) -> Iterator[Site]:
    """The sites about whose primitives nothing is known."""
    return (self.sites[n] for n in self.executed if rule_of(self.sites[n]) is rules.UNKNOWN)

  def _batch_axes(self, variable):
    pairs = zip(self.program.shapes[variable], self._other.shapes[variable])
    return [axis for axis, (size, other) in enumerate(pairs) if size != other]

  def _tie(self):
    """Joins what has to be kept or removed together, and pins what has to be kept."""
    channels, shapes = self.channels, self.program.shapes
    for variable in [*self.program.inputs, *self.changing]:
      channels.add(variable, shapes[variable])
    for site in self.sites:
      for place, shape in zip(site.inputs, site.shapes_in):
        if place not in channels:
          channels.add(place, shape)
      for variable in site.outputs:
        channels.add(variable, shapes[variable])
    for variable in {*self.program.inputs, *self.changing, *self.program.outputs} - self.stored:
      for axis in range(len(shapes[variable])):
        channels.pin(variable, axis)
    for place in channels.places:
      if isinstance(place, int):
        for axis in self._batch_axes(place):
          channels.pin(place, axis)
    self._links = [()] * len(self.sites)
    # Which axis of a reshaped array may lose indices depends on what the others say of it.
    for number in sorted(
      range(len(self.sites)), key=lambda n: self.sites[n].equation.name == "reshape"
    ):
      self._tie_site(number)

  def _tie_site(self, number):
    site, channels = self.sites[number], self.channels
    rule = rule_of(site)
    links = self._links[number] = tuple(rule.links(site, channels))
    for link in links:
      channels.join(
        channels.nodes(site.inputs[link.operand], link.axis)[link.indices],
        channels.nodes(site.outputs[link.output], link.output_axis)[link.output_indices],
      )
    free = {(link.operand, link.axis) for link in links}
    contraction = self._contractions[number]
    if contraction is not None:
      for axis, other in contraction.axes:
        free |= {(contraction.data, axis), (contraction.weights, other)}
    elif site.equation.name == "dot_general":
      for left, right in zip(*site.equation.params["dimension_numbers"][0]):
        free |= {(0, left), (1, right)}
        channels.join(channels.nodes(site.inputs[0], left), channels.nodes(site.inputs[1], right))
    for k, shape in enumerate(site.shapes_in):
      for axis in range(len(shape)):
        if (k, axis) not in free:
          channels.pin(site.inputs[k], axis)
    if not rule.makes_axes:
      free = {(link.output, link.output_axis) for link in links}
      for m, shape in enumerate(site.shapes_out):
        for axis in range(len(shape)):
          if (m, axis) not in free:
            channels.pin(site.outputs[m], axis)

  def _is_unsteady(self, number):
    """Whether what does not vary with the data may vary with the batch size.

    Elements that are only moved, or computed from those at their position, do not. A sum over the
    batch does.
    """
    site = self.sites[number]
    rule = rule_of(site)
    if rule.moves or rule.is_pointwise:
      return False
    linked = {(link.operand, link.axis) for link in self._links[number]}
    followed = any(
      (k, axis) not in linked for k in site.moving for axis in self._batch_axes(site.inputs[k])
    )
    return followed or (rule is rules.UNKNOWN and (site.grows or site.follows))

  def _pin_constants(self):
    """Pins the channels whose constants cannot be folded into what follows."""
    for site, contraction in zip(self.sites, self._contractions):
      if contraction is not None:
        constants = self._constants(contraction)
        for axis, _ in contraction.axes if constants.any() else ():
          place = site.inputs[contraction.data]
          self.channels.pin(place, axis, contraction.uneven(constants, axis))
      elif site.equation.name == "dot_general":
        left, right = (nonzero(i, self.values, self.varying) for i in site.equation.inputs)
        for a, b in zip(*site.equation.params["dimension_numbers"][0]):
          both = any_along(left, a) & any_along(right, b)
          self.channels.pin(site.inputs[0], a, both)

  def _constants(self, contraction):
    variables = contraction.site.equation.inputs
    data = variables[contraction.data]
    return contraction.constants(
      self.values[data], self.varying[data], np.asarray(self.values[variables[contraction.weights]])
    )

  def _remove(self):
    """Decides what is kept: the smallest set that computes all that it keeps."""
    channels = self.channels
    pinned = self._pinned = channels.pinned()
    alive = np.zeros_like(pinned)
    kept, self._kept = {}, None
    while True:
      needed, self._reads = find_needed(self.program, self.sites, self.values, self.varying, kept)
      for variable in self.varying:
        matters = self.varying[variable] & needed[variable]
        for axis in range(matters.ndim):
          alive[channels.nodes(variable, axis)] |= any_along(matters, axis)
      keep = pinned | channels.with_any(alive)
      while emptied := self._emptied(keep):
        alive[emptied] = True
        keep = pinned | channels.with_any(alive)
      if self._kept is not None and np.array_equal(keep, self._kept):
        return
      self._kept = keep
      kept = {i: self._mask(i) for i in self.varying}

  def _emptied(self, keep):
    """The first nodes of the axes of which nothing would be left."""
    firsts = []
    for variable in self.varying:
      for axis in range(len(self.program.shapes[variable])):
        nodes = self.channels.nodes(variable, axis)
        if nodes.size and not keep[nodes].any():
          firsts.append(nodes[0])
    return firsts

  def _mask(self, variable):
    """Which elements of a variable are kept."""
    shape = self.program.shapes[variable]
    kept = (self._kept[self.channels.nodes(variable, axis)] for axis in range(len(shape)))
    return functools.reduce(
      lambda mask, pair: mask & along(pair[1], pair[0], len(shape)),
      enumerate(kept),
      np.ones(shape, bool),
    )

  def _inputs(self, number, contraction):
    site, data = contraction.site, contraction.data
    variables = site.equation.inputs
    nodes = {axis: self.channels.nodes(site.inputs[data], axis) for axis, _ in contraction.axes}
    return choose_inputs(
      contraction,
      np.asarray(self.values[variables[contraction.weights]]),
      self._constants(contraction),
      matters=self.varying[variables[data]] & self._reads[number, data],
      kept={axis: self._kept[n] for axis, n in nodes.items()},
      pinned={axis: bool(self._pinned[n].all()) for axis, n in nodes.items()},
      left=self.kept(site.inputs[contraction.weights]),
    )
