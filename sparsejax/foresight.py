r"""Pruning before training: scores and masks for the weights as they were initialised.

Each method scores every parameter, and the lowest scores are to be pruned;
`sparsejax.masks_from_scores` makes masks of them, and `sparsejax.fixed_masks` trains under the
masks. The network is the caller's function of its parameters: what its batch normalisation and
dropout do while it is scored, and which weights are shared, is written there.

Half-precision parameters reach that function as they are; scores and sums of gradients are in
single precision at least. All functions may be used under `jax.jit`, where the checks of values are
left out. They compile anew each time that they are called: to score many networks, jit the call.
"""

import functools
import numbers
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax import allocation as allocation_lib
from sparsejax import counts, selection
from sparsejax import masks as masks_lib
from sparsejax.allocation import Allocation, Sparsity
from sparsejax.masks import Prunable, PyTree, is_kernel

LossFn = Callable[[PyTree, Any], jax.Array]
ApplyFn = Callable[[PyTree, Any], jax.Array]


def magnitude(params: PyTree) -> PyTree:
  """Scores weights by their absolute value.

  Args:
    params: the parameters.

  Returns:
    A tree of scores like `params`.

  Raises:
    ValueError: if a parameter is not a floating-point array.
  """
  return jax.tree.map(jnp.abs, _checked(params))


def random(params: PyTree, key: jax.Array) -> PyTree:
  """Scores weights by independent uniform numbers, the baseline of any method.

  Args:
    params: the parameters, of which only the shapes count.
    key: a random key, folded with the number of each leaf.

  Returns:
    A tree of scores like `params`.

  Raises:
    ValueError: if a parameter is not a floating-point array, or if the key is no key.
  """
  if not isinstance(key, (jax.Array, np.ndarray)):
    raise ValueError(f"key must be a random key, got {key!r}: pass jax.random.key(seed).")
  leaves, treedef = jax.tree.flatten(_checked(params))
  scores = [
    jax.random.uniform(jax.random.fold_in(key, i), np.shape(leaf)) for i, leaf in enumerate(leaves)
  ]
  return jax.tree.unflatten(treedef, scores)


def snip(loss_fn: LossFn, params: PyTree, batch: Any) -> PyTree:
  r"""Scores weights by their effect on the loss of one batch (single-shot network pruning).

  .. math:: s = | w \, \partial L / \partial w |

  The paper divides the scores by their sum, which does not change their order.

  Args:
    loss_fn: `loss_fn(params, batch)` gives the loss as a scalar, without weight decay in the paper.
    params: the parameters.
    batch: whatever the loss takes.

  Returns:
    A tree of scores like `params`. By default `sparsejax.masks_from_scores` prunes the kernels; the
    authors' code prunes biases too (though not batch normalisation), as in the example.

  Raises:
    ValueError: if a parameter is not a floating-point array; if the loss fails on the batch, or is
      not a finite scalar; if scores are not finite, or all zero.

  Example:
    >>> import jax.numpy as jnp
    >>> import sparsejax
    >>> def loss_fn(params, batch):
    ...   inputs, targets = batch
    ...   return jnp.mean((inputs @ params["kernel"] + params["bias"] - targets) ** 2)
    >>> params = {"kernel": jnp.array([[1.0, -3.0], [2.0, 0.5]]), "bias": jnp.array([0.1, 2.0])}
    >>> scores = sparsejax.foresight.snip(loss_fn, params, (jnp.eye(2), jnp.zeros((2, 2))))
    >>> print(scores["kernel"])
    [[0.55  1.5  ]
     [2.1   0.625]]
    >>> masks = sparsejax.masks_from_scores(scores, 0.5, prunable=lambda path, leaf: True)
    >>> print(masks["kernel"], masks["bias"])
    [[False  True]
     [ True False]] [False  True]

  References:
    Lee et al., `SNIP: Single-shot Network Pruning based on Connection Sensitivity
    <https://arxiv.org/abs/1810.02340>`_, 2019
  """
  weights, loss_fn = _widened(_checked(params)), _checked_loss(loss_fn, params)

  @jax.jit
  def score(weights, batch):
    loss, gradient = jax.value_and_grad(loss_fn)(weights, batch)
    return loss, jax.tree.map(lambda w, g: jnp.abs(w * g), weights, gradient)

  loss, scores = score(weights, batch)
  _check_loss(loss)
  _check_scores(scores, "the weights or the gradient of the loss")
  return scores


