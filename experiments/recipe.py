"""What decides the outcome of a run: a frozen dataclass."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import tyro

from experiments import commands
from experiments.augment import Augmentation
from experiments.models import MODELS


@dataclasses.dataclass(frozen=True)
class Published:
  """What is published of a run."""

  accuracy: float
  """On the test set, in per cent."""
  spread: float | None = None
  """Standard deviation over runs."""
  runs: int = 1
  seconds: float | None = None
  """Of one run."""
  epoch: Literal["last", "best"] = "last"
  """Whose accuracy it is; the best one is chosen by the test set."""


@dataclasses.dataclass(frozen=True)
class Dynamic:
  """Sparse training whose weights are dropped and grow: see `sparsejax.dynamic_sparse_training`."""

  method: Literal["none", "static", "criteria", "granet", "rigl", "set", "snfs"] = "none"
  """"criteria" drops and grows by the criteria below, as in Fantastic Weights; the others have
  theirs. GraNet's sparsity rises along a cubic ramp; the others have the final one throughout."""
  drop: Literal[
    "magnitude", "each_sign", "mest", "snip", "sensitivity", "reciprocal_sensitivity", "random"
  ] = "magnitude"
  """The score by which weights are dropped."""
  grow: Literal["gradient", "random", "momentum"] = "gradient"
  """The score by which weights grow."""
  fraction: float = 0.5
  """Of the active weights of each layer, dropped and grown at first; it falls along a cosine."""
  last_fraction: float = 0.0
  """At the foot of that cosine."""
  every: int = 0
  """Steps from one change of the masks to the next; 0: one epoch."""
  stop: float = 1.0
  """The part of the training after which masks do not change any more; the cosine ends there."""
  allocation: Literal["erk", "er", "uniform"] = "erk"
  """How the sparsity is shared out among layers at the start."""

  def __post_init__(self):
    commands.check_fields(
      self,
      {
        "fraction": (0 <= self.fraction <= 1, "in [0, 1]"),
        "last_fraction": (0 <= self.last_fraction <= self.fraction, "from 0 to the fraction"),
        "every": (self.every >= 0, "at least 0"),
        "stop": (0 < self.stop <= 1, "in (0, 1]"),
      },
    )


