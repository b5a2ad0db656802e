"""Runs of several cycles of training: lottery tickets."""

import dataclasses
import functools
import json
import pathlib
import tempfile

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import sparsejax
from experiments import checkpoints, cycles, data, methods, train, training
from experiments.recipe import Dynamic
from experiments.recipes import RECIPES

pytestmark = pytest.mark.usefixtures("trainers")

DIGITS = dataclasses.replace(RECIPES["lenet300-digits"], sparsity=0.0, epochs=5, train_images=300)


def run(folder, **changes):
  return train.Run(dataclasses.replace(DIGITS, **changes), "digits", seed=3, out=folder)


def checkpoint(folder):
  with ocp.CheckpointManager(folder / "checkpoints") as saved:
    return saved.restore(saved.latest_step(), args=ocp.args.StandardRestore())


def metrics(folder):
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@functools.cache
def trained_by_hand(rewind_epoch, rewind_weights):
  """Three cycles, written out: the weights after each, and the masks of each."""
  recipe = dataclasses.replace(DIGITS, cycles=3)
  trainer = training.make_trainer(recipe, data.load("digits"), seed=3)
  epoch_fn, steps = trainer.compile_epoch(), trainer.steps_per_epoch
  state = trainer.init()
  early = trained = jax.tree.map(np.asarray, state.params)
  masks, found = methods.full_masks(early), []
  for cycle in range(3):
    begin = rewind_epoch if cycle else 0
    if cycle:
      for name, rate in (("Dense_0", 0.2), ("Dense_1", 0.2), ("Dense_2", 0.1)):
        weights, mask = trained[name]["kernel"], np.array(masks[name]["kernel"])
        count = mask.sum() - round((1 - rate) * mask.sum())
        threshold = np.sort(np.abs(weights[mask]))[count]
        masks[name]["kernel"] = mask & (np.abs(weights) >= threshold)
      start = early if rewind_weights else trained
      params = sparsejax.apply_masks(start, masks)
      state = trainer.start({"params": params, "batch_stats": {}}, masks, begin * steps)
    for epoch in range(begin, recipe.epochs):
      if cycle == 0 and epoch == rewind_epoch:
        early = jax.tree.map(np.asarray, state.params)
      state, _ = epoch_fn(state, trainer.train)
    assert int(state.step) == recipe.epochs * steps
    trained = jax.tree.map(np.asarray, state.params)
    found.append((trained, jax.tree.map(np.asarray, masks)))
  return found


@pytest.mark.parametrize(("rewind_epoch", "rewind_weights"), [(0, True), (2, True), (2, False)])
def test_cycles_are_those_that_one_would_write_by_hand(tmp_path, rewind_epoch, rewind_weights):
  options = dict(rewind_epoch=rewind_epoch, rewind_weights=rewind_weights)
  of_three = run(tmp_path, cycles=3, **options)
  result = train.train(of_three)
  expected = trained_by_hand(rewind_epoch, rewind_weights)
  trainer = training.make_trainer(of_three.recipe, data.load("digits"), of_three.seed)
  chex.assert_trees_all_equal(cycles.restore_finished(of_three, trainer).params, expected[-1][0])
  last = checkpoint(tmp_path)["last"]
  chex.assert_trees_all_equal(last["trained"]["params"], expected[-1][0])
  chex.assert_trees_all_equal(last["masks"]["params"], expected[-1][1])
  pruned = [sum(int((~m).sum()) for m in jax.tree.leaves(masks)) for _, masks in expected]
  assert [cycle["pruned"] for cycle in result["cycles"]] == pruned
  # 9,830 of 19,200 and so on: what is left of a layer is rounded.
  assert pruned[-1] == 50_200 - (12_288 + 19_200 + 810)


def test_the_epochs_of_a_cycle_are_numbered_by_its_schedule(tmp_path):
  train.train(run(tmp_path, cycles=3, rewind_epoch=2))
  lines = metrics(tmp_path)
  assert [(line["cycle"], line["epoch"]) for line in lines] == [
    *((0, epoch) for epoch in range(5)),
    *((cycle, epoch) for cycle in (1, 2) for epoch in (2, 3, 4)),
  ]
  assert [i for i, line in enumerate(lines) if "finished" in line] == [4, 7, 10]


def test_a_run_that_is_cut_after_each_epoch_has_the_same_cycles(tmp_path, capsys):
  # Cut before and after the epoch to rewind to, within a cycle and between two.
  changes = {"cycles": 3, "epochs": 3, "rewind_epoch": 1}
  whole = train.train(run(tmp_path / "whole", **changes))
  cut = dataclasses.replace(run(tmp_path / "cut", **changes), time_limit=1e-9)
  stops = 0
  while (result := train.train(cut)) is None:
    stops += 1
    assert f"after {stops} of {cut.recipe.total_epochs} epochs" in capsys.readouterr().out
  assert stops == cut.recipe.total_epochs - 1
  assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
  chex.assert_trees_all_equal(checkpoint(tmp_path / "cut"), checkpoint(tmp_path / "whole"))
  for key in ("test_accuracy", "pruned", "layers"):
    assert result[key] == whole[key]