def grasp(
  loss_fn: LossFn, params: PyTree, batches: Iterable[Any], *, prunable: Prunable = is_kernel
) -> PyTree:
  r"""Scores weights by their effect on the flow of the gradient (gradient signal preservation).

  .. math:: s = w \, (H g), \quad g = \sum_b \nabla L_b, \quad H = \sum_b \nabla^2 L_b

  The paper's score is the negative of this one, and it prunes the largest; here the lowest go, as
  everywhere. Its temperature belongs to the loss: the authors divide the logits by 200. The flow is
  that to the prunable weights: in g, the gradient with respect to all others counts as zero.

  Args:
    loss_fn: `loss_fn(params, batch)` gives the loss as a scalar.
    params: the parameters.
    batches: a list of batches, or anything else that can be gone through twice: first for g, then
      for the product with H. One batch is held at a time, and batches of one shape compile once.
    prunable: `prunable(path, leaf) -> bool` says which leaves are to be pruned.

  Returns:
    A tree of scores like `params`.

  Raises:
    ValueError: if there are no batches, or an iterator that can be gone through only once;
      otherwise as `snip` does.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> import sparsejax
    >>> def loss_fn(params, batch):
    ...   inputs, labels = batch
    ...   logits = inputs @ params["kernel"] / 200
    ...   return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    >>> params = {"kernel": jax.random.normal(jax.random.key(0), (8, 3))}
    >>> inputs = jax.random.normal(jax.random.key(1), (2, 4, 8))
    >>> batches = [(inputs[0], jnp.arange(4) % 3), (inputs[1], jnp.arange(4) % 3)]
    >>> scores = sparsejax.foresight.grasp(loss_fn, params, batches)
    >>> print(jnp.sum(sparsejax.masks_from_scores(scores, 0.75)["kernel"]))
    6

  References:
    Wang et al., `Picking Winning Tickets Before Training by Preserving Gradient Flow
    <https://arxiv.org/abs/2002.07376>`_, 2020
  """
  _check_batches(batches)
  weights, loss_fn = _widened(_checked(params)), _checked_loss(loss_fn, params)

  @jax.jit
  def add_gradient(total, weights, batch):
    loss, gradient = jax.value_and_grad(loss_fn)(weights, batch)
    return jax.tree.map(jnp.add, total, gradient), loss

  @jax.jit
  def add_product(total, weights, direction, batch):
    gradient = lambda weights: jax.grad(loss_fn)(weights, batch)
    _, product = jax.jvp(gradient, (weights,), (direction,))
    return jax.tree.map(jnp.add, total, product)

  gradient = product = jax.tree.map(jnp.zeros_like, weights)
  losses, again = [], 0
  for batch in batches:
    gradient, loss = add_gradient(gradient, weights, batch)
    losses.append(loss)
  if not losses:
    raise ValueError("there are no batches to score on: `batches` is empty.")
  for i, loss in enumerate(losses):
    _check_loss(loss, f" of batch {i}")
  direction = jax.tree_util.tree_map_with_path(
    lambda path, w, g: g if prunable(masks_lib.strip_value(path), w) else jnp.zeros_like(g),
    weights,
    gradient,
  )
  for batch in batches:
    product = add_product(product, weights, direction, batch)
    again += 1
  if again != len(losses):
    raise ValueError(
      f"`batches` gave {len(losses)} batches at first, but {again} when gone through again: pass a"
      " list, or an object that starts anew each time."
    )
  scores = jax.tree.map(jnp.multiply, weights, product)
  _check_scores(scores, "the weights, or the gradient of the loss times its Hessian,")
  return scores


def synflow_scores(
  apply_fn: ApplyFn, params: PyTree, inputs: Any, masks: PyTree | None = None
) -> PyTree:
  r"""Scores weights by the synaptic flow through them: one round of `synflow`.

  .. math:: s = | \theta \, \partial R / \partial \theta |, \quad R = \sum f(|\theta|, x)

  Args:
    apply_fn: `apply_fn(params, inputs)` gives the outputs; see `synflow`.
    params: the parameters.
    inputs: the inputs x; see `synflow`.
    masks: a full boolean tree of the weights that are active; all are by default.

  Returns:
    A tree of scores like `params`, times the power of two that keeps them near 1 whatever R is.

  Raises:
    ValueError: as `synflow` does.
  """
  if masks is None:
    masks = jax.tree.map(lambda p: jnp.ones_like(p, dtype=bool), _checked(params))
  masks_lib.check_boolean(masks)
  masks_lib.check_same_structure(masks, params, "the masks", "the parameters")
  flow = jax.jit(_flow_of(apply_fn, params, inputs))
  scores, is_homogeneous = flow(_widened(params), masks, inputs)
  _check_flow(_sum(scores), is_homogeneous)
  return scores


