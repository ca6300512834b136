"""Rows of a cache by their numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def take_rows(x: Array, rows: Array) -> Array:
  """x [B, K, R, H] at rows int32 [B, M, X], M a multiple of K: [B, M, X, H]."""
  b, heads, count = rows.shape
  return jnp.take_along_axis(x, rows.reshape(b, x.shape[1], -1, 1), axis=2).reshape(b, heads, count, x.shape[3])
