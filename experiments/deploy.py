"""Reports what the sparsity of a finished run buys: in files, in memory, and in time.

    python -m experiments.deploy runs/lenet300-mnist-98/seed42 --data-dir DIR

Writes `deploy.json`, `deploy.md` and `layout.png` into the run's folder, or into another one. All
times are taken on this machine, by turns. With --weights FILE, the network goes into a sparse file.
"""

import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import sparsejax
from experiments import (
  commands,
  cycles,
  data,
  imagenet,
  layouts,
  methods,
  records,
  train,
  training,
)
from experiments.augment import normalize
from experiments.models import MODELS
from experiments.recipe import from_config
from experiments.recipes import RECIPES
from experiments.run import Run
from sparsejax import deploy


@dataclasses.dataclass(frozen=True)
class Options:
  """Reports what the sparsity of a finished run buys."""

  run: tyro.conf.Positional[pathlib.Path]
  """The folder of the run."""
  data_dir: pathlib.Path | None = None
  """Directory of the data set; see the README."""
  out: pathlib.Path | None = None
  """Where the report goes; by default the folder of the run."""
  weights: pathlib.Path | None = None
  """A file that does not exist, for the trained network without its zeros: see
  `sparsejax.deploy.load`. By default there is none."""
  batches: tuple[int, ...] = (1, 256)
  """Sizes of the batches to time."""
  rounds: int = 7
  """How often to time each."""

  def __post_init__(self):
    commands.check_fields(
      self,
      {
        "batches": (min(self.batches, default=0) >= 1, "one or more numbers of at least 1"),
        "rounds": (self.rounds >= 1, "at least 1"),
        "weights": (not (self.weights and self.weights.exists()), "a file that does not exist"),
      },
    )


class Target(NamedTuple):
  """What is to be reached.

  Attributes:
    text: says so.
    find: from a report to the figure.
    limit: of the figure.
    at_least: whether the limit is the least, and not the most.
  """

  text: str
  find: Callable[[deploy.Report], float]
  limit: float
  at_least: bool = True


# Of every run, and of those that are named.
_TARGETS = (
  Target(
    "outputs equal those of the trained network: the largest difference is at most 1e-5 of the"
    " largest logit",
    lambda report: max(variant.difference for variant in report.variants),
    1e-5,
    at_least=False,
  ),
)
_TARGETS_OF = {
  "lenet300-mnist-98": (
    Target(
      "the file is at least 30 times smaller than that of dense float32",
      lambda report: report["dense"].file_bytes / report["sparse"].file_bytes,
      30,
    ),
    Target(
      "compaction leaves at least 1.5 times fewer parameters",
      lambda report: report["dense"].parameters / report["compact"].parameters,
      1.5,
    ),
    Target(
      "NumPy at batch 256 is at least 4 times faster than with the dense network",
      lambda report: report.times_faster(report.fastest(256), 256),
      4,
    ),
  )
}


