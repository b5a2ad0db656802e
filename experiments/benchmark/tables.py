"""The tables of the report: their columns, as functions of a row of raw numbers."""

from collections.abc import Callable
from typing import NamedTuple

from experiments.benchmark import figures
from experiments.benchmark.figures import Row, median

Column = tuple[str, Callable[[Row], str]]


class Table(NamedTuple):
  """Some columns of the rows of one measurement, or of several.

  Attributes:
    title: of the section.
    measurements: whose rows they are.
    text: what is to be known of the figures.
    columns: a header and a function from a row to a cell, for each.
    holds: which rows there are.
  """

  title: str
  measurements: tuple[str, ...]
  text: str
  columns: tuple[Column, ...]
  holds: Callable[[Row], bool] = lambda row: True


def _value(name: str) -> Callable[[Row], str]:
  return lambda row: str(row[name])


def _count(name: str) -> Callable[[Row], str]:
  return lambda row: f"{row[name]:,}"


def _seconds(name: str) -> Callable[[Row], str]:
  return lambda row: figures.in_seconds(row["seconds"][name])


def _ratio(above: str, below: str) -> Callable[[Row], str]:
  return lambda row: figures.spread(figures.ratios(row["seconds"][above], row["seconds"][below]))


def _compiled(variant: str) -> Callable[[Row], str]:
  return lambda row: figures.in_seconds(row[variant]["compile_seconds"])


def _compile_ratio(above: str, below: str) -> Callable[[Row], str]:
  return lambda row: figures.spread(
    figures.ratios(row[above]["compile_seconds"], row[below]["compile_seconds"])
  )


def _temporary(variant: str, unit: str) -> Callable[[Row], str]:
  return lambda row: f"{row[variant]['temporary_bytes'] / row[unit]:.2g}"


def _changes(row: Row) -> bool:
  return "changed" in row["seconds"]


def _mask_bytes(row: Row) -> str:
  masks = row["pruned"]["state_bytes"] - row["bare"]["state_bytes"]
  return f"{masks / row['weights']:.3f}"


def _of_steps(row: Row, variant: str) -> str:
  return figures.in_seconds([s / row["steps_an_epoch"] for s in row["seconds"][variant]])


def _part_of_an_epoch(row: Row) -> str:
  return figures.in_per_cent(figures.epoch_shares(row, figures.update_seconds(row)))


def _flops(row: Row) -> float:
  return row["flops_an_image"] * row["images"] / median(row["seconds"]["pruned"])


def _is_collective(row: Row) -> bool:
  return row["devices"] > 1


_TREE = ("tree", _value("tree"))
_METHOD = ("method", _value("method"))
_STEPS = ("steps a call", _value("steps_a_call"))
_PLACES = (
  ("devices", lambda row: f"{row['devices']} ({row['platform']})"),
  ("each has", _value("placement")),
)
_UPDATE = ("mask update", lambda row: figures.in_seconds(figures.update_seconds(row)))
_READINGS = ("readings", lambda row: figures.spread(figures.update_readings(row)))
_LOCAL = ("temporary bytes per local parameter", _temporary("pruned", "local_parameters"))

