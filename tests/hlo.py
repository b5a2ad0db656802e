"""What a compiled function does, read from its text."""

import math
import re

_COLLECTIVE = re.compile(
  r"= (.*?) ((?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter))[-a-z]*\("
)
_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\]")


def bytes_between_devices(compiled):
  """For each collective operation, its name and the bytes of its largest array on one device."""
  found = []
  for shapes, name in _COLLECTIVE.findall(compiled.as_text()):
    # A boolean, `pred`, has no number of bits in its name.
    sizes = [
      math.prod(int(n) for n in dimensions.split(",") if n) * int(bits or 8) // 8
      for _, bits, dimensions in _ARRAY.findall(shapes)
    ]
    found.append((name, max(sizes)))
  return found
