"""Recipes of dynamic sparse training, by name: published ones, and those on equal terms."""

import dataclasses

from experiments.augment import Augmentation
from experiments.recipe import Dynamic, Published, Recipe

DROP = ("magnitude", "each_sign", "mest", "snip", "reciprocal_sensitivity")
GROW = ("random", "gradient")
DENSITIES = (0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)


def on_equal_terms(prefix: str, recipe: Recipe) -> dict[str, Recipe]:
  """Other methods with the data, network, optimizer and epochs of one of progressive pruning.

  Their names are the prefix and the method. Masks change once an epoch; all start with ERK:

  - "granet", "granet-sparse": GraNet from dense and from half of the weights, with the ramp of the
    given recipe; it regenerates half of the weights at first, as published, and 0.5 % at last;
  - "rigl": 30 % at first, falling to 0 after three quarters of the training;
  - "set": 30 % throughout;
  - "snfs": 50 % at first, falling to 0.5 %, shared out anew among layers;
  - "static": none.
  """
  granet = dataclasses.replace(recipe, ramp="cubic", dynamic=Dynamic("granet", last_fraction=0.005))
  changes = {
    "rigl": Dynamic("rigl", fraction=0.3, stop=0.75),
    "set": Dynamic("set", fraction=0.3, last_fraction=0.3),
    "snfs": Dynamic("snfs", last_fraction=0.005),
    "static": Dynamic("static"),
  }
  return {
    f"{prefix}-granet": dataclasses.replace(granet, initial_sparsity=0.0),
    f"{prefix}-granet-sparse": dataclasses.replace(granet, initial_sparsity=0.5),
    **{
      f"{prefix}-{method}": dataclasses.replace(
        recipe, dynamic=dynamic, prune_begin=0, prune_epochs=0, initial_sparsity=0.0
      )
      for method, dynamic in changes.items()
    },
  }


def criteria_grid(prefix: str, recipe: Recipe) -> dict[str, Recipe]:
  """Five criteria to drop by and two to grow by, as in Fantastic Weights; static; and dense.

  Their names are the prefix and "DROP-GROW", "static" or "dense". They have 95 % of zeros; the
  tables run them at other sparsities too.
  """
  grid = {
    f"{drop.replace('_', '-')}-{grow}": dataclasses.replace(
      recipe.dynamic, method="criteria", drop=drop, grow=grow
    )
    for drop in DROP
    for grow in GROW
  }
  grid["static"] = dataclasses.replace(recipe.dynamic, method="static")
  return {
    **{
      f"{prefix}-{name}": dataclasses.replace(recipe, sparsity=0.95, dynamic=dynamic)
      for name, dynamic in grid.items()
    },
    f"{prefix}-dense": recipe,
  }


# Nowak et al., "Fantastic Weights and How to Find Them", 2023 (arXiv 2306.12230), as in the
# specifications of its code; no table of accuracies is published.
# DEVIATIONS: exactly as many weights are active in each layer as ERK says (there, each is drawn by
# itself), and exactly as many grow at random as were dropped (there, as many on average); SET drops
# no weight more where the number is odd. Images are normalised as everywhere here (there, CIFAR-10
# by other deviations, and Fashion-MNIST by 0.5 and 0.5) and cropped with a margin of zeros (there,
# of reflections), and those held out are drawn by seed (there, the last ones). The small ConvNet
# has the layers that its code has, and so 94,538 parameters (a comment there says 95,818).
_FANTASTIC = Recipe(
  data="cifar10",
  model="mlp",
  epochs=100,
  learning_rate=0.01,
  milestones=(50, 75),
  nesterov=True,
  weight_decay=5e-4,
  validation=0.1,
  dynamic=Dynamic(fraction=0.5, last_fraction=0.005, every=800),
)
_CIFAR_CROPS = Augmentation(crop=4, flip=True)
_CIFAR = dataclasses.replace(_FANTASTIC, augmentation=_CIFAR_CROPS)

# Liu et al., "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration", 2021 (arXiv
# 2106.10404), GraNet on CIFAR: 160 epochs, masks change every 1000 steps, the ramp ends with epoch
# 80. Its VGG-19 is that of GraSP. The paper reports the epoch that is best on the test set; here it
# is the last.
# DEVIATIONS: bfloat16; the ramp reaches the final sparsity (there, it stops one change before), and
# exactly as many weights are left as it asks for. On CIFAR-10, images are normalised as everywhere
# here (there, by other deviations) and cropped with a margin of zeros (there, of reflections), and
# those held out are drawn by seed (there, the last ones).
_GRANET = Recipe(
  data="cifar10",
  model="vgg19-grasp",
  dtype="bfloat16",
  epochs=160,
  learning_rate=0.1,
  milestones=(80, 120),
  nesterov=True,
  weight_decay=5e-4,
  validation=0.1,
  sparsity=0.9,
  prune_epochs=80,
  ramp="cubic",
  augmentation=_CIFAR_CROPS,
  dynamic=Dynamic("granet", last_fraction=0.005, every=1000),
)

