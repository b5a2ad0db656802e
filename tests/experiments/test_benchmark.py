import collections
import functools
import json
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sparsejax
from experiments.benchmark import (
  command,
  communication,
  devices,
  figures,
  growth,
  inference,
  networks,
  report,
  steps,
  timing,
  trees,
)
from experiments.recipes import RECIPES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """What `all` leaves behind on two tiny trees."""
  out = tmp_path_factory.mktemp("benchmark")
  options = (
    "--trees convnet-small lenet300 --methods progressive --mesh-trees lenet300 --devices 1 2"
    " --abstract-trees lenet300 --recipes lenet300-digits --batch-size 4 --rounds 1"
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(trees.TREES, "convnet-small", lambda: [(64, 32)])
    patch.setitem(trees.TREES, "lenet300", lambda: [(64, 64), (64,)])
    command.main(["all", *options.split(), "--out", str(out)])
  return out


@pytest.fixture
def record(folder):
  return json.loads((folder / "benchmark.json").read_text())


@pytest.mark.parametrize(
  ("tree", "parameters", "weights", "leaves"),
  [
    ("convnet-small", 94_538, 94_304, 8),
    ("lenet300", 266_610, 266_200, 6),
    ("resnet18", 11_173_962, 11_164_352, 62),
    ("resnet50", 25_557_032, 25_502_912, 161),
    ("gpt2", 124_439_808, 124_318_464, 148),
    ("gpt-1b", 1_011_476_480, 1_010_993_152, 220),
  ],
)
def test_trees_have_the_published_sizes(tree, parameters, weights, leaves):
  found = trees.sizes_of(trees.shapes_of(tree))
  assert found == {"parameters": parameters, "weights": weights, "leaves": leaves}


def test_all_writes_a_report_that_is_made_of_its_json_alone(folder, record):
  assert (folder / "benchmark.md").read_text() == report.to_markdown(record)
  assert record["commit"] and record["versions"]["jax"] == jax.__version__
  assert record["hardware"]["platform"] == "cpu"
  assert {name: len(rows) for name, rows in record["measured"].items()} == {
    "selection": 2,  # trees
    "step": 2,
    "network": 1,
    "devices": 4,  # two numbers, and two placements
    "abstract": 1,
  }
  for name, rows in record["measured"].items():
    rounds = 6 if name == "network" else 1
    for row in rows:
      for times in row.get("seconds", {}).values():
        assert len(times) == rounds and min(times) > 0


def test_tables_are_rectangular_and_grow_with_what_was_measured(record):
  text = report.to_markdown(record)
  for block in text.split("\n\n"):
    assert len({line.count("|") for line in block.splitlines()}) == 1 or "|" not in block
  assert (
    "| time per weight, ns | convnet-small (0.00205 M) | lenet300 (0.0041 M) | the whole" in text
  )
  assert "| tree | method | each has | quantity | 1 | 2 |" in text
  for row in record["measured"].values():
    del row[1:]
  assert "the whole grows as" not in report.to_markdown(record)


def test_a_difference_that_noise_made_negative_grows_as_nothing(record):
  for row in figures.progressive_steps(record):
    row["seconds"] |= {"kept": [2e-3], "changed": [1e-3], "bare": [row["weights"] * 1e-9]}
  lines = report.to_markdown(record).splitlines()
  (update,) = (line for line in lines if line.startswith("| mask update | -"))
  assert update.endswith(" | - |")
  (bare,) = (line for line in lines if line.startswith("| bare step | 1 | 1 |"))
  assert bare.endswith(" | N^1.00 |")


@pytest.mark.parametrize(
  ("readings", "verdict"), [(11.9, "reached"), (12.1, "missed")], ids=["under", "over"]
)
def test_a_verdict_is_computed_from_the_times(record, readings, verdict):
  (row,) = figures.progressive_steps(record)[:1]
  row["seconds"] |= {
    "reading": [1e-3, 1.0],
    "kept": [1.0, 1.0],
    "changed": [1 + readings / 1e3, 1.0],
  }
  row["seconds"] = {name: times[:1] for name, times in row["seconds"].items()}
  line = next(line for line in report.to_markdown(record).splitlines() if "readings" in line)
  assert line.endswith(f"| convnet-small | {readings} | {verdict} |")


def test_what_was_not_measured_is_said_to_be_not_run(record):
  lines = report.to_markdown(record).splitlines()
  assert any("argsort | - | - | not run |" in line for line in lines)
  assert lines[-1] == "Not run: the device is a cpu."


def test_on_a_gpu_bytes_to_move_are_set_against_the_bandwidth_of_a_copy(record):
  record["hardware"]["platform"] = "gpu"
  record["measured"]["selection"] = []
  (row,) = record["measured"]["step"] = record["measured"]["step"][:1]
  row |= {"parameters": 1_000_000, "weights": 900_000}
  row["bare"]["state_bytes"], row["pruned"]["state_bytes"] = 4_000_000, 4_900_000
  # 8 MB in 1 ms.
  row["seconds"] |= {"copy": [1e-3], "bare": [5e-3], "kept": [5e-3], "changed": [6.35e-3]}
  text = report.to_markdown(record)
  assert "| bare step | 8 GB/s | 20.0 MB | 5 ms | 50 % |" in text
  assert "| steady step, progressive | 8 GB/s | 20.9 MB | 5 ms | 52 % |" in text
  # The weights, and their masks in and out.
  assert "| mask update, progressive | 8 GB/s | 5.4 MB | 1.35 ms | 50 % |" in text
  # Small trees are bound by launches there, and have no target.
  assert "readings of the weights' memory | - | - | not run |" in text


def test_a_single_measurement_prints_its_tables_only(capsys):
  options = "--trees lenet300 --methods progressive-packed --lengths 2 --rounds 1"
  command.main(["step", *options.split()])
  lines = capsys.readouterr().out.splitlines()
  titles = [line for line in lines if line.startswith("## ")]
  assert titles[:4] == ["## Mask update", "## Steady step", "## Memory", "## Compile time"]
  # One bit for each weight, and a count.
  memory = lines[lines.index("## Memory") + 6]
  assert memory.startswith("| lenet300 | progressive-packed | 2 |")
  assert memory.endswith("| 0.127 |")


def test_training_is_measured_with_and_without_pruning(capsys):
  options = "--recipes lenet300-digits --dtypes float32 bfloat16 --unroll 2 --images 300 --rounds 1"
  command.main(["training", *options.split()])
  lines = capsys.readouterr().out.splitlines()
  rows = lines[lines.index("## Epochs of training") + 6 :][:2]
  for row, dtype in zip(rows, ("float32", "bfloat16")):
    assert row.startswith(f"| lenet300-digits | cpu | {dtype} | 2 |")


def test_the_loader_is_measured_on_images_in_the_shape_of_those_of_imagenet(capsys):
  command.main(["loader", "--workers", "0", "--images", "256", "--rounds", "1"])
  row = capsys.readouterr().out.splitlines()[-1]
  assert row.startswith("| 0 | 256 |") and float(row.split("|")[-2]) > 0


def test_a_convolution_works_at_each_position_of_its_output():
  recipe = RECIPES["resnet20-cifar10-short"]
  dataset = networks.random_images(2, (32, 32, 3))
  stages = [(3 * 16, 32), *[(16 * 16, 32)] * 6]
  stages += [(16 * 32, 16), *[(32 * 32, 16)] * 5, (32 * 64, 8), *[(64 * 64, 8)] * 5]
  work = sum(9 * pairs * side**2 for pairs, side in stages)
  work += 16 * 32 * 16**2 + 32 * 64 * 8**2 + 64 * 10  # Shortcuts, and the classifier.
  assert networks.forward_flops(recipe, dataset) == 2 * work


def test_the_work_of_a_network_is_that_of_its_layers():
  recipe = RECIPES["lenet300-mnist-98"]
  dataset = networks.random_images(2, (28, 28, 1))
  assert networks.forward_flops(recipe, dataset) == 2 * 266_200


@pytest.mark.parametrize("name", ["fixed", "progressive", "granet", "rigl"])
def test_masks_change_at_due_calls_and_at_no_others(name):
  method, params = steps.METHODS[name], trees.random_leaves([(24, 16)])
  tx = method.make(0.5, params)
  update = jax.jit(
    lambda state, call: tx.update(params, optax.tree.set(state, count=call), params)[1]
  )
  state = tx.init(params)

  def pruned_after(calls):
    nonlocal state
    before = sparsejax.get_masks(state, params)
    state = update(state, *calls)
    after = sparsejax.get_masks(state, params)
    return not np.array_equal(before[0], after[0])

  due = steps.due_calls()
  assert not pruned_after(steps.idle_calls())
  assert pruned_after(next(due)) == method.changes
  assert not pruned_after(steps.idle_calls())


def test_what_takes_long_has_fewer_rounds_but_two(monkeypatch):
  clock = [0.0]
  monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
  calls = collections.Counter()

  def function(name, seconds):
    def call():
      clock[0] += seconds
      calls[name] += 1

    return call

  lengths = {"short": 2**-6, "long": 4.0, "very long": 30.0}
  times = timing.take_turns({name: function(name, s) for name, s in lengths.items()}, rounds=5)
  assert {name: len(each) for name, each in times.items()} == {
    "short": 5,
    "long": 3,
    "very long": 2,
  }
  for name, each in times.items():
    assert each == pytest.approx([lengths[name]] * len(each))
  # As many calls in a turn as take 0.05 s, after four that are not counted; or one after one.
  assert calls == {"short": 4 + 5 * 4, "long": 1 + 3, "very long": 1 + 2}


@pytest.fixture
def cache(tmp_path):
  """A folder where JAX keeps what it compiles."""
  before = (
    jax.config.jax_compilation_cache_dir,
    jax.config.jax_persistent_cache_min_compile_time_secs,
  )
  _set_cache(str(tmp_path), 0)
  yield tmp_path
  _set_cache(*before)


def _set_cache(folder, seconds):
  jax.config.update("jax_compilation_cache_dir", folder)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
  compilation_cache.reset_cache()


def test_every_other_round_goes_backwards():
  turns = []

  def turn(name):
    time.sleep(0.06)  # As long as a turn is, so that it is one call.
    turns.append(name)

  times = timing.take_turns({name: functools.partial(turn, name) for name in "abc"}, rounds=2)
  assert {name: len(each) for name, each in times.items()} == {"a": 2, "b": 2, "c": 2}
  assert turns[-6:] == list("abccba")


def test_a_compilation_starts_from_nothing_and_leaves_nothing(cache):
  traced = []

  def double(x):
    traced.append(x)
    return 2 * x

  _, seconds = timing.compile_afresh(double, 1.0, rounds=3)
  assert len(seconds) == len(traced) == 3 and min(seconds) > 0
  assert not list(cache.iterdir())
  jax.clear_caches()
  jax.jit(double).lower(1.0).compile()
  assert list(cache.iterdir())
  # What is there now is not read.
  events = []
  listen = lambda event, **_: events.append(event.split("/")[-1])
  jax.monitoring.register_event_listener(listen)
  try:
    timing.compile_afresh(double, 1.0)
    assert "cache_hits" not in events
    jax.clear_caches()
    jax.jit(double).lower(1.0).compile()
    assert "cache_hits" in events
  finally:
    jax.monitoring.unregister_event_listener(listen)


def test_bytes_are_counted_in_each_pass_of_a_loop_and_outside_of_loops():
  mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))

  def double_until(x, n):
    doubled = jax.lax.while_loop(lambda x: jnp.sum(x) < n, lambda x: 2 * x, x)
    return jax.lax.with_sharding_constraint(doubled, NamedSharding(mesh, P()))

  x = jax.device_put(jnp.ones((1024, 8)), NamedSharding(mesh, P("data")))
  found = communication.bytes_sent(jax.jit(double_until).lower(x, 1e6).compile())
  # In each pass the sum, a float32; after the last, the whole array.
  assert found == {"operations": 2, "once": 4 * 1024 * 8, "each_pass": 4}


