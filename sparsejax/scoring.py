"""Functions that are scored by `sparsejax.foresight`: what goes in, and what may come out."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import ordinals, trees
from sparsejax.trees import PyTree


def check_params(params: PyTree) -> None:
  """Raises a ValueError if a parameter is not floating-point."""
  for name, leaf in trees.leaves_by_name(params).items():
    if jnp.result_type(leaf) not in ordinals.FLOATS:
      raise ValueError(
        f"parameters must be floating-point arrays, but {trees.quoted(name)} has dtype"
        f" {jnp.result_type(leaf)}: leave it out, and let the function close over it."
      )


def widened(params: PyTree) -> PyTree:
  """The parameters in single precision at least."""
  return jax.tree.map(
    lambda p: jnp.asarray(p, jnp.promote_types(jnp.result_type(p), jnp.float32)), params
  )


def for_widened(function: Callable[..., Any], what: str, params: PyTree) -> Callable[..., Any]:
  """The function for parameters that are widened: it gets them in the dtypes that they had.

  Args:
    function: takes parameters and one other argument.
    what: what to call it in an error.
    params: the parameters as they are.

  Returns:
    A function that raises a ValueError with the shapes of its argument if that one fails on it.
  """
  types = jax.tree.map(jnp.result_type, params)

  def narrowing(weights, inputs):
    try:
      return function(jax.tree.map(lambda w, dtype: w.astype(dtype), weights, types), inputs)
    except Exception as error:
      raise ValueError(
        f"{what} failed on an input of {describe(inputs)}: {type(error).__name__}: {error}"
      ) from error

  return narrowing


def loss_for_widened(
  loss_fn: Callable[[PyTree, Any], jax.Array], params: PyTree
) -> Callable[[PyTree, Any], jax.Array]:
  """The same for a loss, which has to be a scalar."""
  loss_fn = for_widened(loss_fn, "the loss", params)

  def checked(weights, batch):
    loss = loss_fn(weights, batch)
    is_leaf = jax.tree.structure(loss) == jax.tree.structure(0)  # None is none.
    if not is_leaf or np.ndim(loss) or jnp.result_type(loss) not in ordinals.FLOATS:
      raise ValueError(
        f"the loss must be one floating-point number, but it returned {describe(loss)}: take the"
        " mean over the examples, and return nothing else."
      )
    return jnp.asarray(loss)

  return checked


def describe(tree: PyTree) -> str:
  """What it is that was passed or returned, such as "float32[8,64], int32[8]"."""
  return ", ".join(str(jax.typeof(x)) for x in jax.tree.leaves(tree)) or "nothing"


def check_batches(batches: Any) -> None:
  """Raises a ValueError if batches cannot be gone through twice."""
  if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
    raise ValueError(
      f"`batches` must be a list of batches, got {type(batches).__name__}: pass [batch] for one."
    )
  if isinstance(batches, Iterator):
    raise ValueError(
      f"`batches` is gone through twice, but {type(batches).__name__} is an iterator, empty after"
      " the first time: pass a list, or an object whose __iter__ starts anew."
    )


def check_loss(loss: jax.Array, which: str = "") -> None:
  """Raises a ValueError if a loss is known not to be finite."""
  if not isinstance(loss, jax.core.Tracer) and not np.isfinite(loss):
    raise ValueError(
      f"the loss{which} is {loss}, and so nothing can be scored by it: look for NaN and infinity in"
      " the batch and the parameters."
    )


def check_scores(scores: PyTree, factors: str) -> None:
  """Raises a ValueError if scores are known not to be finite, or to be all zero as factors are."""
  leaves = trees.leaves_by_name(scores)
  if not leaves or any(isinstance(s, jax.core.Tracer) for s in leaves.values()):
    return
  largest = jax.device_get({name: jnp.max(jnp.abs(s), initial=0) for name, s in leaves.items()})
  for name, value in largest.items():
    if not np.isfinite(value):
      raise ValueError(
        f"the scores of {trees.quoted(name)} are not finite, although the loss is: look for"
        " parameters or derivatives that are infinite (such as that of a square root at 0), or use"
        " a wider dtype."
      )
  if not any(largest.values()):
    raise ValueError(
      f"all scores are zero, because {factors} are zero everywhere: there is nothing to choose by."
      " Is the loss computed from the parameters that it gets?"
    )
