"""The tables that `experiments.reproduce` makes: which runs stand in which."""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

SEEDS = (42, 123, 456, 789, 999)


class Row(NamedTuple):
  """A recipe, and after which of its cycles of training, from 1, it is read; None: at the end."""

  recipe: str
  cycle: int | None = None


Series = dict[str, tuple[Row, ...]]


@dataclasses.dataclass(frozen=True)
class Table:
  """A run of each recipe with each seed.

  Attributes:
    blocks: parts of the table, by their titles: rows, by the label of the line that they make in
      the figure.
    seeds: of each recipe.
    by_cost: whether there is a figure of accuracy over epochs of training too.
  """

  blocks: dict[str, Series]
  seeds: tuple[int, ...] = SEEDS
  by_cost: bool = False

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
}
