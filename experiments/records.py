"""What a run leaves behind: its folder, the result, and where that comes from."""

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import jax

import sparsejax
from experiments.recipe import Dynamic, Recipe

PACKAGES = ("sparsejax", "jax", "jaxlib", "flax", "optax", "numpy")
# Sparse products are theirs, if they are installed.
OPTIONAL_PACKAGES = ("scipy", "numba")
# Of a result, what tables are made of; and what else is read of it.
IN_TABLES = (
  "test_accuracy",
  "best_test_accuracy",
  "pool",
  "pruned",
  "sparsity",
  "collapsed_in_epoch",
  "seconds",
  "device",
)
_IN_RESULTS = ("config", *IN_TABLES, "layers", "commit")


@contextlib.contextmanager
def open_folder(folder: pathlib.Path, config: dict[str, Any]) -> Iterator[None]:
  """Makes the folder of a run, or checks that it is no other run's; keeps other processes out.

  Raises:
    ValueError: if it holds another run, if another process is at work there, or if it cannot be
      written.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / "lock").open("w")
  except OSError as error:
    raise ValueError(f"out={folder} cannot be written: {error}") from error
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise ValueError(f"out={folder}: another process is training there") from error
    if (path := folder / "config.json").exists():
      check_config(folder, read_json(path), config)
    elif (path := folder / "result.json").exists():
      check_config(folder, read_result(path)["config"], config)
    elif (folder / "checkpoints").exists():
      raise ValueError(
        f"out={folder} has checkpoints, but no config.json that says of what: choose another"
        " folder, or remove this one"
      )
    yield


def check_config(where: pathlib.Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
  """Raises a ValueError that names the fields in which two runs differ.

  Published numbers are no part of a run.
  """
  if changed := find_differences(found, expected):
    raise ValueError(
      f"{where} holds a run with {', '.join(changed)}: choose another place, or remove it"
    )


def find_differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
  """The fields of one run that another one has not, or otherwise: each as "field=value"."""
  # A field that a run is older than has had its default value.
  expected = json.loads(json.dumps(expected))
  before, now = _DEFAULTS | _flatten(found), _DEFAULTS | _flatten(expected)
  return [f"{key}={before.get(key)}" for key in before | now if before.get(key) != now.get(key)]


def _flatten(config: dict[str, Any]) -> dict[str, Any]:
  flat = {}
  for key, value in config.items():
    if key == "published":
      continue
    if isinstance(value, dict):
      flat |= {f"{key}.{inner}": each for inner, each in _flatten(value).items()}
    else:
      flat[key] = value
  return flat


_DEFAULTS = {
  field.name: json.loads(json.dumps(field.default))
  for field in dataclasses.fields(Recipe)
  if field.default is not dataclasses.MISSING and field.name != "published"
} | _flatten({"dynamic": dataclasses.asdict(Dynamic())})


def make_result(
  config: dict[str, Any],
  metrics: list[dict[str, Any]],
  summary: sparsejax.Summary,
  *,
  test_accuracy: float,
  compile_seconds: float,
) -> dict[str, Any]:
  """The contents of `result.json`.

  Args:
    config: of the run.
    metrics: the lines of `metrics.jsonl`.
    summary: of the trained network.
    test_accuracy: of the last epoch, in [0, 1].
    compile_seconds: what the last session of the run took before its first epoch: to initialise, to
      prune before training, and to compile.
  """
  cycles = [
    line["finished"]
    | {
      "collapsed_in_epoch": collapsed_in_epoch(metrics[: i + 1]),
      "seconds": {"train": sum(each["seconds"] for each in metrics[: i + 1])},
    }
    for i, line in enumerate(metrics)
    if "finished" in line
  ]
  return {
    "config": config,
    "test_accuracy": 100 * test_accuracy,
    "best_test_accuracy": _best_test_accuracy(metrics),
    "pool": summary.pool.parameters,
    "pruned": summary.pool.parameters - summary.pool.active,
    "sparsity": summary.pool.sparsity,
    "collapsed_in_epoch": collapsed_in_epoch(metrics),
    "layers": [
      {"name": row.name, "parameters": row.parameters, "active": row.active}
      for row in summary.layers
    ],
    "cycles": cycles,
    "seconds": {"compile": compile_seconds, "train": sum(line["seconds"] for line in metrics)},
    # A run may have begun on one machine and ended on another.
    "device": " / ".join(dict.fromkeys(line["device"] for line in metrics)),
  }


def _best_test_accuracy(metrics: list[dict[str, Any]]) -> dict[str, Any] | None:
  """That of the best epoch, where a recipe asks for it."""
  tested = [line for line in metrics if "test_accuracy" in line]
  if not tested:
    return None
  best = max(tested, key=lambda line: line["test_accuracy"])
  return {"test_accuracy": 100 * best["test_accuracy"], "epoch": best["epoch"]}


def collapsed_in_epoch(metrics: list[dict[str, Any]]) -> int | None:
  """The epoch from which on a run was dead, if it was so at the end of its last cycle."""
  last = metrics[-1].get("cycle", 0)
  dead = itertools.takewhile(
    lambda line: line["collapsed"] and line.get("cycle", 0) == last, reversed(metrics)
  )
  return min((line["epoch"] for line in dead), default=None)


def describe_result(recipe: Recipe, result: dict[str, Any]) -> str:
  """What a user wants to know of a result."""
  lines = [
    f"test accuracy {result['test_accuracy']:.2f} % (last epoch), {result['pruned']:,} of"
    f" {result['pool']:,} weights pruned",
    f"{result['seconds']['train']:.1f} s of training after {result['seconds']['compile']:.1f} s of"
    " compilation",
  ]
  empty = [layer["name"] for layer in result["layers"] if not layer["active"]]
  if empty:
    lines.insert(1, f"WARNING: no active weight is left in {', '.join(empty)}")
  if (best := result["best_test_accuracy"]) is not None:
    lines.insert(
      1,
      f"best test accuracy {best['test_accuracy']:.2f} % after epoch {best['epoch']}, chosen by the"
      f" test set among those above {recipe.best_above:.0%} sparsity",
    )
  if result["collapsed_in_epoch"] is not None:
    lines.insert(0, f"This run COLLAPSED in epoch {result['collapsed_in_epoch']}.")
  return "\n".join(lines)


def provenance() -> dict[str, Any]:
  """The commit and the versions that a result comes from."""
  try:
    git = subprocess.run(
      ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"],
      cwd=pathlib.Path(__file__).parent,
      capture_output=True,
      text=True,
      check=False,
    )
    commit = git.stdout.strip() or None
  except OSError:  # There is no git.
    commit = None
  versions = {package: importlib.metadata.version(package) for package in PACKAGES}
  for package in OPTIONAL_PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[package] = importlib.metadata.version(package)
  return {"commit": commit, "versions": {"python": platform.python_version(), **versions}}


def hardware() -> dict[str, Any]:
  """What times are taken on."""
  return {
    "platform": jax.default_backend(),
    "device": jax.devices()[0].device_kind,
    "devices": jax.device_count(),
    "processor": _processor(),
    "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    # How many processes wanted a core in the last minute.
    "load": os.getloadavg()[0],
    "xla_flags": os.environ.get("XLA_FLAGS", ""),
  }


def _processor() -> str:
  path = pathlib.Path("/proc/cpuinfo")
  found = path.exists() and re.search(r"model name\s*: (.*)", path.read_text())
  return found[1] if found else platform.processor() or platform.machine()


def read_result(path: pathlib.Path) -> dict[str, Any]:
  """Reads a `result.json`; a ValueError names it if it is none."""
  result = read_json(path)
  if missing := [key for key in _IN_RESULTS if key not in result]:
    raise ValueError(f"{path} is damaged, remove it: it holds no {', no '.join(missing)}")
  return result


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a file that holds one object; a ValueError names it if it does not."""
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except (ValueError, OSError) as error:
    raise ValueError(f"{path} is damaged, remove it: {error}") from error
  if not isinstance(content, dict):
    raise ValueError(f"{path} is damaged, remove it: it holds no object")
  return content


def to_json(content: dict[str, Any]) -> str:
  return json.dumps(content, indent=2) + "\n"


def replace_file(path: pathlib.Path, text: str) -> None:
  """Writes a file as a whole, in place of the one before."""
  temporary = path.with_name(path.name + ".new")
  temporary.write_text(text, encoding="utf-8")
  temporary.replace(path)
