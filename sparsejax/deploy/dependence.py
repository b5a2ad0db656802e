"""What varies with the inputs, and what the outputs need, element by element."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.deploy.contraction import rule_of
from sparsejax.deploy.program import Program
from sparsejax.deploy.sites import Site

Marks = dict[int, np.ndarray]  # By variable, of its shape.  # dtype=bool


def find_varying(
  program: Program,
  sites: Sequence[Site],
  values: Sequence[Any],
  sources: Marks,
  unsteady: Callable[[int], bool],
) -> Marks:
  """Where variables may depend on the inputs.

  Args:
    program: all equations.
    sites: those that are computed at run time.
    values: of all variables, for some inputs.
    sources: where inputs, and what else does not depend on other variables, vary.
    unsteady: whether the outputs of the site of a number vary even if its operands do not.

  Returns:
    The marks of all variables that are computed at run time. What is not marked has the same value
    for all inputs, and that is finite.
  """
  varying = dict(sources)
  for number, site in enumerate(sites):
    moving = [varying[site.inputs[k]] for k in site.moving]
    shapes = [program.shapes[i] for i in site.outputs]
    if unsteady(number):
      found = [np.ones(shape, bool) for shape in shapes]
    elif not any(mark.any() for mark in moving):
      found = [np.zeros(shape, bool) for shape in shapes]
    else:
      outputs = _surrogate(site, values, varying)(*(np.float32(mark) for mark in moving))
      found = [np.asarray(output) > 0 for output in outputs]
    for i, mark in zip(site.outputs, found):
      if jnp.issubdtype(program.dtypes[i], jnp.inexact):
        mark = mark | ~np.isfinite(np.asarray(values[i]))
      varying[i] = mark | varying.get(i, False)
  return varying


def find_needed(
  program: Program,
  sites: Sequence[Site],
  values: Sequence[Any],
  varying: Marks,
  kept: Mapping[int, np.ndarray],
) -> tuple[Marks, dict[tuple[int, int], np.ndarray]]:
  """Where variables may matter to the outputs.

  Args:
    program: all equations.
    sites: those that are computed at run time.
    values: of all variables.
    varying: where they vary.
    kept: of every variable of which anything is needed, the elements that will be computed. They
      are to be right, whether they matter or not.

  Returns:
    The marks of all variables that are computed at run time; and what each site reads of its
    operands, by the number of the site and the position of the operand.
  """
  needed = {i: np.zeros(program.shapes[i], bool) for i in varying}
  for i in program.outputs:
    if i in needed:
      needed[i] = np.ones(program.shapes[i], bool)
  reads = {}
  for number, site in reversed(list(enumerate(sites))):
    seeds = []
    for i in site.outputs:
      if (needed[i] & varying[i]).any() and i in kept:
        needed[i] |= kept[i]
      seeds.append(needed[i] & varying[i])
    operands = [site.inputs[k] for k in site.moving]
    if site.equation.has_effects:
      marks = [np.ones(program.shapes[i], bool) for i in operands]
    elif not any(seed.any() for seed in seeds):
      marks = [np.zeros(program.shapes[i], bool) for i in operands]
    else:
      like = [jax.ShapeDtypeStruct(program.shapes[i], jnp.float32) for i in operands]
      transposed = jax.linear_transpose(_surrogate(site, values, varying), *like)
      marks = [np.asarray(x) > 0 for x in transposed([np.float32(seed) for seed in seeds])]
    for k, i, mark in zip(site.moving, operands, marks):
      reads[number, k] = mark
      needed[i] |= mark
  return needed, reads


def nonzero(variable: int, values: Sequence[Any], varying: Marks) -> np.ndarray:
  """Where a variable may differ from zero."""
  return varying.get(variable, False) | (np.asarray(values[variable]) != 0)


def _surrogate(site: Site, values: Sequence[Any], varying: Marks):
  variables = site.equation.inputs

  def value(k):
    marks = varying.get(variables[k])
    return values[variables[k]] if marks is None or not marks.any() else None

  def may_differ(k):
    return np.float32(nonzero(variables[k], values, varying))

  return rule_of(site).surrogate(site, may_differ, value)
