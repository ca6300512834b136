"""Dilated attention as one masked softmax over all keys: what every implementation is tested against."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.attention import reference
from pallas_kernels.packing import number_documents
from pallas_kernels.pattern import Pattern

Array = jax.Array


def dilated_attention(q: Array, k: Array, v: Array, *, dilation: int | None, window: int = 0, sinks: int = 0,
                      segment_ids: Array | None = None) -> Array:
  """As `api.dilated_attention`; arithmetic and result in float32, of float64 arguments in float64."""
  positions = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
  documents = jnp.zeros_like(positions)
  if segment_ids is not None:
    documents, positions = number_documents(jnp.asarray(segment_ids))
  t, s = positions[:, :, None], positions[:, None]
  seen = Pattern(dilation, window, sinks).sees(t, s) & (s >= 0) & (s <= t)
  seen &= documents[:, :, None] == documents[:, None]
  return reference.attend(q, k, v, seen[:, None])[0]
