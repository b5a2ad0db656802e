"""The sparsity library for JAX: pruning and sparse training as optax gradient transformations."""

from sparsejax import allocation, criteria, foresight, lottery
from sparsejax.allocation import masks_from_scores
from sparsejax.gradual import (
  fixed_masks,
  gradual_pruning,
  one_shot_pruning,
  progressive_pruning,
)
from sparsejax.masks import Overlap, apply_masks, is_kernel, overlap, sparsity
from sparsejax.report import Summary, summary
from sparsejax.selection import select_smallest
from sparsejax.transform import (
  Call,
  MaskedUpdatesState,
  get_masks,
  masked_updates,
  static_args,
)

__all__ = (
  "Call",
  "MaskedUpdatesState",
  "Overlap",
  "Summary",
  "allocation",
  "apply_masks",
  "criteria",
  "fixed_masks",
  "foresight",
  "get_masks",
  "gradual_pruning",
  "is_kernel",
  "lottery",
  "masked_updates",
  "masks_from_scores",
  "one_shot_pruning",
  "overlap",
  "progressive_pruning",
  "select_smallest",
  "sparsity",
  "static_args",
  "summary",
)
