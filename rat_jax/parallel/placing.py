"""Trees of arrays on a mesh, cut as `rules` says: from outside a program, and inside one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding

from rat_jax.parallel import rules

Tree = TypeVar("Tree")


def shardings(tree: Any, mesh: rules.AnyMesh) -> Any:
  """How a mesh cuts the leaves of a tree, arrays or their shapes: a tree of `NamedSharding`s.

  Raises ValueError as `shard`.
  """
  if not isinstance(mesh, (jax.sharding.Mesh, jax.sharding.AbstractMesh)):
    raise ValueError(f"mesh={mesh!r}; give a mesh, as rat_jax.parallel.make_mesh makes it.")

  def of_leaf(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
    if not hasattr(leaf, "shape"):
      raise ValueError(f"{rules.name_of(path)} holds {leaf!r}, which is no array; give arrays of JAX or NumPy.")
    return NamedSharding(mesh, rules.spec(rules.name_of(path), np.shape(leaf), mesh, strict=True))

  return jax.tree.map_with_path(of_leaf, tree)


def sharded(make: Callable[..., Tree], mesh: jax.sharding.Mesh) -> Callable[..., Tree]:
  """`make`, compiled so that each device makes its part of what is returned, and none ever holds the whole.

  For instance `sharded(model.init, mesh)(key, tokens)`: the numbers are those of one device.
  """
  def placed(*arguments: Any) -> Tree:
    made = jax.eval_shape(make, *arguments)
    result: Tree = jax.jit(make, out_shardings=shardings(made, mesh))(*arguments)
    return result

  return placed


def shard(tree: Tree, mesh: jax.sharding.Mesh) -> Tree:
  """A tree on the devices of a mesh, cut by the table in `rat_jax.parallel.rules`.

  Args:
    tree: parameters, a `TrainState`, a batch (a dict with "tokens", of NumPy arrays too) or a `Cache`.
    mesh: of `make_mesh`.

  Raises:
    ValueError: an array that is none of those, heads, rows or widths that an axis of the mesh does not divide.
  """
  placed: Tree = jax.tree.map(_put, tree, shardings(tree, mesh))
  return placed


def on_mesh(mesh: jax.sharding.Mesh) -> Callable[[str, np.ndarray], jax.Array]:
  """What puts parameters onto a mesh: the `place` of `rat_jax.load_pretrained` and `rat_jax.convert.load_olmo2`.

  (the leaf's name, the NumPy leaf) -> the array, of which every device gets its part.
  """
  def place(name: str, leaf: np.ndarray) -> jax.Array:
    return _put(leaf, NamedSharding(mesh, rules.spec(name.rpartition("/")[2], leaf.shape, mesh, strict=True)))

  return place


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
  if isinstance(leaf, np.ndarray):  # where there are several processes, each has it, and puts its devices' parts there
    return jax.make_array_from_callback(leaf.shape, sharding, lambda at: leaf[at])
  placed: jax.Array = jax.device_put(leaf, sharding)
  return placed
