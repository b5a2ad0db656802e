"""Processes that train runs together in a test, and what they do: all the same tasks, in order.

A task is a list of strings: its kind, a file for what came of it, and arguments of
`experiments.train`, in which "{process}" stands for the index of a process. The kinds are

- "train": writes the message with which it ended, if it did not succeed;
- "train until killed": the last process is killed as it begins to write its second checkpoint;
- "replay": see `replay`.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from unittest import mock

import compiling

ROOT = pathlib.Path(__file__).parents[1]
DEVICES = 4  # Of all processes together.
HEARTBEAT = 5  # Seconds after which the others of a process that was killed must have noticed.


def start(
  tasks: Sequence[Sequence[str]], count: int, folder: pathlib.Path
) -> list[subprocess.Popen]:
  """Starts so many processes, whose output goes to files in a folder."""
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
  options = {
    **compiling.IN_TESTS,
    "xla_backend_optimization_level": 0,  # Most of the time is compilation.
    "xla_force_host_platform_device_count": DEVICES // count,
  }
  environment = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": " ".join(compiling.as_flags(options)),
    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
    "JAX_NUM_PROCESSES": str(count),
  }
  started = []
  for process in range(count):
    with (folder / f"process{process}of{count}.txt").open("w") as output:
      started.append(
        subprocess.Popen(
          [sys.executable, __file__, json.dumps(tasks)],
          env={**environment, "JAX_PROCESS_ID": str(process)},
          stdout=output,
          stderr=subprocess.STDOUT,
        )
      )
  return started


def replay(target: pathlib.Path, arguments: Sequence[str], devices: int | None = None) -> None:
  """Updates the masks in the last checkpoint of a run once, with gradients that are its weights.

  Args:
    target: for the masks "before" and "after", in the order of the layers.
    arguments: of the run, of LeNet-300-100 with five steps in an epoch.
    devices: only so many share the state.
  """
  import jax
  import numpy as np

  import sparsejax
  from experiments import checkpoints, cycles, distributed, learner, train

  with mock.patch.object(train, "train") as run_with:
    train.main(list(arguments))
  run = run_with.call_args.args[0]
  made = learner.make_learner(
    run.recipe,
    (28, 28, 1),
    classes=10,
    mean=(0.5,),
    std=(0.5,),
    steps_per_epoch=5,
    key=jax.random.key(0),
  )
  mesh = distributed.make_mesh(run.mesh, jax.devices()[:devices])
  like = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    made.state,
    distributed.over_model(made.state, mesh),
  )
  with checkpoints.open_checkpoints(run.folder / "checkpoints") as saved:
    progress, _ = saved.restore_latest(cycles.Progress(like, None))
  params, before = progress.state.params, progress.state.opt_state
  _, after = jax.jit(made.tx.update)(params, before, params)

  def masks(opt_state):
    found = sparsejax.get_masks(opt_state, params)
    return jax.tree.leaves(distributed.place(found, distributed.everywhere(mesh)))

  arrays = {
    f"{name} {i}": np.asarray(mask)
    for name, opt_state in (("before", before), ("after", after))
    for i, mask in enumerate(masks(opt_state))
  }
  if distributed.is_first():
    np.savez(target, **arrays)


def main(tasks: Sequence[Sequence[str]]) -> None:
  from experiments import checkpoints, plots, train

  plots.plot_run = lambda *args: None  # It takes long to import what draws.
  process, count = int(os.environ["JAX_PROCESS_ID"]), int(os.environ["JAX_NUM_PROCESSES"])
  save = checkpoints.Checkpoints.save

  def save_once(saved, *state_and_metrics):
    if process == count - 1 and written:
      os.kill(os.getpid(), signal.SIGKILL)
    save(saved, *state_and_metrics)
    written.append(True)

  for kind, target, *arguments in tasks:
    arguments = [argument.format(process=process) for argument in arguments]
    arguments += ["--distributed", "--heartbeat-timeout", str(HEARTBEAT)]
    if kind == "replay":
      replay(pathlib.Path(target), arguments)
      continue
    written = []
    if kind == "train until killed":
      checkpoints.Checkpoints.save = save_once
    try:
      train.main(arguments)
    except SystemExit as error:
      pathlib.Path(f"{target}{process}").write_text(str(error.code))


if __name__ == "__main__":
  main(json.loads(sys.argv[1]))
