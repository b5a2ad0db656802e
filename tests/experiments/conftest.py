"""What tests of whole runs share."""

import dataclasses
import functools

import pytest

from experiments import data, train


@pytest.fixture(scope="module")
def trainers():
  """Gives all runs of a module that have the same recipe, seed and data one trainer.

  Most of the time of a short run goes into what its trainer traces and compiles. These trainers are
  in a dictionary: once it is cleared, the next run is traced anew, as in another process.
  """
  make, made = train.make_trainer, {}

  def make_or_find(run, mesh):
    # Tests put other data in the place of those that are loaded.
    key = run.recipe, run.seed, data.load, run.data_dir, mesh
    if key not in made:
      trainer = make(run, mesh)
      made[key] = dataclasses.replace(trainer, compile_epoch=functools.cache(trainer.compile_epoch))
    return made[key]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train, "make_trainer", make_or_find)
    yield made
