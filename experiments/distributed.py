"""One run on many devices: processes that train it together, and the mesh that they share.

All is JAX's own: `jax.distributed`, and programs over a mesh whose axis `data` shares each batch,
and whose axis `model` shares parameters and what the optimizer knows of them.
"""

import collections
import dataclasses
import json
import os
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments import commands, records

_AXES = ("data", "model")


@dataclasses.dataclass(frozen=True)
class Distributed:
  """Which of the processes this is that train one run together."""

  enabled: Annotated[bool, tyro.conf.arg(name="distributed")] = False
  """Whether this process trains the run together with others: each is started with the same options
  but its index, and all read and write the run's folder. If one dies, the others end too; the same
  commands go on from the last checkpoint, and so does any other number of processes."""
  coordinator: str | None = None
  """HOST:PORT at which process 0 listens; by default JAX_COORDINATOR_ADDRESS, or what JAX finds out
  from Slurm, Open MPI, Kubernetes or a Cloud TPU."""
  processes: int | None = None
  """Their number; by default JAX_NUM_PROCESSES, or what JAX finds out."""
  process: int | None = None
  """Index of this one, from 0; by default JAX_PROCESS_ID, or what JAX finds out."""
  coordinator_timeout: int = 300
  """Seconds to wait for process 0, and for it to wait for the others."""
  heartbeat_timeout: int = 100
  """Seconds without a sign of life after which a process is taken for dead, and the others end."""

  def __post_init__(self):
    known = self.processes is not None and self.process is not None
    requirements = {
      "coordinator": (
        self.coordinator is None or bool(re.fullmatch(r".+:\d+", self.coordinator)),
        "HOST:PORT",
      ),
      "processes": (self.processes is None or self.processes >= 1, "at least 1"),
      "process": (
        self.process is None or 0 <= self.process < (self.processes if known else np.inf),
        f"an index from 0, below processes={self.processes}",
      ),
      "coordinator_timeout": (self.coordinator_timeout >= 1, "at least 1"),
      "heartbeat_timeout": (self.heartbeat_timeout >= 1, "at least 1"),
    }
    for field in () if self.enabled else ("coordinator", "processes", "process"):
      requirements[field] = (getattr(self, field) is None, "left out without --distributed")
    commands.check_fields(self, requirements)


def start(options: Distributed) -> None:
  """Joins the other processes; to be called before JAX looks for devices.

  Raises:
    ValueError: if nothing says who they are, if process 0 is not there in time, or if it cannot
      listen at its address.
  """
  if not options.enabled or jax.distributed.is_initialized():
    return
  options = dataclasses.replace(
    options,
    coordinator=options.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"),
    processes=_or_integer(options.processes, "JAX_NUM_PROCESSES"),
    process=_or_integer(options.process, "JAX_PROCESS_ID"),
  )
  # Where JAX would end the process, with a stack of its own functions.
  if options.coordinator is not None and options.process is not None:
    _check_coordinator(options)
  # It would keep SIGTERM from ending the process.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(
      options.coordinator,
      options.processes,
      options.process,
      initialization_timeout=options.coordinator_timeout,
      heartbeat_timeout_seconds=options.heartbeat_timeout,
      # So long do the others of a process wait that has ended with an error.
      shutdown_timeout_seconds=options.heartbeat_timeout,
    )
  except ValueError as error:
    raise ValueError(
      "distributed=True needs --coordinator, --processes and --process, or an environment that has"
      f" them: {error}"
    ) from error


def _or_integer(given: int | None, variable: str) -> int | None:
  text = os.environ.get(variable)
  if given is not None or text is None:
    return given
  if not text.isdecimal():
    raise ValueError(f"{variable}={text} must be a whole number")
  return int(text)


def _check_coordinator(options: Distributed) -> None:
  host, port = options.coordinator.rsplit(":", 1)
  address = (host.strip("[]"), int(port))
  if options.process == 0:
    try:
      socket.create_server(("", address[1])).close()
    except OSError as error:
      raise ValueError(
        f"coordinator={options.coordinator}: process 0 cannot listen there: {error}"
      ) from error
    return
  deadline = time.monotonic() + options.coordinator_timeout
  while True:
    try:
      socket.create_connection(address, timeout=max(deadline - time.monotonic(), 0.1)).close()
      return
    except OSError as error:
      if time.monotonic() > deadline:
        raise ValueError(
          f"coordinator={options.coordinator} was not there within"
          f" coordinator_timeout={options.coordinator_timeout} seconds: {error}"
        ) from error
    time.sleep(0.1)


def is_first() -> bool:
  """Whether this is process 0, which writes files and speaks; any single process is."""
  return jax.process_index() == 0


def from_first(function: Callable[[], Any]) -> Any:
  """What a function returns in process 0, or the ValueError that it raises there, in all of them.

  Args:
    function: called in process 0 only; returns what JSON can say.
  """
  if jax.process_count() == 1:
    return function()
  found = None
  if is_first():
    try:
      found = {"value": function()}
    except ValueError as error:
      found = {"error": str(error)}
  found = _gather(found)[0]
  if "error" in found:
    raise ValueError(found["error"])
  return found["value"]


def check_agreement(options: Mapping[str, Any]) -> None:
  """Raises a ValueError in all processes, with the fields that differ, unless all say the same."""
  if jax.process_count() == 1:
    return
  counts = collections.Counter(device.process_index for device in jax.devices())
  if len(set(counts.values())) > 1:
    raise ValueError(f"processes must have the same number of devices, but have {dict(counts)}")
  first, *others = _gather(options)
  for index, other in enumerate(others, start=1):
    if differences := records.find_differences(other, first):
      here = records.find_differences(first, other)
      raise ValueError(
        f"process {index} disagrees with process 0: {', '.join(differences)} there, but"
        f" {', '.join(here)} in process 0"
      )


