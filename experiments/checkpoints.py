"""Checkpoints of a run: written as a whole or not at all, and checked before they are read.

Where several processes train one run, each writes and reads its parts of the arrays; process 0 does
all else, and what it finds holds for all of them.
"""

import contextlib
import json
import pathlib
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import orbax.checkpoint as ocp

from experiments import distributed, records

_KEPT = 2
_METRICS = "metrics.json"
_CHECKSUMS = "checksums.json"


class Checkpoints:
  """The last two checkpoints of a run, by number of epochs."""

  def __init__(self, manager: ocp.CheckpointManager):
    self._manager = manager

  @property
  def epochs(self) -> list[int]:
    """After how many epochs there is a checkpoint, whole or not."""
    return sorted(self._manager.all_steps())

  def save(self, state: Any, metrics: list[dict[str, Any]]) -> None:
    """Writes the state and the metrics of all epochs until now."""
    epochs = len(metrics)
    self._manager.save(epochs, args=ocp.args.StandardSave(state))
    if distributed.is_first():
      folder = self._folder(epochs)
      (folder / _METRICS).write_text(json.dumps(metrics))
      # Last of all: without them a checkpoint is unfinished.
      records.replace_file(folder / _CHECKSUMS, json.dumps(_checksums(folder)))

  def restore_latest(self, like: Any) -> tuple[Any, list[dict[str, Any]]]:
    """Reads the latest checkpoint that is whole; warns of later ones, and removes them.

    Args:
      like: a state of the same structure, shapes and types, which lies where the result is to be:
        on any devices of any number of processes.

    Returns:
      The state and the metrics of all epochs until then; (`like`, []) if no checkpoint has ever
      been finished.

    Raises:
      ValueError: if there are finished checkpoints, but all are damaged.
    """
    damaged, metrics = distributed.from_first(self._find_whole)
    if metrics is None:
      self._drop(damaged, "starting anew")
      return like, []
    epochs = len(metrics)
    self._drop(damaged, f"going back to {epochs}")
    return self._read(epochs, like), metrics

  def restore(self, epochs: int, like: Any) -> Any:
    """Reads the checkpoint after so many epochs, in the form of `like`; removes nothing.

    Raises:
      ValueError: if it is not there or not whole.
    """
    if epochs not in self.epochs:
      raise ValueError(f"{self._manager.directory} has no checkpoint after {epochs} epochs")
    if reason := self._fault(epochs):
      raise ValueError(f"{self._folder(epochs)} is not whole: {reason}")
    return self._read(epochs, like)

  def _read(self, epochs: int, like: Any) -> Any:
    try:
      return self._manager.restore(epochs, args=ocp.args.StandardRestore(like))
    except ValueError as error:
      raise ValueError(
        f"{self._folder(epochs)} is whole, but of something else, perhaps of an earlier version"
        f" of this program: remove {self._manager.directory} to start anew. {error}"
      ) from error

  def _find_whole(self) -> tuple[list[tuple[int, str]], list[dict[str, Any]] | None]:
    """What is wrong with the latest checkpoints, and the metrics of the last one that is whole."""
    damaged = []
    for epochs in reversed(self.epochs):
      if not (reason := self._fault(epochs)):
        return damaged, json.loads((self._folder(epochs) / _METRICS).read_text())
      damaged.append((epochs, reason))
    if any((self._folder(epochs) / _CHECKSUMS).exists() for epochs, _ in damaged):
      raise ValueError(
        f"all checkpoints in {self._manager.directory} are damaged, remove the folder to start"
        f" anew: {damaged[0][1]}"
      )
    return damaged, None

  def _drop(self, damaged: list[tuple[int, str]], then: str) -> None:
    for epochs, reason in damaged:
      warnings.warn(
        f"the checkpoint after {epochs} epochs is not whole, {then}: {reason}", stacklevel=3
      )
      self._manager.delete(epochs)

  def _folder(self, epochs: int) -> pathlib.Path:
    return pathlib.Path(self._manager.directory) / str(epochs)

  def _fault(self, epochs: int) -> str | None:
    """What is wrong with a checkpoint."""
    folder = self._folder(epochs)
    if not (folder / _CHECKSUMS).exists():
      return "the run ended while it was written"
    try:
      written = dict(json.loads((folder / _CHECKSUMS).read_text()))
    except (ValueError, TypeError, OSError):
      return f"{_CHECKSUMS} is damaged"
    found = _checksums(folder)
    changed = {name for name in written | found if written.get(name) != found.get(name)}
    return f"damaged are {', '.join(sorted(changed))}" if changed else None


@contextlib.contextmanager
def open_checkpoints(folder: pathlib.Path) -> Iterator[Checkpoints]:
  """The checkpoints in a folder, which need not exist."""
  options = ocp.CheckpointManagerOptions(max_to_keep=_KEPT, enable_async_checkpointing=False)
  with ocp.CheckpointManager(folder.absolute(), options=options) as manager:
    yield Checkpoints(manager)


def _checksums(folder: pathlib.Path) -> dict[str, str]:
  """Of each file in a checkpoint: formats do not notice each bit that flips."""
  return {
    str(path.relative_to(folder)): f"{zlib.crc32(path.read_bytes()):08x}"
    for path in sorted(folder.rglob("*"))
    if path.is_file() and not path.name.startswith(_CHECKSUMS)
  }
