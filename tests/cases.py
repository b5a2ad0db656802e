"""The transformations that the compliance suite goes through, one line each.

A case is a link, its arguments and the check of its final masks. A new method is a new line of
`CASES`: every test runs over these. `VARIANTS` differ from a case in a number that another test is
about, and are trained only.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import reference

import sparsejax

CALLS = 12  # After so many calls of `update` every case has made its last change of masks.
SPARSITY = 0.7
EACH_SPARSITY = {"conv/kernel": 0.9, "hidden/kernel": 0.25, "out/kernel": 0.5}
SHAPES = {
  "conv": {"kernel": (2, 2, 8, 8), "bias": (8,)},
  "hidden": {"kernel": (8, 16), "bias": (16,)},
  "out": {"kernel": (16, 8), "bias": (8,)},
}


def make_params(seed=0, dtype=jnp.float32):
  """Random parameters: no zeros and no ties, so that every mask is due to a transformation."""
  shapes, structure = jax.tree.flatten(SHAPES, is_leaf=lambda node: isinstance(node, tuple))
  generator = np.random.default_rng(seed)
  leaves = [jnp.asarray(generator.normal(0.0, 0.3, shape), dtype) for shape in shapes]
  return jax.tree.unflatten(structure, leaves)


def path_name(path):
  """The path of a leaf as "layer/kernel", also where NNX appends "value"."""
  return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def kernels(tree):
  """The kernels of a tree by name, as NumPy arrays."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {path_name(path): np.asarray(leaf) for path, leaf in leaves if np.ndim(leaf) >= 2}


# The checks of final masks, which they get by name.


def pruned_count(sparsity, total):
  """How many of `total` weights are pruned at `sparsity`."""
  return total - round((1 - sparsity) * total)


def prunes_of_pool(sparsity):
  def check(masks):
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    assert pruned == pruned_count(sparsity, sum(mask.size for mask in masks.values()))

  return check


def prunes_in_all(densities):
  """As many as these densities prune layer by layer, but in whichever layers."""

  def check(masks):
    layers = zip(masks.values(), densities([m.shape for m in masks.values()], 1 - SPARSITY))
    expected = sum(pruned_count(1 - density, mask.size) for mask, density in layers)
    assert sum(int((~mask).sum()) for mask in masks.values()) == expected

  return check


def prunes_of_each(sparsities):
  def check(masks):
    for name, mask in masks.items():
      assert (~mask).sum() == pruned_count(sparsities[name], mask.size), name

  return check


def prunes_by_densities(densities):
  def check(masks):
    layers = densities([mask.shape for mask in masks.values()], 1 - SPARSITY)
    prunes_of_each(dict(zip(masks, 1 - layers, strict=True)))(masks)

  return check


def prunes_fixed(masks):
  for name, mask in masks.items():
    np.testing.assert_array_equal(mask, _fixed_mask(mask.shape), name)


# Arguments that are trees shaped like the parameters.


def _each_sparsity(params):
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: EACH_SPARSITY.get(path_name(path), 0.0), params
  )


def _fixed_mask(shape):
  if len(shape) < 2:
    return np.ones(shape, bool)
  return (np.arange(np.prod(shape)) % 3 > 0).reshape(shape)


def _fixed_masks(params):
  return jax.tree.map(lambda leaf: jnp.asarray(_fixed_mask(leaf.shape)), params)


class Case(NamedTuple):
  """A transformation under test.

  Attributes:
    name: what pytest calls it.
    link: the function that builds the transformation.
    arguments: its keyword arguments, given the parameters.
    check: asserts that the masks of the kernels, by name, are right after `CALLS` calls.
    wraps: whether it wraps the optimizer; that is its argument `inner` then.
  """

  name: str
  link: Callable[..., optax.GradientTransformationExtraArgs]
  arguments: Callable[[Any], dict[str, Any]]
  check: Callable[[dict[str, np.ndarray]], None]
  wraps: bool = False

  def build(self, params, **changes):
    """The link for these parameters, with some of its arguments changed; a wrapper of nothing."""
    return self.link(**(self.arguments(params) | changes))

  def optimizer(self, params, sgd=None, **changes):
    """With what would revive weights, momentum and weight decay, before or in it."""
    step = optax.chain(optax.add_decayed_weights(1e-2), sgd or optax.sgd(0.1, momentum=0.9))
    if self.wraps:
      return self.build(params, inner=step, **changes)
    return optax.chain(step, self.build(params, **changes))


