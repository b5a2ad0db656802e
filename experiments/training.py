"""The jitted epoch: data on the device, and augmentation and optimizer steps in one program.

Only networks with convolutions are called step by step on a CPU: see `compile_epoch`. Images that
no memory holds are streamed instead: see `experiments.streaming`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh

from experiments import distributed
from experiments.data import Dataset
from experiments.imagenet import Stream
from experiments.learner import EpochMetrics, TrainState, make_learner
from experiments.methods import Variables
from experiments.recipe import Recipe

# On a GPU or a TPU, images of so many steps are augmented at once, before an epoch's first step:
# those of one are so few that most of the time would go into the launches of small programs. All of
# an epoch are then in memory, in the type that the network computes with: 273 MB of CIFAR-10 in
# bfloat16, and as often as there are runs side by side.
_PREPARED_TOGETHER = 32


class Images(NamedTuple):
  """A set of labelled images on the device.

  Their key is among them, and no constant of what is compiled, which is the same for all seeds.
  """

  pixels: jax.Array  # of the whole data set: shape=(all, height, width, channels), dtype=uint8
  index: jax.Array  # where in it the images of this set are: shape=(count,), dtype=int32
  labels: jax.Array  # shape=(count,), dtype=int32
  key: jax.Array  # of their order and augmentation

  @property
  def size(self) -> int:
    return self.labels.size

  def first(self, count: int) -> "Images":
    """The first so many of them."""
    return self._replace(index=self.index[:count], labels=self.labels[:count])


class Evaluation(NamedTuple):
  """What a network does on a set of images; scalars."""

  accuracy: jax.Array  # in [0, 1]
  constant: jax.Array  # whether its output is the same for every image: its units are dead


@dataclasses.dataclass(frozen=True)
class Trainer:
  """A recipe on a data set with a seed: its jitted functions and its first state.

  Attributes:
    steps_per_epoch: number of optimizer steps.
    classes: number of classes.
    init: returns the state before the first epoch; of several sparsities, that of an index.
    start: (parameters and running statistics, masks, step) -> state, with a fresh optimizer.
    tx: the optimizer of its states; not the masks and the key that they start with.
    epoch: the function (state, training images) -> (state, EpochMetrics), as it is.
    steps_are_calls: whether `compile_epoch` makes a call from Python of each step.
    compile_epoch: compiles and returns it. It uses the state's buffers for its result then.
    evaluate: (state, images) -> Evaluation, on the images as they are.
    validate: (state, images) -> Evaluation, on augmented images, the same ones each time.
    train: training images.
    held_out: validation images; there may be none.
    test: test images, for the end.
    mesh: of the devices that share batches and parameters; None: all is on one device.
  """

  steps_per_epoch: int
  classes: int
  init: Callable[..., TrainState]
  start: Callable[..., TrainState]
  tx: optax.GradientTransformation
  epoch: Callable[..., tuple[TrainState, EpochMetrics]]
  steps_are_calls: bool
  compile_epoch: Callable[[], Callable[..., tuple[TrainState, EpochMetrics]]]
  evaluate: Callable[..., Evaluation]
  validate: Callable[..., Evaluation]
  train: Images | Stream
  held_out: Images | Stream
  test: Images | Stream
  mesh: Mesh | None


def make_trainer(
  recipe: Recipe,
  dataset: Dataset,
  seed: int,
  *,
  unroll: int = 1,
  sparsities: tuple[float, ...] = (),
  mesh: Mesh | None = None,
) -> Trainer:
  """Prepares a run.

  Args:
    recipe: what to train.
    dataset: on what.
    seed: decides initialisation, split, order, augmentation and dropout.
    unroll: so many steps of an epoch are written out in one turn of its loop.
    sparsities: that states may have, each its own, in place of the recipe's.
    mesh: as of `distributed.make_mesh`; each device has all images, and computes with a part of
      each batch.

  Raises:
    ValueError: if there are fewer training images than are asked for or than a batch takes, if
      they are too small for the network, or if a batch does not fit the mesh.
  """
  distributed.check_batch(recipe.batch_size, mesh)
  init_key, data_key, held_out_key = jax.random.split(jax.random.key(seed), 3)
  split = np.random.default_rng(seed).permutation(len(dataset.train_labels))
  if recipe.train_images > len(split):
    raise ValueError(f"train_images={recipe.train_images} are more than there are, {len(split)}")
  if recipe.train_images:
    split = split[: recipe.train_images]
  held_out = round(recipe.validation * len(split))
  count, batch = len(split) - held_out, recipe.batch_size
  if batch > count:
    raise ValueError(f"batch_size={batch} must not exceed the number of training images, {count}")
  full, rest = divmod(count, batch)
  rest = 0 if recipe.drop_last else rest
  steps = full + (rest > 0)
  everywhere, of_batch = distributed.everywhere(mesh), distributed.over_data(mesh)

  def images(pixels, labels, key, index):
    labels = jnp.asarray(labels[index], jnp.int32)
    arrays = jnp.asarray(index, jnp.int32), labels, key
    return Images(pixels, *distributed.place(arrays, everywhere))

  train_pixels = distributed.place(jnp.asarray(dataset.train_images), everywhere)
  train = images(train_pixels, dataset.train_labels, data_key, split[held_out:])
  learner = make_learner(
    recipe,
    train_pixels.shape[1:],
    classes=dataset.classes,
    mean=dataset.mean,
    std=dataset.std,
    steps_per_epoch=steps,
    key=init_key,
    sparsities=sparsities,
  )
  # XLA's CPU backend runs gradients of convolutions 40 times slower in a loop than outside of one
  # (https://github.com/jax-ml/jax/issues/12868), so there each step is a call from Python.
  on_cpu = _is_on_cpu(train.labels)
  steps_are_calls = on_cpu and _has_convolutions(learner.model, learner.variables, train)
  of_state = mesh and distributed.over_model(learner.state, mesh)
  whole = distributed.within_programs(of_state, mesh)
  shared_step = distributed.on_mesh(learner.train_step, of_state, mesh)
  change_masks = distributed.state_on_mesh(learner.change_masks, of_state, mesh)

  def start(variables, masks, step):
    return distributed.place(learner.start(variables, masks, step), of_state)

  def init(index=0):
    first = learner.init(train.pixels[train.index[:batch]], train.labels[:batch], index)
    return distributed.place(first, of_state)

  def begin(state, key):
    """The state with the masks of the coming epoch, its key, and the order of its images."""
    order_key, step_key = jax.random.split(jax.random.fold_in(key, state.step // steps))
    return change_masks(state), step_key, jax.random.permutation(order_key, count)

  def prepare(train, key, step, index):
    pixels = distributed.constrain(train.pixels[train.index[index]], of_batch)
    return learner.prepare(key, step, pixels)

  def train_step(state, train, key, index, inputs=None):
    if inputs is None:
      inputs = prepare(train, key, state.step, index)
    return shared_step(state, inputs, train.labels[index], key)

  def end(state, sums):
    return learner.end(state, sums, full * batch + rest)

  def epoch(state, train):
    state, key, order = begin(state, train.key)
    index, inputs = order[: full * batch].reshape(full, batch), None
    if not on_cpu:
      numbers = state.step + jnp.arange(full)
      inputs = jax.lax.map(
        lambda each: prepare(train, key, *each), (numbers, index), batch_size=_PREPARED_TOGETHER
      )
    state, sums = jax.lax.scan(
      lambda state, each: train_step(state, train, key, *each),
      state,
      (index, inputs),
      unroll=unroll,
    )
    sums = jnp.sum(sums, axis=0)
    if rest:
      state, of_the_rest = train_step(state, train, key, order[full * batch :])
      sums += of_the_rest
    return state, end(state, sums)

  def compile_epoch():
    state = learner.state
    after_step = dict(out_shardings=(of_state, everywhere), donate_argnums=0)
    if not steps_are_calls:
      in_shardings = (of_state, everywhere)
      return jax.jit(epoch, in_shardings=in_shardings, **after_step).lower(state, train).compile()
    _, key, order = jax.eval_shape(begin, state, train.key)
    step = jax.jit(train_step, in_shardings=(of_state, *[everywhere] * 3), **after_step)
    step_of = {
      size: step.lower(state, train, key, jax.ShapeDtypeStruct([size], order.dtype)).compile()
      for size in {batch, rest} - {0}
    }
    first = jax.jit(
      begin,
      in_shardings=(of_state, everywhere),
      out_shardings=(of_state, everywhere, everywhere),
      donate_argnums=0,
    )
    first = first.lower(state, train.key).compile()
    last = jax.jit(end, in_shardings=(of_state, everywhere), out_shardings=everywhere)
    last = last.lower(state, jax.ShapeDtypeStruct([2], jnp.float32)).compile()

    def epoch_of_calls(state, train):
      state, key, order = first(state, train.key)
      sums = distributed.place(jnp.zeros(2), everywhere)
      for start in range(0, full * batch + rest, batch):
        index = order[start : min(start + batch, full * batch + rest)]
        state, of_step = step_of[index.size](state, train, key, index)
        sums += of_step
      return state, last(state, sums)

    return epoch_of_calls

  def evaluate(state, images, augmented):
    # In batches of a thousand, so that no network needs memory for all images at once.
    size = images.labels.size
    batches = -(-size // 1000)
    index = jnp.pad(jnp.arange(size), (0, batches * 1000 - size)).reshape(batches, 1000)
    network = learner.network(distributed.constrain(state, whole))

    def logits_of_batch(inputs):
      index, key = inputs
      pixels = distributed.constrain(images.pixels[images.index[index]], of_batch)
      return network(augmented(key, pixels))

    keys = jax.random.split(images.key, batches)
    out = jax.lax.map(logits_of_batch, (index, keys)).reshape(-1, dataset.classes)[:size]
    return Evaluation(
      accuracy=jnp.mean(jnp.argmax(out, axis=-1) == images.labels),
      constant=jnp.all(out == out[0]),
    )

  judge = functools.partial(jax.jit, out_shardings=everywhere)
  return Trainer(
    steps_per_epoch=steps,
    classes=dataset.classes,
    init=init,
    start=start,
    tx=learner.tx,
    epoch=epoch,
    steps_are_calls=steps_are_calls,
    compile_epoch=compile_epoch,
    evaluate=judge(lambda state, images: evaluate(state, images, lambda key, x: x)),
    # As published: the validation images pass through the augmentation too.
    validate=judge(lambda state, images: evaluate(state, images, learner.augment)),
    train=train,
    held_out=images(train_pixels, dataset.train_labels, held_out_key, split[:held_out]),
    test=images(
      distributed.place(jnp.asarray(dataset.test_images), everywhere),
      dataset.test_labels,
      held_out_key,
      np.arange(len(dataset.test_labels)),
    ),
    mesh=mesh,
  )


def _is_on_cpu(array: jax.Array) -> bool:
  return all(device.platform == "cpu" for device in array.devices())


def _has_convolutions(model: nn.Module, variables: Variables, train: Images) -> bool:
  pixels = jax.ShapeDtypeStruct([1, *train.pixels.shape[1:]], jnp.float32)
  return "conv_general_dilated" in str(jax.make_jaxpr(model.apply)(variables, pixels))
