"""The sparse training of the papers, by name, in terms of `dynamic_sparse_training`."""

import jax
import optax

from sparsejax import arguments, criteria, start, transform
from sparsejax.allocation import Allocation
from sparsejax.arguments import OneOf
from sparsejax.dynamic import dynamic_sparse_training
from sparsejax.masks import Prunable, is_kernel
from sparsejax.patterns import SINGLE, Pattern
from sparsejax.transform import Moments
from sparsejax.trees import PyTree


def granet(
  inner: optax.GradientTransformation,
  *,
  sparsity: float | jax.Array | OneOf | PyTree,
  initial: float = 0.0,
  steps: int,
  every: int,
  fraction: float | optax.Schedule,
  begin: int = 0,
  end: int | None = None,
  allocation: Allocation = "erk",
  ramp_allocation: Allocation = "global",
  masks: PyTree | None = None,
  moments: Moments = "masked",
  pattern: Pattern = SINGLE,
  pack: bool = False,
  prunable: Prunable = is_kernel,
  key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Gradual pruning with zero-cost neuroregeneration.

  The sparsity rises along Zhu & Gupta's cubic, by global magnitude pruning; after each pruning, a
  fraction of the smallest weights of each layer gives way to those of largest gradient. This goes
  on when the final sparsity is reached. Masks change by the weights that a step leaves, first after
  `begin + every` calls.

  Args:
    inner: the optimizer.
    sparsity: the final sparsity, as in `sparsejax.dynamic_sparse_training`.
    initial: the sparsity at the start: 0 is dense-to-sparse, and 0.5 the authors' sparse-to-sparse.
    steps: length of the ramp of sparsity, in calls of `update`. Masks have the final sparsity from
      the first change at `begin + steps` or later on: see `end`.
    every: calls from one change of the masks to the next.
    fraction: of the active weights, how much is regenerated; the authors let it fall from 0.5 to
      0.005 along a cosine over the training, `optax.cosine_decay_schedule(0.5, calls, 0.01)`.
    begin: the call at which the ramp begins.
    end: the call at which masks change last, on the grid or off it. Without it they go on changing,
      on the grid alone.
    allocation: how the sparsity at the start is shared out among layers.
    ramp_allocation: how that of the ramp is.
    masks: the masks to start with instead.
    moments: as in `sparsejax.dynamic_sparse_training`.
    pattern: what is pruned together, and what has to stay; see `sparsejax.patterns`.
    pack: whether the state holds masks as one bit per weight, see `sparsejax.masked_updates`.
    prunable: `prunable(path, leaf) -> bool` says which leaves are sparse.
    key: a random key, if the start is sparse.

  Returns:
    An `optax.GradientTransformationExtraArgs`; see `sparsejax.dynamic_sparse_training`.

  Raises:
    ValueError: as `sparsejax.dynamic_sparse_training` does.

  Example:
    >>> import jax.numpy as jnp, optax, sparsejax
    >>> tx = sparsejax.granet(optax.sgd(0.1), sparsity=0.8, steps=4, every=2, fraction=0.5)
    >>> params = {"kernel": jnp.arange(1., 11.).reshape(2, 5)}
    >>> state = tx.init(params)
    >>> for _ in range(5):
    ...   updates, state = tx.update({"kernel": jnp.zeros((2, 5))}, state, params)
    ...   print(int(sparsejax.get_masks(state, params)["kernel"].sum()))
    10
    3
    3
    2
    2

  References:
    Liu et al., `Sparse Training via Boosting Pruning Plasticity with Neuroregeneration
    <https://arxiv.org/abs/2106.10404>`_, 2021
  """
  steps = arguments.check_integer("steps", steps, at_least=1)
  begin = arguments.check_integer("begin", begin, at_least=0)
  every = arguments.check_integer("every", every, at_least=1)
  if end is not None and arguments.check_integer("end", end, at_least=0) < begin + steps:
    raise ValueError(
      f"the ramp of sparsity ends at {begin + steps}, after the last change at end={end}."
    )
  return dynamic_sparse_training(
    inner,
    sparsity=sparsity,
    fraction=fraction,
    every=every,
    begin=begin + every,
    end=end,
    allocation=allocation,
    masks=masks,
    ramp=optax.polynomial_schedule(0.0, 1.0, 3, steps, begin),
    initial=initial,
    ramp_allocation=ramp_allocation,
    after_step=True,
    moments=moments,
    rounding="up",
    pattern=pattern,
    pack=pack,
    prunable=prunable,
    key=key,
  )


def rigl(
  inner: optax.GradientTransformation,
  *,
  sparsity: float | jax.Array | OneOf | PyTree | None = None,
  end: int,
  every: int = 100,
  fraction: float | optax.Schedule | None = None,
  allocation: Allocation = "erk",
  masks: PyTree | None = None,
  moments: Moments = "reset",
  pattern: Pattern = SINGLE,
  pack: bool = False,
  prunable: Prunable = is_kernel,
  key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
  """The rigged lottery: drops by magnitude and grows by gradient, in place of a step.

  Args:
    inner: the optimizer. It makes no step at a call at which masks change.
    sparsity: as in `sparsejax.dynamic_sparse_training`.
    end: the call at which masks change last; in the paper after three quarters of the training.
    every: calls from one change of the masks to the next, from the first call on.
    fraction: as in `sparsejax.dynamic_sparse_training`. By default it falls from 0.3 to 0 at `end`,
      along a cosine.
    allocation: how the sparsity is shared out among layers.
    masks: the masks to start with instead.
    moments: as in `sparsejax.dynamic_sparse_training`.
    pattern: what is pruned together, and what has to stay; see `sparsejax.patterns`.
    pack: whether the state holds masks as one bit per weight, see `sparsejax.masked_updates`.
    prunable: `prunable(path, leaf) -> bool` says which leaves are sparse.
    key: a random key, for the masks to start with.

  Returns:
    An `optax.GradientTransformationExtraArgs`; see `sparsejax.dynamic_sparse_training`.

  Raises:
    ValueError: as `sparsejax.dynamic_sparse_training` does.

  References:
    Evci et al., `Rigging the Lottery: Making All Tickets Winners
    <https://arxiv.org/abs/1911.11134>`_, 2020
  """
  if fraction is None:
    fraction = optax.cosine_decay_schedule(0.3, arguments.check_integer("end", end, at_least=1))
  return dynamic_sparse_training(
    inner,
    sparsity=sparsity,
    fraction=fraction,
    every=every,
    end=end,
    allocation=allocation,
    masks=masks,
    skip_step=True,
    moments=moments,
    rounding="down",
    pattern=pattern,
    pack=pack,
    prunable=prunable,
    key=key,
  )


def sparse_evolutionary_training(
  inner: optax.GradientTransformation,
  *,
  sparsity: float | jax.Array | OneOf | PyTree | None = None,
  every: int,
  end: int | None = None,
  fraction: float | optax.Schedule = 0.3,
  allocation: Allocation = "er",
  masks: PyTree | None = None,
  moments: Moments = "masked",
  pattern: Pattern = SINGLE,
  pack: bool = False,
  prunable: Prunable = is_kernel,
  key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
  """SET: drops the weights closest to zero, of each sign a fraction, and grows at random.

  Args:
    inner: the optimizer.
    sparsity: as in `sparsejax.dynamic_sparse_training`.
    every: calls from one change of the masks to the next, an epoch in the paper.
    end: the call at which masks change last. Without it they go on changing.
    fraction: as in `sparsejax.dynamic_sparse_training`.
    allocation: how the sparsity is shared out among layers.
    masks: the masks to start with instead.
    moments: as in `sparsejax.dynamic_sparse_training`.
    pattern: what has to stay, see `sparsejax.patterns`: N:M, and nothing that is pruned together,
      since weights are dropped by their signs.
    pack: whether the state holds masks as one bit per weight, see `sparsejax.masked_updates`.
    prunable: `prunable(path, leaf) -> bool` says which leaves are sparse.
    key: a random key.

  Returns:
    An `optax.GradientTransformationExtraArgs`; see `sparsejax.dynamic_sparse_training`.

  Raises:
    ValueError: as `sparsejax.dynamic_sparse_training` does.

  References:
    Mocanu et al., `Scalable training of artificial neural networks with adaptive sparse
    connectivity inspired by network science <https://arxiv.org/abs/1707.04780>`_, 2018
  """
  return dynamic_sparse_training(
    inner,
    sparsity=sparsity,
    drop=criteria.each_sign_in_proportion,
    grow=criteria.random,
    fraction=fraction,
    every=every,
    begin=every,
    end=end,
    allocation=allocation,
    masks=masks,
    after_step=True,
    moments=moments,
    pattern=pattern,
    pack=pack,
    prunable=prunable,
    key=key,
  )


def snfs(
  inner: optax.GradientTransformation,
  *,
  sparsity: float | jax.Array | OneOf | PyTree | None = None,
  every: int,
  fraction: float | optax.Schedule,
  redistribute: bool = True,
  end: int | None = None,
  allocation: Allocation = "uniform",
  masks: PyTree | None = None,
  pattern: Pattern = SINGLE,
  pack: bool = False,
  prunable: Prunable = is_kernel,
  key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Sparse networks from scratch (sparse momentum): grows by momentum, where layers have most.

  What a full layer cannot take goes to the others in proportion too (in the authors' code in equal
  parts), and layers that are nearly dense are no special case.

  Args:
    inner: the optimizer, which has to keep a first moment. It gets the gradients of all weights.
    sparsity: as in `sparsejax.dynamic_sparse_training`.
    every: calls from one change of the masks to the next, an epoch in the paper.
    fraction: as in `sparsejax.dynamic_sparse_training`; the authors let it fall from 0.5 to 0.005
      along a cosine over the training, `optax.cosine_decay_schedule(0.5, calls, 0.01)`.
    redistribute: whether what grows is shared out among layers in proportion to the mean momentum
      of their active weights, or grows where it was dropped, as it has to with an N:M pattern.
    end: the call at which masks change last. Without it they go on changing.
    allocation: how the sparsity is shared out among layers at the start.
    masks: the masks to start with instead.
    pattern: what is pruned together, and what has to stay; see `sparsejax.patterns`.
    pack: whether the state holds masks as one bit per weight, see `sparsejax.masked_updates`.
    prunable: `prunable(path, leaf) -> bool` says which leaves are sparse.
    key: a random key, for the masks to start with.

  Returns:
    An `optax.GradientTransformationExtraArgs`; see `sparsejax.dynamic_sparse_training`.

  Raises:
    ValueError: as `sparsejax.dynamic_sparse_training` does.

  References:
    Dettmers and Zettlemoyer, `Sparse Networks from Scratch: Faster Training without Losing
    Performance <https://arxiv.org/abs/1907.04840>`_, 2019
  """
  return dynamic_sparse_training(
    inner,
    sparsity=sparsity,
    grow=criteria.momentum,
    fraction=fraction,
    every=every,
    begin=every,
    end=end,
    allocation=allocation,
    masks=masks,
    after_step=True,
    moments="kept",
    redistribute=criteria.mean_momentum if redistribute else None,
    rounding="up",
    pattern=pattern,
    pack=pack,
    prunable=prunable,
    key=key,
  )


def static_sparse_training(
  inner: optax.GradientTransformation,
  *,
  sparsity: float | jax.Array | OneOf | PyTree | None = None,
  allocation: Allocation = "erk",
  masks: PyTree | None = None,
  pattern: Pattern = SINGLE,
  pack: bool = False,
  prunable: Prunable = is_kernel,
  key: jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Trains under masks drawn at random that never change, the baseline of dynamic ones.

  Args:
    inner: the optimizer.
    sparsity: as in `sparsejax.dynamic_sparse_training`.
    allocation: how the sparsity is shared out among layers.
    masks: the masks instead of those drawn; as a link after an optimizer, `sparsejax.fixed_masks`.
    pattern: what is pruned together, and what has to stay; see `sparsejax.patterns`.
    pack: whether the state holds masks as one bit per weight, see `sparsejax.masked_updates`.
    prunable: `prunable(path, leaf) -> bool` says which leaves are sparse.
    key: a random key, for the masks.

  Returns:
    An `optax.GradientTransformationExtraArgs`; see `sparsejax.masked_updates`.

  Raises:
    ValueError: as `sparsejax.dynamic_sparse_training` does.
  """
  arguments.check_inner(inner)
  sparsity, _ = start.check_start(sparsity, masks, ramp=None, initial=0.0)
  return transform.masked_updates(
    lambda call: call.masks,
    due=lambda count: False,
    inner=inner,
    initial_masks=start.initial_masks(
      sparsity,
      masks,
      allocation,
      key,
      pattern=pattern,
      final=sparsity,
      final_allocation=allocation,
    ),
    pack=pack,
    prunable=prunable,
    key=key,
  )
