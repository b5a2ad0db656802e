"""Speed and memory of the library against plain JAX, as ratios within one run.

    python -m experiments.benchmark selection
    python -m experiments.benchmark step
    python -m experiments.benchmark training
    python -m experiments.benchmark loader [--data-dir DIR]

`selection` picks the fraction of smallest magnitudes, against `jnp.argsort` of the concatenated
scores. `step` is SGD with momentum and `optax.apply_updates`, alone and with pruning as last link,
at calls that keep the masks and at calls that change them; once with a step for each call from
Python, and once with the steps in a scan, as those of an epoch are. `training` is whole epochs of a
recipe on random pixels, with its pruning and without. `loader` is the host's work for ImageNet, or
for images in its shape if no directory is given. Each figure is the median over rounds in
which all variants take turns.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import sparsejax
from experiments import commands, loading, training
from experiments.models import MODELS
from experiments.published import Dataset
from experiments.recipe import Recipe
from experiments.recipes import RECIPES


@dataclasses.dataclass(frozen=True)
class Options:
  """Measures the library against plain JAX."""

  what: tyro.conf.Positional[Literal["selection", "step", "training", "loader"]]
  """What to measure."""
  trees: tuple[Literal["lenet300", "resnet18", "resnet50"], ...] = (
    "lenet300",
    "resnet18",
    "resnet50",
  )
  """Shapes of the parameters, for selection and step."""
  recipes: tuple[Literal[tuple(RECIPES)], ...] = ("resnet18-cifar10-72.9",)
  """What to train."""
  dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("bfloat16",)
  """In which the networks compute."""
  unroll: tuple[int, ...] = (1,)
  """How many steps of an epoch are written out in one turn of its loop."""
  images: int = 0
  """Training images, before some are held out; 0: as many as the data set has, or 1,024 for the
  loader."""
  workers: tuple[int, ...] = (0, 1, 2)
  """How many processes decode images, for the loader; 0: threads of this one do."""
  data_dir: pathlib.Path | None = None
  """Directory of ImageNet, for the loader."""
  sparsity: float = 0.729
  """The fraction to prune."""
  rounds: int = 7
  """How often each variant is timed."""

  def __post_init__(self):
    commands.check_fields(
      self,
      {
        "sparsity": (0 <= self.sparsity < 1, "in [0, 1)"),
        "rounds": (self.rounds >= 1, "at least 1"),
        "unroll": (min(self.unroll, default=0) >= 1, "at least 1"),
        "workers": (min(self.workers, default=-1) >= 0, "at least 0"),
        "images": (self.images >= 0, "at least 0"),
      },
    )


# Networks, and the images and classes of the data set that they are used on.
TREES = {
  "lenet300": ("lenet300", (28, 28, 1), 10),
  "resnet18": ("resnet18", (32, 32, 3), 10),
  "resnet50": ("resnet50-imagenet", (224, 224, 3), 1000),
}


def shapes_of(tree: str) -> list[tuple[int, ...]]:
  """Shapes of the parameters of a network."""
  name, image, classes = TREES[tree]
  init = MODELS[name](classes=classes).init
  params = jax.eval_shape(init, jax.random.key(0), jnp.zeros([1, *image]))["params"]
  return [leaf.shape for leaf in jax.tree.leaves(params)]


def benchmark_selection(options: Options) -> list[dict[str, Any]]:
  """Selects from given scores: one row for each tree."""
  rows = []
  for name in options.trees:
    scores = [jnp.abs(w) for w in _random_like(shapes_of(name)) if w.ndim >= 2]
    size = sum(s.size for s in scores)
    k = jnp.int32(round(options.sparsity * size))
    argsort = _compile(_argsort, scores, k)
    select = _compile(sparsejax.select_smallest, scores, k)
    slow, fast = _take_turns(
      [functools.partial(f, scores, k) for f in (argsort, select)], options.rounds
    )
    rows.append(
      {
        "tree": name,
        "weights": f"{size:,}",
        "argsort": _milliseconds(slow),
        "select_smallest": _milliseconds(fast),
        "times faster": f"{slow / fast:.0f}",
        "argsort, temporary bytes per weight": f"{_temporary_bytes(argsort) / size:.2f}",
        "select_smallest, temporary bytes per weight": f"{_temporary_bytes(select) / size:.2f}",
      }
    )
  return rows


def benchmark_step(options: Options) -> list[dict[str, Any]]:
  """Optimizer steps with donated buffers: for each tree, one a call and a scan of them."""
  sgd = optax.sgd(0.1, momentum=0.9)
  rows = []
  for name, length in itertools.product(options.trees, (1, 16)):
    shapes = shapes_of(name)
    methods = _methods(sgd, options.sparsity)
    with _count_compilations() as compilations:
      optimizers = [sgd, *itertools.chain.from_iterable(methods.values())]
      steps = [_make_steps(tx, shapes, length) for tx in optimizers]
      before = len(compilations)
      bare, *times = (s / length for s in _take_turns(steps, options.rounds))
      later = len(compilations) - before
    for method, kept, changed in zip(methods, times[::2], times[1::2]):
      rows.append(
        {
          "tree": name,
          "parameters": f"{sum(math.prod(shape) for shape in shapes):,}",
          "steps a call": str(length),
          "SGD": _milliseconds(bare),
          "method": method,
          "masks kept": _milliseconds(kept),
          "ratio": f"{kept / bare:.2f}",
          "masks changed": _milliseconds(changed),
          "ratio of that": f"{changed / bare:.1f}",
          "compilations after the first call": str(later),
        }
      )
  return rows


def _methods(sgd: optax.GradientTransformation, sparsity: float) -> dict[str, tuple[Any, Any]]:
  """Methods by name: one whose masks stay as they are, and one that changes them at each call."""
  ramp = optax.linear_schedule(0.0, sparsity, transition_steps=1000)
  never = 2**30

  def dynamic(method, **options):
    make = functools.partial(
      method, sgd, sparsity=sparsity, end=2**31 - 1, fraction=0.3, key=jax.random.key(0), **options
    )
    return make(every=never), make(every=1)

  return {
    "link": (
      optax.chain(sgd, sparsejax.one_shot_pruning(sparsity, at=never)),
      optax.chain(sgd, sparsejax.gradual_pruning(ramp, every=1)),
    ),
    "RigL": dynamic(sparsejax.rigl),
    "GraNet": dynamic(sparsejax.granet, steps=1000, initial=0.5 * sparsity),
  }


# How many training images each data set has, and their shape.
IMAGES = {
  "digits": (1_442, 8, 8, 1),
  "mnist": (60_000, 28, 28, 1),
  "cifar10": (50_000, 32, 32, 3),
}

# Of dense bfloat16 matrix products, in FLOP/s, as the makers give it.
PEAKS = {
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H200": 989e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
}


def benchmark_training(options: Options) -> list[dict[str, Any]]:
  """Epochs with the recipe's pruning and without it: for each recipe, dtype and unrolling."""
  rows = []
  for name, dtype, unroll in itertools.product(options.recipes, options.dtypes, options.unroll):
    recipe = dataclasses.replace(RECIPES[name], dtype=dtype)
    dense = dataclasses.replace(recipe, sparsity=0.0, initial_sparsity=0.0)
    count, *shape = IMAGES[recipe.data]
    dataset = _random_images(options.images or count, shape)
    started = time.perf_counter()
    trainer = training.make_trainer(recipe, dataset, seed=0, unroll=unroll)
    epochs = [_make_epochs(trainer)]
    compile_seconds = time.perf_counter() - started
    epochs.append(_make_epochs(training.make_trainer(dense, dataset, seed=0, unroll=unroll)))
    seconds, without = _take_turns(epochs, options.rounds)
    steps, trained = trainer.steps_per_epoch, trainer.train.labels.size
    if recipe.drop_last:
      trained = steps * recipe.batch_size
    flops = 3 * _forward_flops(recipe, dataset) * trained / seconds
    peak = PEAKS.get(jax.devices()[0].device_kind) if dtype == "bfloat16" else None
    rows.append(
      {
        "recipe": name,
        "device": jax.devices()[0].device_kind,
        "dtype": dtype,
        "unroll": str(unroll),
        "images per second": f"{trained / seconds:,.0f}",
        "step": _milliseconds(seconds / steps),
        "step without pruning": _milliseconds(without / steps),
        "share of pruning": f"{1 - without / seconds:.1%}",
        "TFLOP/s": f"{flops / 1e12:.3g}",
        "of the matrix rate": "-" if peak is None else f"{flops / peak:.1%}",
        "compilation and first epoch": f"{compile_seconds:.0f} s",
        "all epochs": f"{seconds * recipe.epochs:,.0f} s",
      }
    )
  return rows


