"""Training on a stream of images: batches ahead on the devices, which share each batch.

A step is one program over all of them; batch norm sees whole batches. The host decodes and crops
(see `experiments.imagenet`), the devices do all else.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from experiments import distributed
from experiments.imagenet import Batch, Imagenet, Stream
from experiments.learner import make_learner
from experiments.recipe import Recipe
from experiments.training import Evaluation, Trainer

# So many batches wait on the devices while one is trained on.
_AHEAD = 2


def make_trainer(
  recipe: Recipe,
  dataset: Imagenet,
  seed: int,
  *,
  workers: int = 0,
  mesh: Mesh | None = None,
) -> Trainer:
  """Prepares a run on streamed images.

  Those held out are the first of the data set, whose files are shuffled; on them, and in tests,
  crops are those for testing.

  Args:
    recipe: what to train.
    dataset: on what.
    seed: decides initialisation, order, crops, augmentation and dropout.
    workers: number of processes that decode images; 0: threads of this process do.
    mesh: of the devices that share each batch, by default all of the default device's kind, those
      of other processes included.

  Raises:
    ValueError: if the recipe does not fit the data or the devices.
  """
  if mesh is None:
    mesh = distributed.make_mesh("", jax.devices(jnp.zeros([]).device.platform))
  distributed.check_batch(recipe.batch_size, mesh)
  count = recipe.train_images or dataset.train_size
  if count > dataset.train_size:
    raise ValueError(f"train_images={count} are more than there are, {dataset.train_size}")
  if not recipe.drop_last:
    raise ValueError("drop_last=False, but batches of streamed images must be full: set it to True")
  everywhere, of_batch = distributed.everywhere(mesh), distributed.over_data(mesh)
  stream = functools.partial(
    Stream,
    dataset,
    batch_size=recipe.batch_size,
    image_size=recipe.image_size,
    seed=seed,
    workers=workers,
    shard=distributed.shard_of_process(mesh),
  )
  held_out = round(recipe.validation * count)
  train = stream("train", held_out, count)
  steps = train.full_batches
  if not steps:
    raise ValueError(
      f"batch_size={recipe.batch_size} must not exceed the number of training images, {train.size}"
    )
  init_key, step_key = jax.random.split(jax.random.key(seed))
  image_shape = (recipe.image_size, recipe.image_size, 3)
  learner = make_learner(
    recipe,
    image_shape,
    classes=dataset.classes,
    mean=dataset.mean,
    std=dataset.std,
    steps_per_epoch=steps,
    key=init_key,
  )
  of_state = distributed.over_model(learner.state, mesh)

  def start(variables, masks, step):
    return distributed.place(learner.start(variables, masks, step), of_state)

  def init():
    first = np.zeros([1, *image_shape], np.uint8), np.zeros([1], np.int32)
    if recipe.foresight != "none":
      # The same ones for all processes.
      whole = dataclasses.replace(train.first(recipe.batch_size), shard=(0, 1))
      first = next(whole.in_order())
    return distributed.place(learner.init(*first), of_state)

  on_devices = functools.partial(_put_ahead, sharding=of_batch)

  def step_on(state, pixels, labels, key):
    return learner.train_step(state, learner.prepare(key, state.step, pixels), labels, key)

  change_masks = jax.jit(
    distributed.state_on_mesh(learner.change_masks, of_state, mesh),
    in_shardings=(of_state,),
    out_shardings=of_state,
    donate_argnums=0,
  )
  train_step = jax.jit(
    distributed.on_mesh(step_on, of_state, mesh),
    in_shardings=(of_state, of_batch, of_batch, everywhere),
    out_shardings=(of_state, everywhere),
    donate_argnums=0,
  )
  end = jax.jit(learner.end, static_argnums=2, out_shardings=everywhere)

  def make_epoch(change_fn, step_fn):
    def epoch(state, train):
      number = int(state.step) // steps
      start = jax.random.fold_in(step_key, number), jnp.zeros(2)
      key, sums = distributed.place(start, everywhere)
      state = change_fn(state)
      for pixels, labels in on_devices(train.shuffled(number)):
        state, of_step = step_fn(state, pixels, labels, key)
        sums += of_step
      return state, end(state, sums, steps * recipe.batch_size)

    return epoch

  def compile_epoch():
    pixels = jax.ShapeDtypeStruct([recipe.batch_size, *image_shape], jnp.uint8)
    labels = jax.ShapeDtypeStruct([recipe.batch_size], jnp.int32)
    return make_epoch(
      change_masks.lower(learner.state).compile(),
      train_step.lower(learner.state, pixels, labels, step_key).compile(),
    )

  @functools.partial(
    jax.jit,
    in_shardings=(everywhere, of_state, of_batch, of_batch),
    out_shardings=everywhere,
  )
  def judge(found, state, pixels, labels):
    """The number of right answers; and the bounds of each logit, without those of the padding."""
    correct, lowest, highest = found
    state = distributed.constrain(state, distributed.within_programs(of_state, mesh))
    logits, real = learner.network(state)(pixels), labels[:, None] >= 0
    return (
      correct + jnp.sum(jnp.argmax(logits, axis=-1) == labels),
      jnp.minimum(lowest, jnp.min(jnp.where(real, logits, jnp.inf), axis=0)),
      jnp.maximum(highest, jnp.max(jnp.where(real, logits, -jnp.inf), axis=0)),
    )

  def evaluate(state, images):
    # One program after the other, or processes would mix up what they send each other in two.
    found = np.int32(0), *np.full([2, dataset.classes], [[np.inf], [-np.inf]], np.float32)
    for batch in on_devices(images.in_order()):
      found = judge(found, state, *batch)
    correct, lowest, highest = jax.device_get(found)
    return Evaluation(
      accuracy=np.float32(correct / images.size), constant=np.all(lowest == highest)
    )

  return Trainer(
    steps_per_epoch=steps,
    classes=dataset.classes,
    init=init,
    start=start,
    tx=learner.tx,
    epoch=make_epoch(change_masks, train_step),
    steps_are_calls=True,
    compile_epoch=compile_epoch,
    evaluate=evaluate,
    validate=evaluate,
    train=train,
    held_out=stream("train", 0, held_out),
    test=stream("validation", 0, dataset.test_size),
    mesh=mesh,
  )


def _put_ahead(
  batches: Iterable[Batch], sharding: NamedSharding
) -> Iterator[tuple[jax.Array, ...]]:
  """Puts each process's batches onto its devices, as parts of one, before they are asked for."""
  waiting = collections.deque()
  for batch in batches:
    waiting.append(tuple(jax.make_array_from_process_local_data(sharding, part) for part in batch))
    if len(waiting) > _AHEAD:
      yield waiting.popleft()
  yield from waiting