def test_devices_that_are_missing_are_simulated_in_another_process():
  assert devices.with_devices(8, jax.device_count) == jax.device_count()
  assert devices.with_devices(9, jax.device_count) == 9


def test_what_an_asynchronous_operation_sends_is_what_it_gives():
  lines = [
    "ENTRY %main (p: f32[4]) -> f32[16] {",
    "  %a = (f32[4]{0}, f32[16]{0}) all-gather-start(%p), dimensions={0}",
    "  %b = f32[16]{0} all-gather-done(%a)",
    "  %c = ((f32[4], s32[2,3]), (f32[16], s32[8,3])) all-gather-start(%p, %q), dimensions={0}",
    "  %d = (f32[4], f32[4], u32[], u32[]) collective-permute-start(%p)",
    "  %e = (f32[4], f32[2]) all-reduce-start(%p, %r)",
    "  %f = f32[16] all-gather(%p), dimensions={0}",
  ]
  program = types.SimpleNamespace(as_text=lambda: "\n".join(lines))
  sent = 64 + (64 + 96) + 16 + 24 + 64
  assert communication.bytes_sent(program) == {"operations": 5, "once": sent, "each_pass": 0}


def test_numbers_of_devices_stand_under_their_own_in_any_order():
  def row(devices, seconds):
    return {
      "tree": "t",
      "method": "progressive",
      "placement": "p",
      "devices": devices,
      "weights": 100,
      "seconds": {name: [seconds] for name in ("reading", "bare", "kept", "changed")},
      "pruned": {"compile_seconds": [seconds], "temporary_bytes": devices},
      "sent": {"operations": 1, "once": devices, "each_pass": 0},
    }

  texts = [
    growth.growth_with_devices({"measured": {"devices": rows}})[-1]
    for rows in ([row(1, 2.0), row(2, 6.0)], [row(2, 6.0), row(1, 2.0)])
  ]
  assert texts[0] == texts[1]
  assert "| bare step | 1 | 3 |" in texts[0]


