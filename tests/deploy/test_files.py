"""Sparse files: what is read is what was written, bit for bit, or an error."""

import json
import os
import pathlib
import re
import stat
import zlib
from typing import Any, NamedTuple

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from sparsejax import deploy
from sparsejax.deploy import files

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "file-format.md"
DTYPES = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "f16": np.float16}
INDICES = {"i32": np.int32, "u16": np.uint16}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def sparse(shape, density, seed=0, dtype=np.float32):
  rng = np.random.default_rng(seed)
  return np.where(rng.random(shape) < density, rng.normal(size=shape), 0).astype(dtype)


def network():
  return {
    "Dense_0": {"kernel": sparse((784, 30), 0.02), "bias": sparse(30, 1)},
    "Dense_1": {"kernel": sparse((30, 40), 0.4, 1), "bias": sparse(40, 0)},
    "Dense_2": {"kernel": sparse((40, 10), 1)},
  }


@pytest.fixture
def path(tmp_path):
  return tmp_path / "network.safetensors"


def assert_same_bits(tree, other):
  assert jax.tree.structure(tree) == jax.tree.structure(other)
  for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
    a, b = np.asarray(a), np.asarray(b)
    assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def reader_of_the_page():
  """The function that the description of the format prints."""
  (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
  names = {}
  exec(code, names)
  return names["read"]


def forms(path):
  with safetensors.safe_open(path, framework="numpy") as file:
    return {name: leaf["form"] for name, leaf in json.loads(file.metadata()["leaves"]).items()}


@every_dtype
def test_what_is_read_is_what_was_written(path, dtype):
  params = jax.tree.map(lambda x: x.astype(dtype), network())
  size = deploy.save(path, params)
  assert size == path.stat().st_size
  assert_same_bits(deploy.load(path), params)


@every_dtype
def test_weights_are_stored_in_the_type_that_is_asked_for(path, dtype):
  params = network()
  deploy.save(path, jax.tree.map(jnp.asarray, params), dtype=dtype)
  assert_same_bits(deploy.load(path), jax.tree.map(lambda x: x.astype(dtype), params))


@hypothesis.given(
  st.sampled_from([*DTYPES.values(), *INDICES.values()]).flatmap(
    lambda dtype: hnp.arrays(
      {2: np.uint16, 4: np.uint32}[np.dtype(dtype).itemsize],
      hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=30),
      elements=st.integers(0, 0x7BFF),  # In each type a finite number.
      fill=st.just(0),
    ).map(lambda bits: bits.view(dtype))
  )
)
def test_any_array_comes_back_by_the_reader_of_the_page_too(tmp_path_factory, array):
  path = tmp_path_factory.mktemp("any") / "file"
  deploy.save(path, {"x": array})
  assert_same_bits(deploy.load(path), {"x": array})
  read = reader_of_the_page()(path)["x"]
  assert (read.shape, read.tobytes()) == (array.shape, array.tobytes())


def test_each_leaf_is_stored_in_its_smallest_form(path):
  deploy.save(path, network())
  assert forms(path) == {
    "Dense_0/bias": "dense",
    "Dense_0/kernel": "gaps",
    "Dense_1/bias": "gaps",
    "Dense_1/kernel": "bitmask",
    "Dense_2/kernel": "dense",
  }


@pytest.mark.parametrize("density,form", [(0.1, "gaps"), (0.15, "bitmask"), (0.99, "dense")])
def test_gaps_win_above_seven_eighths_of_zeros(path, density, form):
  # Evenly spread, so that no gap is long.
  weights = np.zeros(100_000, np.float32)
  weights[np.linspace(0, 99_999, round(density * 100_000)).astype(int)] = 1
  deploy.save(path, {"w": weights})
  assert forms(path) == {"w": form}


def test_a_few_zeros_do_not_make_a_file_larger(path):
  weights = np.ones(40, np.float32)
  dense = deploy.save(path, {"w": weights})
  weights[:8] = 0  # A mask saves 27 bytes, but another tensor takes more in the header.
  assert deploy.save(path, {"w": weights}, overwrite=True) <= dense


@pytest.mark.parametrize("zeros", [0, 1, 254, 255, 256, 509, 510, 511, 1000])
def test_gaps_of_any_length_are_counted(path, zeros):
  weights = np.zeros(5 * (zeros + 1) + 2000, np.float32)
  weights[zeros :: zeros + 1][:4] = [1, 2, 3, 4]
  deploy.save(path, {"w": weights})
  assert forms(path) == {"w": "gaps"}
  assert_same_bits(deploy.load(path), {"w": weights})


