"""The textbook's attention: one masked softmax over all keys. What every operation of attention is tested against."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.attention.softmax import NOTHING, Part

Array = jax.Array


def attend(q: Array, k: Array, v: Array, seen: Array) -> Part:
  """(weighted mean of the values [B, T, N, H], log-sum-exp [B, T, N]); zeros and `NOTHING` where nothing is seen.

  Arithmetic and results are float32, of float64 arguments float64. A key that no query of a head sees may hold
  anything, and so may its value.

  Args:
    q: [B, T, N, H]; k, v: [B, S, K, H], N a multiple of K.
    seen: bool, broadcastable to [B, N, T, S].
  """
  (b, t, n, h), s = q.shape, k.shape[1]
  wide = jnp.promote_types(q.dtype, jnp.float32)
  seen = jnp.broadcast_to(seen, (b, n, t, s))
  by_any = jnp.moveaxis(seen.any(axis=2), 1, 2)[..., None]  # [B, S, N, 1]
  k, v = (jnp.where(by_any, jnp.repeat(x.astype(wide), n // k.shape[2], axis=2), 0.0) for x in (k, v))
  scores = jnp.einsum("btnh,bsnh->bnts", q.astype(wide), k, precision=jax.lax.Precision.HIGHEST) * h**-0.5
  scores = jnp.where(seen, scores, NOTHING)
  top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
  weights = jnp.where(seen, jnp.exp(scores - top), 0.0)
  total = weights.sum(axis=-1, keepdims=True)
  empty = total == 0
  total = jnp.where(empty, 1.0, total)
  out = jnp.einsum("bnts,bsnh->btnh", weights / total, v, precision=jax.lax.Precision.HIGHEST)
  return out, jnp.moveaxis(jnp.where(empty, NOTHING, top + jnp.log(total))[..., 0], 1, 2)