@pytest.mark.parametrize(
  ("what", "recipe", "fits"),
  [
    ("network", "lenet300-mnist-98-e40-granet", False),
    ("network", "lenet300-mnist-dense", False),
    ("training", "lenet300-mnist-dense", True),
    ("training", "resnet50-imagenet-dense", False),
    ("selection", "resnet50-imagenet-dense", True),
  ],
)
def test_recipes_that_cannot_be_measured_are_an_error(what, recipe, fits):
  if fits:
    command.Options(what, recipes=(recipe,))
  else:
    with pytest.raises(ValueError, match=f"recipes=.'{recipe}',. must be of digits, mnist"):
      command.Options(what, recipes=(recipe,))


def test_a_report_that_cannot_be_written_is_an_error_before_anything_is_measured(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(command, "measure", None)
  (tmp_path / "file").touch()
  with pytest.raises(SystemExit, match=f"error: out={tmp_path}/file cannot be written: "):
    command.main(["selection", "--out", str(tmp_path / "file")])


def test_inference_is_timed_in_all_ways_and_goes_into_files_of_its_name(tmp_path, monkeypatch):
  monkeypatch.setattr(inference, "NETWORKS", {"tiny": (40, 30, 10)})
  monkeypatch.setattr(inference, "_TURN", 0.0)
  options = "inference --sparsities 0.5 0.9 --batches 1 3 --rounds 2 --out"
  command.main([*options.split(), str(tmp_path)])
  record = json.loads((tmp_path / "inference.json").read_text())
  assert (tmp_path / "inference.md").read_text() == report.to_markdown(record)
  rows = record["measured"]["inference"]
  assert [(row["sparsity"], row["batch_size"]) for row in rows] == [
    (0.5, 1), (0.5, 3), (0.9, 1), (0.9, 3)
  ]  # fmt: skip
  for row in rows:
    assert row["active"] == round((1 - row["sparsity"]) * row["weights"]) > 0
    assert row["difference"] < 1e-5 and len(row["choices"]) == 2
    assert {len(row["seconds"][kind]) for kind in ("dense", "sparse", "fastest", "jax")} == {2}
