"""Removes units that no longer matter, exactly."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import trees
from sparsejax.deploy import program as programs
from sparsejax.deploy.compacted import Compacted, Step
from sparsejax.deploy.compaction_report import CompactionReport, CompactionRow
from sparsejax.deploy.contraction import operations, weights_of
from sparsejax.deploy.plan import Plan
from sparsejax.deploy.sites import Indices, cut, positions
from sparsejax.trees import PyTree

_CAPTURED = "captured"
_MADE = "constants"  # The owner of what is computed from literals alone.


def compact(apply_fn: Callable[..., Any], params: PyTree, example_inputs: Any) -> Compacted:
  """Removes the units of a network that no longer matter, exactly.

  A unit is removed if no output needs it, or if it is the same for all inputs: what it adds to the
  next layer is added there then. This looks at the operations of the function, not at layers, and
  so works for any function of JAX. An operation that it does not know keeps all of the arrays that
  it touches; the report names it.

  The outputs are those of the original to float rounding, as long as all activations are finite: a
  product with zero is taken to be zero.

  Args:
    apply_fn: a function of the parameters and of the inputs, such as `model.apply`. It must be pure
      and compute the same for each example of a batch of any size.
    params: all that the weights are taken from; for a Flax module the variables, with the
      statistics of batch norm. What the function closes over is known as well.
    example_inputs: an array or a tuple of them, of which one example suffices. Leading axes of the
      size of the first one are taken to be those of the batch, if the function can be traced with
      another size; if not, it is compacted for these shapes alone.

  Returns:
    A `Compacted`, to be called with inputs of any batch size. Jit it.

  Raises:
    ValueError: if a weight is not finite, if the function cannot be traced with these parameters,
      or if it uses none of them.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from sparsejax import deploy
    >>> def apply(params, x):
    ...   return jax.nn.relu(x @ params["hidden"] + params["bias"]) @ params["out"]
    >>> params = {
    ...   "hidden": jnp.array([[1., 0., 0., 2.], [0., 0., 2., 1.]]),  # The second reads nothing.
    ...   "bias": jnp.array([0., 3., 1., 4.]),
    ...   "out": jnp.array([[1., 2.], [4., 5.], [0., 0.], [3., 4.]]),  # Nothing reads the third.
    ... }
    >>> small = deploy.compact(apply, params, jnp.ones((1, 2)))
    >>> print(small.report)
    weight  shape  new shape  parameters  new  extra  FLOPs  dense FLOPs
    --------------------------------------------------------------------
    bias    4      1x2                 4    2      0      -            -
    hidden  2x4    2x2                 8    4      0      8           16
    out     4x2    2x2                 8    6      2      8           16
    --------------------------------------------------------------------
    total                             20   12      2     16           32
    >>> print(small.params["out/folded"])  # What the second unit adds: 3 times its weights.
    [[12. 15.]]
  """
  inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
  params, inputs = _arrays(params), jax.tree.map(jnp.asarray, inputs)
  program = programs.trace_of(apply_fn, params, inputs)
  inputs, program, other, batched = _with_batch(apply_fn, params, inputs, program)
  values = programs.evaluate(program, jax.tree.leaves(params), jax.tree.leaves(inputs))
  names = list(trees.leaves_by_name(params))
  plan = Plan(program, values, other)
  store = _Store(plan, names)
  steps = tuple(_step(plan, number, store) for number in plan.executed)
  outputs = {
    i: store.add(i, (None,) * len(program.shapes[i]))
    for i in program.outputs
    if i in plan.stored and i not in program.literals
  }
  batch = jax.tree.leaves(inputs)[batched.index(True)].shape[0] if any(batched) else 1
  return Compacted(
    {name: jnp.asarray(array) for name, array in store.arrays.items()},
    _report(plan, store, steps, batch),
    apply_fn,
    jax.eval_shape(lambda p: p, params),
    jax.eval_shape(lambda x: x, inputs),
    batched,
    program,
    steps,
    outputs,
    other,
  )


def _arrays(params):
  """The parameters as arrays, if all of them are finite numbers."""

  def checked(path, leaf):
    name = trees.path_name(path)
    try:
      array = jnp.asarray(leaf)
    except (TypeError, ValueError) as error:
      raise ValueError(f"{trees.quoted(name)} is no array: {error}") from error
    if jnp.issubdtype(array.dtype, jnp.inexact) and not np.isfinite(np.asarray(array)).all():
      what = "NaN" if np.isnan(np.asarray(array)).any() else "infinite"
      raise ValueError(
        f"{trees.quoted(name)} has weights that are {what}: what they are multiplied with cannot"
        " be removed."
      )
    return array

  return trees.map_with_path(checked, params)


def _with_batch(apply_fn, params, inputs, program):
  """The program for a batch of at least two, that for one more, and which inputs are batched.

  A batch of one would not show which axes follow the batch, nor what is broadcast along it.
  """
  leaves, structure = jax.tree.flatten(inputs)
  size = next((x.shape[0] for x in leaves if x.ndim), 0)
  batched = tuple(x.ndim > 0 and x.shape[0] == size for x in leaves)

  def of_size(new):
    types = [
      jax.ShapeDtypeStruct((new, *x.shape[1:]), x.dtype) if b else x
      for x, b in zip(leaves, batched)
    ]
    return programs.trace(apply_fn, params, structure.unflatten(types))

  try:
    first, other = of_size(max(size, 2)), of_size(max(size, 2) + 1)
  except Exception:  # Whatever a function raises that has been written for one size.
    return inputs, program, None, (False,) * len(leaves)
  if not size or not first.same_as(other):
    return inputs, program, None, (False,) * len(leaves)
  if size == 1:
    inputs = structure.unflatten(
      [jnp.concatenate([x, x]) if b else x for x, b in zip(leaves, batched)]
    )
  return inputs, first, other, batched


class _Store:
  """The arrays that are left, by name, and the leaf of the parameters that each belongs to."""

  def __init__(self, plan: Plan, names: list[str]):
    self.arrays: dict[str, np.ndarray] = {}
    # Names of arrays by leaf: of what is left of it, and of what is stored with that.
    self.weights: dict[str, list[str]] = {}
    self.extras: dict[str, list[str]] = {}
    self.shapes = {name: plan.program.shapes[i] for name, i in zip(names, plan.program.params)}
    self._plan = plan
    self._leaves = dict(zip(plan.program.params, names))
    for n, i in enumerate(plan.program.captured):
      self._leaves[i] = name = _unused(f"{_CAPTURED}{n}", names)
      if i not in plan.changing:
        self.shapes[name] = plan.program.shapes[i]
    for equation in plan.program.equations:
      owners = [self._leaves[i] for i in equation.inputs if i in self._leaves]
      if owners and plan.stored.issuperset(equation.outputs):
        self._leaves |= dict.fromkeys(equation.outputs, max(owners, key=list(self.shapes).index))
    self._known: dict[Any, str] = {}

  def owner(self, variable: int) -> str:
    """The last leaf of those that a stored variable is computed from."""
    return self._leaves.get(variable, _MADE)

  def add(self, variable: int, kept: Indices) -> str:
    """Stores what is kept of a variable, once; its name."""
    key = (variable, tuple(None if k is None else k.tobytes() for k in kept))
    if key not in self._known:
      array = self._plan.values[variable]
      for axis, indices in enumerate(kept):
        if indices is not None:
          array = np.take(np.asarray(array), indices, axis)
      self._known[key] = self.put(array, self.owner(variable))
    return self._known[key]

  def put(self, array: np.ndarray, owner: str, kind: str = "") -> str:
    """Stores an array of a leaf; its name."""
    name = _unused(owner + kind, self.arrays)
    self.arrays[name] = array
    self.shapes.setdefault(owner, (0,))
    (self.extras if kind else self.weights).setdefault(owner, []).append(name)
    return name


def _unused(name, taken):
  """The name, or one with a number, that is not taken yet."""
  found, copies = name, 1
  while found in taken:
    copies += 1
    found = f"{name}:{copies}"
  return found


def _step(plan, number, store):
  site = plan.sites[number]
  kept = {place: plan.kept(place) for place in (*site.inputs, *site.outputs)}
  if number not in plan.inputs:
    constants = {
      k: store.add(site.equation.inputs[k], kept[place])
      for k, place in enumerate(site.inputs)
      if k not in site.moving and site.equation.inputs[k] not in plan.program.literals
    }
    return Step(site, constants, kept)
  inputs = plan.inputs[number]
  contraction = inputs.contraction
  weights, data = (site.equation.inputs[k] for k in (contraction.weights, contraction.data))
  constants, gathers = {}, {}
  owner = store.owner(weights)
  if not inputs.is_empty:
    constants[contraction.weights] = store.add(weights, inputs.left)
    for axis in inputs.gathers:
      indices = positions(inputs.take[axis], kept[data][axis])
      is_short = site.shapes_in[contraction.data][axis] <= 2**16
      indices = indices.astype(np.uint16 if is_short else np.int32)
      gathers[axis] = store.put(indices, owner, "/inputs")
  folded = inputs.folded
  if folded is not None:
    # Of the type of the sum that it is a part of, which may be wider than that of the weights.
    folded = store.put(folded.astype(plan.program.dtypes[site.outputs[0]]), owner, "/folded")
  return Step(site, constants, kept, contraction, gathers, folded, inputs.is_empty)


def _report(plan, store, steps, batch):
  dense, left = _flops(plan, store, steps, batch)
  rows = []
  for leaf, shape in store.shapes.items():
    weights, extras = store.weights.get(leaf, ()), store.extras.get(leaf, ())
    new_shapes = tuple(np.shape(store.arrays[name]) for name in weights)
    extra = sum(np.size(store.arrays[name]) for name in extras)
    flops = sum(left.get(name, 0) for name in weights) if leaf in dense else None
    rows.append(CompactionRow(leaf, shape, new_shapes, extra, dense.get(leaf), flops))
  unknown = {}
  for site in plan.unknown:
    touched = unknown.setdefault(site.equation.name, [])
    touched += [shape for shape in (*site.shapes_in, *site.shapes_out) if shape not in touched]
  unknown = {name: tuple(shapes) for name, shapes in unknown.items()}
  return CompactionReport(tuple(rows), unknown, left)


def _flops(plan, store, steps, batch):
  """Operations for one example: of the original by leaf, and those that are left by array."""
  dense, left = {}, {}
  for site in plan.sites:
    if (k := weights_of(site)) is not None:
      leaf = store.owner(site.equation.inputs[k])
      count = operations(site, site.shapes_out[0], site.shapes_in[k])
      dense[leaf] = dense.get(leaf, 0) + count // batch
  for step in steps:
    if (name := step.constants.get(weights_of(step.site))) is not None:
      (output,) = step.site.outputs
      shape = cut(step.site.shapes_out[0], step.kept[output])
      count = operations(step.site, shape, np.shape(store.arrays[name]))
      left[name] = left.get(name, 0) + count // batch
  return dense, left
