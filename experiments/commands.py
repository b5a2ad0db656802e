"""What the commands share."""

import contextlib
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.published import DataNotFound


@contextlib.contextmanager
def errors_as_messages(*, resumes: bool = False) -> Iterator[None]:
  """Ends a command with a message where the user can mend what is wrong.

  Args:
    resumes: whether a command that was interrupted goes on where it was.
  """
  try:
    yield
  except BrokenPipeError:  # What was printed is not read to its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)
  except (DataNotFound, ValueError, OSError) as error:
    sys.exit(f"error: {error}")
  except KeyboardInterrupt:
    how = ": the same command resumes at the last checkpoint" if resumes else ""
    sys.exit(f"interrupted{how}")


def check_fields(options: Any, requirements: Mapping[str, tuple[bool, str]]) -> None:
  """Raises a ValueError that names the first field whose requirement does not hold.

  Args:
    options: a dataclass.
    requirements: by field, whether it holds, and what the field must be.

  Example:
    >>> check_fields(slice(0, 9), {"start": (True, "at least 0"), "stop": (False, "at least 10")})
    Traceback (most recent call last):
    ...
    ValueError: stop=9 must be at least 10
  """
  for name, (holds, text) in requirements.items():
    if not holds:
      raise ValueError(f"{name}={getattr(options, name)!r} must be {text}")


def check_writable(name: str, path: pathlib.Path, folder: pathlib.Path) -> None:
  """Raises a ValueError that names an option whose path lies in a folder that cannot be written.

  For what is written at the end of a command, before it begins.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      pass
  except OSError as error:
    raise ValueError(f"{name}={path} cannot be written: {error}") from error


def to_markdown(rows: Sequence[dict[str, str]]) -> str:
  """A table with the keys of the first row as its header."""
  lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)
