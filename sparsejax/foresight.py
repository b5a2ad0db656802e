r"""Pruning before training: scores and masks for the weights as they were initialised.

Each method scores every parameter, and the lowest scores are to be pruned;
`sparsejax.masks_from_scores` makes masks of them, and `sparsejax.fixed_masks` trains under the
masks. The network is the caller's function of its parameters: what its batch normalisation and
dropout do while it is scored, and which weights are shared, is written there.

Half-precision parameters reach that function as they are; its scores and sums of gradients are in
single precision at least. All functions may be used under `jax.jit`, where the checks of values are
left out. They compile anew each time that they are called: to score many networks, jit the call.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import arguments, scoring, trees
from sparsejax import masks as masks_lib
from sparsejax.flow import synflow, synflow_scores
from sparsejax.masks import Prunable, is_kernel
from sparsejax.trees import PyTree

LossFn = Callable[[PyTree, Any], jax.Array]

__all__ = ("grasp", "magnitude", "random", "snip", "synflow", "synflow_scores")


def magnitude(params: PyTree) -> PyTree:
  """Scores weights by their absolute value.

  Args:
    params: the parameters.

  Returns:
    A tree of scores like `params`.

  Raises:
    ValueError: if a parameter is not a floating-point array.
  """
  scoring.check_params(params)
  return jax.tree.map(jnp.abs, params)


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
  arguments.check_key(key)
  scoring.check_params(params)
  leaves, treedef = jax.tree.flatten(params)
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
  scoring.check_params(params)
  weights, loss_fn = scoring.widened(params), scoring.loss_for_widened(loss_fn, params)

  @jax.jit
  def score(weights, batch):
    loss, gradient = jax.value_and_grad(loss_fn)(weights, batch)
    return loss, jax.tree.map(lambda w, g: jnp.abs(w * g), weights, gradient)

  loss, scores = score(weights, batch)
  scoring.check_loss(loss)
  scoring.check_scores(scores, "the weights or the gradient of the loss")
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
  scoring.check_batches(batches)
  scoring.check_params(params)
  masks_lib.check_prunable(params, masks_lib.select_prunable(params, prunable))
  weights, loss_fn = scoring.widened(params), scoring.loss_for_widened(loss_fn, params)

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
    scoring.check_loss(loss, f" of batch {i}")
  direction = trees.map_with_path(
    lambda path, w, g: g if prunable(path, w) else jnp.zeros_like(g),
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
  for checked in (scores, masks_lib.select_prunable(scores, prunable)):
    scoring.check_scores(checked, "the weights, or the gradient of the loss times its Hessian,")
  return scores
