"""What is run: a recipe with a seed, and where its files lie."""

import dataclasses
import math
import pathlib
from typing import Literal

import tyro

from experiments import commands
from experiments.distributed import Distributed, parse_mesh
from experiments.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Run:
  """A recipe, a seed, and where things lie."""

  recipe: Recipe
  name: tyro.conf.Suppress[str]
  seed: int = 42
  """Decides initialisation, split, order and augmentation."""
  data_dir: pathlib.Path | None = None
  """Directory of the data set; see the README."""
  out: pathlib.Path | None = None
  """The run's folder; by default runs/RECIPE/seedSEED, or runs/RECIPE-smoke/seedSEED."""
  checkpoint_every: int = 10
  """Epochs from one checkpoint to the next; there is always one at the end."""
  time_limit: float = math.inf
  """Seconds, compilation included, after which no epoch may end: the run stops before that with a
  checkpoint, from which the same command resumes. It always trains one epoch."""
  device: Literal["any", "cpu", "gpu", "tpu"] = "any"
  """What to train on; it is an error if there is none."""
  deterministic: bool = False
  """Whether a GPU has to give the same bits each time, which is slower."""
  workers: int = 0
  """Processes that decode streamed images; 0: threads of this process do. They change no result."""
  smoke: bool = False
  """Whether to train only a narrow version of the network on 512 images for two epochs a cycle, in
  batches of 64. It takes the place of what is said of these, of the ramp and of the schedule."""
  mesh: str = ""
  """How devices share the work, such as data=4,model=2: four parts of each batch, and two of each
  matrix of parameters. It changes rounding alone, and a run may go on with another one. By default
  one device does all; with --distributed, or if images are streamed, all devices share batches."""
  distributed: Distributed = dataclasses.field(default_factory=Distributed)

  def __post_init__(self):
    commands.check_fields(
      self,
      {
        "seed": (0 <= self.seed < 2**32, "from 0 to 2**32 - 1"),
        "checkpoint_every": (self.checkpoint_every >= 1, "at least 1"),
        "workers": (self.workers >= 0, "at least 0"),
        "time_limit": (self.time_limit > 0, "positive"),
      },
    )
    parse_mesh(self.mesh)

  @property
  def folder(self) -> pathlib.Path:
    name = f"{self.name}-smoke" if self.smoke else self.name
    return self.out or pathlib.Path("runs") / name / f"seed{self.seed}"
