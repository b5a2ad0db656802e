import math

import pytest

from experiments import benchmark


@pytest.mark.parametrize(
  ("tree", "parameters", "weights"),
  [
    ("lenet300", 266_610, 266_200),
    ("resnet18", 11_173_962, 11_164_352),
    ("resnet50", 25_557_032, 25_502_912),
  ],
)
def test_trees_have_the_published_sizes(tree, parameters, weights):
  shapes = benchmark.shapes_of(tree)
  assert sum(map(math.prod, shapes)) == parameters
  assert sum(math.prod(shape) for shape in shapes if len(shape) >= 2) == weights


@pytest.mark.parametrize("what", ["selection", "step"])
def test_a_table_is_printed(what, capsys):
  benchmark.main([what, "--trees", "lenet300", "--rounds", "1"])
  header, _, *rows = capsys.readouterr().out.splitlines()
  assert len(rows) == (6 if what == "step" else 1)
  for row in rows:
    assert header.count("|") == row.count("|")
    assert row.startswith("| lenet300 |")
    if what == "step":
      assert row.endswith("| 0 |")


def test_training_is_measured_with_and_without_pruning(capsys):
  options = "--recipes lenet300-digits --dtypes float32 bfloat16 --unroll 2 --images 300 --rounds 1"
  benchmark.main(["training", *options.split()])
  header, _, *rows = capsys.readouterr().out.splitlines()
  assert "share of pruning" in header
  for row, dtype in zip(rows, ("float32", "bfloat16")):
    assert row.startswith(f"| lenet300-digits | cpu | {dtype} | 2 |")
    assert header.count("|") == row.count("|")


def test_the_loader_is_measured_on_images_in_the_shape_of_those_of_imagenet(capsys):
  benchmark.main(["loader", "--workers", "0", "--images", "256", "--rounds", "1"])
  header, _, row = capsys.readouterr().out.splitlines()
  assert header.endswith("| images per second |")
  assert row.startswith("| 0 | 256 |") and float(row.split("|")[-2]) > 0


def test_the_work_of_a_network_is_that_of_its_layers():
  recipe = benchmark.RECIPES["lenet300-mnist-98"]
  dataset = benchmark._random_images(2, (28, 28, 1))
  # Two for each weight, and little more.
  assert 2 * 266_200 <= benchmark._forward_flops(recipe, dataset) <= 2.01 * 266_200
