"""Other methods in place of progressive pruning, on equal terms with a recipe of it."""

import dataclasses

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
    at one batch of training images as they are, and at the very weights that are trained then.
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
      and the rates such that they come to its sparsity.
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
