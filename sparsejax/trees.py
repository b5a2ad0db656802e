"""Trees of parameters: what their leaves are called, and where two of them differ.

`optax.MaskedNode()` stands for leaves that a tree leaves out, as in optax.
"""

import collections
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

PyTree = Any
KeyPath = tuple[Any, ...]


def is_masked_node(x: Any) -> bool:
  return isinstance(x, optax.MaskedNode)


def leaves_with_path(
  tree: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[KeyPath, Any]]:
  """The leaves of a tree and their paths, as everything in this library knows them.

  They are those of `jax.tree_util` but for variables of Flax NNX, which have a final `value` at
  `init` and not at `update`: it is left out.
  """
  everything = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: not jax.tree.leaves(x))
  leaves_below = collections.Counter(path[:i] for path, _ in everything for i in range(len(path)))

  def known(path):
    is_value = path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value"
    # A field of this name beside others is no variable.
    return path[:-1] if is_value and leaves_below[path[:-1]] == 1 else path

  return [(known(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf)]


def map_with_path(function: Callable[..., Any], tree: PyTree, *trees: PyTree) -> PyTree:
  """A function of the paths of `leaves_with_path` and the leaves of one or more trees."""
  structure = jax.tree.structure(tree)
  paths = [path for path, _ in leaves_with_path(tree)]
  leaves = map(structure.flatten_up_to, (tree, *trees))
  return jax.tree.unflatten(structure, map(function, paths, *leaves))


def path_name(path: KeyPath) -> str:
  """A path as a name for people, such as "dense/kernel"."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def quoted(name: str) -> str:
  """The name of a leaf in a message; a tree that is nothing but one array has none."""
  return repr(name) if name else "the array"


def leaves_by_name(tree: PyTree) -> dict[str, Any]:
  """The leaves of a tree by their names for people; a ValueError if two have the same."""
  leaves = {}
  for path, leaf in leaves_with_path(tree):
    if (name := path_name(path)) in leaves:
      raise ValueError(f"two leaves have the name {name!r}: rename one of them.")
    leaves[name] = leaf
  return leaves


def leaves_and_masked_nodes(tree: PyTree) -> tuple[dict[str, Any], list[str]]:
  """The leaves of a tree by name, and the names of its `optax.MaskedNode()`."""
  nodes = [
    path_name(path)
    for path, x in leaves_with_path(tree, is_leaf=is_masked_node)
    if is_masked_node(x)
  ]
  return leaves_by_name(tree), nodes


def lies_in(name: str, nodes: list[str]) -> bool:
  """Whether a leaf lies at or below one of the nodes, all given by name."""
  return any(f"{name}/".startswith(f"{node}/") for node in nodes)


def pick(template: PyTree, tree: PyTree, name_template: str, name_tree: str) -> PyTree:
  """The tree with `optax.MaskedNode()` where a template has it.

  Args:
    template: a tree of arrays and `optax.MaskedNode()`.
    tree: a tree with its structure and shapes, but for the places of those nodes.
    name_template: what to call the template in an error.
    name_tree: what to call the tree in an error.

  Returns:
    A tree with the structure of the template.

  Raises:
    ValueError: if the rest of the tree differs from that of the template; it says where.
  """
  try:
    picked = jax.tree.map(
      lambda t, x: t if is_masked_node(t) else x, template, tree, is_leaf=is_masked_node
    )
  except ValueError as error:
    expected, ignored = leaves_and_masked_nodes(template)
    rest = {name: x for name, x in leaves_by_name(tree).items() if not lies_in(name, ignored)}
    check_same_shapes(expected, rest, name_template, name_tree)
    raise ValueError(
      f"{name_template} and {name_tree} have different structures: {error}"
    ) from error
  check_same_structure(template, picked, name_template, name_tree)
  return picked


def check_same_structure(a: PyTree, b: PyTree, name_a: str, name_b: str) -> None:
  """Raises a ValueError that says where two trees differ in structure or in shapes."""
  check_same_shapes(leaves_by_name(a), leaves_by_name(b), name_a, name_b)


def check_same_shapes(a: dict[str, Any], b: dict[str, Any], name_a: str, name_b: str) -> None:
  """The same for two sets of leaves by name."""
  for path in a | b:
    if path not in b:
      raise ValueError(f"{name_a} have {quoted(path)}, but {name_b} have not.")
    if path not in a:
      raise ValueError(f"{name_b} have {quoted(path)}, but {name_a} have not.")
    if np.shape(a[path]) != np.shape(b[path]):
      raise ValueError(
        f"{quoted(path)} has shape {np.shape(a[path])} in {name_a}, but {np.shape(b[path])} in"
        f" {name_b}."
      )
