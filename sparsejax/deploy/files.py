"""Sparse weights in a file: each leaf in the form that is smallest.

The file is a safetensors file, described in `docs/file-format.md`: a weight is a bit pattern that
is not all zeros, and its position is stored as a bit of a mask, or as the gap to the one before.
"""

import json
import math
import os
import pathlib
import secrets
import shutil
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from sparsejax import trees
from sparsejax.trees import PyTree

FORMAT = "sparsejax"
VERSION = "1"
DTYPES = {
  "F32": np.dtype(np.float32),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F16": np.dtype(np.float16),
  # Which inputs a layer takes after compaction.
  "I32": np.dtype(np.int32),
  "U16": np.dtype(np.uint16),
}
_FLOATS = ("F32", "BF16", "F16")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# A gap of so many zeros that no weight ends.
_LONG = 255
# About what one more tensor takes in the header.
_HEADER_ENTRY = 70
# The name of the header's own entry.
_RESERVED = "__metadata__"


def save(
  path: str | os.PathLike, params: PyTree, *, dtype: Any = None, overwrite: bool = False
) -> int:
  """Writes weights to a file, sparse ones without their zeros.

  The file appears as a whole, or not at all.

  Args:
    path: of the file, by convention with the suffix `.safetensors`.
    params: a pytree of float32, bfloat16 or float16 arrays; int32 and uint16 ones too, such as
      `compact` makes.
    dtype: the type in which to store all floating-point numbers, one of these three; by default
      that which each array has.
    overwrite: whether a file that is there already may be replaced.

  Returns:
    The size of the file in bytes.

  Raises:
    ValueError: if a leaf has another type or holds NaN, or infinity once it is converted, or if
      names collide; it names the leaf.
    FileExistsError: if the file exists and is not to be replaced.
    OSError: if it cannot be written.
    ModuleNotFoundError: if safetensors is not installed; so does `load`.
  """
  safetensors = _safetensors()
  path = pathlib.Path(path)
  if path.exists() and not overwrite:
    raise FileExistsError(f"{path} exists already: pass overwrite=True to replace it.")
  tensors, leaves = {}, {}
  for key_path, leaf in trees.leaves_with_path(params):
    name = trees.path_name(key_path)
    array = _converted(name, leaf, dtype)
    parts = _smallest(array)
    record = {"form": _form(parts), "dtype": _NAMES[array.dtype], "shape": list(array.shape)}
    keys = [jax.tree_util.keystr((key,), simple=True) for key in key_path]
    if "/".join(keys) != name or any("/" in key for key in keys):
      record["path"] = keys
    record["crc32"] = _checksum(name, record, parts)
    for part, content in parts.items():
      if (tensor := _tensor_name(name, part)) in tensors or name in leaves:
        raise ValueError(f"two leaves have the name {tensor!r}: rename one of them.")
      if tensor == _RESERVED:
        raise ValueError(f"a leaf has the name {tensor!r}, which the format has taken: rename it.")
      tensors[tensor] = content
    leaves[name] = record
  listed = json.dumps(leaves, separators=(",", ":"))
  content = safetensors.numpy.save(
    tensors,
    {
      "format": FORMAT,
      "version": VERSION,
      "leaves": listed,
      "crc32": f"{zlib.crc32(listed.encode()):08x}",
    },
  )
  _write(path, content)
  return len(content)


