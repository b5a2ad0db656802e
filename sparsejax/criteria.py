"""Scores per weight: the lowest are pruned; where weights grow, the highest do.

A criterion is a function of one leaf's context, a `Leaf`, that returns scores of the leaf's shape.
Any such function will do:

>>> def my_criterion(leaf):
...   return jnp.abs(leaf.weight) * (1 + jnp.abs(leaf.gradient))

One that keeps statistics from call to call is a `Criterion`. Those that need no more than the
context may also be given by name: `criteria.BY_NAME` has them.

References:
  Nowak et al., `Fantastic Weights and How to Find Them: Where to Prune in Dynamic Sparse Training
  <https://arxiv.org/abs/2306.12230>`_, 2023
"""

import functools
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import arguments, counts, selection
from sparsejax.patterns import SINGLE, Pattern


class Leaf:
  """What a criterion may look at.

  Attributes:
    weight: the weights by which masks are decided.
    mask: True where the weight is active.

  The rest may be missing, and asking for it is an error then: `gradient`, `moment`, `key`, `count`.
  """

  def __init__(
    self,
    weight: jax.Array,
    mask: jax.Array,
    *,
    gradient: jax.Array | None = None,
    key: jax.Array | None = None,
    moment: Callable[[], tuple[jax.Array, jax.Array | None]] | None = None,
    count: jax.Array | None = None,
  ):
    self.weight = weight
    self.mask = mask
    self._gradient = gradient
    self._key = key
    self._moment = moment
    self._count = count

  @property
  def gradient(self) -> jax.Array:
    """The gradient of the loss: what a wrapper gets as updates, a link as `grad=gradient`."""
    if self._gradient is None:
      raise ValueError(
        "this criterion needs the gradient: call update(updates, state, params, grad=gradient)."
        " The updates that reach the last link of a chain are not gradients any more."
      )
    return self._gradient

  @property
  def key(self) -> jax.Array:
    """A key of this leaf's own, new at each update of the masks."""
    if self._key is None:
      raise ValueError(
        "this criterion is random and needs a key: pass key=jax.random.key(seed) to the"
        " transformation."
      )
    return self._key

  @property
  def moment(self) -> jax.Array:
    """The first moment that the inner optimizer keeps: SGD's momentum, or Adam's."""
    return self._moments()[0]

  @property
  def second_moment(self) -> jax.Array | None:
    """The second moment that it keeps beside the first, as Adam does; None if it has none."""
    return self._moments()[1]

  @property
  def count(self) -> jax.Array:
    """How many weights of this leaf are to be dropped, or grown.  # shape=(), dtype=uint32"""
    if self._count is None:
      raise ValueError(
        "this criterion needs to know how many weights of each layer go, which is not known where"
        " all layers compete, pruned weights may return (keep_weights), or a pattern has its say:"
        ' drop in each layer, and give a ramp another allocation than "global".'
      )
    return self._count

  def _moments(self) -> tuple[jax.Array, jax.Array | None]:
    if self._moment is None:
      raise ValueError(
        "this criterion needs the momentum of an optimizer: use it in a wrapper, such as"
        " dynamic_sparse_training, around one that has it; for growth, where inactive weights have"
        ' theirs, with moments="kept".'
      )
    return self._moment()


class Criterion(NamedTuple):
  """A criterion that keeps statistics.

  >>> def running_magnitude(decay):
  ...   return Criterion(
  ...     init=jnp.zeros_like,
  ...     update=lambda leaf, mean: decay * mean + (1 - decay) * jnp.abs(leaf.weight),
  ...     score=lambda leaf, mean: mean,
  ...   )

  Attributes:
    init: from the weights of a leaf to its statistics, any pytree of arrays.
    update: from the context of a leaf and its statistics to new ones, at every call.
    score: from the context and the statistics, those of this call included, to scores.
    forget: whether statistics start anew when masks have changed.
  """

  init: Callable[[jax.Array], Any]
  update: Callable[[Leaf, Any], Any]
  score: Callable[[Leaf, Any], jax.Array]
  forget: bool = True


