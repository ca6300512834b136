"""One decode step under a mode that chooses blocks: only the chosen blocks of the cache are read."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import decode_attention, softmax
from pallas_kernels.gather import take_rows
from rat_jax import selection
from rat_jax.axes import Array, Keys, Lengths, Positions, Queries
from rat_jax.cache import KVCache, Slots
from rat_jax.modes import BlockMode, visible
from rat_jax.selection import Origin, Statistics


def attend_step(q: Queries, k: Keys, v: Keys, mode: BlockMode, positions: Positions, kv: KVCache, layer: Array | int,
                statistics: Statistics, lengths: Lengths, origin: Origin, max_length: int,
                implementation: str | None = None) -> Array:
  """Attention of one new token to the blocks that it chooses, to what the mode's rule adds, and to itself.

  Args:
    q: [B, 1, N, H]; k, v: [B, 1, K, H], of the token at `positions` [B, 1]; -1 for a row that takes none.
    kv: keys and values [L, B, K, R, H] of which `layer` is read, row p holding position p of the `lengths` [B] tokens
      so far.
    statistics: of the blocks of these tokens, [B, K, P, H] each.
    implementation: of `decode_attention`, which reads the chosen blocks.

  Returns:
    float32 [B, 1, N, H].
  """
  own = selection.continued(mode, statistics, k, positions, lengths)
  count, size, kv_heads = statistics[0].shape[2], mode.block, k.shape[2]
  keys = (k, positions)
  if mode.selector == "oracle":
    old = _layer(kv.keys, layer)
    at = jnp.arange(old.shape[2], dtype=jnp.int32)
    keys = (jnp.concatenate([jnp.swapaxes(old, 1, 2), k], axis=1),
            jnp.concatenate([jnp.where(at < lengths[:, None], at, -1), positions], axis=1))
  scores = selection.score_blocks(mode, {"q": q, "own": own, "position": positions}, statistics, keys, origin)
  blocks, valid = selection.pick(mode, scores, positions, max_length)

  rows = blocks[:, 0, :, :, None] * size + jnp.arange(size, dtype=jnp.int32)
  seen = valid[:, 0, :, :, None] & (rows < lengths[:, None, None, None])
  # A query's own block, if it must be read, has the query's own key.
  forced = (k[:, 0], v[:, 0]) if mode.forces_own else None
  out, lse = decode_attention(q[:, 0], kv.keys, kv.values, seen, blocks=blocks[:, 0], layer=layer, own=forced,
                              implementation=implementation)
  parts = [(out[:, None], lse[:, None])]
  if forced is None:
    is_seen = selection.seen_keys(mode, blocks, count, positions, positions)
    parts.append(softmax.attend_part(q, k, v, selection.to_groups(is_seen, kv_heads)))
  if mode.rule is not None:
    held = Slots.of(mode.rule, max_length).readable(lengths)
    at = jnp.maximum(held, 0)[:, None]
    besides = ~selection.is_chosen(blocks, count, at[:, None] // size)[:, 0] & visible(mode.rule, positions, held)
    at = jnp.broadcast_to(at, (*lengths.shape, kv_heads, held.shape[1]))
    old_k, old_v = (jnp.swapaxes(take_rows(_layer(x, layer), at), 1, 2) for x in (kv.keys, kv.values))
    parts.append(softmax.attend_part(q, old_k, old_v, selection.to_groups(besides[:, None], kv_heads)))
  return softmax.merge(parts)


def _layer(x: Array, layer: Array | int) -> Array:
  return jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)