def make_report(
  options: Options, run: Run, result: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Restores a finished run, and measures its network.

  Returns:
    What goes into the JSON, and the variables of the network.

  Raises:
    ValueError: if the run is of no use here; it says why.
  """
  dataset = data.load(run.recipe.data, options.data_dir)
  if isinstance(dataset, imagenet.Imagenet):
    raise ValueError(f"{options.run} is of {run.recipe.data}, which does not fit into memory")
  trainer = training.make_trainer(run.recipe, dataset, run.seed)
  state = cycles.restore_finished(run, trainer)
  masks = methods.get_masks(run.recipe, state.opt_state, state.params)
  # What the network computes with, where pruned weights have kept their values.
  params = sparsejax.apply_masks(state.params, masks) if run.recipe.keep_weights else state.params
  variables, masks = {"params": params}, {"params": masks}
  if state.batch_stats:
    variables["batch_stats"] = state.batch_stats
    masks["batch_stats"] = methods.full_masks(state.batch_stats)
  variables = jax.device_get(variables)
  model = MODELS[run.recipe.model](classes=dataset.classes, width=run.recipe.width)
  changes = _changes(run)
  hardware = records.hardware()
  report = deploy.report(
    model.apply,
    variables,
    np.asarray(normalize(jnp.asarray(dataset.test_images), dataset.mean, dataset.std)),
    labels=dataset.test_labels,
    masks=masks,
    batches=options.batches,
    rounds=options.rounds,
  )
  record = {
    "config": train.make_config(run),
    "changes": changes,
    "trained": {key: result[key] for key in ("test_accuracy", "pruned", "pool", "commit")},
    "hardware": hardware,
    **records.provenance(),
    "rounds": options.rounds,
    "report": dataclasses.asdict(report),
    "table": report.cells,
    "gains": dict(report.gains),
    "conclusion": report.conclusion,
    "targets": [_check(target, report) for target in _targets(run, changes, report)],
  }
  return record, variables


def _read_run(options: Options) -> tuple[Run, dict[str, Any]]:
  """A finished run and its result."""
  for name in ("config.json", "result.json"):
    if not (options.run / name).exists():
      raise ValueError(f"{options.run} has no {name}: it is not the folder of a finished run")
  config = records.read_json(options.run / "config.json")
  run = Run(from_config(config), config["recipe"], config["seed"], out=options.run)
  return run, records.read_result(options.run / "result.json")


def _changes(run: Run) -> list[str]:
  """In what a run differs from its recipe."""
  if run.name not in RECIPES:
    return []
  own = dataclasses.replace(run, recipe=RECIPES[run.name])
  return records.find_differences(train.make_config(run), train.make_config(own))


def _targets(run: Run, changes: list[str], report: deploy.Report) -> Iterator[Target]:
  yield from _TARGETS
  if 256 in report.batches and not changes:
    yield from _TARGETS_OF.get(run.name, ())


def _check(target: Target, report: deploy.Report) -> dict[str, Any]:
  figure = target.find(report)
  is_reached = figure >= target.limit if target.at_least else figure <= target.limit
  return {"target": target.text, "figure": figure, "reached": is_reached}


def to_markdown(record: dict[str, Any]) -> str:
  """The report in Markdown, made of the JSON alone."""
  trained, config, hardware = record["trained"], record["config"], record["hardware"]
  report, targets = record["report"], record["targets"]
  packages = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
  choices = "; ".join(
    f"{variant['name']} at batch {batch}: {_runs(kinds)}, {_threads(variant['threads'][batch])}"
    for variant in report["variants"][1:]
    for batch, kinds in variant["choices"].items()
  )
  checked = commands.to_markdown(
    [
      {
        "target": each["target"],
        "figure": f"{each['figure']:.3g}",
        "verdict": "reached" if each["reached"] else "MISSED",
      }
      for each in targets
    ]
  )
  changed = f" with {', '.join(record['changes'])}" if record["changes"] else ""
  parts = [
    f"# `{config['recipe']}`{changed}, seed {config['seed']}: what the sparsity buys",
    f"{config['model']} on {config['data']}, {config['epochs']} epochs: {trained['pruned']:,} of"
    f" {trained['pool']:,} weights pruned, {trained['test_accuracy']:.2f} % test accuracy at the"
    " end of training.",
    commands.to_markdown(record["table"]),
    record["conclusion"],
    checked,
    "The networks: dense, as trained, with its zeros; sparse, without them; compact, without the"
    " units that no longer matter, in dense arrays; and without either. Accuracy, and the largest"
    " difference to the dense network's outputs as a part of the largest of these, are of"
    f" {report['examples']:,} test images, with weights read from the file.",
    "Parameters are all numbers that a network computes with, indices of inputs and statistics of"
    " batch norm among them. FLOPs are those of products and convolutions for one image, two for"
    " each multiplication. Files are in bytes: safetensors, sparse ones as in"
    " `docs/file-format.md`; and the same after gzip.",
    f"Times are the median of {record['rounds']} rounds, in each of which all have a turn of a"
    " fifth of a second, whose fastest call counts; on"
    f" {hardware['processor']}, {hardware['cores']} cores, {hardware['load']:.1f} processes at work"
    f" on them before; JAX on {report['device']}, to which zeros are numbers like others. In NumPy,"
    " dense products take as many threads as NumPy gives them; sparse ones are computed by"
    f" {'Numba' if 'numba' in record['versions'] else 'SciPy'}. Chosen, by their time, were one of"
    f" these for each product, and among how many threads examples are shared out. {choices}.",
    f"Trained at commit {trained['commit']}, measured at {record['commit']}; {packages}.",
    "![Where the weights lie](layout.png)",
    "## What compaction leaves",
    commands.to_markdown([_describe_leaf(row) for row in report["compaction"]["rows"]]),
  ]
  return "\n\n".join(parts) + "\n"


def _runs(kinds: Sequence[str]) -> str:
  """Equal neighbours together, as in "dense, 3 sparse"."""
  groups = [(kind, len(list(group))) for kind, group in itertools.groupby(kinds)]
  return ", ".join(kind if count == 1 else f"{count} {kind}" for kind, count in groups)


def _threads(count: int) -> str:
  return "one thread" if count == 1 else f"{count} threads"


def _describe_leaf(row: dict[str, Any]) -> dict[str, str]:
  kept = sum(math.prod(shape) for shape in row["new_shapes"]) + row["extra"]
  return {
    "weight": row["name"],
    "shape": _times(row["shape"]),
    "shape that is left": ", ".join(map(_times, row["new_shapes"])) or "-",
    "parameters": f"{math.prod(row['shape']):,}",
    "left, with indices and what is folded": f"{kept:,}",
  }


def _times(shape: Sequence[int]) -> str:
  return "x".join(map(str, shape)) or "one number"


def _plot(path: pathlib.Path, record: dict[str, Any], variables: dict[str, Any]) -> None:
  kernels = {
    jax.tree_util.keystr(keys, simple=True, separator="/"): leaf
    for keys, leaf in jax.tree_util.tree_leaves_with_path(variables)
    if sparsejax.is_kernel(keys, leaf)
  }
  left = {
    row["name"]: ", ".join(map(_times, row["new_shapes"])) or "nothing"
    for row in record["report"]["compaction"]["rows"]
  }
  title = f"{record['config']['model']} on {record['config']['data']}: where the weights lie"
  layouts.plot_layout(path, title, kernels, left)


def main(args: list[str] | None = None) -> None:
  with commands.errors_as_messages():
    options = tyro.cli(Options, prog="python -m experiments.deploy", args=args)
    out = options.out or options.run
    run, result = _read_run(options)
    commands.check_writable("out", out, out)
    if options.weights:
      commands.check_writable("weights", options.weights, options.weights.parent)
    record, variables = make_report(options, run, result)
    record = json.loads(records.to_json(record))  # As it is read again.
    text = to_markdown(record)
    records.replace_file(out / "deploy.json", records.to_json(record))
    records.replace_file(out / "deploy.md", text)
    _plot(out / "layout.png", record, variables)
    if options.weights:
      deploy.save(options.weights, variables)
    print(text)


if __name__ == "__main__":
  main()
