"""Packed rows: several documents one after another in a row, and padding."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def number_documents(segment_ids: Array) -> tuple[Array, Array]:
  """(documents, positions), int32 [B, T] each, of packed rows.

  A document is a run of equal segment ids; padding (id 0) inside it belongs to no document and does not end it.
  Documents are numbered 1, 2, ... along the row, 0 for padding; positions start at 0 in each, -1 for padding.
  """
  real = segment_ids != 0
  index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
  last_real = jax.lax.cummax(jnp.where(real, index, -1), axis=1)
  before = jnp.concatenate([jnp.full_like(last_real[:, :1], -1), last_real[:, :-1]], axis=1)
  previous = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
  starts = real & ((before < 0) | (segment_ids != previous))
  documents = jnp.where(real, jnp.cumsum(starts, axis=1, dtype=jnp.int32), 0)
  count = jnp.cumsum(real, axis=1, dtype=jnp.int32)
  positions = count - jax.lax.cummax(jnp.where(starts, count, 0), axis=1)
  return documents, jnp.where(real, positions, -1)