def synflow(
  apply_fn: ApplyFn,
  params: PyTree,
  inputs: Any,
  sparsity: Sparsity,
  *,
  rounds: int = 100,
  allocation: Allocation = "global",
  prunable: Prunable = is_kernel,
) -> PyTree:
  r"""Masks that preserve the synaptic flow (iterative synaptic flow pruning), without data.

  After round k of n the density :math:`\rho^{k/n}` is left, :math:`\rho = 1 - \mathrm{sparsity}`.
  Each round scores what is left anew, by :math:`s = |\theta \, \partial R / \partial \theta|` where
  R is the sum of the outputs of the network with the absolute values of its parameters, and prunes
  the lowest. No score is recomputed after the last.

  In single precision R leaves the range of numbers in deep networks. Scores are linear in the
  cotangent of R, and the outputs in the inputs if nothing is added to activations (biases and
  shifts are zero, as initialised): both are scaled by powers of two, which leaves the bits of the
  scores as they would be, and the inputs only where they have to be.

  Args:
    apply_fn: `apply_fn(params, inputs)` gives the outputs, in evaluation mode. It is called with
      the absolute values of `params`; running statistics of batch normalisation, which are the
      caller's, have to be made absolute in it, as the authors do.
    params: the parameters.
    inputs: ones in the shape of one example, as a batch of one, in the paper.
    sparsity: the fraction to prune, a Python number in [0, 1), or a tree like `params` of such
      numbers, one for each prunable leaf.
    rounds: the number n of rounds.
    allocation: how the sparsity is shared out among the leaves; see `sparsejax.allocation`.
    prunable: `prunable(path, leaf) -> bool` says which leaves are pruned.

  Returns:
    A full boolean tree like `params`, True where a weight is kept, with the counts of
    `sparsejax.masks_from_scores`.

  Raises:
    ValueError: if an argument is out of range; if parameters or inputs are not floating-point
      arrays; if the network fails on the inputs; if its scores are not finite or all zero, as far
      as scaling cannot help it.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> import sparsejax
    >>> def apply_fn(params, inputs):
    ...   return jax.nn.relu(inputs @ params["in"]) @ params["out"]
    >>> keys = jax.random.split(jax.random.key(0))
    >>> params = {
    ...   "in": jax.random.normal(keys[0], (8, 16)), "out": jax.random.normal(keys[1], (16, 4))
    ... }
    >>> masks = sparsejax.foresight.synflow(apply_fn, params, jnp.ones((1, 8)), 0.9)
    >>> print(f"{sparsejax.sparsity(masks):.1%}")
    90.1%

  References:
    Tanaka et al., `Pruning neural networks without any data by iteratively conserving synaptic flow
    <https://arxiv.org/abs/2006.05467>`_, 2020
  """
  if isinstance(rounds, bool) or not isinstance(rounds, numbers.Integral) or rounds < 1:
    raise ValueError(f"rounds must be a positive integer, got {rounds!r}.")
  weights = _widened(_checked(params))
  pool = masks_lib.select_prunable(weights, prunable)
  k = counts.from_ints(_counts_of_rounds(weights, pool, sparsity, rounds, allocation))
  flow = _flow_of(apply_fn, params, inputs)

  @jax.jit
  def prune(weights, inputs):
    def prune_once(masks, k):
      scores, is_homogeneous = flow(weights, masks_lib.full_masks(masks, weights), inputs)
      scores = masks_lib.pick(pool, scores, "the pool", "the scores")
      leaves, treedef = jax.tree.flatten(scores)
      pruned = selection.select(leaves, k, active=jax.tree.leaves(masks))
      masks = jax.tree.unflatten(treedef, [~p for p in pruned])
      return masks, (_sum(scores), is_homogeneous)

    first = jax.tree.map(lambda w: jnp.ones_like(w, dtype=bool), pool)
    return lax.scan(prune_once, first, k)

  masks, (totals, are_homogeneous) = prune(weights, inputs)
  if jax.tree.leaves(pool):
    _check_flow(totals, are_homogeneous)
  masks = masks_lib.full_masks(masks, weights)
  masks_lib.warn_of_emptied(masks, stacklevel=2)
  return masks


