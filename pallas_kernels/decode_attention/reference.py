"""Decode attention by the textbook, in float64: what every implementation is tested against."""

from __future__ import annotations

import numpy as np

from pallas_kernels.softmax import NOTHING


def decode_attention(q, keys, values, visible) -> tuple[np.ndarray, np.ndarray]:
  """As `api.decode_attention`, in NumPy and float64. Rows that are not visible may hold anything."""
  heads, kv_heads = q.shape[1], keys.shape[1]
  visible = np.asarray(visible)
  seen = visible[:, None] if visible.ndim == 2 else visible
  seen = np.broadcast_to(seen, keys.shape[:3])[..., None]
  keys, values = (np.repeat(np.where(seen, np.asarray(x, np.float64), 0.0), heads // kv_heads, axis=1)
                  for x in (keys, values))
  seen = np.repeat(seen[..., 0], heads // kv_heads, axis=1)
  scores = np.einsum("bnh,bnrh->bnr", np.asarray(q, np.float64), keys) / np.sqrt(q.shape[-1])
  scores = np.where(seen, scores, NOTHING)
  top = scores.max(axis=-1, keepdims=True)
  weights = np.where(seen, np.exp(scores - top), 0.0)
  total = weights.sum(axis=-1, keepdims=True)
  empty = total == 0
  total = np.where(empty, 1.0, total)
  out = np.einsum("bnr,bnrh->bnh", weights / total, values)
  return out, np.where(empty, NOTHING, top + np.log(total))[..., 0]