# Evci et al., "Rigging the Lottery", 2020 (arXiv 1911.11134), WRN-22-2 on CIFAR-10: 250 epochs,
# masks change every 100 steps until 75,000 of 97,656; ERK. The author's accuracies at 50, 80, 90
# and 95 % are .942, .936, .929 and .918.
# DEVIATIONS: bfloat16; the first convolution is sparse too; the learning rate falls after epochs
# 77, 154 and 230 (there after 30,000, 60,000 and 90,000 steps); steps at which masks change count.
_RIGL = Recipe(
  data="cifar10",
  model="wrn-22-2",
  dtype="bfloat16",
  epochs=250,
  learning_rate=0.1,
  milestones=(77, 154, 230),
  milestone_factor=0.2,
  nesterov=True,
  weight_decay=5e-4,
  validation=0.0,
  sparsity=0.9,
  augmentation=_CIFAR_CROPS,
  dynamic=Dynamic("rigl", fraction=0.3, every=100, stop=0.768),
)

# Liu et al., 2021, GraNet, ResNet-50 on ImageNet in 100 epochs: 76.0 % at 80 % and 74.5 % at 90 %,
# from half of the weights; masks change every 4000 steps, the ramp ends with epoch 30.
# DEVIATIONS: those of GraNet above but for its images, and besides: bfloat16; batch norm sees the
# whole batch (there, the halves on two GPUs, each with a random start of its own); convolutions
# start from fan_out (there, fan_in); 1,281,152 images an epoch (there, 15 more in a last batch);
# what is regenerated falls from half to 0.5 % along a cosine, as on CIFAR.
# Weight decay spares the parameters of batch norm but for those in shortcuts, as it does there.
_IMAGENET = Recipe(
  data="imagenet2012",
  model="resnet50-imagenet",
  dtype="bfloat16",
  epochs=100,
  learning_rate=0.1,
  milestones=(30, 60, 90),
  warmup_epochs=5,
  weight_decay=1e-4,
  undecayed="(^|/)(stem_norm|norm[123])/",
  label_smoothing=0.1,
  drop_last=True,
  validation=0.0,
)


def on_imagenet() -> dict[str, Recipe]:
  """GraNet from half of the weights and from all, its GMP, and the dense network.

  GMP is what GraNet is without regeneration: the same ramp from the dense network, at the same
  steps.
  """
  found = {"resnet50-imagenet-dense": _IMAGENET}
  for sparsity, accuracy in ((0.8, 76.0), (0.9, 74.5)):
    from_dense = dataclasses.replace(
      _IMAGENET,
      sparsity=sparsity,
      prune_epochs=30,
      ramp="cubic",
      dynamic=Dynamic("granet", last_fraction=0.005, every=4000),
    )
    granet = f"resnet50-imagenet-granet-{100 * sparsity:g}"
    found[f"{granet}-dense-to-sparse"] = from_dense
    found[granet] = dataclasses.replace(
      from_dense, initial_sparsity=0.5, published=Published(accuracy)
    )
    found[f"resnet50-imagenet-gmp-{100 * sparsity:g}"] = dataclasses.replace(
      from_dense, dynamic=Dynamic("granet", fraction=0.0, every=4000)
    )
  return found


def published() -> dict[str, Recipe]:
  """GraNet's, RigL's, and the grids of Fantastic Weights; on ImageNet, GraNet's."""
  found = {}
  for data in ("cifar10", "cifar100"):
    for name, model in (("vgg19", "vgg19-grasp"), ("resnet50", "resnet50")):
      dense_to_sparse = dataclasses.replace(_GRANET, data=data, model=model)
      # All of CIFAR-100's training images are trained on.
      dense_to_sparse = dataclasses.replace(
        dense_to_sparse, validation=0.1 if data == "cifar10" else 0.0
      )
      found[f"{name}-{data}-granet"] = dense_to_sparse
      found[f"{name}-{data}-granet-sparse"] = dataclasses.replace(
        dense_to_sparse, initial_sparsity=0.5
      )
  # Progressive pruning in the training of GraNet, over all of its ramp, for comparison.
  found["vgg19-cifar10-progressive"] = dataclasses.replace(
    _GRANET, ramp="progressive", dynamic=Dynamic()
  )
  found["wrn-22-2-cifar10-rigl"] = _RIGL
  for method, dynamic in (
    ("set", Dynamic("set", fraction=0.3, last_fraction=0.3, every=100, stop=0.768)),
    ("static", Dynamic("static")),
  ):
    found[f"wrn-22-2-cifar10-{method}"] = dataclasses.replace(_RIGL, dynamic=dynamic)
  resnet = dict(model="resnet56", epochs=200, milestones=(100, 150), learning_rate=0.1)
  grids = {
    "mlp-cifar10": _CIFAR,
    "convnet-small-cifar10": dataclasses.replace(_CIFAR, model="convnet-small"),
    "lenet5-fashion": dataclasses.replace(
      _FANTASTIC, data="fashion_mnist", model="lenet5-caffe-torch"
    ),
    "resnet56-cifar10": dataclasses.replace(_CIFAR, **resnet, weight_decay=1e-4),
  }
  for prefix, recipe in grids.items():
    found |= criteria_grid(prefix, recipe)
  return found | on_imagenet()


def lenet_grid() -> dict[str, Recipe]:
  """The grid of Fantastic Weights on LeNet-300-100 and MNIST, in a fifth of its epochs.

  Masks change as often as there, so that the steps between two changes are a fifth too.
  """
  recipe = dataclasses.replace(
    _FANTASTIC,
    data="mnist",
    model="lenet300",
    epochs=20,
    milestones=(10, 15),
    dynamic=dataclasses.replace(_FANTASTIC.dynamic, every=160),
  )
  return criteria_grid("lenet300-mnist-e20", recipe)
