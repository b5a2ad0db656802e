"""What is known about primitives."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from sparsejax.deploy import links, surrogates
from sparsejax.deploy.channels import Channels
from sparsejax.deploy.links import Link
from sparsejax.deploy.sites import Site
from sparsejax.deploy.surrogates import Operands, Surrogate


class Rule(NamedTuple):
  """What is known about a primitive.

  Attributes:
    links: which indices of operands and outputs belong together. Axes of neither are pinned.
    surrogate: of a site, given where its operands may differ from zero, and the values of those
      that do not vary, None for others.
    moves: whether outputs are elements of inputs, or their own positions, and static arguments say
      no more than which.
    is_pointwise: whether outputs are functions of the elements of inputs at the same position.
    resize: the static arguments for operands and outputs that are smaller.
    makes_axes: whether the output may have axes that belong to no operand's, without being pinned.
  """

  links: Callable[[Site, Channels], Iterator[Link]]
  surrogate: Callable[[Site, Operands, Operands], Surrogate]
  moves: bool = False
  is_pointwise: bool = False
  resize: Callable[..., dict[str, Any]] = lambda site, kept, shapes: {}
  makes_axes: bool = False


# Static arguments that say sizes.


def _new_shape(key):
  return lambda site, kept, shapes: {key: shapes[0]}


def _resize_parts(site, kept, shapes):
  axis = site.equation.params["axis"]
  return {"sizes": tuple(shape[axis] for shape in shapes)}


def _resize_padding(site, kept, shapes):
  config = list(site.equation.params["padding_config"])
  for axis, (low, _, _) in enumerate(config):
    indices = kept(site.outputs[0])[axis]
    if indices is not None:
      end = low + site.shapes_in[0][axis]
      config[axis] = (int(np.sum(indices < low)), int(np.sum(indices >= end)), 0)
  return {"padding_config": tuple(config)}


def _resize_slice(site, kept, shapes):
  params = site.equation.params
  starts, limits = list(params["start_indices"]), list(params["limit_indices"])
  for axis, start in enumerate(starts):
    indices = kept(site.inputs[0])[axis]
    if indices is not None:
      starts[axis] = int(np.sum(indices < start))
      limits[axis] = starts[axis] + shapes[0][axis]
  return {"start_indices": tuple(starts), "limit_indices": tuple(limits)}


_ELEMENTWISE = (
  "abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp"
  " convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor"
  " ge gt integer_pow is_finite le lgamma log log1p logistic lt max min name ne neg nextafter not"
  " or pow reduce_precision rem round rsqrt sign sin sinh sqrt square stop_gradient sub tan tanh"
  " xor"
)
_REDUCTIONS = (
  "argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor"
)

UNKNOWN = Rule(links.none, surrogates.everything)
_SAME = Rule(links.same_axes, surrogates.any_operand, is_pointwise=True)
_MOVED = Rule(links.none, surrogates.itself, moves=True)
RULES = {
  **dict.fromkeys(_ELEMENTWISE.split(), _SAME),
  **dict.fromkeys(_REDUCTIONS.split(), Rule(links.remaining, surrogates.reduced)),
  **dict.fromkeys(
    ["reduce_window_max", "reduce_window_min", "reduce_window_sum"],
    Rule(links.unwindowed, surrogates.windows),
  ),
  "broadcast_in_dim": _MOVED._replace(
    links=links.broadcast, resize=_new_shape("shape"), makes_axes=True
  ),
  "concatenate": _MOVED._replace(links=links.concatenated),
  "iota": Rule(links.none, surrogates.everything, moves=True),
  "mul": _SAME._replace(surrogate=surrogates.bilinear),
  "pad": _MOVED._replace(links=links.padded, resize=_resize_padding),
  "reshape": _MOVED._replace(links=links.reshaped, resize=_new_shape("new_sizes")),
  "rev": _MOVED._replace(links=links.reversed_axes),
  "select_n": _SAME._replace(surrogate=surrogates.selected),
  "slice": _MOVED._replace(links=links.sliced, resize=_resize_slice),
  "split": _MOVED._replace(links=links.parts, resize=_resize_parts),
  "stack": _MOVED._replace(links=links.stacked),
  "squeeze": _MOVED._replace(links=links.remaining),
  "tile": _MOVED._replace(links=links.tiled),
  "transpose": _MOVED._replace(links=links.permuted),
  "unstack": _MOVED._replace(links=links.unstacked),
}
