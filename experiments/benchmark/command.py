"""The command: what it measures, on what, and where the report goes."""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import tqdm
import tyro

from experiments import commands, loading, records
from experiments.benchmark import devices, inference, networks, report, selection, steps
from experiments.benchmark.trees import TREES, shapes_of
from experiments.recipes import RECIPES

RESULTS = pathlib.Path(__file__).parents[1] / "results"

Rows = list[dict[str, Any]]
Tree = Literal[tuple(TREES)]
Method = Literal[tuple(steps.METHODS)]


@dataclasses.dataclass(frozen=True)
class Options:
  """Measures the library against plain JAX."""

  what: tyro.conf.Positional[
    Literal[
      "all",
      "selection",
      "step",
      "network",
      "devices",
      "abstract",
      "training",
      "loader",
      "inference",
    ]
  ]
  """What to measure; all is all but the last three."""
  out: pathlib.Path | None = None
  """Folder for benchmark.json, with the raw numbers, and benchmark.md, with tables of them; a
  single measurement gives its name to them. By default experiments/results for all; a single
  measurement only prints its tables."""
  trees: tuple[Tree, ...] = ("convnet-small", "lenet300", "resnet18", "resnet50", "gpt2")
  """Shapes of the parameters, for selection and step."""
  mesh_trees: tuple[Tree, ...] = ("resnet18",)
  """The same for devices."""
  abstract_trees: tuple[Tree, ...] = ("gpt2", "gpt-1b")
  """The same for abstract, which only compiles."""
  methods: tuple[Method, ...] = (
    "fixed",
    "progressive",
    "progressive-packed",
    "granet",
    "granet-packed",
  )
  """How to prune, for step."""
  mesh_methods: tuple[Method, ...] = ("progressive",)
  """The same for devices and abstract."""
  lengths: tuple[int, ...] = (1,)
  """How many steps a call makes, for step."""
  devices: tuple[int, ...] = (1, 2, 4, 8)
  """How many there are, for devices, and at most for abstract; one CPU simulates those missing."""
  recipes: tuple[Literal[tuple(RECIPES)], ...] = ("resnet18-cifar10-72.9",)
  """What to train, for network and training."""
  batch_size: int = 0
  """For network; 0: the recipe's, but 16 on a CPU."""
  dtypes: tuple[Literal["float32", "bfloat16"], ...] = ()
  """In which networks compute; by default bfloat16, but float32 on a CPU."""
  unroll: tuple[int, ...] = (1,)
  """How many steps of an epoch are written out in one turn of its loop, for training."""
  images: int = 0
  """Training images, before some are held out; 0: as many as the data set has, or 1,024 for the
  loader."""
  workers: tuple[int, ...] = (0, 1, 2)
  """How many processes decode images, for the loader; 0: threads of this one do."""
  data_dir: pathlib.Path | None = None
  """Directory of ImageNet, for the loader."""
  sparsity: float = 0.729
  """The fraction to prune; for network and training, the recipe's."""
  sparsities: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99)
  """The same for inference."""
  batches: tuple[int, ...] = (1, 256)
  """Sizes of the batches, for inference."""
  rounds: int = 7
  """How often each variant has its turn; what takes very long has fewer."""

  def __post_init__(self):
    commands.check_fields(
      self,
      {
        "sparsity": (0 < self.sparsity < 1, "in (0, 1)"),
        "sparsities": (all(0 < s < 1 for s in self.sparsities), "in (0, 1)"),
        "batches": (min(self.batches, default=0) >= 1, "at least 1"),
        "rounds": (self.rounds >= 1, "at least 1"),
        "lengths": (min(self.lengths, default=0) >= 1, "at least 1"),
        "devices": (min(self.devices, default=0) >= 1, "at least 1"),
        "batch_size": (self.batch_size >= 0, "at least 0"),
        "unroll": (min(self.unroll, default=0) >= 1, "at least 1"),
        "workers": (min(self.workers, default=-1) >= 0, "at least 0"),
        "images": (self.images >= 0, "at least 0"),
        "recipes": (
          self._can_measure_recipes(),
          f"of {', '.join(networks.IMAGES)}, in memory, and for network prune by epochs",
        ),
      },
    )

  def _can_measure_recipes(self) -> bool:
    if self.what not in ("all", "network", "training"):
      return True
    recipes = [RECIPES[name] for name in self.recipes]
    return all(recipe.data in networks.IMAGES for recipe in recipes) and (
      self.what == "training" or all(recipe.prunes_by_epoch for recipe in recipes)
    )

  @property
  def network_dtypes(self) -> tuple[str, ...]:
    return self.dtypes or (("float32",) if _on_cpu() else ("bfloat16",))