def load(path: str | os.PathLike, *, like: PyTree | None = None) -> PyTree:
  """Reads weights from a file, and checks each of their bits.

  Args:
    path: of the file.
    like: a tree whose structure the weights are to have, and whose shapes they must have; by
      default they come as nested dictionaries.

  Returns:
    A tree of NumPy arrays, of the types that they are stored in.

  Raises:
    ValueError: if the file is truncated, damaged, or of another format, or if it does not match
      `like`. It names the byte or the leaf.
    OSError: if there is no such file.
  """
  metadata, tensors = _read(pathlib.Path(path))
  found, keys = {}, {}
  for name, record in _leaves(path, metadata).items():
    try:
      parts = {part: tensors.pop(_tensor_name(name, part)) for part in _PARTS[record["form"]]}
      expected = DTYPES[record["dtype"]]
    except KeyError as error:
      raise ValueError(f"{path} is damaged: there is no {error} for {name!r}.") from error
    is_whole = all(
      content.dtype == (expected if part in ("", "values") else np.uint8)
      for part, content in parts.items()
    )
    if record.pop("crc32", None) != _checksum(name, record, parts) or not is_whole:
      raise ValueError(f"{path} is damaged: {name!r} is not what was written.")
    try:
      found[name] = _decoded(record, parts)
    except ValueError as error:
      raise ValueError(f"{path} is damaged: {name!r} is inconsistent: {error}.") from error
    keys[name] = record.get("path", name.split("/"))
  if tensors:
    raise ValueError(f"{path} is damaged: nothing is known of {sorted(tensors)[0]!r} in it.")
  if like is not None:
    trees.check_same_shapes(found, trees.leaves_by_name(like), str(path), "the tree")
    return trees.map_with_path(lambda p, _: found[trees.path_name(p)], like)
  if list(keys.values()) == [[""]]:
    return found[""]
  tree = {}
  for name, array in found.items():
    *outer, last = keys[name]
    node = tree
    for key in outer:
      node = node.setdefault(key, {}) if isinstance(node, dict) else None
    if not isinstance(node, dict) or last in node:
      raise ValueError(
        f"{path} does not make nested dictionaries, since {name!r} and another leaf lie in each"
        " other: pass `like`."
      )
    node[last] = array
  return tree


def dense(params: PyTree) -> bytes:
  """A safetensors file of the same weights with their zeros, to compare with."""
  leaves = trees.leaves_by_name(params)
  return _safetensors().numpy.save({name: _in_order(leaf) for name, leaf in leaves.items()})


# By form: the tensors that a leaf is stored in. A dense one has the name of the leaf.
_PARTS = {"dense": ("",), "bitmask": ("bitmask", "values"), "gaps": ("gaps", "values")}


def _safetensors() -> Any:
  """The package, which only files need."""
  try:
    import safetensors.numpy
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      "sparse files need safetensors: pip install 'sparsejax[deploy]'"
    ) from error
  return safetensors


def _in_order(leaf: Any) -> np.ndarray:
  """The leaf as an array in C order: safetensors writes the memory of an array as it is."""
  return np.asarray(leaf, order="C")


def _form(parts: Mapping[str, np.ndarray]) -> str:
  return next(form for form, names in _PARTS.items() if names == tuple(parts))


def _tensor_name(leaf: str, part: str) -> str:
  return f"{leaf}:{part}" if part else leaf


def _name_of(dtype: Any) -> str | None:
  """The name in the file of a type that is asked for, or None if it has none."""
  try:
    return _NAMES.get(np.dtype(dtype))
  except TypeError:
    return None


def _converted(name: str, leaf: Any, dtype: Any) -> np.ndarray:
  """The leaf as a NumPy array of the type that it is stored in."""
  try:
    array = _in_order(leaf)
  except TypeError as error:
    raise ValueError(f"{trees.quoted(name)} is no array of numbers: {error}") from error
  if array.dtype not in _NAMES:
    known = ", ".join(map(str, _NAMES))
    raise ValueError(
      f"{trees.quoted(name)} is {array.dtype}, but only {known} can be stored: convert it."
    )
  if _NAMES[array.dtype] not in _FLOATS:
    return array
  if dtype is not None and _name_of(dtype) not in _FLOATS:
    floats = ", ".join(str(DTYPES[each]) for each in _FLOATS)
    raise ValueError(f"dtype={dtype} must be one of {floats}.")
  with np.errstate(all="ignore"):
    stored = array if dtype is None else array.astype(dtype)
    has_nan = np.isnan(stored).any()
    too_large = np.any(np.isinf(stored) & ~np.isinf(array))
  if has_nan:
    raise ValueError(f"{trees.quoted(name)} holds NaN.")
  if too_large:
    raise ValueError(f"{trees.quoted(name)} holds numbers that are too large for {stored.dtype}.")
  return stored