def test_negative_zeros_denormals_and_infinities_are_weights(path):
  weights = np.zeros(4000, np.float32)
  weights[::999] = [-0.0, 1e-45, -1e-40, np.inf, -np.inf]
  deploy.save(path, {"w": weights})
  assert_same_bits(deploy.load(path), {"w": weights})


@pytest.mark.parametrize(
  "params",
  [
    {"mlp/~/linear": {"w": sparse((40, 40), 0.1)}, "mlp": {"b": np.ones(2, np.float32)}},
    {"λ": {"w": np.ones(2, np.float32)}},
    np.ones((2, 2), np.float32),
    {},
  ],
)
def test_any_names_and_a_single_array_come_back(path, params):
  deploy.save(path, params)
  assert_same_bits(deploy.load(path), params)


LAYOUTS = {
  "transposed": lambda x: x.T,
  "reversed": lambda x: x[:, ::-1],
  "every second": lambda x: x[::2],
  "a row": lambda x: x[1],
  "a column": lambda x: x[:, 1],
}


@pytest.mark.parametrize("dtype", [None, ml_dtypes.bfloat16], ids=["as it is", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_weights_come_back_however_they_lie_in_memory(path, layout, dtype):
  weights = layout(np.arange(1, 13, dtype=np.float32).reshape(3, 4))
  deploy.save(path, {"w": weights}, dtype=dtype)
  assert forms(path)["w"] == "dense"
  expected = np.ascontiguousarray(weights).astype(dtype or np.float32)
  assert_same_bits(deploy.load(path), {"w": expected})
  assert reader_of_the_page()(path)["w"].tobytes() == expected.tobytes()
  read = safetensors.numpy.load(files.dense({"w": weights}))["w"]
  np.testing.assert_array_equal(read, weights)


def test_a_tree_of_another_kind_comes_back_in_its_structure(path):
  params = [(sparse((30, 30), 0.1), np.ones(3, np.float32)), {"w": np.zeros(9, np.float32)}]
  deploy.save(path, params)
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  assert_same_bits(deploy.load(path, like=like), params)


def test_a_tree_that_does_not_match_the_file_is_an_error_that_names_the_leaf(path):
  deploy.save(path, network())
  other = network()
  other["Dense_1"]["kernel"] = np.ones((30, 41))
  with pytest.raises(ValueError, match=r"'Dense_1/kernel' has shape \(30, 40\)"):
    deploy.load(path, like=other)
  del other["Dense_1"]
  with pytest.raises(ValueError, match="have 'Dense_1/"):
    deploy.load(path, like=other)


def test_every_flipped_bit_and_every_truncation_is_noticed(path):
  params = {"a": {"kernel": sparse((40, 50), 0.05)}, "b": sparse(20, 1), "c": sparse(200, 0.5)}
  deploy.save(path, params)
  content = path.read_bytes()
  rng = np.random.default_rng(0)
  header = 8 + int.from_bytes(content[:8], "little")
  for i in range(len(content)):
    changed = bytearray(content)
    # All of the header, where a bit may have any meaning; every third byte of the data.
    if i >= header and i % 3:
      continue
    changed[i] ^= 1 << int(rng.integers(8))
    path.write_bytes(changed)
    with pytest.raises(ValueError, match=re.escape(str(path))):
      deploy.load(path)
  for length in [*range(0, len(content), 17), len(content) - 1]:
    path.write_bytes(content[:length])
    with pytest.raises(ValueError, match=f"to byte {length}"):
      deploy.load(path)
  path.write_bytes(content)
  assert_same_bits(deploy.load(path), params)


def test_damaged_weights_are_refused_by_the_name_of_their_leaf(path):
  deploy.save(path, network())
  content = bytearray(path.read_bytes())
  start = 8 + int.from_bytes(content[:8], "little")
  begin, _ = json.loads(content[8:start])["Dense_2/kernel"]["data_offsets"]
  content[start + begin + 5] ^= 4
  path.write_bytes(content)
  with pytest.raises(ValueError, match="is damaged: 'Dense_2/kernel' is not what was written"):
    deploy.load(path)


def test_a_tensor_of_another_type_than_was_written_is_refused(path):
  deploy.save(path, {"w": np.ones(3, np.float32)})
  path.write_bytes(path.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"I32"'))
  with pytest.raises(ValueError, match="is damaged: 'w' is not what was written"):
    deploy.load(path)


def test_a_tensor_of_no_leaf_is_refused(path):
  params = {"w": np.ones(3, np.float32)}
  deploy.save(path, params)
  with safetensors.safe_open(path, framework="numpy") as file:
    metadata = file.metadata()
  path.write_bytes(safetensors.numpy.save(params | {"v": params["w"]}, metadata))
  with pytest.raises(ValueError, match="is damaged: nothing is known of 'v' in it"):
    deploy.load(path)


INCONSISTENT = {
  "F64": (np.zeros(3, np.uint8), {"dtype": "F64"}, "there is no 'F64' for 'w'"),
  "beyond": (np.uint8([1, 9, 0]), {}, "3 values for 3 places in 8 weights"),
  "fewer": (np.uint8([1, 0]), {}, "3 values for 2 places in 8 weights"),
  "one": (np.uint8([1, 1]), {"count": 1}, "1 values for 2 places in 8 weights"),
  "shape": (None, {"form": "dense"}, "'w' is inconsistent: cannot reshape"),
}


@pytest.mark.parametrize("gaps, changes, match", INCONSISTENT.values(), ids=INCONSISTENT)
def test_leaves_that_are_inconsistent_are_refused_by_name(path, gaps, changes, match):
  changes = dict(changes)
  values = np.ones(changes.pop("count", 3), np.float32)
  entry = {"form": "gaps", "dtype": "F32", "shape": [4, 2]} | changes
  tensors = {"w": values} if gaps is None else {"w:gaps": gaps, "w:values": values}
  content = json.dumps(["w", entry]).encode() + b"".join(x.tobytes() for x in tensors.values())
  leaves = json.dumps({"w": entry | {"crc32": f"{zlib.crc32(content):08x}"}})
  metadata = {"format": "sparsejax", "version": "1", "leaves": leaves}
  metadata["crc32"] = f"{zlib.crc32(leaves.encode()):08x}"
  path.write_bytes(safetensors.numpy.save(tensors, metadata))
  with pytest.raises(ValueError, match=f"is damaged: .*{match}"):
    deploy.load(path)


@pytest.mark.parametrize("names", [("a", "a/b"), ("a/b", "a")])
def test_leaves_that_lie_in_each_other_are_refused_by_name(path, names):
  entry = {"form": "dense", "dtype": "F32", "shape": [3]}
  tensors = {name: np.ones(3, np.float32) for name in names}
  contents = {name: json.dumps([name, entry]).encode() + x.tobytes() for name, x in tensors.items()}
  leaves = {name: entry | {"crc32": f"{zlib.crc32(contents[name]):08x}"} for name in names}
  leaves = json.dumps(leaves)
  metadata = {"format": "sparsejax", "version": "1", "leaves": leaves}
  metadata["crc32"] = f"{zlib.crc32(leaves.encode()):08x}"
  path.write_bytes(safetensors.numpy.save(tensors, metadata))
  with pytest.raises(
    ValueError, match=f"since '{names[1]}' and another leaf lie in each other: pass `like`"
  ):
    deploy.load(path)


class Heads(NamedTuple):
  query: Any
  key: Any
  value: Any


def test_a_field_of_the_name_value_is_a_leaf_like_others(path):
  params = {"heads": Heads(*(sparse((4, 4), 0.5, seed) for seed in range(3)))}
  deploy.save(path, params)
  assert_same_bits(deploy.load(path), {"heads": params["heads"]._asdict()})
  assert_same_bits(deploy.load(path, like=params), params)


def test_other_files_are_refused(path):
  path.write_bytes(safetensors.numpy.save({"w": np.ones(3, np.float32)}))
  with pytest.raises(ValueError, match="but not one of sparsejax"):
    deploy.load(path)
  path.write_bytes(
    safetensors.numpy.save({}, {"format": "sparsejax", "version": "2", "leaves": "{}"})
  )
  with pytest.raises(ValueError, match="has version 2 of the format"):
    deploy.load(path)
  with pytest.raises(FileNotFoundError):
    deploy.load(path.with_name("none"))


@pytest.mark.parametrize(
  "leaf,match",
  [
    (np.array([1.0, np.nan], np.float32), "'b/kernel' holds NaN"),
    (np.ones(2, np.int8), "'b/kernel' is int8, but only float32, bfloat16, float16"),
    (np.ones(2, np.complex64), "'b/kernel' is complex64"),
    (np.ones(2, np.float64), "'b/kernel' is float64"),
    (jax.random.key(0), "'b/kernel' is no array of numbers"),
  ],
)
def test_weights_that_cannot_be_stored_are_an_error_and_leave_the_file_alone(path, leaf, match):
  path.write_text("before")
  with pytest.raises(ValueError, match=match):
    deploy.save(path, {"a": np.ones(3, np.float32), "b": {"kernel": leaf}}, overwrite=True)
  assert path.read_text() == "before"
  assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_numbers_too_large_for_the_type_asked_for_are_an_error(path):
  with pytest.raises(ValueError, match="'w' holds numbers that are too large for float16"):
    deploy.save(path, {"w": np.array([1e6], np.float32)}, dtype=np.float16)
  for dtype in ("int8", "floa16"):
    with pytest.raises(ValueError, match=f"dtype={dtype} must be one of float32"):
      deploy.save(path, network(), dtype=dtype)
  assert not path.exists()


def test_indices_stay_integers_whatever_the_type_of_the_weights(path):
  params = {"w": sparse(9, 1), "inputs": np.arange(3, dtype=np.uint16), "n": np.int32([-1, 2**20])}
  deploy.save(path, params, dtype=np.float16)
  assert_same_bits(deploy.load(path), params | {"w": params["w"].astype(np.float16)})


def test_a_file_is_replaced_only_if_that_is_asked_for(path):
  deploy.save(path, {"w": np.ones(3, np.float32)})
  with pytest.raises(FileExistsError, match="overwrite=True"):
    deploy.save(path, {"w": np.zeros(3, np.float32)})
  np.testing.assert_array_equal(deploy.load(path)["w"], 1)
  deploy.save(path, {"w": np.zeros(3, np.float32)}, overwrite=True)
  np.testing.assert_array_equal(deploy.load(path)["w"], 0)


def test_a_file_that_cannot_be_written_leaves_the_one_before_alone(path, monkeypatch):
  deploy.save(path, {"w": np.ones(3, np.float32)})

  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr("os.fsync", full)
  with pytest.raises(OSError, match="No space left"):
    deploy.save(path, {"w": np.zeros(3, np.float32)}, overwrite=True)
  np.testing.assert_array_equal(deploy.load(path)["w"], 1)
  assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_directory_that_cannot_be_written_is_an_error_that_names_the_file(tmp_path, monkeypatch):
  folder = tmp_path / "read-only"
  folder.mkdir()
  folder.chmod(stat.S_IRUSR | stat.S_IXUSR)

  def denied(name, mode):
    raise PermissionError(13, "Permission denied", str(name))

  # The superuser may write anywhere.
  monkeypatch.setattr(files, "open", denied, raising=False)
  with pytest.raises(OSError, match="cannot be written"):
    deploy.save(folder / "network.safetensors", network())


@pytest.fixture
def umask():
  before = os.umask(0o027)
  yield
  os.umask(before)


@pytest.mark.usefixtures("umask")
def test_a_file_has_the_permissions_of_a_new_one_or_of_the_one_before(path):
  deploy.save(path, network())
  assert stat.S_IMODE(path.stat().st_mode) == 0o640
  path.chmod(0o604)
  deploy.save(path, network(), overwrite=True)
  assert stat.S_IMODE(path.stat().st_mode) == 0o604


def test_a_link_stays_and_the_file_that_it_leads_to_is_replaced(path):
  link = path.with_name("newest")
  link.symlink_to(path.name)
  for value in (1, 2):
    deploy.save(link, {"w": np.full(3, value, np.float32)}, overwrite=True)
    assert link.is_symlink() and path.is_file()
    np.testing.assert_array_equal(deploy.load(path)["w"], value)


@pytest.mark.parametrize(
  "params, match",
  [
    (
      {"w": sparse((50, 50), 0.1), "w:values": np.ones(3, np.float32)},
      "two leaves have the name 'w:values'",
    ),
    (
      {"a": {"b": np.ones(3, np.float32)}, "a/b": sparse((50, 50), 0.1)},
      "two leaves have the name 'a/b",
    ),
    ({"__metadata__": np.ones(3, np.float32)}, "'__metadata__', which the format has taken"),
  ],
)
def test_names_that_are_taken_are_an_error(path, params, match):
  with pytest.raises(ValueError, match=match):
    deploy.save(path, params)
  assert not path.exists()


def test_a_network_of_two_per_cent_takes_a_thirtieth(path):
  params = {
    name: {"kernel": sparse(shape, 0.02, i), "bias": sparse(shape[1], 1)}
    for i, (name, shape) in enumerate({"a": (784, 300), "b": (300, 100), "c": (100, 10)}.items())
  }
  dense = sum(x.nbytes for x in jax.tree.leaves(params))
  assert 30 * deploy.save(path, params) < dense
