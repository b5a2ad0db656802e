"""The sparsity library for JAX: pruning and sparse training as optax gradient transformations."""

from sparsejax import allocation, criteria, deploy, foresight, lottery, patterns
from sparsejax.alias import (
  granet,
  rigl,
  snfs,
  sparse_evolutionary_training,
  static_sparse_training,
)
from sparsejax.allocation import masks_from_scores
from sparsejax.arguments import OneOf, static_args
from sparsejax.dynamic import dynamic_sparse_training
from sparsejax.fixed import fixed_masks
from sparsejax.gradual import gradual_pruning, one_shot_pruning, progressive_pruning
from sparsejax.masks import Overlap, apply_masks, is_kernel, overlap, sparsity
from sparsejax.report import Summary, summary
from sparsejax.selection import select_smallest
from sparsejax.state import MaskedUpdatesState, get_masks
from sparsejax.transform import Call, Rule, masked_updates

__all__ = (
  "Call",
  "MaskedUpdatesState",
  "OneOf",
  "Overlap",
  "Rule",
  "Summary",
  "allocation",
  "apply_masks",
  "criteria",
  "deploy",
  "dynamic_sparse_training",
  "fixed_masks",
  "foresight",
  "get_masks",
  "gradual_pruning",
  "granet",
  "is_kernel",
  "lottery",
  "masked_updates",
  "masks_from_scores",
  "one_shot_pruning",
  "overlap",
  "patterns",
  "progressive_pruning",
  "rigl",
  "select_smallest",
  "snfs",
  "sparse_evolutionary_training",
  "sparsity",
  "static_args",
  "static_sparse_training",
  "summary",
)