def _selection(options: Options) -> Rows:
  return [
    {
      "tree": tree,
      **selection.measure_selection(
        shapes_of(tree), sparsity=options.sparsity, rounds=options.rounds
      ),
    }
    for tree in options.trees
  ]


def _step(options: Options) -> Rows:
  return [
    {"tree": tree, **row}
    for tree in options.trees
    for length in options.lengths
    for row, _ in steps.measure_steps(
      shapes_of(tree),
      options.methods,
      sparsity=options.sparsity,
      rounds=options.rounds,
      length=length,
    )
  ]


def _network(options: Options) -> Rows:
  batch_size = options.batch_size or (16 if _on_cpu() else 0)
  return [
    networks.measure_network(recipe, dtype, batch_size, rounds=options.rounds)
    for recipe in options.recipes
    for dtype in options.network_dtypes
  ]


def _devices(options: Options) -> Rows:
  return [
    {"tree": tree, **row}
    for tree in options.mesh_trees
    for row in devices.measure_devices(
      shapes_of(tree),
      options.mesh_methods,
      options.devices,
      sparsity=options.sparsity,
      rounds=options.rounds,
    )
  ]


def _abstract(options: Options) -> Rows:
  return [
    {"tree": tree, **row}
    for tree in options.abstract_trees
    for row in devices.measure_abstract(
      shapes_of(tree), options.mesh_methods, max(options.devices), sparsity=options.sparsity
    )
  ]


def _training(options: Options) -> Rows:
  return [
    networks.measure_epochs(recipe, dtype, unroll, images=options.images, rounds=options.rounds)
    for recipe in options.recipes
    for dtype in options.network_dtypes
    for unroll in options.unroll
  ]


def _loader(options: Options) -> Rows:
  return loading.measure_loader(
    options.data_dir, options.workers, images=options.images or 1024, rounds=options.rounds
  )


def _inference(options: Options) -> Rows:
  return list(
    inference.measure_inference(options.sparsities, options.batches, rounds=options.rounds)
  )


def _on_mesh(function: Callable[[Options], Rows]) -> Callable[[Options], Rows]:
  return lambda options: devices.with_devices(max(options.devices), function, options)


MEASUREMENTS: dict[str, Callable[[Options], Rows]] = {
  "selection": _selection,
  "step": _step,
  "network": _network,
  "devices": _on_mesh(_devices),
  "abstract": _on_mesh(_abstract),
  "training": _training,
  "loader": _loader,
  "inference": _inference,
}


# Those of the report.
REPORTED = ("selection", "step", "network", "devices", "abstract")


def measure(options: Options) -> dict[str, Any]:
  """Makes the measurements; what goes into the JSON."""
  names = REPORTED if options.what == "all" else (options.what,)
  measured, seconds = {}, {}
  for name in tqdm.tqdm(names, unit="measurement"):
    started = time.perf_counter()
    measured[name] = MEASUREMENTS[name](options)
    seconds[name] = time.perf_counter() - started
  return {
    "hardware": records.hardware(),
    **records.provenance(),
    "rounds": options.rounds,
    "sparsity": options.sparsity,
    "seconds": seconds,
    "measured": measured,
  }


def _on_cpu() -> bool:
  return jax.default_backend() == "cpu"


def main(args: list[str] | None = None) -> None:
  with commands.errors_as_messages():
    options = tyro.cli(Options, prog="python -m experiments.benchmark", args=args)
    out = options.out or (RESULTS if options.what == "all" else None)
    if out is not None:
      commands.check_writable("out", out, out)
    record = measure(options)
    if out is None:
      print("\n\n".join(report.sections(record)))
      return
    text = report.to_markdown(record)
    name = "benchmark" if options.what == "all" else options.what
    records.replace_file(out / f"{name}.json", records.to_json(record))
    records.replace_file(out / f"{name}.md", text)
    print(text)
