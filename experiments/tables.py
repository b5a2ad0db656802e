"""The tables that `experiments.reproduce` makes: which runs stand in which."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple

SEEDS = (42, 123, 456, 789, 999)


class Row(NamedTuple):
  """A recipe, and how it is run and read.

  Attributes:
    recipe: its name.
    cycle: after which of its cycles of training, from 1, it is read; None: at the end.
    sparsity: in place of the recipe's own.
  """

  recipe: str
  cycle: int | None = None
  sparsity: float | None = None

  @property
  def name(self) -> str:
    """Of its runs."""
    return self.recipe if self.sparsity is None else f"{self.recipe}-{100 * self.sparsity:g}"


Series = dict[str, tuple[Row, ...]]


@dataclasses.dataclass(frozen=True)
class Table:
  """A run of each recipe with each seed.

  Attributes:
    blocks: parts of the table, by their titles: rows, by the label of the line that they make in
      the figure.
    seeds: of each recipe.
    by_cost: whether there is a figure of accuracy over epochs of training too.
    lanes: so many runs of a recipe are trained side by side where they can be.
    compared: rows that differ in the criterion by which weights are dropped, by its name, for a
      figure of how far these agree.
  """

  blocks: dict[str, Series]
  seeds: tuple[int, ...] = SEEDS
  by_cost: bool = False
  lanes: int = 1
  compared: Mapping[str, Row] = dataclasses.field(default_factory=dict)

  @property
  def rows(self) -> tuple[Row, ...]:
    """All of them, in order."""
    series = (rows for block in self.blocks.values() for rows in block.values())
    return tuple(dict.fromkeys(row for rows in series for row in rows))

  @property
  def recipes(self) -> tuple[str, ...]:
    """The names of all recipes, each once."""
    return tuple(dict.fromkeys(row.recipe for row in self.rows))


def _rows(names: Iterable[str]) -> tuple[Row, ...]:
  return tuple(map(Row, names))


_LENET = {
  "LeNet-300-100": _rows(("lenet300-mnist-dense", "lenet300-mnist-78.9", "lenet300-mnist-98")),
  "LeNet-300-100, learning rate 0.05": _rows(("lenet300-mnist-78.9-lr0.05",)),
}
_RESNET18 = ("dense", "70", "72.9", "75", "80", "85", "90", "95")

_SINGLE_CYCLE = {
  "GMP": "gmp",
  "GMP, original form": "gmp-original",
  "one-shot + fine-tuning": "one-shot",
  "SNIP": "snip",
  "GraSP": "grasp",
  "SynFlow": "synflow",
  "magnitude at initialisation": "magnitude",
  "random at initialisation": "random",
}


def _single_cycle(dense: str, progressive: Iterable[str], prefixes: Iterable[str]) -> Series:
  """A dense network, progressive pruning, and what is in `baselines.single_cycle`."""
  return {
    "dense": _rows((dense,)),
    "progressive": _rows(progressive),
    **{
      label: _rows(f"{prefix}-{method}" for prefix in prefixes)
      for label, method in _SINGLE_CYCLE.items()
    },
  }


_E40, _E200 = (tuple(f"lenet300-mnist-{s}-e{e}" for s in ("78.9", "98")) for e in (40, 200))
_LENET_E40 = _single_cycle(
  "lenet300-mnist-e40-dense", (f"{prefix}-progressive" for prefix in _E40), _E40
)

_DYNAMIC = {
  "GraNet, dense to sparse": "granet",
  "GraNet, sparse to sparse": "granet-sparse",
  "RigL": "rigl",
  "SET": "set",
  "SNFS": "snfs",
  "static": "static",
}

_CRITERIA = ("magnitude", "each-sign", "mest", "snip", "reciprocal-sensitivity")


def _at(sparsities: Iterable[float], recipe: str) -> tuple[Row, ...]:
  return tuple(Row(recipe, sparsity=sparsity) for sparsity in sparsities)


def _grid(prefix: str, densities: Iterable[float]) -> dict[str, Series]:
  """The blocks of a grid of criteria: one for each way to grow, with static and dense lines."""

  sparsities = [round(1 - density, 4) for density in densities]
  return {
    f"growth by {grow}": {
      **{drop: _at(sparsities, f"{prefix}-{drop}-{grow}") for drop in _CRITERIA},
      "static": _at(sparsities, f"{prefix}-static"),
      "dense": _rows((f"{prefix}-dense",)),
    }
    for grow in ("gradient", "random")
  }


def _compared(prefix: str) -> dict[str, Row]:
  """As in Fantastic Weights: growth by gradient, a fifth of the weights."""
  return {
    name.replace("-", "_"): Row(f"{prefix}-{name}-gradient", sparsity=0.8) for name in _CRITERIA
  }


_GRID_DENSITIES = (0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.09, 0.08, 0.07, 0.06, 0.05)
_GRID_SEEDS = (42, 123, 456)

TABLES = {
  # All runs of arXiv 2606.12278, and three beside them: VGG-19 with a plain cosine, LeNet-300-100
  # dense and at half the learning rate.
  "progressive": Table(
    {
      "CIFAR-10": {
        "ResNet-18": _rows(f"resnet18-cifar10-{name}" for name in _RESNET18),
        "VGG-like": _rows(("vgg-like-cifar10-97",)),
        "VGG-19": _rows(("vgg19-cifar10-98",)),
        "VGG-19, plain cosine": _rows(("vgg19-cifar10-98-cosine",)),
      },
      "MNIST": _LENET,
    }
  ),
  # Its runs on MNIST.
  "lenet-mnist": Table({"MNIST": _LENET}),
  # Not of the paper: whether ResNet-20 learns on a CPU in a short time.
  "resnet20-cifar10-short": Table(
    {"CIFAR-10": {"ResNet-20, 5 epochs": _rows(("resnet20-cifar10-short",))}}, (42,)
  ),
  # Other methods on equal terms with it, which is not what the paper compares.
  "baselines": Table(
    {
      "LeNet-300-100 on MNIST, 40 epochs in a cycle of training": _LENET_E40
      | {
        "LTH": (Row("lenet300-mnist-e40-lth", 8), Row("lenet300-mnist-e40-lth", 19)),
        "LTH, rewinding to epoch 1": (
          Row("lenet300-mnist-e40-lth-rewind", 8),
          Row("lenet300-mnist-e40-lth-rewind", 19),
        ),
      },
      "LeNet-300-100 on MNIST, 40 epochs in all": _LENET_E40
      | {
        "LTH": _rows(f"{prefix}-lth-8x5" for prefix in _E40),
        "LTH, rewinding to epoch 1": _rows(f"{prefix}-lth-rewind-13x4" for prefix in _E40),
      },
      "LeNet-300-100 on MNIST, 40 epochs: why SNIP falls short": {
        "SNIP": _rows(("lenet300-mnist-98-e40-snip",)),
        "SNIP, its own initialisation": _rows(("lenet300-mnist-98-e40-snip-own-init",)),
        "SNIP, no augmentation": _rows(("lenet300-mnist-98-e40-snip-plain",)),
        "SNIP, its own initialisation, no augmentation": _rows(
          ("lenet300-mnist-98-e40-snip-own-init-plain",)
        ),
      },
      "LeNet-300-100 on MNIST, 200 epochs": _single_cycle(
        "lenet300-mnist-dense", ("lenet300-mnist-78.9-e200-progressive", "lenet300-mnist-98"), _E200
      ),
      "ResNet-18 on CIFAR-10, 200 epochs in a cycle of training": _single_cycle(
        "resnet18-cifar10-dense", ("resnet18-cifar10-72.9",), ("resnet18-cifar10-72.9",)
      )
      | {
        "LTH": _rows(("resnet18-cifar10-lth",)),
        "LTH, rewinding to epoch 2": _rows(("resnet18-cifar10-lth-rewind",)),
        "LTH, 200 epochs in all": _rows(("resnet18-cifar10-72.9-lth-8x25",)),
        "LTH, rewinding to epoch 2, 200 epochs in all": _rows(
          ("resnet18-cifar10-72.9-lth-rewind-9x24",)
        ),
      },
      "VGG-19 on CIFAR-10, 400 epochs in a cycle of training": _single_cycle(
        "vgg19-cifar10-dense", ("vgg19-cifar10-98-cosine",), ("vgg19-cifar10-98",)
      )
      | {
        "LTH": _rows(("vgg19-cifar10-lth",)),
        "LTH, rewinding to epoch 2": _rows(("vgg19-cifar10-lth-rewind",)),
        "LTH, 400 epochs in all": _rows(("vgg19-cifar10-98-lth-8x50",)),
        "LTH, rewinding to epoch 1, 400 epochs in all": _rows(
          ("vgg19-cifar10-98-lth-rewind-7x58",)
        ),
      },
    },
    by_cost=True,
  ),
  # Dynamic sparse training on equal terms with progressive pruning and GMP.
  "dynamic": Table(
    {
      "LeNet-300-100 on MNIST, 40 epochs, 98 % pruned": {
        label: _rows((f"lenet300-mnist-98-e40-{method}",))
        for label, method in {"progressive": "progressive", "GMP": "gmp", **_DYNAMIC}.items()
      },
    }
  ),
  # GraNet as published, beside progressive pruning of the same network.
  "granet": Table(
    {
      f"{label} on {data}": {
        "GraNet, dense to sparse": _at((0.9, 0.95, 0.98), f"{network}-granet"),
        "GraNet, sparse to sparse": _at((0.9, 0.95, 0.98), f"{network}-granet-sparse"),
        **(
          {"progressive": _at((0.9, 0.95, 0.98), "vgg19-cifar10-progressive")}
          if network == "vgg19-cifar10"
          else {}
        ),
      }
      for label, data, network in (
        ("VGG-19", "CIFAR-10", "vgg19-cifar10"),
        ("ResNet-50", "CIFAR-10", "resnet50-cifar10"),
        ("VGG-19", "CIFAR-100", "vgg19-cifar100"),
        ("ResNet-50", "CIFAR-100", "resnet50-cifar100"),
      )
    },
    _GRID_SEEDS,
  ),
  # RigL as published.
  "rigl": Table(
    {
      "WRN-22-2 on CIFAR-10": {
        label: _at((0.5, 0.8, 0.9, 0.95), f"wrn-22-2-cifar10-{method}")
        for label, method in {"RigL": "rigl", "SET": "set", "static": "static"}.items()
      }
    },
    _GRID_SEEDS,
  ),
  # GraNet on ImageNet, with the GMP of its code.
  "imagenet": Table(
    {
      "ResNet-50 on ImageNet": {
        "dense": _rows(("resnet50-imagenet-dense",)),
        **{
          label: _rows(f"resnet50-imagenet-{name}" for name in names)
          for label, names in {
            "GraNet, sparse to sparse": ("granet-80", "granet-90"),
            "GraNet, dense to sparse": ("granet-80-dense-to-sparse", "granet-90-dense-to-sparse"),
            "GMP": ("gmp-80", "gmp-90"),
          }.items()
        },
      }
    },
    (42,),
  ),
  # The grid of Fantastic Weights in a short time, and as published on its networks.
  "criteria": Table(
    _grid("lenet300-mnist-e20", (0.5, 0.2, 0.1, 0.05)),
    _GRID_SEEDS,
    lanes=12,
    compared=_compared("lenet300-mnist-e20"),
  ),
  **{
    f"criteria-{network}": Table(
      _grid(prefix, _GRID_DENSITIES), _GRID_SEEDS, lanes=33, compared=_compared(prefix)
    )
    for network, prefix in (
      ("mlp", "mlp-cifar10"),
      ("convnet", "convnet-small-cifar10"),
      ("lenet5", "lenet5-fashion"),
      ("resnet56", "resnet56-cifar10"),
    )
  },
}
