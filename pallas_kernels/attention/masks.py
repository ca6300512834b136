"""Masks of chosen blocks: which keys a query reads, and the shape in which `softmax` takes that."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.pattern import Rule, seen

Array = jax.Array


def keys_read(blocks: Array, q_positions: Array, keys: int, block: int, rule: Rule | None) -> Array:
  """Which keys are read by queries at `q_positions` [B, T] with chosen `blocks` [B, T, M, n]: bool [B, T, M, S].

  M are the heads that choose, N or K. An index beyond the last block, or below 0, is no block.

  Args:
    keys: how many there are, S; block: how many of them are a block.
    rule: what is read besides; the same for all heads.
  """
  count = -(-keys // block)
  chosen = jnp.any(blocks[..., None] == jnp.arange(count, dtype=jnp.int32), axis=-2)  # [B, T, M, P]
  read = jnp.repeat(chosen, block, axis=-1)[..., :keys]
  at = jnp.arange(keys, dtype=jnp.int32)
  if rule is not None:
    read |= seen(rule, q_positions, at)[:, :, None]
  return read & seen(None, q_positions, at)[:, :, None]


def to_groups(read: Array, kv_heads: int) -> Array:
  """bool [B, T, N or K, S] as a mask [B, K, G or 1, T, S] of `softmax.attend_part`."""
  read = jnp.moveaxis(read, 2, 1)
  return read.reshape(read.shape[0], kv_heads, -1, *read.shape[2:])