Score = Callable[[Leaf], jax.Array]


def magnitude(leaf: Leaf) -> jax.Array:
  """The absolute value of the weight."""
  return jnp.abs(leaf.weight)


def random(leaf: Leaf) -> jax.Array:
  """Independent uniform numbers in [0, 1): every weight is equally likely to go, or to grow."""
  return _uniform_like(leaf.weight, leaf.key)


def gradient(leaf: Leaf) -> jax.Array:
  r"""The absolute value of the gradient, :math:`|g|`."""
  return jnp.abs(leaf.gradient)


def momentum(leaf: Leaf) -> jax.Array:
  r"""The absolute value of the momentum, :math:`|m|`, or :math:`|m| / \sqrt{v}` as in Adam."""
  if leaf.second_moment is None:
    return jnp.abs(leaf.moment)
  return jnp.abs(_widened(leaf.moment)) / (jnp.sqrt(_widened(leaf.second_moment)) + 1e-8)


def mean_momentum(leaf: Leaf) -> jax.Array:
  """The mean `momentum` of active weights, a number for each layer: see `redistribute`."""
  return jnp.mean(momentum(leaf), where=leaf.mask)


def snip(leaf: Leaf) -> jax.Array:
  r"""The effect of the weight on the loss, to first order, :math:`|w g|`."""
  return jnp.abs(_effect(leaf))


def taylor(leaf: Leaf) -> jax.Array:
  r"""The square of that effect, :math:`(w g)^2`."""
  return _effect(leaf) ** 2


def sensitivity(leaf: Leaf) -> jax.Array:
  r"""The gradient in relation to the weight, :math:`|g| / |w|`."""
  return _ratio(leaf.gradient, leaf.weight)


def reciprocal_sensitivity(leaf: Leaf) -> jax.Array:
  r"""The weight in relation to the gradient, :math:`|w| / |g|`."""
  return _ratio(leaf.weight, leaf.gradient)


def mest(gamma: float = 1.0) -> Score:
  r"""The weight and the gradient together, :math:`|w| + \gamma |g|`."""
  return lambda leaf: jnp.abs(_widened(leaf.weight)) + gamma * jnp.abs(_widened(leaf.gradient))


def gradient_step(gamma: float = 1.0) -> Score:
  r"""What a step along the gradient would leave of the weight, :math:`|w - \gamma g|`."""
  return lambda leaf: jnp.abs(_widened(leaf.weight) - gamma * _widened(leaf.gradient))


