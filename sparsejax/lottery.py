"""Lottery tickets: iterative magnitude pruning, with rewinding.

Train, prune a part of what is left, set the rest back to what it was early in training, and train
again. It finds sparse networks that train to full accuracy from the start, at the cost of one
training for each round.

References:
  Frankle and Carbin, `The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks
  <https://arxiv.org/abs/1803.03635>`_, 2019

  Frankle et al., `Linear Mode Connectivity and the Lottery Ticket Hypothesis
  <https://arxiv.org/abs/1912.05671>`_, 2020

  Renda et al., `Comparing Rewinding and Fine-tuning in Neural Network Pruning
  <https://arxiv.org/abs/2003.02389>`_, 2020
"""

import numbers
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import allocation as allocation_lib
from sparsejax import arguments, counts, selection, sparsities, trees
from sparsejax import masks as masks_lib
from sparsejax.masks import Prunable, is_kernel
from sparsejax.trees import PyTree


class Ticket(NamedTuple):
  """Where one training starts.

  Attributes:
    index: number of the round, from 0, which trains the dense network.
    params: the weights to start from, zero where pruned.
    masks: a full boolean tree like them, to be kept to during training, as by
      `sparsejax.fixed_masks`.
    step: the step to start at: schedules, and the order of the data, go on from there, with a fresh
      optimizer.
  """

  index: int
  params: PyTree
  masks: PyTree
  step: int


class Round(NamedTuple):
  """One finished round; a pytree, from which `iterative_pruning` goes on.

  Attributes:
    index: its number, from 0.
    masks: a full boolean tree, under which it was trained.
    trained: the weights after training.
    early: the weights to which later rounds rewind; None if their training did not save them.
  """

  index: int
  masks: PyTree
  trained: PyTree
  early: PyTree


def iterative_pruning(
  train: Callable[[Ticket], Mapping[int, PyTree]],
  params: PyTree,
  *,
  rounds: int,
  rate: float | PyTree = 0.2,
  rewind_to: int = 0,
  rewind_weights: bool = True,
  prunable: Prunable = is_kernel,
  last: Round | None = None,
) -> Iterator[Round]:
  """Trains, prunes and rewinds, round after round.

  Round 0 trains the dense network from step 0 on. Each later one prunes the active weights of
  smallest magnitude, as many as `prune` says, sets the others back to what they were after
  `rewind_to` steps of round 0, and trains from that step on. With `rewind_weights=False` the
  weights go on as they are, and only the step goes back (*learning-rate rewinding*).

  Args:
    train: trains a `Ticket`, and returns weights by the number of steps after which they were
      saved. Those of the largest number are the trained ones. To rewind weights to a later step
      than 0, there have to be those of `rewind_to` too in round 0. It may donate the ticket.
    params: the initial weights: any pytree, which may hold other arrays of the network besides,
      such as the running statistics of batch normalisation, that are not prunable.
    rounds: number of trainings.
    rate: the fraction of what is left that is pruned after each round but the last, in [0, 1): one
      for all layers together, or a tree with one for each prunable leaf.
    rewind_to: a number of steps; 0 for the initial weights.
    rewind_weights: whether the weights go back.
    prunable: `prunable(path, leaf) -> bool` says which leaves are pruned.
    last: a `Round` to go on from, in place of the beginning; saved after it was yielded, it is all
      that has to be kept in order to resume.

  Yields:
    A `Round` for each training, before its weights are pruned.

  Raises:
    ValueError: if an argument is out of its range or a prunable leaf not floating-point, before
      anything is trained; if `train` does not return weights by step; on
      going on after round 0, if it has not saved those of `rewind_to`: the round itself is yielded
      all the same.

  Example:
    >>> import jax.numpy as jnp, sparsejax
    >>> from sparsejax import lottery
    >>> def train(ticket):  # A training that doubles all active weights, in 100 steps.
    ...   return {100: {"kernel": 2 * ticket.params["kernel"]}}
    >>> params = {"kernel": jnp.arange(1., 13.).reshape(3, 4)}
    >>> for finished in lottery.iterative_pruning(train, params, rounds=3, rate=0.5):
    ...   print(finished.index, f"{sparsejax.sparsity(finished.masks):.0%}")
    0 0%
    1 50%
    2 75%
  """
  rounds = arguments.check_integer("rounds", rounds, at_least=1)
  rewind_to = arguments.check_integer("rewind_to", rewind_to, at_least=0)
  rate = _check_rate(rate, params, prunable)
  if last is not None:
    trees.check_same_structure(last.masks, params, "the last round's masks", "the weights")
  params = _copy(params)
  return _rounds(train, params, rounds, rate, rewind_to, rewind_weights, prunable, last)


