"""What sparsity buys: a network as it is, as a sparse one, and compacted, side by side."""

import functools
import gzip
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import arguments, trees
from sparsejax import masks as masks_lib
from sparsejax.deploy import files, final
from sparsejax.deploy.compaction import compact
from sparsejax.deploy.comparison_report import Report, Variant
from sparsejax.deploy.runtime import timing
from sparsejax.deploy.translation import to_numpy
from sparsejax.trees import PyTree

# How many inputs are computed together where time does not count.
_CHUNK = 1000
# A turn of a function is made up of as many calls as take so many seconds.
_TURN = 0.2


def report(
  apply_fn: Callable[..., Any],
  params: PyTree,
  inputs: Any,
  *,
  labels: Any = None,
  masks: PyTree | None = None,
  batches: int | Sequence[int] = (1, 256),
  rounds: int = 7,
) -> Report:
  """Measures what the zeros of a network are good for: in files, in memory, and in time.

  All times are taken on this machine, by turns in each round. A turn takes a fifth of a second, and
  its fastest call counts.

  Args:
    apply_fn: a function of the parameters and of the inputs to an array of outputs; see `compact`.
    params: its trained parameters, as of `finalize`.
    inputs: an array of real examples or a tuple of them: what accuracy and differences are of, and
      what times are taken with.
    labels: the class of each example; outputs are logits then.  # shape=(examples,), dtype=int
    masks: a full boolean tree like the parameters, which says what is active; by default what is
      not zero.
    batches: one or several sizes of the batches to time; examples are repeated if there are fewer.
    rounds: how often to time each.

  Returns:
    A `Report`.

  Raises:
    ValueError: if weights are not finite or not as sparse as the masks say, or if parameters,
      inputs and labels do not belong together; it names the leaf.

  Example:
    >>> import jax, jax.numpy as jnp, numpy as np
    >>> from sparsejax import deploy
    >>> kernel = np.random.default_rng(0).normal(size=(200, 100)).astype(np.float32)
    >>> params = {"kernel": np.where(abs(kernel) > 2.5, kernel, 0)}
    >>> apply = lambda params, x: jax.nn.relu(x @ params["kernel"])
    >>> found = deploy.report(apply, params, jnp.ones((8, 200)), batches=(8,), rounds=1)
    >>> found["dense"].parameters, found["sparse"].parameters, found["compact"].parameters
    (20000, 260, 13837)
    >>> print(found.conclusion)  # doctest: +ELLIPSIS
    The sparsity buys: a smaller file: ...

  """
  inputs = inputs if isinstance(inputs, tuple) else (inputs,)
  inputs = jax.tree.map(np.asarray, inputs)
  examples = _count(inputs, labels)
  batches = tuple(
    arguments.check_integer(f"batches[{i}]", batch, at_least=1)
    for i, batch in enumerate(batches if isinstance(batches, Sequence) else [batches])
  )
  if masks is None:
    masks = jax.tree.map(lambda x: jnp.asarray(x) != 0, params)
  final.check(params, masks)
  compacted = compact(apply_fn, params, _take(inputs, slice(2)))
  compaction = compacted.report
  original = _outputs(apply_fn, params, inputs)
  if labels is not None and (original.ndim != 2 or len(original) != examples):
    raise ValueError(
      f"the outputs for {examples} examples have shape {original.shape}, but with labels they must"
      " be logits, one row for each."
    )
  forms = _forms(apply_fn, params, masks, compacted)
  seconds, networks, differences = _measure(forms, inputs, original, batches, rounds)
  variants = []
  for name, form in forms.items():
    content, read = _through_file(form)
    outputs = original if name == "dense" else _outputs(form.apply_fn, read, inputs)
    accuracy = None if labels is None else np.mean(np.argmax(outputs, -1) == np.asarray(labels))
    variants.append(
      Variant(
        name,
        form.parameters,
        form.flops,
        len(content),
        # Of the time, the file would have another size in each second.
        len(gzip.compress(content, mtime=0)),
        None if accuracy is None else float(accuracy),
        max(differences[name], _difference(outputs, original)),
        seconds[name],
        {batch: network.choices for batch, network in networks[name].items()},
        {batch: network.threads for batch, network in networks[name].items()},
      )
    )
  device = jax.devices()[0].device_kind
  return Report(tuple(variants), compaction, examples, device)


