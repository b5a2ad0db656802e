import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparsejax


@pytest.fixture
def params():
  rng = np.random.default_rng(0)
  return {
    "conv": {"kernel": jnp.asarray(rng.normal(size=(3, 3, 2, 4)), jnp.float32)},
    "dense": {"kernel": jnp.asarray(rng.normal(size=(8, 5)), jnp.float32), "bias": jnp.zeros(5)},
  }


def test_layers_and_totals_are_counted(params):
  masks = sparsejax.masks_from_scores(jax.tree.map(jnp.abs, params), 0.75, allocation="uniform")
  summary = sparsejax.summary(params, masks, positions={"conv/kernel": 100})
  conv, dense = summary.layers
  assert (conv.name, conv.shape) == ("conv/kernel", (3, 3, 2, 4))
  assert (conv.parameters, conv.active, conv.sparsity) == (72, 18, 0.75)
  assert (conv.dense_flops, conv.flops) == (2 * 72 * 100, 2 * 18 * 100)
  assert (dense.dense_flops, dense.flops) == (80, 20)
  assert (summary.pool.parameters, summary.pool.active, summary.pool.sparsity) == (112, 28, 0.75)
  assert summary.pool.flops == 3620
  assert (summary.others.parameters, summary.others.active) == (5, 5)
  assert (summary.total.parameters, summary.total.active) == (117, 33)
  assert summary.total.flops == 3620


def test_flops_are_known_only_with_the_size_of_a_layers_output(params):
  masks = jax.tree.map(lambda p: jnp.ones_like(p, dtype=bool), params)
  summary = sparsejax.summary(params, masks)
  assert [row.flops for row in summary.layers] == [None, 80]
  assert summary.pool.flops is None
  assert summary.total.flops is None
  line = next(line for line in str(summary).splitlines() if line.startswith("conv"))
  assert line.split()[-2:] == ["-", "-"]


def test_the_table_is_aligned_and_has_a_line_for_each_layer(params):
  masks = jax.tree.map(lambda p: jnp.ones_like(p, dtype=bool), params)
  lines = str(sparsejax.summary(params, masks, positions={"conv/kernel": 1})).splitlines()
  assert len({len(line) for line in lines if "others" not in line}) == 1
  assert [line.split()[0] for line in lines if not line.startswith("-")] == [
    "layer",
    "conv/kernel",
    "dense/kernel",
    "prunable",
    "others",
    "total",
  ]


def test_a_summary_works_on_shapes_and_on_an_empty_tree(params):
  masks = jax.tree.map(lambda p: jnp.ones_like(p, dtype=bool), params)
  shapes = jax.eval_shape(lambda: params)
  assert sparsejax.summary(shapes, masks) == sparsejax.summary(params, masks)
  assert sparsejax.summary({}, {}).total.parameters == 0
  assert "0.00%" in str(sparsejax.summary({}, {}))


def test_positions_of_unknown_layers_and_masks_of_other_trees_are_errors(params):
  masks = jax.tree.map(lambda p: jnp.ones_like(p, dtype=bool), params)
  with pytest.raises(ValueError, match=r"positions are given for \['cnv/kernel'\]"):
    sparsejax.summary(params, masks, positions={"cnv/kernel": 4})
  with pytest.raises(ValueError, match="'dense/bias'"):
    sparsejax.summary(params, {**masks, "dense": {"kernel": masks["dense"]["kernel"]}})


def test_layers_without_any_active_weight_are_named_under_the_table(params):
  masks = jax.tree.map(lambda p: jnp.ones_like(p, dtype=bool), params)
  full = sparsejax.summary(params, masks)
  assert full.empty == ()
  assert str(full).splitlines()[-1].startswith("total")
  masks["dense"]["kernel"] = jnp.zeros((8, 5), bool)
  masks["dense"]["bias"] = jnp.zeros(5, bool)
  emptied = sparsejax.summary(params, masks)
  assert emptied.empty == ("dense/kernel",)  # A bias is no layer.
  lines = str(emptied).splitlines()
  assert len(lines) == len(str(full).splitlines()) + 1
  assert lines[-1] == "no active weight in dense/kernel"
  masks["conv"]["kernel"] = jnp.zeros((3, 3, 2, 4), bool)
  emptied = sparsejax.summary(params, masks)
  assert str(emptied).endswith("no active weight in conv/kernel, dense/kernel")


def test_a_layer_without_any_weight_at_all_is_not_said_to_be_emptied():
  params = {"nothing": jnp.zeros((0, 4)), "dense": jnp.ones((2, 2))}
  masks = jax.tree.map(lambda p: jnp.ones_like(p, dtype=bool), params)
  assert sparsejax.summary(params, masks).empty == ()


def test_an_empty_layer_has_no_sparsity_and_a_total_of_no_layers_no_flops():
  params = {"dense": jnp.ones((2, 2)), "nothing": jnp.zeros((0, 3))}
  masks = jax.tree.map(lambda p: jnp.ones_like(p, dtype=bool), params)
  summary = sparsejax.summary(params, masks)
  assert summary.layers[1].sparsity == 0
  line = next(line for line in str(summary).splitlines() if line.startswith("others"))
  assert line.split() == ["others", "0", "0", "0.00%", "-", "-"]


def test_positions_can_be_used_again(params):
  masks = jax.tree.map(lambda p: jnp.ones_like(p, dtype=bool), params)
  positions = {"conv/kernel": 100}
  for _ in range(2):
    summary = sparsejax.summary(params, masks, positions=positions)
    assert summary.layers[0].flops == 2 * 72 * 100
  assert positions == {"conv/kernel": 100}


def test_the_memory_of_masks_is_that_of_all_in_the_state(params):
  def mask_bytes(**options):
    tx = optax.chain(optax.sgd(0.1), sparsejax.one_shot_pruning(0.5, at=0, **options))
    state = optax.chain(tx, tx).init(params)
    masks = sparsejax.get_masks(state, params)
    summary = sparsejax.summary(params, masks, opt_state=state)
    assert str(summary).endswith(f"\nmasks in the optimizer state: {summary.mask_bytes} bytes")
    return summary.mask_bytes

  assert mask_bytes() == 2 * (3 * 3 * 2 * 4 + 8 * 5)
  # A row of 4 or 5 weights takes a byte.
  assert mask_bytes(pack=True) == 2 * (3 * 3 * 2 + 8)


def test_without_a_state_nothing_is_said_of_its_memory(params):
  masks = jax.tree.map(lambda p: jnp.ones_like(p, dtype=bool), params)
  assert "bytes" not in str(sparsejax.summary(params, masks))