def benchmark_loader(options: Options) -> list[dict[str, Any]]:
  """Decodes and crops images: one row for each number of processes."""
  return loading.measure_loader(
    options.data_dir, options.workers, images=options.images or 1024, rounds=options.rounds
  )


def _random_images(count: int, shape: Sequence[int]) -> Dataset:
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (count, *shape), np.uint8)
  labels = rng.integers(0, 10, count).astype(np.int32)
  moments = (0.5,) * shape[-1]
  return Dataset("random pixels", images, labels, images[:1], labels[:1], moments, moments)


def _make_epochs(trainer: training.Trainer) -> Callable[[], Any]:
  """A function that trains one more epoch at each call, already called once."""
  epoch = trainer.compile_epoch()
  held = [trainer.init()]

  def train():
    held[0], metrics = epoch(held[0], trainer.train)
    return metrics

  jax.block_until_ready(train())
  return train


def _forward_flops(recipe: Recipe, dataset: Dataset) -> float:
  """Of one image; a step takes three times that for each, by the usual count."""
  model = MODELS[recipe.model](classes=dataset.classes, width=recipe.width)
  image = jnp.zeros([1, *dataset.train_images.shape[1:]])
  variables = jax.eval_shape(model.init, jax.random.key(0), image)
  return jax.jit(model.apply).lower(variables, image).cost_analysis()["flops"]


