"""How many bytes a compiled program sends between devices, read from its text."""

import collections
import math
import re
from typing import Any

_COMPUTATION = re.compile(r"(?:ENTRY )?(%[\w.-]+) \(.*\{$")
_CALLS = re.compile(r"\b(\w+)=\{?(%[\w.-]+(?:, %[\w.-]+)*)")
_COLLECTIVE = re.compile(
  r"= (.*?) ((?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?)\("
)
# The result of these is a tuple of what goes in, what comes out, and more.
_WITH_INPUTS = ("all-gather-start", "collective-permute-start")
_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\]")


def bytes_sent(program: Any) -> dict[str, int]:
  """The size of what all collective operations of a program give one device.

  Args:
    program: compiled.

  Returns:
    "operations": how many there are. "once": the bytes of those outside of loops. "each_pass": the
    bytes of those in loops, in one pass of each loop.
  """
  calls, loops = collections.defaultdict(set), set()
  sizes = collections.defaultdict(list)
  computation = None
  for line in program.as_text().splitlines():
    if found := _COMPUTATION.match(line):
      computation = found[1]
    for attribute, names in _CALLS.findall(line):
      called = names.split(", ")
      calls[computation].update(called)
      if attribute in ("body", "condition"):
        loops.update(called)
    if found := _COLLECTIVE.search(line):
      shapes, kind = found.groups()
      sizes[computation].append(_bytes_of(_parts(shapes)[1] if kind in _WITH_INPUTS else shapes))
  inside = set()
  while loops:
    inside.add(name := loops.pop())
    loops |= calls[name] - inside
  return {
    "operations": sum(map(len, sizes.values())),
    "once": sum(sum(each) for name, each in sizes.items() if name not in inside),
    "each_pass": sum(sum(each) for name, each in sizes.items() if name in inside),
  }


def _parts(shapes: str) -> list[str]:
  """The shapes of a tuple, each of which may be one again."""
  parts, depth = [""], 0
  for character in shapes[1:-1]:
    depth += (character in "([{") - (character in ")]}")
    if character == "," and not depth:
      parts.append("")
    else:
      parts[-1] += character
  return parts


def _bytes_of(shapes: str) -> int:
  # A boolean, `pred`, has no number of bits in its name.
  return sum(
    math.prod(int(n) for n in dimensions.split(",") if n) * int(bits or 8) // 8
    for _, bits, dimensions in _ARRAY.findall(shapes)
  )