def each_sign(leaf: Leaf) -> jax.Array:
  """Drops the smallest positive weights and the negative ones closest to zero, half of each.

  Where one sign has too few weights, the other makes up for it. Of an odd number, the positive
  weights give one more. An active weight that is exactly zero counts as positive. Only for
  dropping in each layer, since how many weights go decides which; and not for what is pruned
  together.
  """
  return _of_each_sign(leaf, lambda positive, negative: leaf.count - leaf.count // 2)


def each_sign_in_proportion(leaf: Leaf) -> jax.Array:
  """The same, but of each sign the same fraction, as in the original SET."""

  def share(positive, negative):
    part = positive.astype(jnp.float32) / jnp.maximum((positive + negative).astype(jnp.float32), 1)
    return counts.share(part[None], counts.widen(leaf.count[None])).low[0]

  return _of_each_sign(leaf, share)


def running_magnitude(decay: float) -> Criterion:
  """The magnitude, averaged exponentially over the calls since masks last changed."""
  return _running(magnitude, decay)


def running_snip(decay: float) -> Criterion:
  r""":math:`|w| |g|`, averaged exponentially over the calls since masks last changed."""
  return _running(snip, decay)


BY_NAME = {
  "magnitude": magnitude,
  "random": random,
  "gradient": gradient,
  "momentum": momentum,
  "snip": snip,
  "taylor": taylor,
  "sensitivity": sensitivity,
  "reciprocal_sensitivity": reciprocal_sensitivity,
  "mest": mest(),
  "gradient_step": gradient_step(),
  "each_sign": each_sign,
  "each_sign_in_proportion": each_sign_in_proportion,
}


def resolve(criterion: str | Score | Criterion, name: str = "criterion") -> Score | Criterion:
  """The criterion of that name, or the one given.

  Raises:
    ValueError: if it is neither.
  """
  if callable(criterion) or isinstance(criterion, Criterion):
    return criterion
  if isinstance(criterion, str) and criterion in BY_NAME:
    return BY_NAME[criterion]
  hint = arguments.did_you_mean(criterion, BY_NAME)
  raise ValueError(
    f"unknown {name} {criterion!r}{hint}: use one of {sorted(BY_NAME)}, a function of a Leaf, or a"
    " Criterion."
  )


def check_key(key: jax.Array | None, *used: Score | Criterion) -> None:
  """Raises a ValueError if a criterion is known to need a random key, and there is none."""
  if key is None and any(criterion is random for criterion in used):
    raise ValueError("criteria.random needs a key, got key=None: pass key=jax.random.key(seed).")


def check_pattern(criterion: Score | Criterion, pattern: Pattern, *, only_drops: bool) -> None:
  """Raises a ValueError if a criterion is known not to go with a pattern.

  Args:
    criterion: by which weights are pruned or dropped.
    pattern: what is pruned together, and what has to stay.
    only_drops: whether as many grow again, so that N:M may drop any weights.
  """
  if not any(criterion is each for each in (each_sign, each_sign_in_proportion)):
    return
  if pattern != SINGLE and not (only_drops and pattern.regrows_in_groups):
    raise ValueError(
      f"criteria.{criterion.__name__} says which single weights go, which {pattern} does not allow:"
      " take another criterion, such as magnitude."
    )


def _effect(leaf: Leaf) -> jax.Array:
  return _widened(leaf.weight) * _widened(leaf.gradient)


def _widened(x: jax.Array) -> jax.Array:
  """In single precision at least: in half, products and ratios would often be 0 or infinite."""
  return x.astype(np.promote_types(x.dtype, np.float32))


def _ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
  numerator, denominator = _widened(numerator), _widened(denominator)
  # Nothing in relation to nothing is nothing; without this it would be NaN, and never go.
  ratio = jnp.abs(numerator) / jnp.abs(denominator)
  return jnp.where(numerator == 0, jnp.zeros_like(ratio), ratio)


# The array says on which devices, so it is not to be dropped as unused.
@functools.partial(jax.jit, keep_unused=True)
def _uniform_like(array: jax.Array, key: jax.Array) -> jax.Array:
  """Independent uniform numbers in [0, 1), one for each entry of an array, and sharded alike."""
  return jax.random.uniform(key, array.shape, out_sharding=jax.typeof(array).sharding)


def _of_each_sign(
  leaf: Leaf, share_of_positive: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
  """Scores that are 0 for the weights to be dropped of each sign, and 1 for the others."""
  signs = (leaf.mask & (leaf.weight >= 0), leaf.mask & (leaf.weight < 0))
  positive, negative = counts.count_true(*signs)
  of_positive = jnp.minimum(share_of_positive(positive, negative), positive)
  of_negative = jnp.minimum(leaf.count - of_positive, negative)
  of_positive = jnp.minimum(leaf.count - of_negative, positive)
  scores = [jnp.abs(leaf.weight)] * 2
  dropped = selection.select_smallest(scores, [of_positive, of_negative], among=list(signs))
  return jnp.where(dropped[0] | dropped[1], 0.0, 1.0)


def _running(score: Score, decay: float) -> Criterion:
  """The exponential moving average of a score."""
  if isinstance(decay, numbers.Real) and not 0 <= decay < 1:
    raise ValueError(f"decay must be in [0, 1), got {decay!r}.")

  def update(leaf, mean):
    return decay * mean + (1 - decay) * score(leaf).astype(mean.dtype)

  return Criterion(
    # In half precision an average would soon stand still.
    init=lambda weight: jnp.zeros_like(weight, np.promote_types(weight.dtype, np.float32)),
    update=update,
    score=lambda leaf, mean: mean,
  )
