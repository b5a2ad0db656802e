"""What the commands share."""

import contextlib
import sys
from collections.abc import Iterator

from experiments.published import DataNotFound


@contextlib.contextmanager
def errors_as_messages() -> Iterator[None]:
  """Ends a command with a message where the user can mend what is wrong."""
  try:
    yield
  except (DataNotFound, ValueError) as error:
    sys.exit(f"error: {error}")
  except KeyboardInterrupt:
    sys.exit("interrupted: the same command resumes at the last checkpoint")
