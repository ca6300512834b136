"""Decode attention by the textbook, in float64: what every implementation is tested against."""

from __future__ import annotations

import numpy as np

from pallas_kernels.softmax import NOTHING


def decode_attention(q, keys, values, visible, blocks=None) -> tuple[np.ndarray, np.ndarray]:
  """As `api.decode_attention`, in NumPy and float64. Rows that are not visible may hold anything."""
  heads, kv_heads, rows = q.shape[1], keys.shape[1], keys.shape[2]
  visible = np.asarray(visible) if blocks is None else rows_of_blocks(visible, blocks, rows)
  seen = visible[:, None] if visible.ndim == 2 else visible
  seen = np.repeat(seen, heads // seen.shape[1], axis=1)  # [B, N, R]
  keys, values = (np.where(seen[..., None], np.repeat(np.asarray(x, np.float64), heads // kv_heads, axis=1), 0.0)
                  for x in (keys, values))
  scores = np.einsum("bnh,bnrh->bnr", np.asarray(q, np.float64), keys) / np.sqrt(q.shape[-1])
  scores = np.where(seen, scores, NOTHING)
  top = scores.max(axis=-1, keepdims=True)
  weights = np.where(seen, np.exp(scores - top), 0.0)
  total = weights.sum(axis=-1, keepdims=True)
  empty = total == 0
  total = np.where(empty, 1.0, total)
  out = np.einsum("bnr,bnrh->bnh", weights / total, values)
  return out, np.where(empty, NOTHING, top + np.log(total))[..., 0]


def rows_of_blocks(visible, blocks, rows: int) -> np.ndarray:
  """`visible` [B, M, n, S], of the rows of blocks [B, M, n], as bool [B, M, rows] of all rows."""
  visible, blocks = np.asarray(visible), np.asarray(blocks)
  seen = np.zeros((*blocks.shape[:2], rows), bool)
  for at in np.argwhere(visible):
    *who, i, row = at
    seen[(*who, blocks[(*who, i)] * visible.shape[3] + row)] = True
  return seen