def _counts_of_rounds(weights, pool, sparsity, rounds, allocation) -> np.ndarray:
  """How many weights are pruned after each round, of all layers or of each."""
  allocation_lib.resolve(allocation)
  sparsity = allocation_lib.check_sparsity("sparsity", sparsity)
  if any(isinstance(s, jax.core.Tracer) for s in jax.tree.leaves(sparsity)):
    raise ValueError("the sparsity must be a Python number: SynFlow counts its rounds beforehand.")
  allocation_lib.check_leaves(sparsity, weights, pool)
  final = jax.tree.map(float, allocation_lib.for_leaves(sparsity, pool))
  shapes = [w.shape for w in jax.tree.leaves(pool)]

  def after(k):
    # The last round reaches the sparsity itself, not a rounding error beside it.
    reached = jax.tree.map(lambda s: s if k == rounds else 1 - (1 - s) ** (k / rounds), final)
    return allocation_lib.count_pruned(shapes, reached, allocation)

  return np.stack([after(k) for k in range(1, rounds + 1)])


def _flow_of(apply_fn: ApplyFn, params: PyTree, inputs: Any) -> Callable[..., Any]:
  """The scores under masks, for weights and inputs like these, and whether scaling was sound."""
  for name, x in masks_lib.leaves_by_name(inputs).items():
    if jnp.result_type(x) not in selection.FLOATS:
      raise ValueError(
        f"SynFlow needs floating-point inputs, but {name or 'they'} have dtype"
        f" {jnp.result_type(x)}: pass ones in place of indices, after any embedding."
      )
  function = _narrowing(functools.partial(_call, apply_fn, "the network"), params)
  outputs = jax.eval_shape(function, _widened(params), inputs)
  if not isinstance(outputs, jax.ShapeDtypeStruct) or outputs.dtype not in selection.FLOATS:
    raise ValueError(
      "the network must return its outputs, a floating-point array, but it returned"
      f" {_describe(outputs)}: leave anything else out in `apply_fn`."
    )
  types = [jnp.result_type(x) for x in jax.tree.leaves((params, inputs, outputs))]
  limit = min(int(jnp.finfo(dtype).maxexp) for dtype in types) * 7 // 8
  wide = jnp.promote_types(outputs.dtype, jnp.float32)

  def power_of_two(exponent):
    return jnp.ldexp(jnp.ones([], wide), exponent)

  def flow(weights, masks, inputs):
    weights = jax.tree.map(lambda w, m: jnp.where(m, jnp.abs(w), 0), weights, masks)

    def step(state):
      # At first the inputs are as they are. If R is out of range, it is found with inputs that are
      # scaled as far as possible. Then half of its exponent goes to the inputs, and half to the
      # cotangent; and inputs half as large have to give the same once more.
      number, exponent, previous, _ = state
      scaled = jax.tree.map(lambda x: x * power_of_two(exponent).astype(x.dtype), inputs)
      total, pull = jax.vjp(lambda w: jnp.sum(function(w, scaled).astype(wide)), weights)
      magnitude = jnp.clip(jnp.frexp(total)[1], -limit, limit)
      (gradient,) = pull(power_of_two(-magnitude))
      scores = jax.tree.map(lambda w, g: jnp.abs(w * g), weights, gradient)
      is_usable = jnp.isfinite(total) & (total > 2.0**-limit)
      extreme = jnp.where(total <= 2.0**-limit, limit, -limit)
      following = jnp.stack([extreme, (exponent - magnitude) // 2, exponent - 1, exponent])[number]
      is_same = [
        jnp.abs(jnp.sum(a) - jnp.sum(b)) <= 1e-2 * jnp.sum(a)
        for a, b in zip(jax.tree.leaves(scores), jax.tree.leaves(previous))
      ]
      is_homogeneous = (number < 3) | jnp.all(jnp.asarray(is_same))
      number = jnp.where((number == 0) & is_usable, 4, number + 1)
      return number, following, scores, is_homogeneous

    nothing = jax.tree.map(jnp.zeros_like, weights)
    start = (jnp.int32(0), jnp.int32(0), nothing, jnp.bool_(True))
    _, _, scores, is_homogeneous = lax.while_loop(lambda state: state[0] < 4, step, start)
    return scores, is_homogeneous

  return flow


def _checked(params: PyTree) -> PyTree:
  """The parameters, all of which are floating-point."""
  for name, leaf in masks_lib.leaves_by_name(params).items():
    if jnp.result_type(leaf) not in selection.FLOATS:
      raise ValueError(
        f"parameters must be floating-point arrays, but {name!r} has dtype"
        f" {jnp.result_type(leaf)}: leave it out, and let the function that is scored close over it."
      )
  return params


def _widened(params: PyTree) -> PyTree:
  """The parameters in single precision at least."""
  return jax.tree.map(
    lambda p: jnp.asarray(p, jnp.promote_types(jnp.result_type(p), jnp.float32)), params
  )


def _narrowing(function: Callable[..., Any], params: PyTree) -> Callable[..., Any]:
  """The function for parameters that are widened, which it gets in the dtypes that they had."""
  types = jax.tree.map(jnp.result_type, params)
  return lambda weights, *args: function(
    jax.tree.map(lambda w, dtype: w.astype(dtype), weights, types), *args
  )


def _checked_loss(loss_fn: LossFn, params: PyTree) -> LossFn:
  """The loss of widened parameters, which says while it is traced what is wrong with it."""

  def checked(params, batch):
    loss = _call(loss_fn, "the loss", params, batch)
    # Any numbers would do, if they are a scalar: a loss that depends on nothing is found out later.
    is_leaf = jax.tree_util.treedef_is_leaf(jax.tree.structure(loss))
    if not is_leaf or np.ndim(loss) or jnp.result_type(loss) not in selection.FLOATS:
      raise ValueError(
        f"the loss must be one floating-point number, but it returned {_describe(loss)}: take the"
        " mean over the examples, and return nothing else."
      )
    return jnp.asarray(loss)

  return _narrowing(checked, params)


def _call(function: Callable[..., Any], what: str, params: PyTree, batch: Any) -> Any:
  try:
    return function(params, batch)
  except Exception as error:
    raise ValueError(
      f"{what} failed on an input of {_describe(batch)}: {type(error).__name__}: {error}"
    ) from error


def _describe(tree: PyTree) -> str:
  """What it is that was passed or returned, such as "float32[8,64], int32[8]"."""
  return ", ".join(str(jax.typeof(x)) for x in jax.tree.leaves(tree)) or "nothing"


def _check_batches(batches: Any) -> None:
  if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
    raise ValueError(
      f"`batches` must be a list of batches, got {type(batches).__name__}: pass [batch] for one."
    )
  if isinstance(batches, Iterator):
    raise ValueError(
      f"`batches` is gone through twice, but {type(batches).__name__} is an iterator, empty after"
      " the first time: pass a list, or an object whose __iter__ starts anew."
    )


def _check_loss(loss: jax.Array, which: str = "") -> None:
  if not isinstance(loss, jax.core.Tracer) and not np.isfinite(loss):
    raise ValueError(
      f"the loss{which} is {loss}, and so nothing can be scored by it: look for NaN and infinity in"
      " the batch and the parameters."
    )


def _check_scores(scores: PyTree, factors: str) -> None:
  leaves = masks_lib.leaves_by_name(scores)
  if not leaves or any(isinstance(s, jax.core.Tracer) for s in leaves.values()):
    return
  largest = jax.device_get({name: jnp.max(jnp.abs(s), initial=0) for name, s in leaves.items()})
  for name, value in largest.items():
    if not np.isfinite(value):
      raise ValueError(
        f"the scores of {name!r} are not finite, although the loss is: look for infinite derivatives"
        " (such as that of a square root at 0), or use a wider dtype."
      )
  if not any(largest.values()):
    raise ValueError(
      f"all scores are zero, because {factors} are zero everywhere: there is nothing to choose by."
      " Is the loss computed from the parameters that it gets?"
    )


def _sum(scores: PyTree) -> jax.Array:
  return sum((jnp.sum(s) for s in jax.tree.leaves(scores)), jnp.float32(0))


def _check_flow(totals: jax.Array, are_homogeneous: jax.Array) -> None:
  """Looks at the sum of the scores of each round, and whether scaling changed them."""
  if isinstance(totals, jax.core.Tracer):
    return
  totals, are_homogeneous = np.atleast_1d(totals), np.atleast_1d(are_homogeneous)
  wider = "compute in float64, with parameters and inputs made under jax.enable_x64(True)."
  for i in np.flatnonzero(~(np.isfinite(totals) & are_homogeneous))[:1]:
    what = (
      "is not proportional to its inputs, which would have to be scaled (are there biases or shifts"
      " other than zero?)"
      if np.isfinite(totals[i])
      else "gives scores that are infinite or NaN"
    )
    raise ValueError(
      f"the synaptic flow of round {i + 1} leaves the range of {totals.dtype}, and the network"
      f" {what}: {wider}"
    )
  dead = np.flatnonzero(totals == 0)
  if not dead.size:
    return
  if dead[0] == 0:
    raise ValueError(
      "all scores are zero: no path with weights other than zero leads from the inputs to the"
      f" outputs, or the flow is below the range of {totals.dtype}. For the latter, {wider}"
    )
  warnings.warn(
    f"from round {dead[0] + 1} on all scores are zero, and the first weights go: so sparse, no path"
    " leads from the inputs to the outputs any more (or the flow is below the range of"
    f" {totals.dtype}).",
    stacklevel=3,
  )