def _smallest(array: np.ndarray) -> dict[str, np.ndarray]:
  """The array in the form that takes the fewest bytes, by part."""
  flat = array.reshape(-1)
  # By bits, so that -0 stays what it is.
  is_weight = flat.view(f"u{flat.itemsize}") != 0
  values, places = flat[is_weight], np.flatnonzero(is_weight)
  forms = [
    {"": array},
    {"bitmask": np.packbits(is_weight, bitorder="little"), "values": values},
    {"gaps": _gaps(places), "values": values},
  ]
  return min(forms, key=lambda p: sum(x.nbytes for x in p.values()) + _HEADER_ENTRY * len(p))


def _gaps(places: np.ndarray) -> np.ndarray:
  """How many zeros lie before each weight; 255 stands for as many without a weight after them."""
  zeros = np.diff(places, prepend=-1) - 1
  long = zeros // _LONG
  gaps = np.full(places.size + int(long.sum()), _LONG, np.uint8)
  gaps[np.cumsum(long + 1) - 1] = zeros % _LONG
  return gaps


def _decoded(record: Mapping[str, Any], parts: Mapping[str, np.ndarray]) -> np.ndarray:
  shape = tuple(record["shape"])
  if "" in parts:
    return parts[""].reshape(shape)
  array = np.zeros(math.prod(shape), DTYPES[record["dtype"]])
  if "bitmask" in parts:
    places = np.flatnonzero(np.unpackbits(parts["bitmask"], bitorder="little"))
  else:
    gaps = parts["gaps"].astype(np.int64)
    places = (np.cumsum(gaps + (gaps < _LONG)) - 1)[gaps < _LONG]
  values = parts["values"]
  if values.shape != places.shape or np.any(places >= array.size):
    raise ValueError(f"{values.size} values for {places.size} places in {array.size} weights")
  array[places] = values
  return array.reshape(shape)


def _checksum(name: str, record: Mapping[str, Any], parts: Mapping[str, np.ndarray]) -> str:
  """Of all that is stored of a leaf."""
  crc = zlib.crc32(json.dumps([name, record]).encode())
  for content in parts.values():
    crc = zlib.crc32(np.ascontiguousarray(content).tobytes(), crc)
  return f"{crc:08x}"


def _read(path: pathlib.Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
  """The metadata and the tensors of a safetensors file."""
  safetensors, size = _safetensors(), path.stat().st_size
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
  except (safetensors.SafetensorError, ValueError, TypeError) as error:
    raise ValueError(
      f"{path} is no whole safetensors file, from its first byte to byte {size}: {error}."
    ) from error


def _leaves(path: str | os.PathLike, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
  """What the metadata says of each leaf."""
  if metadata.get("format") != FORMAT:
    raise ValueError(f"{path} is a safetensors file, but not one of {FORMAT}.")
  if metadata.get("version") != VERSION:
    raise ValueError(
      f"{path} has version {metadata.get('version')} of the format, but this program knows only"
      f" {VERSION}."
    )
  listed = metadata.get("leaves", "")
  if metadata.get("crc32") != f"{zlib.crc32(listed.encode()):08x}":
    raise ValueError(
      f"{path} is damaged: its list of leaves has another checksum than was written."
    )
  return json.loads(listed)


def _write(path: pathlib.Path, content: bytes) -> None:
  """Writes a file as a whole or not at all."""
  try:
    _replace(path, content)
  except OSError as error:
    raise OSError(error.errno, f"{path} cannot be written: {error}") from error


def _replace(path: pathlib.Path, content: bytes) -> None:
  path = path.resolve()  # A link stays, and what it leads to is replaced.
  # Not a file of `tempfile`, which its owner alone may read.
  temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
  with open(temporary, "xb") as file:
    try:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
      if path.exists():
        shutil.copymode(path, temporary)
      os.replace(temporary, path)
    except BaseException:
      os.unlink(temporary)
      raise