@dataclasses.dataclass(frozen=True)
class Recipe:
  """All that decides the outcome of a run, but the seed."""

  data: Literal["digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "imagenet2012"]
  """Data set."""
  model: Literal[tuple(MODELS)]
  """Network."""
  epochs: int
  """Length of the training."""
  learning_rate: float
  """At the start; it falls along a cosine, epoch by epoch, or in steps."""
  width: float = 1.0
  """Multiplies the number of units of each hidden layer."""
  dtype: Literal["float32", "bfloat16"] = "float32"
  """In which the network computes. Its parameters are float32."""
  sparsity: float = 0.0
  """Final fraction of pruned weights, in [0, 1); 0 trains the dense network."""
  prune_begin: int = 0
  """The epoch, from 0, at whose start masks change first."""
  prune_epochs: int = 0
  """Length of the ramp of sparsity, in epochs."""
  initial_sparsity: float = 0.0
  """At the start of the ramp."""
  ramp: Literal["progressive", "linear", "cubic"] = "progressive"
  """How sparsity rises. A progressive ramp is linear and has gone one epoch's way at its first
  change; over one epoch, it prunes once. A linear one, and Zhu & Gupta's cubic, begin with the
  initial sparsity."""
  keep_weights: bool = False
  """Whether pruned weights keep their values, so that they can return; not with a progressive
  ramp or a dynamic method."""
  dynamic: Dynamic = dataclasses.field(default_factory=Dynamic)
  foresight: Literal["none", "magnitude", "random", "snip", "grasp", "synflow"] = "none"
  """The score by which to prune before training, in place of a ramp."""
  cycles: int = 1
  """With more than one, iterative magnitude pruning: each cycle but the last ends with pruning, and
  each but the first starts from what is left of the weights after `rewind_epoch`."""
  prune_scope: Literal["layer", "global"] = "layer"
  """Whether each layer is pruned at its own rate between two cycles, or all compete."""
  prune_rate: float = 0.2
  """The fraction of what is left that is pruned between two cycles."""
  prune_rate_output: float = 0.1
  """The same for the last layer, if layers have rates of their own."""
  rewind_epoch: int = 0
  """The epoch, from 0, at whose start each cycle but the first begins, with the learning rate and
  the order of the images of then; the first one begins with epoch 0."""
  rewind_weights: bool = True
  """Whether the weights too go back to then, or go on as they are."""
  label_smoothing: float = 0.0
  """Of the cross-entropy, in [0, 1)."""
  augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)
  batch_size: int = 128
  """Images in a step."""
  drop_last: bool = False
  """Whether to leave out what remains of an epoch after its last full batch."""
  momentum: float = 0.9
  """Of SGD."""
  nesterov: bool = False
  """Whether the momentum is Nesterov's."""
  clip_norm: float = 0.0
  """Gradients that exceed this global norm are scaled down to it, before weight decay; 0: none."""
  weight_decay: float = 5e-4
  """Added to the gradient, for all parameters but the following."""
  undecayed: str = ""
  """A regular expression: parameters whose path, with slashes, has a match have no weight decay."""
  final_learning_rate: float = 0.0
  """At the foot of the cosine."""
  half_period: int = 0
  """Epochs to the foot of the cosine, after which it rises again; 0: the whole training."""
  milestones: tuple[float, ...] = ()
  """Epochs after which the learning rate falls to a part of it, in place of the cosine."""
  milestone_factor: float = 0.1
  """That part."""
  warmup_epochs: int = 0
  """So many epochs, n, have 1 / (n + 1), 2 / (n + 1), ... of the learning rate."""
  restart_epoch: int = 0
  """The epoch, from 0, at whose start the learning rate begins a second cosine, so that it has
  fallen to the foot twice; 0: none."""
  image_size: int = 224
  """Height and width of streamed images after cropping; those in memory keep theirs."""
  train_images: int = 0
  """Only so many of the training images are used; 0: all."""
  validation: float = 0.11
  """The fraction of the training images that are held out for validation, in [0, 1)."""
  best_above: float = 1.0
  """Also report the best test accuracy of all epochs with more than this sparsity, as was published
  of some runs. It chooses by the test set: it is no estimate of anything."""
  published: tyro.conf.Suppress[Published | None] = None

  def __post_init__(self):
    # But for a progressive one, a ramp of n epochs changes the masks n + 1 times.
    longest = self.epochs - self.prune_begin - (self.ramp != "progressive")
    has_ramp = self.has_ramp
    commands.check_fields(
      self,
      {
        "epochs": (self.epochs >= 1, "at least 1"),
        "learning_rate": (0 <= self.learning_rate < math.inf, "at least 0 and finite"),
        "width": (0 < self.width < math.inf, "positive and finite"),
        "sparsity": (0 <= self.sparsity < 1, "in [0, 1)"),
        "prune_begin": (self.prune_begin >= 0, "at least 0"),
        "prune_epochs": (
          not has_ramp or 1 <= self.prune_epochs <= longest,
          f"from 1 to {longest}, so that the ramp ends within epochs={self.epochs}",
        ),
        "initial_sparsity": (
          0 <= self.initial_sparsity <= self.sparsity,
          f"from 0 to the sparsity, {self.sparsity}",
        ),
        "keep_weights": (
          not self.keep_weights or (self.prunes_by_epoch and self.ramp != "progressive"),
          "False but with a linear or a cubic ramp, and without a dynamic method",
        ),
        "dynamic": (
          self.dynamic.method == "none" or (self.foresight == "none" and self.cycles == 1),
          "of method none with pruning before training, or in cycles",
        ),
        "milestones": (
          all(0 < m < self.epochs for m in self.milestones)
          and list(self.milestones) == sorted(self.milestones),
          f"in (0, {self.epochs}), in order",
        ),
        "milestone_factor": (0 < self.milestone_factor < 1, "in (0, 1)"),
        "warmup_epochs": (
          0 <= self.warmup_epochs < self.epochs,
          f"from 0 to {self.epochs - 1}",
        ),
        "foresight": (
          self.foresight == "none" or self.sparsity > 0,
          f"none with a sparsity of {self.sparsity}",
        ),
        "cycles": (
          self.cycles >= 1 and (self.cycles == 1 or self.sparsity == 0),
          "at least 1, and with more than one the rates decide the sparsity, which must be 0",
        ),
        "prune_rate": (0 <= self.prune_rate < 1, "in [0, 1)"),
        "prune_rate_output": (0 <= self.prune_rate_output < 1, "in [0, 1)"),
        "rewind_epoch": (
          0 <= self.rewind_epoch < (self.epochs if self.cycles > 1 else 1),
          f"an epoch from 0 to {self.epochs - 1}, and 0 with a single cycle",
        ),
        "restart_epoch": (
          0 <= self.restart_epoch < self.epochs,
          f"an epoch from 0 to {self.epochs - 1}",
        ),
        "label_smoothing": (0 <= self.label_smoothing < 1, "in [0, 1)"),
        "batch_size": (self.batch_size >= 1, "at least 1"),
        "momentum": (0 <= self.momentum < 1, "in [0, 1)"),
        "clip_norm": (self.clip_norm >= 0, "at least 0"),
        "weight_decay": (0 <= self.weight_decay < math.inf, "at least 0 and finite"),
        "undecayed": (_is_pattern(self.undecayed), "a regular expression"),
        "final_learning_rate": (
          0 <= self.final_learning_rate <= self.learning_rate,
          f"from 0 to the learning rate, {self.learning_rate}",
        ),
        "half_period": (self.half_period >= 0, "at least 0"),
        "image_size": (self.image_size >= 1, "at least 1"),
        "train_images": (self.train_images >= 0, "at least 0"),
        "validation": (0 <= self.validation < 1, "in [0, 1)"),
        "best_above": (0 <= self.best_above <= 1, "in [0, 1]"),
      },
    )

  @property
  def has_ramp(self) -> bool:
    """Whether its sparsity rises during training."""
    return (
      self.sparsity > 0 and self.foresight == "none" and self.dynamic.method in ("none", "granet")
    )

  @property
  def prunes_by_epoch(self) -> bool:
    """Whether its masks change during training, and at the start of epochs only."""
    return self.has_ramp and self.dynamic.method == "none"

  @property
  def total_epochs(self) -> int:
    """Of all cycles together."""
    return self.epochs_after(self.cycles)

  def epochs_after(self, cycles: int) -> int:
    """Of so many cycles together."""
    return cycles * self.epochs - (cycles - 1) * self.rewind_epoch