TABLES = (
  Table(
    "Selection",
    ("selection",),
    "Exactly the smallest magnitudes of the tree, against `jnp.argsort` of the concatenation.",
    (
      _TREE,
      ("weights", _count("weights")),
      ("argsort", _seconds("argsort")),
      ("`select_smallest`", _seconds("select")),
      ("times faster", _ratio("argsort", "select")),
      ("argsort, temporary bytes per weight", _temporary("argsort", "weights")),
      ("`select_smallest`, temporary bytes per weight", _temporary("select", "weights")),
      ("argsort, compilation", _compiled("argsort")),
      ("`select_smallest`, compilation", _compiled("select")),
    ),
  ),
  Table(
    "Mask update",
    ("step",),
    "What a step that changes the masks costs more than one that keeps them, and how often plain"
    " JAX could sum up all weights in that time.",
    (
      _TREE,
      ("parameters", _count("parameters")),
      _METHOD,
      _STEPS,
      _UPDATE,
      ("one reading", _seconds("reading")),
      _READINGS,
      ("step that changes masks / bare step", _ratio("changed", "bare")),
    ),
    _changes,
  ),
  Table(
    "Steady step",
    ("step",),
    "SGD with momentum and `optax.apply_updates` in donated buffers, alone and with pruning, at"
    " calls that keep the masks.",
    (
      _TREE,
      _METHOD,
      _STEPS,
      ("bare optimizer", _seconds("bare")),
      ("with pruning", _seconds("kept")),
      ("ratio", _ratio("kept", "bare")),
    ),
  ),
  Table(
    "Memory",
    ("step",),
    "Bytes for each parameter that a step takes beside its arguments and results, and bytes for"
    " each prunable weight by which the state is larger.",
    (
      _TREE,
      _METHOD,
      _STEPS,
      ("bare optimizer, temporary", _temporary("bare", "parameters")),
      ("with pruning, temporary", _temporary("pruned", "parameters")),
      ("masks in the state", _mask_bytes),
    ),
  ),
  Table(
    "Compile time",
    ("step",),
    "Of a step: tracing, lowering and compiling, with nothing from a cache.",
    (
      _TREE,
      ("leaves", _value("leaves")),
      _METHOD,
      _STEPS,
      ("bare optimizer", _compiled("bare")),
      ("with pruning", _compiled("pruned")),
      ("ratio", _compile_ratio("pruned", "bare")),
    ),
  ),
  Table(
    "Training step",
    ("network",),
    "Augmentation, forward, backward, optimizer and pruning. A smaller batch than the recipe's"
    " makes the step shorter and what pruning adds a larger part of it: an upper bound."
    " The step without pruning, compiled again, is set against itself: so much may the ratio be"
    " off.",
    (
      ("recipe", _value("recipe")),
      ("dtype", _value("dtype")),
      ("batch", _value("batch_size")),
      ("rounds", lambda row: str(len(row["seconds"]["dense"]))),
      ("without pruning", _seconds("dense")),
      ("with pruning", _seconds("kept")),
      ("ratio", _ratio("kept", "dense")),
      ("without pruning, against itself", _ratio("again", "dense")),
      _UPDATE,
      ("steps of an epoch", _value("steps_an_epoch")),
      ("part of an epoch", _part_of_an_epoch),
      ("compilation without pruning", _compiled("dense")),
      ("compilation with pruning", _compiled("pruned")),
    ),
  ),
  Table(
    "Devices",
    ("devices",),
    "Devices of the platform cpu are simulated and share the same cores, so that times do not fall"
    " as they become more: the ratios say what sharding costs, not what it saves.",
    (
      _TREE,
      _METHOD,
      *_PLACES,
      ("bare optimizer", _seconds("bare")),
      ("with pruning", _seconds("kept")),
      ("ratio", _ratio("kept", "bare")),
      _UPDATE,
      _READINGS,
      _LOCAL,
      ("compilation", _compiled("pruned")),
    ),
    _changes,
  ),
  Table(
    "Large trees on a mesh",
    ("abstract",),
    "Compiled from shapes and shardings, and not run. The bytes are those of one device.",
    (
      _TREE,
      ("parameters", _count("parameters")),
      ("leaves", _value("leaves")),
      _METHOD,
      *_PLACES,
      ("compilation of the bare step", _compiled("bare")),
      ("with pruning", _compiled("pruned")),
      ("arguments", lambda row: f"{row['pruned']['argument_bytes']:,}"),
      ("temporary", lambda row: f"{row['pruned']['temporary_bytes']:,}"),
      _LOCAL,
    ),
  ),
  Table(
    "Sent between devices",
    ("devices", "abstract"),
    "What collective operations leave on one device, in bytes, read from the compiled program."
    " Those in a loop run in each pass of a selection. Few are needed; at most, it takes as many as"
    " there must be until each bit of a score, and of a place among ties, is known. The last column"
    " is against plain JAX's way, gathering all weights.",
    (
      _TREE,
      ("parameters", _count("parameters")),
      _METHOD,
      *_PLACES,
      ("operations", lambda row: f"{row['sent']['operations']:,}"),
      ("bytes sent once", lambda row: f"{row['sent']['once']:,}"),
      ("bytes in each pass", lambda row: f"{row['sent']['each_pass']:,}"),
      ("bytes of a mask update, at most", lambda row: f"{figures.most_sent(row):,}"),
      (
        "part of the bytes of all weights",
        lambda row: f"{figures.most_sent(row) / figures.pool(row):.1g}",
      ),
    ),
    _is_collective,
  ),
  Table(
    "Epochs of training",
    ("training",),
    "On random pixels; the work is that of the layers alone.",
    (
      ("recipe", _value("recipe")),
      ("device", _value("device")),
      ("dtype", _value("dtype")),
      ("unroll", _value("unroll")),
      ("images per second", lambda row: f"{row['images'] / median(row['seconds']['pruned']):,.0f}"),
      ("step", lambda row: _of_steps(row, "pruned")),
      ("step without pruning", lambda row: _of_steps(row, "dense")),
      ("with pruning / without", _ratio("pruned", "dense")),
      ("TFLOP/s", lambda row: f"{_flops(row) / 1e12:.3g}"),
      (
        "of the matrix rate",
        lambda row: "-" if row["peak_flops"] is None else f"{_flops(row) / row['peak_flops']:.1%}",
      ),
      ("compilation and first epoch", lambda row: f"{row['compile_seconds']:.0f} s"),
      (
        "all epochs",
        lambda row: f"{row['epochs'] * median(row['seconds']['pruned']):,.0f} s",
      ),
    ),
  ),
  Table(
    "Loader",
    ("loader",),
    "Decoding and cropping on the host.",
    (
      ("workers", _value("workers")),
      ("images", _count("images")),
      ("first batch", lambda row: figures.in_seconds(row["first_batch_seconds"])),
      ("images per second", lambda row: f"{median(row['images_per_second']):,.0f}"),
    ),
  ),
  Table(
    "Inference on the host",
    ("inference",),
    "Random weights, pruned by magnitude. `deploy.to_numpy` multiplies with CSR matrices, by Numba"
    " if it is installed and else by SciPy, or with dense ones, whichever took less time in each"
    " layer, and in one thread or in all; sparse layers that follow each other are one call. CSR in"
    " all layers takes one thread, NumPy's dense products take their own. To JAX, zeros are numbers"
    " like others. A turn of a variant is a fifth of a second, of which the fastest call counts.",
    (
      ("network", _value("network")),
      ("pruned", lambda row: f"{row['sparsity']:.0%}"),
      ("batch", _value("batch_size")),
      ("NumPy, dense", _seconds("dense")),
      ("CSR in all layers", _seconds("sparse")),
      ("`deploy.to_numpy`", _seconds("fastest")),
      ("its layers", lambda row: ", ".join(row["choices"])),
      ("its threads", _value("threads")),
      ("JAX, dense", _seconds("jax")),
      ("`deploy.to_numpy`, times faster than NumPy", _ratio("dense", "fastest")),
      ("than JAX", _ratio("jax", "fastest")),
    ),
  ),
)
