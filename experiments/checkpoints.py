"""Checkpoints of a run: written as a whole or not at all, and checked before they are read."""

import contextlib
import json
import pathlib
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import orbax.checkpoint as ocp

_KEPT = 2
_CHECKSUMS = "checksums.json"


class Checkpoints:
  """The last checkpoints of a run, by number of epochs."""

  def __init__(self, manager: ocp.CheckpointManager):
    self._manager = manager

  def save(self, epochs: int, state: Any) -> None:
    """Writes the state after so many epochs, and removes the oldest checkpoint."""
    self._manager.save(epochs, args=ocp.args.StandardSave(state))
    # Only now is it whole: its checksums are the last to be written.
    folder = self._folder(epochs)
    temporary = folder / f"{_CHECKSUMS}.new"
    temporary.write_text(json.dumps(_checksums(folder)))
    temporary.replace(folder / _CHECKSUMS)

  def restore_latest(self, like: Any) -> tuple[int, Any]:
    """Reads the latest checkpoint that is whole; warns of those that are not, and removes them.

    Args:
      like: a state of the same structure, shapes and types.

    Returns:
      The number of epochs, and the state after them; (0, `like`) if there is no checkpoint.

    Raises:
      ValueError: if there are checkpoints, but none is whole.
    """
    damaged = {}
    for epochs in sorted(self._manager.all_steps(), reverse=True):
      if reason := self._damage(epochs):
        damaged[epochs] = reason
        continue
      for bad, reason in damaged.items():
        warnings.warn(
          f"the checkpoint after {bad} epochs is damaged, going back to {epochs}: {reason}",
          stacklevel=2,
        )
        self._manager.delete(bad)
      return epochs, self._manager.restore(epochs, args=ocp.args.StandardRestore(like))
    if damaged:
      raise ValueError(
        f"all checkpoints in {self._manager.directory} are damaged, remove the folder to start"
        f" anew: {damaged[max(damaged)]}"
      )
    return 0, like

  def _folder(self, epochs: int) -> pathlib.Path:
    return pathlib.Path(self._manager.directory) / str(epochs)

  def _damage(self, epochs: int) -> str | None:
    """What is wrong with a checkpoint."""
    folder = self._folder(epochs)
    try:
      written = json.loads((folder / _CHECKSUMS).read_text())
    except (OSError, ValueError):
      return f"{_CHECKSUMS} is missing or no JSON"
    found = _checksums(folder)
    changed = [name for name in written if written[name] != found.get(name)]
    return f"{', '.join(changed)} is not as it was written" if changed else None


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
    if path.is_file() and path.name != _CHECKSUMS
  }