def _is_pattern(text: str) -> bool:
  try:
    re.compile(text)
  except re.error:
    return False
  return True


def from_config(config: Mapping[str, Any]) -> Recipe:
  """The recipe of a run, from the contents of its `config.json`.

  Raises:
    ValueError: if a field of it is unknown, missing or out of bounds.
  """
  nested = {"augmentation": Augmentation, "dynamic": Dynamic, "published": Published}
  fields = {key: value for key, value in config.items() if key not in ("recipe", "seed")}
  # JSON has no tuples.
  fields = {key: tuple(x) if isinstance(x, list) else x for key, x in fields.items()}
  try:
    for key, kind in nested.items():
      if fields.get(key) is not None:
        fields[key] = kind(**fields[key])
    return Recipe(**fields)
  except TypeError as error:
    raise ValueError(f"the config is not one of this version of the program: {error}") from error


def smoke(recipe: Recipe) -> Recipe:
  """A version of a recipe that takes seconds: a narrow network, 512 images, two epochs a cycle."""
  is_progressive = recipe.ramp == "progressive"
  prunes_once = is_progressive and recipe.prune_epochs == 1
  return dataclasses.replace(
    recipe,
    width=recipe.width / 8,
    dtype="float32",
    epochs=2,
    prune_begin=int(prunes_once),
    prune_epochs=2 if is_progressive and not prunes_once else 1,
    cycles=min(recipe.cycles, 3),
    rewind_epoch=min(recipe.rewind_epoch, 1),
    half_period=min(recipe.half_period, 1),
    milestones=(1.0,) if recipe.milestones else (),
    warmup_epochs=min(recipe.warmup_epochs, 1),
    restart_epoch=min(recipe.restart_epoch, 1),
    dynamic=dataclasses.replace(recipe.dynamic, every=3),
    image_size=32,
    train_images=512,
    # An eighth, so that what is left are full batches.
    validation=0.125 if recipe.validation else 0.0,
    batch_size=64,
    published=None,
  )
