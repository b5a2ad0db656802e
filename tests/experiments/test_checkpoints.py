import shutil

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import checkpoints


def state_after(epochs):
  rng = np.random.default_rng(epochs)
  return {
    "weights": jnp.asarray(rng.standard_normal((300, 100), np.float32)),
    "halves": jnp.asarray(rng.standard_normal(7), jnp.bfloat16),
    "masks": jnp.asarray(rng.random((300, 100)) < 0.5),
    "count": jnp.int32(epochs),
    "empty": {},
  }


def metrics_after(epochs):
  return [{"epoch": epoch, "loss": 1 / (1 + epoch)} for epoch in range(epochs)]


@pytest.fixture
def folder(tmp_path):
  folder = tmp_path / "checkpoints"
  with checkpoints.open_checkpoints(folder) as saved:
    for epochs in (10, 20, 30):
      saved.save(state_after(epochs), metrics_after(epochs))
  return folder


def restore(folder):
  """The number of epochs, and the state after them."""
  with checkpoints.open_checkpoints(folder) as saved:
    state, metrics = saved.restore_latest(state_after(0))
  assert metrics == metrics_after(len(metrics))
  return len(metrics), state


def files_of(folder, epochs):
  return [path for path in (folder / str(epochs)).rglob("*") if path.is_file()]


def test_without_checkpoints_a_run_starts_where_it_was(tmp_path):
  epochs, state = restore(tmp_path / "new")
  assert epochs == 0
  chex.assert_trees_all_equal(state, state_after(0))


def test_the_latest_checkpoint_is_restored_bit_by_bit_and_two_are_kept(folder):
  epochs, state = restore(folder)
  assert epochs == 30
  chex.assert_trees_all_equal(state, state_after(30))
  chex.assert_trees_all_equal_shapes_and_dtypes(state, state_after(30))
  assert sorted(path.name for path in folder.iterdir() if path.name.isdigit()) == ["20", "30"]


def truncate(content):
  return content[: len(content) // 2]


def flip_a_bit(content):
  middle = len(content) // 2
  return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lambda content: b"", None])
def test_a_checkpoint_is_skipped_with_a_warning_whichever_file_is_damaged(folder, damage, tmp_path):
  for i, path in enumerate(files_of(folder, 30)):
    if not path.stat().st_size:
      continue
    copy = tmp_path / f"copy{i}"
    shutil.copytree(folder, copy)
    damaged = copy / path.relative_to(folder)
    if damage is None:
      damaged.unlink()
    else:
      damaged.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="after 30 epochs is not whole, going back to 20"):
      epochs, state = restore(copy)
    assert epochs == 20
    chex.assert_trees_all_equal(state, state_after(20))
    # It is out of the way of the next one.
    with checkpoints.open_checkpoints(copy) as saved:
      saved.save(state_after(30), metrics_after(30))
    assert restore(copy)[0] == 30


def test_a_warning_names_the_file(folder):
  path = max(files_of(folder, 30), key=lambda path: path.stat().st_size)
  path.write_bytes(flip_a_bit(path.read_bytes()))
  with pytest.warns(UserWarning, match=path.name):
    restore(folder)


def test_if_all_checkpoints_are_damaged_nothing_is_trained_anew(folder):
  for epochs in (20, 30):
    path = max(files_of(folder, epochs), key=lambda path: path.stat().st_size)
    path.write_bytes(truncate(path.read_bytes()))
  with pytest.raises(ValueError, match="are damaged, remove the folder to start anew"):
    restore(folder)
  assert files_of(folder, 20) and files_of(folder, 30)


def test_a_run_that_ended_within_its_first_checkpoint_starts_anew(tmp_path, monkeypatch):
  folder = tmp_path / "new"

  def killed(folder):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(checkpoints, "_checksums", killed)
    with checkpoints.open_checkpoints(folder) as saved, pytest.raises(KeyboardInterrupt):
      saved.save(state_after(10), metrics_after(10))
  with pytest.warns(UserWarning, match="not whole, starting anew: the run ended while it was"):
    assert restore(folder)[0] == 0
  assert restore(folder)[0] == 0


@pytest.mark.parametrize("content", ["{}", "[]", "{", '["state"]', None])
def test_checksums_that_say_nothing_are_no_checksums(folder, content):
  path = folder / "30/checksums.json"
  path.unlink()
  path.mkdir() if content is None else path.write_text(content)
  with pytest.warns(UserWarning, match="going back to 20"):
    assert restore(folder)[0] == 20


def test_the_checkpoint_that_is_asked_for_is_read_and_nothing_is_removed(folder):
  with checkpoints.open_checkpoints(folder) as saved:
    chex.assert_trees_all_equal(saved.restore(20, state_after(0)), state_after(20))
    with pytest.raises(ValueError, match="has no checkpoint after 10 epochs"):
      saved.restore(10, state_after(0))
    (folder / "30/checksums.json").write_text("{}")
    with pytest.raises(ValueError, match="30 is not whole: damaged are"):
      saved.restore(30, state_after(0))
    assert saved.epochs == [20, 30]
