"""Other methods in place of progressive pruning, on equal terms with a recipe of it."""

import dataclasses
import functools

from experiments.augment import Augmentation
from experiments.recipe import Recipe

FORESIGHT = ("snip", "grasp", "synflow", "magnitude", "random")


def dense(recipe: Recipe) -> Recipe:
  """The training of a recipe of progressive pruning, without pruning."""
  return dataclasses.replace(
    recipe, sparsity=0.0, prune_begin=0, initial_sparsity=0.0, prune_epochs=0, published=None
  )


def single_cycle(prefix: str, recipe: Recipe) -> dict[str, Recipe]:
  """Recipes of other methods that take as many epochs as one of progressive pruning, by name.

  Their names are the prefix and the method:

  - "gmp": the cubic ramp of Zhu & Gupta, 2017, from the first epoch to where the given one ends, or
    to the last epoch, at whose start it changes the masks last;
  - "gmp-original": the same in its original form, where pruned weights may return;
  - "one-shot": training for three fifths of the epochs, pruning by magnitude, and fine-tuning for
    the rest, each along a whole cosine of the learning rate;
  - "snip", "grasp", "synflow", "magnitude", "random": pruning before training. SNIP and GraSP look
    at one batch of training images as they are, and at the very weights that are trained then, of a
    network that computes as in training: with the batch's statistics, and with dropout. No method
    prunes biases, which SNIP's code does.
  """
  end = min(recipe.prune_begin + recipe.prune_epochs, recipe.epochs - 1)
  ramp = {"prune_epochs": end, "ramp": "cubic"}
  trained = 3 * recipe.epochs // 5
  changes = {
    "gmp": ramp,
    "gmp-original": ramp | {"keep_weights": True},
    "one-shot": {
      "prune_begin": trained,
      "prune_epochs": 1,
      "restart_epoch": trained,
      "ramp": "progressive",
    },
    **{score: {"foresight": score} for score in FORESIGHT},
  }
  return {
    f"{prefix}-{method}": dataclasses.replace(dense(recipe), sparsity=recipe.sparsity, **each)
    for method, each in changes.items()
  }


def lottery(
  recipe: Recipe, *, cycles: int, rewind_epoch: int = 0, by_layer: bool, in_all: bool = False
) -> Recipe:
  """Lottery tickets: iterative magnitude pruning with rewinding, in several cycles of training.

  Args:
    recipe: of progressive pruning; each cycle is as long as its training.
    cycles: how many.
    rewind_epoch: see `Recipe`.
    by_layer: whether layers are pruned at rates of their own, a fifth and, in the last one, a
      tenth, as Frankle & Carbin, 2019, prune LeNet; or else all compete for a fifth of all.
    in_all: whether cycles are shorter, so that together they take as many epochs as that training,
      and the rates such that they come to its sparsity; a little less than that with `by_layer`,
      where the last layer is pruned at half the rate.
  """
  found = dataclasses.replace(
    dense(recipe),
    cycles=cycles,
    rewind_epoch=rewind_epoch,
    prune_scope="layer" if by_layer else "global",
  )
  if not in_all:
    return found
  epochs, rest = divmod(recipe.epochs + (cycles - 1) * rewind_epoch, cycles)
  if rest:
    raise ValueError(f"cycles={cycles} do not share {recipe.epochs} epochs out evenly")
  rate = round(1 - (1 - recipe.sparsity) ** (1 / (cycles - 1)), 3)
  return dataclasses.replace(
    found, epochs=epochs, prune_rate=rate, prune_rate_output=round(rate / 2, 3)
  )


def for_lenet(published: Recipe) -> dict[str, Recipe]:
  """LeNet-300-100 at 78.9 and 98 %, in 40 and in 200 epochs, given the published run at 98 %."""
  found = {}
  for sparsity in (0.789, 0.98):
    name = f"lenet300-mnist-{100 * sparsity:g}"
    whole = dataclasses.replace(published, sparsity=sparsity, published=None)
    short = dataclasses.replace(whole, epochs=40, prune_epochs=16)
    in_all = functools.partial(lottery, short, by_layer=True, in_all=True)
    found |= {
      f"{name}-e40-progressive": short,
      **single_cycle(f"{name}-e40", short),
      f"{name}-e40-lth-8x5": in_all(cycles=8),
      f"{name}-e40-lth-rewind-13x4": in_all(cycles=13, rewind_epoch=1),
      **single_cycle(f"{name}-e200", whole),
    }
    # At 98 % it is the published run, and its dense network is there too.
    if sparsity != published.sparsity:
      found[f"{name}-e200-progressive"] = whole
  return {
    **found,
    "lenet300-mnist-e40-dense": dense(short),
    # These come to 78.9 % in the 8th cycle, and to 98.1 % in the 19th.
    "lenet300-mnist-e40-lth": lottery(short, cycles=19, by_layer=True),
    "lenet300-mnist-e40-lth-rewind": lottery(short, cycles=19, rewind_epoch=1, by_layer=True),
    **why_snip_falls_short(found["lenet300-mnist-98-e40-snip"]),
  }


def why_snip_falls_short(recipe: Recipe) -> dict[str, Recipe]:
  """Why SNIP falls short here of what is published of it at 98 % (97.6).

  With the initialisation of progressive pruning logits start large, so that the softmax is
  saturated and the scores are about its mistakes. And so few weights, chosen beforehand, follow
  this augmentation badly.
  """
  plain = Augmentation()
  changes = {
    "own-init": {"model": "lenet300-snip"},
    "plain": {"augmentation": plain},
    "own-init-plain": {"model": "lenet300-snip", "augmentation": plain},
  }
  return {
    f"lenet300-mnist-98-e40-snip-{name}": dataclasses.replace(recipe, **each)
    for name, each in changes.items()
  }


def for_resnet18(recipe: Recipe) -> dict[str, Recipe]:
  """ResNet-18 on CIFAR-10, given the published run at 72.9 %."""
  tickets = functools.partial(lottery, recipe, by_layer=False)
  return {
    **single_cycle("resnet18-cifar10-72.9", recipe),
    # These come to 73.8 % in the 7th cycle.
    "resnet18-cifar10-lth": tickets(cycles=7),
    "resnet18-cifar10-lth-rewind": tickets(cycles=7, rewind_epoch=2),
    "resnet18-cifar10-72.9-lth-8x25": tickets(cycles=8, in_all=True),
    "resnet18-cifar10-72.9-lth-rewind-9x24": tickets(cycles=9, rewind_epoch=2, in_all=True),
  }


def for_vgg19(recipe: Recipe) -> dict[str, Recipe]:
  """VGG-19 on CIFAR-10, given the run at 98 % with a plain cosine."""
  tickets = functools.partial(lottery, recipe, by_layer=False)
  return {
    "vgg19-cifar10-dense": dense(recipe),
    **single_cycle("vgg19-cifar10-98", recipe),
    # These come to 98.2 % in the 19th cycle.
    "vgg19-cifar10-lth": tickets(cycles=19),
    "vgg19-cifar10-lth-rewind": tickets(cycles=19, rewind_epoch=2),
    "vgg19-cifar10-98-lth-8x50": tickets(cycles=8, in_all=True),
    "vgg19-cifar10-98-lth-rewind-7x58": tickets(cycles=7, rewind_epoch=1, in_all=True),
  }