class Killed(BaseException):
  """What nothing catches."""


# With a checkpoint every second epoch: before and after the save at the end of the first cycle, and
# in the middle of a later one.
@pytest.mark.parametrize(("moment", "number"), [("save", 2), ("saved", 2), ("epoch", 6)])
def test_a_run_that_dies_resumes_where_it_was_saved(tmp_path, monkeypatch, moment, number):
  changes = {"cycles": 3, "epochs": 3, "rewind_epoch": 1, "width": 0.1}
  whole = whole_run(**changes)
  done = {"epoch": 0, "save": 0, "saved": 0}

  def dying(function, *moments):
    def wrapped(*args):
      result = None
      for name in moments:
        if name == "call":
          result = function(*args)
          continue
        done[name] += 1
        if (name, done[name]) == (moment, number):
          raise Killed
      return result

    return wrapped

  killed = dataclasses.replace(run(tmp_path, **changes), checkpoint_every=2)
  with monkeypatch.context() as patch:
    patch.setattr(cycles, "_describe_epoch", dying(cycles._describe_epoch, "call", "epoch"))
    save = checkpoints.Checkpoints.save
    patch.setattr(checkpoints.Checkpoints, "save", dying(save, "save", "call", "saved"))
    with pytest.raises(Killed):
      train.train(killed)
  result = train.train(killed)
  assert metrics(tmp_path) == whole[0]
  assert [result[key] for key in ("test_accuracy", "layers")] == whole[1]


@functools.cache
def whole_run(**changes):
  """Metrics and what came of a run that nothing cuts."""
  with tempfile.TemporaryDirectory() as folder:
    result = train.train(run(pathlib.Path(folder), **changes))
    return metrics(pathlib.Path(folder)), [result[key] for key in ("test_accuracy", "layers")]


def test_the_first_cycle_is_the_dense_run(tmp_path):
  dense = train.train(run(tmp_path / "dense"))
  tickets = train.train(run(tmp_path / "tickets", cycles=2))
  assert tickets["cycles"][0]["test_accuracy"] == dense["test_accuracy"]
  assert tickets["cycles"][0]["pruned"] == 0
  assert dense["cycles"] == []


def test_cycles_can_prune_globally(tmp_path):
  result = train.train(run(tmp_path, cycles=2, prune_scope="global", prune_rate=0.5))
  assert result["pruned"] == 25_100
  shares = [layer["active"] / layer["parameters"] for layer in result["layers"]]
  assert max(shares) - min(shares) > 0.05


def test_a_dead_cycle_does_not_make_a_later_one_dead(tmp_path):
  lines = [
    {"epoch": epoch, "cycle": cycle, "collapsed": collapsed}
    for cycle, epoch, collapsed in ((0, 0, False), (0, 1, True), (1, 0, True), (1, 1, True))
  ]
  assert train.records.collapsed_in_epoch(lines[:2]) == 1
  assert train.records.collapsed_in_epoch(lines) == 0
  assert train.records.collapsed_in_epoch([*lines, lines[0]]) is None


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"cycles": 0}, "cycles=0 must be at least 1"),
    ({"cycles": 2, "sparsity": 0.5, "prune_epochs": 1}, "cycles=2 must be at least 1, and with"),
    ({"cycles": 2, "rewind_epoch": 5}, "rewind_epoch=5 must be an epoch from 0 to 4"),
    ({"rewind_epoch": 1}, "rewind_epoch=1 must be an epoch from 0 to 4, and 0 with a single cycle"),
    ({"cycles": 2, "prune_rate": 1.0}, r"prune_rate=1\.0 must be in \[0, 1\)"),
    ({"foresight": "snip"}, r"foresight='snip' must be none with a sparsity of 0\.0"),
    ({"restart_epoch": 5}, "restart_epoch=5 must be an epoch from 0 to 4"),
    ({"sparsity": 0.5, "prune_epochs": 2, "keep_weights": True}, "keep_weights=True must be False"),
    (
      {"sparsity": 0.5, "prune_epochs": 2, "ramp": "cubic", "keep_weights": True}
      | {"dynamic": Dynamic("granet")},
      "keep_weights=True must be False but with a .* and without a dynamic method",
    ),
  ],
)
def test_an_impossible_recipe_is_an_error_that_names_the_field(changes, said):
  with pytest.raises(ValueError, match=said):
    dataclasses.replace(DIGITS, **changes)