def _gather(content: Any) -> list[Any]:
  """What each process says, in JSON, by its index."""
  text = np.frombuffer(json.dumps(content, default=str).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(text.size))
  padded = np.pad(text, (0, max(sizes) - text.size))
  texts = multihost_utils.process_allgather(padded)
  return [json.loads(each[:size].tobytes()) for each, size in zip(texts, sizes)]


def parse_mesh(text: str) -> dict[str, int]:
  """The sizes of the axes of a mesh.

  Raises:
    ValueError: if it is none.

  Example:
    >>> parse_mesh("data=4,model=2")
    {'data': 4, 'model': 2}
  """
  axes = dict(re.findall(rf"({'|'.join(_AXES)})=([1-9]\d*)(?:,|$)", text))
  if ",".join(f"{name}={size}" for name, size in axes.items()) != text:
    raise ValueError(f"mesh={text} must be such as data=4,model=2, or model=2")
  return {name: int(size) for name, size in axes.items()}


def make_mesh(text: str, devices: Sequence[jax.Device]) -> Mesh:
  """A mesh of all these devices, those of other processes included.

  Args:
    text: see `parse_mesh`; an axis that is missing has what the other one leaves, `model` one.
    devices: all of one kind.

  Raises:
    ValueError: if the axes do not divide the devices.
  """
  axes = parse_mesh(text)
  model = axes.get("model", 1)
  data = axes.get("data", len(devices) // model)
  if data * model != len(devices):
    raise ValueError(f"mesh={text} must divide all of the {len(devices)} devices among its axes")
  return jax.make_mesh((data, model), _AXES, (AxisType.Auto,) * 2, devices=devices)


def everywhere(mesh: Mesh | None) -> NamedSharding | None:
  """For arrays of which each device has a copy; None, which asks for nothing, without a mesh."""
  return mesh and NamedSharding(mesh, PartitionSpec())


def over_data(mesh: Mesh | None) -> NamedSharding | None:
  """For batches, along their first axis."""
  return mesh and NamedSharding(mesh, PartitionSpec("data"))


def over_model(tree: Any, mesh: Mesh) -> Any:
  """For a state: what has two axes or more is shared along the last one, if that divides."""

  def of_leaf(leaf):
    if np.ndim(leaf) < 2 or np.shape(leaf)[-1] % mesh.shape["model"]:
      return everywhere(mesh)
    return NamedSharding(mesh, PartitionSpec(*[None] * (np.ndim(leaf) - 1), "model"))

  return jax.tree.map(of_leaf, tree)


def within_programs(of_state: Any, mesh: Mesh | None) -> Any:
  """Where a state lies while it is computed with, if it lies as `of_state` between programs.

  XLA's CPU backend sends what is within a loop or a conditional, such as the counts by which the
  weights of several devices are selected, in no fixed order with what is outside: processes would
  take the one for the other. There, each device computes with a copy of the whole state.
  """
  if mesh is None or jax.process_count() == 1 or mesh.devices.flat[0].platform != "cpu":
    return of_state
  return everywhere(mesh)


def place(tree: Any, shardings: Any) -> Any:
  """Arrays that each process has as a whole, on the devices of all."""
  # By a program, since devices of other processes cannot be written to.
  return tree if shardings is None else jax.jit(_identity, out_shardings=shardings)(tree)


def _identity(tree: Any) -> Any:
  return tree


def constrain(tree: Any, shardings: Any) -> Any:
  """The same within a program."""
  return tree if shardings is None else jax.lax.with_sharding_constraint(tree, shardings)


def on_mesh(step: Callable[..., Any], of_state: Any, mesh: Mesh | None) -> Callable[..., Any]:
  """A `train_step` of `experiments.learner` whose batch and state are shared by the devices."""
  whole = within_programs(of_state, mesh)

  def shared_step(state, pixels, labels, key):
    pixels, labels = constrain((pixels, labels), over_data(mesh))
    state, sums = step(constrain(state, whole), pixels, labels, key)
    return constrain(constrain(state, whole), of_state), sums

  return shared_step


def state_on_mesh(
  change: Callable[[Any], Any], of_state: Any, mesh: Mesh | None
) -> Callable[[Any], Any]:
  """A function from states to states whose state is shared by the devices."""
  whole = within_programs(of_state, mesh)
  return lambda state: constrain(constrain(change(constrain(state, whole)), whole), of_state)


def check_batch(batch_size: int, mesh: Mesh | None) -> None:
  """Raises a ValueError if devices cannot have equal parts of a batch."""
  if mesh is not None and batch_size % mesh.shape["data"]:
    raise ValueError(
      f"batch_size={batch_size} must be a multiple of {mesh.shape['data']}, the data axis of the"
      " mesh"
    )


def shard_of_process(mesh: Mesh) -> tuple[int, int]:
  """Which of so many parts of each batch the devices of this process compute with.

  Raises:
    ValueError: if processes have parts that overlap, or of several sizes.
  """
  rows = collections.defaultdict(list)
  for row, devices in enumerate(mesh.devices):
    for index in {device.process_index for device in devices}:
      rows[index].append(row)
  parts = sorted({tuple(part) for part in rows.values()})
  if sum(map(len, parts)) != len(mesh.devices) or len(set(map(len, parts))) > 1:
    raise ValueError(
      f"mesh: the {len(mesh.devices)} parts of a batch must be shared out among processes evenly,"
      f" each whole to one of them or to the same ones, but they have {parts}"
    )
  return parts.index(tuple(rows[jax.process_index()])), len(parts)
