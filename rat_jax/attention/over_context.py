"""Attention of whole sequences whose tokens a mesh cuts over its axis "context"; without such a mesh, the mode's own.

Dilated attention fetches the keys that it reads (`pallas_kernels.dilated_attention`). Under every other mode each
device has its queries, and gathers keys and values of some heads at a time.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax

from pallas_kernels import split
from pallas_kernels.attention import context
from rat_jax.attention.terms import Heads, Origin, Placement
from rat_jax.axes import Array

if TYPE_CHECKING:
  from rat_jax.modes.base import Mode


def attend(mode: Mode, heads: Heads, at: Placement, origin: Origin) -> Array:
  """`mode.attend` on any mesh: [B, T, N, H] in q's type."""
  by_its_operation = at.plain and mode.pattern is not None and mode.pattern.dilation != 1
  if split.pieces(heads.q) == 1 or by_its_operation or heads.q.shape[1] != heads.k.shape[1]:
    return mode.attend(heads, at, origin)
  q, k, v, chosen_by = heads
  arguments = (q, k, v, chosen_by, at.queries, at.keys, at.q_documents, at.k_documents, origin.row_ids, origin.layer)
  letters = ("BTNH", "BTKH", "BTKH", "BTKH", "BT", "BT", "BT", "BT", "B", "")
  present = tuple(None if x is None else of for x, of in zip(arguments, letters, strict=True))
  cut = split.cut(arguments, present, "BT" if mode.heads_differ else "BTNK")
  if cut is not None and cut.picks and mode.chooses:  # query heads that choose together lie on several devices
    cut = split.cut(arguments, present, "BT")
  if cut is None or not cut.of_sequences:  # lengths that do not divide
    return mode.attend(heads, at, origin)
  out: Array = split.run(_OfPiece(mode, at.isolated), cut, arguments, "BTNH", {})
  return out


@dataclasses.dataclass(frozen=True)
class _OfPiece:
  """The attention of a device's queries, inside `jax.shard_map`."""

  mode: Mode
  isolated: bool

  def __call__(self, q: Array, k: Array, v: Array, chosen_by: Array | None, queries: Array, keys: Array,
               q_documents: Array | None, k_documents: Array | None, row_ids: Array, layer: Array) -> Array:
    keys, k_documents = jax.tree.map(context.gathered, (keys, k_documents))
    at = Placement(queries, keys, q_documents, k_documents, isolated=self.isolated)

    def of_heads(q: Array, k: Array, v: Array, chosen_by: Array | None) -> Array:
      return self.mode.attend(Heads(q, k, v, chosen_by), at, Origin(row_ids, layer))

    together = k.shape[2] if self.mode.heads_differ else None
    return context.attend_by_heads(of_heads, q, k, v, chosen_by, together=together)