def _argsort(scores: list[jax.Array], k: jax.Array) -> jax.Array:
  """What selection would otherwise begin with."""
  del k
  return jnp.argsort(jnp.concatenate([s.reshape(-1) for s in scores]))


def _make_steps(
  tx: optax.GradientTransformation, shapes: list[tuple[int, ...]], length: int
) -> Callable[[], Any]:
  """A function that makes so many more steps at each call, already called once."""
  grads = _random_like(shapes)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def update(params, state, grads):
    def step(carry, _):
      params, state = carry
      updates, state = tx.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), length=length)[0]

  params = _random_like(shapes)
  held = [params, tx.init(params)]

  def step():
    held[:] = update(*held, grads)
    return held

  jax.block_until_ready(step())
  return step


def _compile(function: Callable[..., Any], *args: Any) -> Any:
  return jax.jit(function).lower(*args).compile()


def _random_like(shapes: list[tuple[int, ...]]) -> list[jax.Array]:
  rng = np.random.default_rng(0)
  return [jnp.asarray(0.05 * rng.standard_normal(shape, np.float32)) for shape in shapes]


def _take_turns(functions: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
  """The median time of each function in seconds; a short one is repeated to make 0.1 s."""

  def timed(function, repetitions):
    started = time.perf_counter()
    for _ in range(repetitions):
      result = function()
    jax.block_until_ready(result)
    return (time.perf_counter() - started) / repetitions

  repetitions = [max(1, math.ceil(0.1 / timed(function, 1))) for function in functions]
  times = [[timed(*turn) for turn in zip(functions, repetitions)] for _ in range(rounds)]
  return [statistics.median(column) for column in zip(*times)]


@contextlib.contextmanager
def _count_compilations() -> Iterator[list[str]]:
  """A list that grows by one with each compilation."""
  events: list[str] = []

  def listen(event: str, duration: float, **_: Any) -> None:
    del duration
    if event.endswith("backend_compile_duration"):
      events.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield events
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def _temporary_bytes(compiled: Any) -> int:
  return compiled.memory_analysis().temp_size_in_bytes


def _milliseconds(seconds: float) -> str:
  return f"{1e3 * seconds:.3g} ms"


def main(args: list[str] | None = None) -> None:
  with commands.errors_as_messages():
    options = tyro.cli(Options, prog="python -m experiments.benchmark", args=args)
    benchmark = {
      "selection": benchmark_selection,
      "step": benchmark_step,
      "training": benchmark_training,
      "loader": benchmark_loader,
    }[options.what]
    print(commands.to_markdown(benchmark(options)))


if __name__ == "__main__":
  main()
