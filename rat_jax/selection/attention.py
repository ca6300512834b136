"""Attention to chosen blocks: of whole sequences, of new tokens to a cache, and of one token that reads little."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pallas_kernels import decode_attention, sparse_attention
from pallas_kernels.attention import softmax
from pallas_kernels.attention.gather import take_rows
from pallas_kernels.attention.masks import to_groups
from pallas_kernels.pattern import seen
from rat_jax.attention.terms import Heads, Held, Origin, Placement
from rat_jax.axes import Array, CacheRows, Keys, Positions
from rat_jax.caches.slots import BlockSlots, Slots, write
from rat_jax.selection.choice import is_chosen, pick
from rat_jax.selection.scores import Choosers, score_blocks
from rat_jax.selection.summary import Summaries

if TYPE_CHECKING:
  from rat_jax.modes.block_mode import BlockMode

_QUERIES = 4096  # of which what they choose exists at a time; kernels read keys once for many, scores take fewer


def attend_blocks(mode: BlockMode, heads: Heads, at: Placement, origin: Origin) -> Array:
  """Attention of queries to the blocks that they choose, of keys that stand at positions 0..S-1, in q's type."""
  summaries, own = mode.summary.of_blocks_and_own(mode.block, heads.choosing_keys, at.queries)
  out = _attend(mode, heads, at, summaries, own, origin, heads.k.shape[1])
  return out.astype(heads.q.dtype)


def _attend(mode: BlockMode, heads: Heads, at: Placement, summaries: Summaries, own: Summaries, origin: Origin,
            max_length: int) -> Array:
  """`attend_blocks` by summaries that were made: float32 [B, T, N, H]; all positions are below `max_length`."""
  keys = (heads.choosing_keys, at.keys)

  def pick_of_chunk(choosers: Choosers) -> tuple[Array, Array]:
    scores = score_blocks(mode, choosers, summaries, keys, origin)
    return pick(mode, scores, choosers.positions, max_length)

  def of_chunk(choosers: Choosers) -> Array:
    blocks, valid = softmax.by_chunks(pick_of_chunk, choosers)
    return sparse_attention(choosers.q, heads.k, heads.v, blocks, valid, block=mode.block,
                            q_positions=choosers.positions, rule=mode.rule)[0]

  return softmax.by_chunks(of_chunk, Choosers(heads.q, at.queries, own), chunk=_QUERIES)


def attend_cached(mode: BlockMode, heads: Heads, held: Held, positions: Positions, origin: Origin) -> Array:
  """Attention of new tokens, at `positions` [B, T], to a full cache and to themselves: float32 [B, T, N, H]."""
  summaries = held.summaries
  if summaries is None:
    summaries = mode.summary.of_blocks(mode.block, held.of_layer()[0], held.lengths)
  own = mode.summary.continued(mode.block, summaries, heads.k, positions, held.lengths)
  if positions.shape[1] == 1:
    return _attend_step(mode, heads, held, positions, summaries, own, origin)
  total = held.lengths + jnp.sum(positions >= 0, axis=1)
  slots = BlockSlots(mode.block, summaries[0].shape[2])
  summaries = tuple(write(slots, old[None], new[None], positions, total)[0]
                    for old, new in zip(summaries, own, strict=True))
  heads, at = joined(heads, held, positions)
  return _attend(mode, heads, at, summaries, own, origin, held.max_length)


def joined(heads: Heads, held: Held, positions: Positions) -> tuple[Heads, Placement]:
  """New queries, with the keys and values of a full cache and of the new tokens: key s stands at position s."""
  slots, total = Slots(held.keys.shape[3]), held.lengths + jnp.sum(positions >= 0, axis=1)

  def all_rows(old: CacheRows, new: Keys) -> Keys:
    old = jax.lax.dynamic_index_in_dim(old, held.layer)
    return jnp.swapaxes(write(slots, old, new[None], positions, total)[0], 1, 2)

  return (Heads(heads.q, all_rows(held.keys, heads.k), all_rows(held.values, heads.v)),
          Placement(positions, slots.held(total)))


def _attend_step(mode: BlockMode, heads: Heads, held: Held, positions: Positions, summaries: Summaries, own: Summaries,
                 origin: Origin) -> Array:
  """One token a row: of the cache it reads the blocks that it chooses, what the mode's rule adds, and no more."""
  count, kv_heads = summaries[0].shape[2], heads.k.shape[2]
  keys = (heads.k, positions)
  if mode.selector == "oracle":  # which alone looks at the keys of the cache
    everything, at = joined(heads, held, positions)
    keys = (everything.k, at.keys)
  scores = score_blocks(mode, Choosers(heads.q, positions, own), summaries, keys, origin)
  blocks, valid = pick(mode, scores, positions, held.max_length)

  rows = blocks[:, 0, :, :, None] * mode.block + jnp.arange(mode.block, dtype=jnp.int32)
  visible = valid[:, 0, :, :, None] & (rows < held.lengths[:, None, None, None])
  # A query's own block, if it must be read, has the query's own key.
  forced = (heads.k[:, 0], heads.v[:, 0]) if mode.forces_own else None
  out, lse = decode_attention(heads.q[:, 0], held.keys, held.values, visible, blocks=blocks[:, 0], layer=held.layer,
                              own=forced)
  parts = [(out[:, None], lse[:, None])]
  if forced is None:
    own_block = jnp.maximum(positions, 0)[:, :, None, None] // mode.block
    reads_own = is_chosen(blocks, count, own_block) & (positions >= 0)[:, :, None, None]
    if mode.rule is not None:
      reads_own |= seen(mode.rule, positions, positions)[:, :, None]
    parts.append(softmax.attend_part(*heads[:3], to_groups(reads_own, kv_heads)))
  if mode.rule is not None:
    parts.append(_attend_besides(mode, heads, held, positions, blocks, count))
  return softmax.merge(parts)


def _attend_besides(mode: BlockMode, heads: Heads, held: Held, positions: Positions, blocks: Array, count: int
                    ) -> softmax.Part:
  """Attention to what the mode's rule reads of the cache outside of the chosen blocks."""
  assert mode.rule is not None
  kv_heads = heads.k.shape[2]
  readable = Slots.of(mode.rule.pattern, held.max_length).readable(held.lengths)
  at = jnp.maximum(readable, 0)[:, None]
  chosen = is_chosen(blocks, count, at[:, None] // mode.block)[:, 0]
  besides = ~chosen & seen(mode.rule, positions, readable)
  at = jnp.broadcast_to(at, (at.shape[0], kv_heads, at.shape[2]))
  k, v = (jnp.swapaxes(take_rows(jax.lax.dynamic_index_in_dim(x, held.layer, keepdims=False), at), 1, 2)
          for x in (held.keys, held.values))
  return softmax.attend_part(heads.q, k, v, to_groups(besides[:, None], kv_heads))