def _progressive(name, check, sparsity=lambda params: SPARSITY, **arguments):
  # Off the grid: updates at calls 2, 5 and 8, the last of them shortened.
  return Case(
    name,
    sparsejax.progressive_pruning,
    lambda params: dict(sparsity=sparsity(params), steps=8, every=3, begin=2) | arguments,
    check,
  )


def _er(shapes, density):
  return reference.er_densities(shapes, density, kernel=False)


def _erk(shapes, density):
  return reference.er_densities(shapes, density, kernel=True)


_RANDOM = dict(criterion=sparsejax.criteria.random, key=jax.random.key(3))
_CUBIC = optax.polynomial_schedule(0.0, SPARSITY, 3, transition_steps=9)


_STARTED_AT_RANDOM = dict(inner=optax.identity(), sparsity=SPARSITY, key=jax.random.key(5))


def _dynamic(name, link, check, **arguments):
  arguments = _STARTED_AT_RANDOM | dict(every=3) | arguments
  return Case(name, link, lambda params: dict(arguments), check, wraps=True)


LINKS = (
  _progressive("progressive", prunes_of_pool(SPARSITY)),
  _progressive("erk", prunes_by_densities(_erk), allocation="erk"),
  _progressive("per_leaf", prunes_of_each(EACH_SPARSITY), _each_sparsity),
  _progressive("random", prunes_of_pool(SPARSITY), **_RANDOM),
  Case(
    "gradual",
    sparsejax.gradual_pruning,
    lambda params: dict(schedule=_CUBIC, every=2, begin=1, end=10),
    prunes_of_pool(SPARSITY),
  ),
  Case(
    "one_shot",
    sparsejax.one_shot_pruning,
    lambda params: dict(sparsity=SPARSITY, at=4),
    prunes_of_pool(SPARSITY),
  ),
  Case(
    "fixed",
    sparsejax.fixed_masks,
    lambda params: dict(masks=_fixed_masks(params)),
    prunes_fixed,
  ),
)

WRAPPERS = (
  _dynamic(
    "dynamic",
    sparsejax.dynamic_sparse_training,
    prunes_by_densities(_erk),
    fraction=optax.cosine_decay_schedule(0.5, CALLS),
    drop=sparsejax.criteria.running_snip(0.5),
  ),
  _dynamic(
    "granet", sparsejax.granet, prunes_of_pool(SPARSITY), initial=0.3, steps=8, fraction=0.4
  ),
  _dynamic("rigl", sparsejax.rigl, prunes_by_densities(_erk), end=10),
)
CASES = LINKS + WRAPPERS

VARIANTS = (
  _dynamic("set", sparsejax.sparse_evolutionary_training, prunes_by_densities(_er)),
  _dynamic("snfs", sparsejax.snfs, prunes_in_all(reference.uniform_densities), fraction=0.4),
  Case(
    "static",
    sparsejax.static_sparse_training,
    lambda params: dict(_STARTED_AT_RANDOM),
    prunes_by_densities(_erk),
    wraps=True,
  ),
  _progressive("uniform", prunes_by_densities(reference.uniform_densities), allocation="uniform"),
  _progressive("er", prunes_by_densities(_er), allocation="er"),
)

# The cases that choose weights themselves, and those whose sparsity may also be a traced scalar.
SELECTING = tuple(case for case in CASES if case.link is not sparsejax.fixed_masks)
TRACED = tuple(
  case for case in CASES if isinstance(case.arguments(make_params()).get("sparsity"), float)
)


def named(*names):
  """Some of the cases, for a test that is slow and does not depend on the others."""
  found = tuple(case for case in CASES if case.name in names)
  assert len(found) == len(names), names
  return found
