"""One decode step under a mode that chooses blocks: only the chosen blocks of the cache are read."""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels import softmax
from rat_jax import selection
from rat_jax.axes import Array, Keys, Lengths, Positions, Queries
from rat_jax.cache import KVCache, Slots
from rat_jax.compression import take_rows
from rat_jax.modes import BlockMode, visible
from rat_jax.selection import Origin, Statistics


def attend_step(q: Queries, k: Keys, v: Keys, mode: BlockMode, positions: Positions, kv: KVCache,
                statistics: Statistics, lengths: Lengths, origin: Origin, max_length: int) -> Array:
  """Attention of one new token to the blocks that it chooses, to what the mode's rule adds, and to itself.

  Args:
    q: [B, 1, N, H]; k, v: [B, 1, K, H], of the token at `positions` [B, 1]; -1 for a row that takes none.
    kv: keys and values of one layer, [B, K, R, H], row p holding position p of the `lengths` [B] tokens so far.
    statistics: of the blocks of these tokens, [B, K, P, H] each.

  Returns:
    float32 [B, 1, N, H].
  """
  own = selection.continued(mode, statistics, k, positions, lengths)
  count, size, kv_heads = statistics[0].shape[2], mode.block, k.shape[2]
  keys = (k, positions)
  if mode.selector == "oracle":
    at = jnp.arange(kv.keys.shape[2], dtype=jnp.int32)
    keys = (jnp.concatenate([jnp.swapaxes(kv.keys, 1, 2), k], axis=1),
            jnp.concatenate([jnp.where(at < lengths[:, None], at, -1), positions], axis=1))
  scores = selection.score_blocks(mode, {"q": q, "own": own, "position": positions}, statistics, keys, origin)
  blocks, valid = selection.pick(mode, scores, positions, max_length)

  def part(at, mask):  # the rows `at` [B, Ksel, X] of the cache, where `mask` [B, N or K, X] lets them be seen
    old_k, old_v = (jnp.swapaxes(take_rows(x, jnp.clip(at, 0, x.shape[2] - 1)), 1, 2) for x in (kv.keys, kv.values))
    return softmax.attend_part(q, old_k, old_v, selection.to_groups(mask[:, None], old_k.shape[2]))

  batch, heads = blocks.shape[0], blocks.shape[2]
  rows = (blocks[:, 0, :, :, None] * size + jnp.arange(size)).reshape(batch, heads, -1)
  parts = [part(rows, jnp.repeat(valid[:, 0], size, axis=-1) & (rows < lengths[:, None, None]))]
  seen = selection.seen_keys(mode, blocks, count, positions, positions)
  parts.append(softmax.attend_part(q, k, v, selection.to_groups(seen, kv_heads)))
  if mode.rule is not None:
    held = Slots.of(mode.rule, max_length).readable(lengths)
    besides = ~selection.is_chosen(blocks, count, jnp.maximum(held, 0)[:, None, None] // size)[:, 0]
    besides &= visible(mode.rule, positions, held)
    at = jnp.broadcast_to(held[:, None], (batch, kv_heads, held.shape[1]))
    parts.append(part(at, besides))
  return softmax.merge(parts)
