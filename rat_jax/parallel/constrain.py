"""Where arrays lie inside a program: at the residual stream, and for what a program returns.

Arguments know their mesh, and so do all arrays that are made of them; without a mesh, nothing here does anything.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from pallas_kernels import devices
from rat_jax.axes import Array, Stream
from rat_jax.parallel import rules
from rat_jax.parallel.mesh import AXES

Tree = TypeVar("Tree")
P = jax.sharding.PartitionSpec


def mesh_to_cut(*arrays: Any) -> AbstractMesh | None:
  """The mesh of the arrays, where it has several devices and Auto axes; None inside `jax.shard_map`.

  A mesh whose axes have other names than ours is left to who made it. Raises ValueError for Explicit axes.
  """
  mesh = devices.mesh_of(*arrays)
  if mesh.empty or mesh.size == 1:
    return None
  if AxisType.Explicit in mesh.axis_types:
    raise ValueError(f"the arrays lie on a mesh with the Explicit axes {mesh.explicit_axes}; make it with"
                     " rat_jax.parallel.make_mesh, or with axis_types=(AxisType.Auto,) * n.")
  if any(kind != AxisType.Auto for kind in mesh.axis_types):
    return None
  return mesh if set(AXES) & set(mesh.axis_names) else None


def stream(x: Stream) -> Stream:
  """The residual stream [B, T, E]: rows over data and fsdp, tokens over context, and every device has whole tokens."""
  return by_axes(x, ("batch", "tokens", ""))


def by_axes(x: Array, axes: tuple[str, ...]) -> Array:
  """An array cut by its axes, as `rules.MESH_AXES` says; what an axis of the mesh does not divide stays whole."""
  mesh = mesh_to_cut(x)
  if mesh is None:
    return x
  constrained: Array = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec_of(mesh, x.shape, axes)))
  return constrained


def spec_of(mesh: AbstractMesh, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.sharding.PartitionSpec:
  """How a mesh cuts an array of these axes."""
  return P(*(rules.axes_that_cut("", axis, size, mesh) for axis, size in zip(axes, shape, strict=True)))


def check_rows(rows: int, params: Any) -> None:
  """Raises ValueError where the mesh of parameters does not cut so many rows into equal parts."""
  mesh = mesh_to_cut(*jax.tree.leaves(params))
  if mesh is not None:
    rules.axes_that_cut("a micro-batch, which is the batch / accumulation,", "batch", rows, mesh, strict=True)


def tree(x: Tree, like: Any = None) -> Tree:
  """Every leaf of a tree of parameters, a train state or a cache, cut by its name.

  `like`: arrays of which any knows the mesh; default those of the tree.
  """
  mesh = mesh_to_cut(*jax.tree.leaves(x if like is None else like))
  if mesh is None:
    return x

  def of_leaf(path: tuple[Any, ...], leaf: Array) -> Array:
    of_name = rules.spec(rules.name_of(path), leaf.shape, mesh)
    placed: Array = jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, of_name))
    return placed

  constrained: Tree = jax.tree.map_with_path(of_leaf, x)
  return constrained
