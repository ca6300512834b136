"""Decode attention as one masked softmax over the whole cache: what every implementation is tested against."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.attention import reference

Array = jax.Array


def decode_attention(q: Array, keys: Array, values: Array, visible: Array, *, layer: Array | int | None = None,
                     own: tuple[Array, Array] | None = None, blocks: Array | None = None) -> tuple[Array, Array]:
  """As `api.decode_attention`; arithmetic and results in float32, of float64 arguments in float64."""
  q, keys, values, visible = (jnp.asarray(x) for x in (q, keys, values, visible))
  if layer is not None:
    keys, values = keys[layer], values[layer]
  seen = visible if blocks is None else rows_of_blocks(visible, jnp.asarray(blocks), keys.shape[2])
  seen = seen[:, None] if seen.ndim == 2 else seen
  seen = jnp.repeat(seen, q.shape[1] // seen.shape[1], axis=1)  # [B, N, R]
  if own is not None:
    keys, values = (jnp.concatenate([x, one[:, :, None]], axis=2) for x, one in zip((keys, values), own, strict=True))
    seen = jnp.pad(seen, ((0, 0), (0, 0), (0, 1)), constant_values=True)
  keys, values = (jnp.swapaxes(x, 1, 2) for x in (keys, values))
  out, lse = reference.attend(q[:, None], keys, values, seen[:, :, None])
  return out[:, 0], lse[:, 0]


def rows_of_blocks(visible: Array, blocks: Array, rows: int) -> Array:
  """`visible` [B, M, n, S], of the rows of blocks [B, M, n], as bool [B, M, rows] of all rows."""
  b, m, n, size = visible.shape
  at = blocks[..., None] * size + jnp.arange(size, dtype=jnp.int32)
  at = jnp.where(visible, at, rows).reshape(b, m, n * size)  # what is not visible falls off the end
  of_row, of_head = jnp.arange(b, dtype=jnp.int32)[:, None, None], jnp.arange(m, dtype=jnp.int32)[:, None]
  return jnp.zeros((b, m, rows), bool).at[of_row, of_head, at].set(True, mode="drop")
