"""The epochs of a run, cycle after cycle: logged, saved, cut by a time limit, and resumed."""

import contextlib
import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

import sparsejax
from experiments import checkpoints, distributed, methods, records
from experiments.methods import Variables
from experiments.recipe import Recipe
from experiments.run import Run
from experiments.training import EpochMetrics, Evaluation, Trainer, TrainState
from sparsejax.lottery import Round, Ticket

Line = dict[str, Any]


class Progress(NamedTuple):
  """What a run needs in order to go on.

  Attributes:
    state: after the last epoch.
    last: the last finished cycle, of number -1 before the first; None where there is but one.
  """

  state: TrainState
  last: Round | None


class _OutOfTime(Exception):
  """The next epoch might end after the deadline."""


def train_cycles(
  run: Run,
  trainer: Trainer,
  epoch_fn: Callable[..., tuple[TrainState, EpochMetrics]],
  state: TrainState,
  deadline: float,
) -> tuple[TrainState, list[Line]]:
  """Trains from the last checkpoint on.

  Args:
    run: which.
    trainer: of its recipe.
    epoch_fn: its compiled epoch.
    state: before the first epoch; its buffers are used.
    deadline: by `time.perf_counter`, after which no epoch may end.

  Returns:
    The last state, and a line of metrics for each epoch: fewer than there should be, if it stopped
    in time for the deadline.
  """
  recipe, steps = run.recipe, trainer.steps_per_epoch
  total = recipe.total_epochs

  whole_variables = functools.partial(_whole_variables, trainer)
  initial = whole_variables(state)
  progress = _begin(recipe, state, initial)
  longest = 0.0

  def is_late():
    # An epoch may take somewhat longer than any before, and the checkpoint takes its time too.
    late = lambda: time.perf_counter() + 1.5 * longest > deadline
    return len(metrics) < total and distributed.from_first(late)

  def train_cycle(ticket: Ticket) -> Mapping[int, Variables]:
    nonlocal progress, longest
    done = sum(line.get("cycle", 0) == ticket.index for line in metrics)
    if ticket.index and not done:
      state = trainer.start(ticket.params, ticket.masks["params"], ticket.step)
      progress = progress._replace(state=state)
    for epoch in range(ticket.step // steps + done, recipe.epochs):
      started = time.perf_counter()
      if ticket.index == 0 and 0 < epoch == recipe.rewind_epoch:
        early = whole_variables(progress.state)
        progress = progress._replace(last=progress.last._replace(early=early))
      state, trained = jax.block_until_ready(epoch_fn(progress.state, trainer.train))
      seconds = time.perf_counter() - started
      progress = progress._replace(state=state)
      line = _describe_epoch(run.recipe, trainer, epoch, state, trained, seconds)
      if recipe.cycles > 1:
        line["cycle"] = ticket.index
        if epoch + 1 == recipe.epochs:
          line["finished"] = _describe_cycle(trainer, state)
      metrics.append(line)
      log(line)
      longest = max(longest, time.perf_counter() - started)
      # What ends a cycle is saved when that is finished.
      if epoch + 1 < recipe.epochs and (len(metrics) % run.checkpoint_every == 0 or is_late()):
        saved.save(progress, metrics)
        if is_late():
          raise _OutOfTime
    trained = {recipe.epochs * steps: whole_variables(progress.state)}
    if ticket.index == 0 and recipe.rewind_epoch:
      trained[recipe.rewind_epoch * steps] = progress.last.early
    return trained

  with checkpoints.open_checkpoints(run.folder / "checkpoints") as saved:
    progress, metrics = saved.restore_latest(progress)
    last = progress.last
    if last is not None and not recipe.rewind_epoch:
      # The very weights that the first cycle began with, if that was on another machine.
      initial = last.early
    rounds = methods.iterative_pruning(
      recipe,
      train_cycle,
      initial,
      classes=trainer.classes,
      steps_per_epoch=steps,
      last=last if last is not None and last.index >= 0 else None,
    )
    with _open_log(run, metrics) as log, contextlib.suppress(_OutOfTime):
      for finished in rounds:
        if recipe.cycles > 1:
          progress = progress._replace(last=finished._replace(index=np.array(finished.index)))
        if len(metrics) not in saved.epochs:
          saved.save(progress, metrics)
        if is_late():
          break
  return progress.state, metrics


def restore_finished(run: Run, trainer: Trainer) -> TrainState:
  """The state that a finished run has ended with.

  Args:
    run: which.
    trainer: of its recipe.

  Raises:
    ValueError: if its last checkpoint is not there, or is damaged.
  """
  folder = run.folder / "checkpoints"
  if not folder.exists():
    raise ValueError(f"{run.folder} has no checkpoints: a run that is trained by itself has")
  state = trainer.init()
  with checkpoints.open_checkpoints(folder) as saved:
    like = _begin(run.recipe, state, _whole_variables(trainer, state))
    try:
      return saved.restore(run.recipe.total_epochs, like).state
    except ValueError as error:
      raise ValueError(
        f"the end of this run is lost: remove {run.folder / 'result.json'} and train it again."
        f" {error}"
      ) from error


def _begin(recipe: Recipe, state: TrainState, initial: Variables) -> Progress:
  """Before the first epoch."""
  first = Round(np.array(-1), methods.full_masks(initial), initial, initial)
  return Progress(state, first if recipe.cycles > 1 else None)


def _whole_variables(trainer: Trainer, state: TrainState) -> Variables:
  """A copy of them on all devices, since an epoch uses up its state."""
  variables = {"params": state.params, "batch_stats": state.batch_stats}
  variables = jax.tree.map(jnp.copy, variables)
  return distributed.place(variables, distributed.everywhere(trainer.mesh))


@contextlib.contextmanager
def _open_log(run: Run, metrics: list[Line]) -> Iterator[Callable[[Line], None]]:
  """A function that writes the line of an epoch to `metrics.jsonl`, and shows it: in process 0."""
  if not distributed.is_first():
    yield lambda line: None
    return
  path = run.folder / "metrics.jsonl"
  records.replace_file(path, "".join(json.dumps(line) + "\n" for line in metrics))
  collapsed = bool(metrics and metrics[-1]["collapsed"])
  with (
    path.open("a") as file,
    tqdm.tqdm(
      total=run.recipe.total_epochs, initial=len(metrics), desc=run.name, unit="epoch"
    ) as bar,
  ):

    def log(line):
      nonlocal collapsed
      if line["collapsed"] != collapsed:
        collapsed = line["collapsed"]
        news = "collapsed: its output is the same for every image" if collapsed else "recovered"
        bar.write(f"{run.name}, seed {run.seed}, epoch {line['epoch']}: the network has {news}")
      print(json.dumps(line), file=file, flush=True)
      bar.update()
      loss, validation = line["loss"], line["validation_accuracy"]
      bar.set_postfix(
        loss="-" if loss is None else f"{loss:.3f}",
        validation="-" if validation is None else f"{validation:.2%}",
        sparsity=f"{line['sparsity']:.2%}",
      )

    yield log


def _describe_epoch(
  recipe: Recipe,
  trainer: Trainer,
  epoch: int,
  state: TrainState,
  trained: EpochMetrics,
  seconds: float,
) -> Line:
  """The line of an epoch in `metrics.jsonl`."""
  size = trainer.held_out.size
  held_out = trainer.validate(state, trainer.held_out) if size else None
  # A few images may have the same output by chance.
  watched = held_out if size >= 100 else trainer.validate(state, trainer.train.first(1000))
  device = next(iter(state.step.devices()))
  line = make_line(epoch, trained, held_out, bool(watched.constant), seconds, device)
  if line["sparsity"] > recipe.best_above:
    line["test_accuracy"] = float(trainer.evaluate(state, trainer.test).accuracy)
  return line


def make_line(
  epoch: int,
  trained: EpochMetrics,
  held_out: Evaluation | None,
  constant: bool,
  seconds: float,
  device: jax.Device,
) -> Line:
  """The line of an epoch, given whether the network's output is the same for all images."""
  loss = float(trained.loss)
  return {
    "epoch": epoch,
    "loss": loss if math.isfinite(loss) else None,
    "train_accuracy": float(trained.accuracy),
    "validation_accuracy": held_out and float(held_out.accuracy),
    "sparsity": float(trained.sparsity),
    "seconds": seconds,
    "device": device.device_kind,
    # With all units dead, or NaN. A few networks come back from the former.
    "collapsed": not math.isfinite(loss) or constant,
  }


def _describe_cycle(trainer: Trainer, state: TrainState) -> dict[str, Any]:
  """What a cycle has come to."""
  masks = sparsejax.get_masks(state.opt_state, state.params)
  masks = jax.device_get(distributed.place(masks, distributed.everywhere(trainer.mesh)))
  pool = sparsejax.summary(state.params, masks).pool
  return {
    "test_accuracy": 100 * float(trainer.evaluate(state, trainer.test).accuracy),
    "pool": pool.parameters,
    "pruned": pool.parameters - pool.active,
    "sparsity": pool.sparsity,
  }