class _Form(NamedTuple):
  """A variant before it is measured."""

  apply_fn: Callable[..., Any]
  params: PyTree
  is_sparse: bool
  parameters: int
  flops: int


def _forms(apply_fn, params, masks, compacted):
  """The variants by name."""
  compaction, small = compacted.report, compacted.params
  kept = sum(int(masks_lib.count_kept(mask)) for mask in jax.tree.leaves(masks))
  dense_flops = {row.name: row.dense_flops or 0 for row in compaction.rows}
  flops = _active_flops(dense_flops, trees.leaves_by_name(params))
  nonzero = sum(int(np.count_nonzero(array)) for array in small.values())
  small_flops = _active_flops(compaction.array_flops, small)
  of_dense = compaction.parameters, compaction.dense_flops
  of_small = compaction.new_parameters, compaction.flops
  return {
    "dense": _Form(apply_fn, params, False, *of_dense),
    "sparse": _Form(apply_fn, params, True, kept, flops),
    "compact": _Form(compacted.apply, small, False, *of_small),
    "compact, sparse": _Form(compacted.apply, small, True, nonzero, small_flops),
  }


def _count(inputs, labels):
  """The number of examples."""
  sizes = {len(x) if x.ndim else 0 for x in jax.tree.leaves(inputs)}
  if len(sizes) != 1 or 0 in sizes:
    raise ValueError(f"the inputs must have the same number of examples, but have {sizes}.")
  (count,) = sizes
  if labels is not None and np.shape(labels) != (count,):
    raise ValueError(f"there are {count} examples, but labels of shape {np.shape(labels)}.")
  return count


def _outputs(apply_fn, params, inputs):
  """The outputs for all inputs, a part of them at a time."""
  function = jax.jit(apply_fn)
  starts = range(0, len(jax.tree.leaves(inputs)[0]), _CHUNK)
  parts = [_take(inputs, slice(start, start + _CHUNK)) for start in starts]
  return np.concatenate([np.asarray(function(params, *part)) for part in parts])


def _take(inputs, where):
  return jax.tree.map(lambda x: x[where], inputs)


def _difference(outputs, original):
  largest = np.max(np.abs(original))
  return float(np.max(np.abs(outputs - original)) / largest) if largest else 0.0


def _active_flops(flops, arrays):
  """Operations of the weights that are not zero, as far as these arrays say which are not."""
  return sum(
    round(count * np.count_nonzero(arrays[name]) / np.size(arrays[name]))
    if count and name in arrays
    else count
    for name, count in flops.items()
  )


def _through_file(form):
  """What a file of these parameters holds, and what is read of it."""
  if not form.is_sparse:
    return files.dense(form.params), form.params
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "network.safetensors"
    files.save(path, form.params)
    return path.read_bytes(), files.load(path, like=form.params)


def _measure(forms, inputs, original, batches, rounds):
  """Times by turns, the networks in NumPy, and how far outputs differ."""
  seconds = {name: {} for name in forms}
  networks = {name: {} for name in forms}
  differences = dict.fromkeys(forms, 0.0)
  for batch in batches:
    where = np.arange(batch) % len(original)
    examples, expected = _take(inputs, where), original[where]
    functions = {}
    for name, form in forms.items():
      kind = "fastest" if form.is_sparse else "dense"
      # NumPy's dense products have threads of their own.
      threads = "fastest" if form.is_sparse else 1
      network = networks[name][batch] = to_numpy(
        form.apply_fn, form.params, examples, kind=kind, threads=threads, rounds=rounds
      )
      functions[name, "numpy"] = functools.partial(network, *examples)
      if not form.is_sparse:  # To JAX, zeros are numbers.
        functions[name, "jax"] = _in_jax(form.apply_fn, form.params, examples)
    for (name, _), function in functions.items():
      differences[name] = max(differences[name], _difference(function(), expected))
    for (name, engine), times in timing.take_turns(functions, rounds, turn=_TURN).items():
      seconds[name].setdefault(engine, {})[batch] = times
  return seconds, networks, differences


def _in_jax(apply_fn, params, examples):
  """A call of the jitted function, with all that it takes on the device."""
  function = jax.jit(apply_fn)
  params, examples = jax.device_put((params, examples))
  return lambda: jax.block_until_ready(function(params, *examples))