def _rounds(train, params, rounds, rate, rewind_to, rewind_weights, prunable, last):
  if last is None:
    # Copies, since a training may use up the buffers of its ticket.
    ticket = Ticket(0, _copy(params), masks_lib.all_true(params), step=0)
    trained, saved = _train(train, ticket)
    early = saved.get(rewind_to) if rewind_to else params
    last = Round(0, masks_lib.all_true(params), trained, early)
    yield last
  for index in range(int(last.index) + 1, rounds):
    masks = prune(last.trained, last.masks, rate, prunable=prunable)
    start = last.early if rewind_weights else last.trained
    if start is None:
      raise ValueError(
        f"rewind_to={rewind_to}, but in round 0 `train` has not saved the weights after so many"
        " steps: it has to return them beside the trained ones."
      )
    ticket = Ticket(index, masks_lib.apply_masks(start, masks), _copy(masks), step=rewind_to)
    trained, _ = _train(train, ticket)
    last = Round(index, masks, trained, last.early)
    yield last


def prune(
  params: PyTree, masks: PyTree, rate: float | PyTree, *, prunable: Prunable = is_kernel
) -> PyTree:
  """Masks that prune a part of what is left: the active weights of smallest magnitude.

  Args:
    params: the weights.
    masks: a full boolean tree like them.
    rate: the fraction of the active weights to prune, in [0, 1): one for all layers together, or a
      tree with one for each prunable leaf.
    prunable: `prunable(path, leaf) -> bool` says which leaves are pruned.

  Returns:
    A full boolean tree. Of n active weights exactly round((1 - rate) n) stay so, in all or, with a
    tree of rates, in each leaf. It warns of a leaf in which none does.

  Raises:
    ValueError: if a rate is out of range or would leave nothing, or if the trees do not match.

  Example:
    >>> import jax.numpy as jnp
    >>> from sparsejax import lottery
    >>> params = {"kernel": jnp.array([[3., 0., 0.], [-2., 4., 1.]])}
    >>> masks = {"kernel": params["kernel"] != 0}
    >>> lottery.prune(params, masks, 0.25)["kernel"]
    Array([[ True, False, False],
           [ True,  True, False]], dtype=bool)
  """
  rate = _check_rate(rate, params, prunable)
  masks_lib.check_boolean(masks)
  trees.check_same_structure(masks, params, "the masks", "the weights")
  pool = masks_lib.select_prunable(params, prunable)
  rates = sparsities.for_leaves(rate, pool)
  weights, treedef = jax.tree.flatten(pool)
  active = jax.tree.leaves(trees.pick(pool, masks, "the weights", "the masks"))
  kept = [int(n) for n in jax.device_get([masks_lib.count_kept(m) for m in active])]
  sizes = [w.size for w in weights]
  if not isinstance(rates, list):
    rates, kept, sizes = [rates], [sum(kept)], [sum(sizes)]
  rates = map(float, rates)
  k = np.array([size - round((1 - r) * n) for size, n, r in zip(sizes, kept, rates)], np.uint64)
  allocation_lib.check_some_left(sizes, k)
  pruned = selection.select(weights, counts.from_ints(k), active=active, score=jnp.abs)
  found = jax.tree.map(
    lambda new, old: old if trees.is_masked_node(new) else new,
    jax.tree.unflatten(treedef, [~p for p in pruned]),
    masks,
    is_leaf=trees.is_masked_node,
  )
  masks_lib.warn_of_emptied(found, stacklevel=2)
  return found


def _train(train, ticket: Ticket) -> tuple[PyTree, Mapping[int, PyTree]]:
  """The trained weights, and all that were saved, by step."""
  saved = train(ticket)
  if not isinstance(saved, Mapping) or not all(isinstance(s, numbers.Integral) for s in saved):
    raise ValueError(
      f"`train` must return weights by step, such as {{1000: params}}, got {type(saved).__name__}."
    )
  if not saved or max(saved) <= ticket.step:
    raise ValueError(
      f"`train` must return the weights after a step later than {ticket.step}, where round"
      f" {ticket.index} starts, got those of {sorted(saved)}."
    )
  trained = saved[max(saved)]
  trees.check_same_structure(trained, ticket.params, "the trained weights", "the weights")
  return trained, saved


def _check_rate(rate: float | PyTree, params: PyTree, prunable: Prunable) -> float | PyTree:
  """The rate with Python floats, if it fits the weights and those can be pruned."""
  pool = masks_lib.select_prunable(params, prunable)
  masks_lib.check_prunable(params, masks_lib.all_true(pool))
  rate = arguments.check_sparsity("rate", rate)
  sparsities.check_leaves(rate, params, pool)
  return rate


def _copy(tree: PyTree) -> PyTree:
  return jax.tree.map(jnp.copy, tree)
