"""The one table of what is cut over a mesh: from an array's name to its axes, and from these to the mesh's.

Parameters, gradients, an optimizer's moments, batches and caches go by it. A name is the last one on the path to a
leaf: "query" of params/layers/query as of the moments that belong to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax

P = jax.sharding.PartitionSpec

_HEADS, _KV_HEADS = ("layers", "embed", "heads", "head_dim"), ("layers", "embed", "kv_heads", "head_dim")
_OF_TOKENS = ("batch", "tokens")
_OF_ROWS = ("layers", "batch", "kv_heads", "rows", "head_dim")
AXES_OF: Mapping[str, tuple[str, ...]] = {
    # Parameters (rat_jax.transformer.initializers).
    "embedding": ("vocab", "embed"), "head": ("vocab", "embed"), "final_norm": ("width",),
    "query": _HEADS, "output_gate": _HEADS, "key": _KV_HEADS, "value": _KV_HEADS, "memory_gate": _KV_HEADS,
    "query_bias": ("layers", "heads", "head_dim"), "key_bias": ("layers", "kv_heads", "head_dim"),
    "value_bias": ("layers", "kv_heads", "head_dim"),
    "memory_gate_bias": ("layers", "kv_heads", "head_dim"), "out": ("layers", "heads", "head_dim", "embed"),
    "mlp_in": ("layers", "embed", "mlp"), "mlp_gate": ("layers", "embed", "mlp"), "mlp_out": ("layers", "mlp", "embed"),
    "attention_norm": ("layers", "width"), "mlp_norm": ("layers", "width"),
    "query_norm": ("layers", "heads", "head_dim"), "key_norm": ("layers", "kv_heads", "head_dim"),
    # Batches.
    "tokens": _OF_TOKENS, "targets": _OF_TOKENS, "segment_ids": _OF_TOKENS, "weights": _OF_TOKENS,
    # Caches (rat_jax.caches).
    "keys": _OF_ROWS, "values": _OF_ROWS, "positions": _OF_ROWS[:4], "queries": ("layers", "batch", "", "heads", ""),
    "summaries": ("layers", "batch", "kv_heads", "", "head_dim"), "state": ("layers", "batch", "kv_heads", "head_dim"),
    "lengths": ("batch",), "row_ids": ("batch",), "prompt_lengths": ("batch",),
}
# What may have fewer axes: as an argument of `apply`, and norms per head.
_AXES_OF_TWO = {"positions": _OF_TOKENS, "query_norm": ("layers", "head_dim"), "key_norm": ("layers", "head_dim")}
MESH_AXES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"), "tokens": ("context",), "rows": ("context",), "embed": ("fsdp",), "heads": ("tensor",),
    "kv_heads": ("tensor",), "mlp": ("tensor",), "vocab": ("tensor",)}
# What an axis of the mesh leaves whole where it does not divide it: fewer key/value heads than devices, an odd
# vocabulary, and lengths.
_WHOLE_IF_NEED_BE = ("kv_heads", "vocab", "tokens", "rows")
# Axes that must be divided, in an error; of a configuration by the name of its field.
_DESCRIBED = {"batch": "rows", "embed": "channels (embed_dim)", "heads": "query heads (num_heads)",
              "kv_heads": "key/value heads (num_kv_heads)", "mlp": "channels (mlp_dim)"}

AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


def spec(name: str, shape: tuple[int, ...], mesh: AnyMesh, *, strict: bool = False) -> jax.sharding.PartitionSpec:
  """How a mesh cuts an array of the table.

  Args:
    strict: raises ValueError where an axis of the mesh does not divide what it must, as of arrays that are placed;
      else that stays whole, as inside a program.
  """
  if not shape:
    return P()
  if not name:
    raise ValueError(f"an array of shape {shape} has no name; give a tree whose leaves have names of the table, such as"
                     ' {"tokens": tokens}.')
  if name not in AXES_OF:
    raise ValueError(f"{name}: no such array is known; the table has {', '.join(AXES_OF)}.")
  axes = _AXES_OF_TWO.get(name, AXES_OF[name]) if len(shape) == 2 else AXES_OF[name]
  if len(axes) != len(shape):
    raise ValueError(f"{name} has shape {shape}; its axes are {axes}.")
  return P(*(axes_that_cut(name, axis, size, mesh, strict) for axis, size in zip(axes, shape, strict=True)))


def axes_that_cut(name: str, axis: str, size: int, mesh: AnyMesh, strict: bool = False) -> tuple[str, ...] | None:
  """The axes of the mesh that cut an axis of an array, or None; `name` and `strict` as in `spec`."""
  cuts = tuple(one for one in MESH_AXES.get(axis, ()) if mesh.shape.get(one, 1) > 1)
  pieces = math.prod(mesh.shape[one] for one in cuts)
  if size % pieces == 0:
    return cuts or None
  if strict and (axis not in _WHOLE_IF_NEED_BE or (axis == "kv_heads" and pieces % size)):
    fits = [n for n in range(1, size + 1) if size % n == 0]
    more = f", or that {size} divides" if axis == "kv_heads" else f", or a multiple of {pieces} for {size}"
    raise ValueError(f"{name} has {size} {_DESCRIBED[axis]}, and the mesh cuts them into"
                     f" {'*'.join(f'{one}:{mesh.shape[one]}' for one in cuts)} pieces; use a size of"
                     f" {' * '.join(cuts)} that divides {size}: {fits}{more}.")
  return None


def name_of(path: tuple[Any, ...]) -> str:
  """The last name on the path to a leaf; numbers of tuples are none."""
  names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path if not hasattr(key, "idx")]
  return names[-1] if names else ""
