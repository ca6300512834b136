"""Attention to chosen blocks as one masked softmax over all keys: what every implementation is tested against."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.attention import reference
from pallas_kernels.pattern import Rule

Array = jax.Array


def sparse_attention(q: Array, k: Array, v: Array, blocks: Array, valid: Array, *, block: int,
                     q_positions: Array | None = None, rule: Rule | None = None) -> tuple[Array, Array]:
  """As `api.sparse_attention`; arithmetic and results in float32, of float64 arguments in float64."""
  length, keys = q.shape[1], k.shape[1]
  t = jnp.arange(keys - length, keys, dtype=jnp.int32)[None] if q_positions is None else q_positions
  t, s = t[:, :, None, None], jnp.arange(keys, dtype=jnp.int32)
  seen = jnp.any((blocks[..., None] == s // block) & valid[..., None], axis=3)  # [B, T, K or N, S]
  if rule is not None:
    seen |= rule.sees(t, s)
  seen &= s <= t
  seen = jnp.repeat(seen, q.shape[2] // seen.shape[2], axis=2)
  return reference.attend(q, k, v, jnp.moveaxis(seen, 2, 1))
