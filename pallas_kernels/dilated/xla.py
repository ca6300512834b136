"""Dilated attention in plain JAX, with memory that grows with T and work that grows with T * (T/D + W + S0).

The keys of a query fall into disjoint sets, which one softmax joins by log-sum-exp (`attention.softmax`):
  strided   the last token of every block of D, older than the window and no sink
  window    the W tokens before the query and itself, sinks left out
  sinks     the first S0 tokens
Queries go through in chunks. A chunk reads all strided keys, its own neighbourhood and the sinks.

Packed rows, whose positions restart, and patterns that leave hardly a key out go by a mask over all keys.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention import context, softmax
from pallas_kernels.attention.context import KeysAt
from pallas_kernels.implementation import Implementation
from pallas_kernels.packing import number_documents
from pallas_kernels.pattern import Pattern, seen
from pallas_kernels.split import CONTEXT

Array = jax.Array
_SCORES = 1 << 19  # scores of a head that are in flight at a time, with queries enough to fill a device


def run(q: Array, k: Array, v: Array, segment_ids: Array | None, *, pattern: Pattern) -> Array:
  """As `api.dilated_attention`."""
  length = q.shape[1]
  strided = length // pattern.dilation if pattern.dilation else 0
  if segment_ids is None and strided + 2 * pattern.window + pattern.sinks < length:
    return dilated_attention(q, k, v, *pattern)
  return _attend_all_keys(q, k, v, segment_ids, pattern)


def run_over_context(q: Array, k: Array, v: Array, segment_ids: Array | None, *, pattern: Pattern) -> Array:
  """`run` of a device's piece of a sequence, inside `jax.shard_map` over the axis "context".

  Of other pieces it fetches the last token of every block of D, the window before its own, and the sinks. Packed rows,
  and patterns that leave hardly a key out, fetch all keys and values.
  """
  length = jax.lax.axis_size(CONTEXT) * q.shape[1]
  strided = length // pattern.dilation if pattern.dilation else 0
  if segment_ids is not None or strided + 2 * pattern.window + pattern.sinks >= length:
    ids = None if segment_ids is None else context.gathered(segment_ids)
    return context.attend_by_heads(
        lambda q, k, v: _attend_all_keys(q, k, v, ids, pattern, context.start(q)), q, k, v)
  last_ones = context.strided(k, v, pattern.dilation) if pattern.dilation and strided else None
  around = Around(context.start(q), last_ones,
                  context.first(k, v, pattern.sinks), context.before(k, v, pattern.window))
  return attend_piece(q, k, v, around, pattern.window, pattern.sinks)


IMPLEMENTATION = Implementation(run, independent="BNK", over_context=run_over_context)


def _attend_all_keys(q: Array, k: Array, v: Array, segment_ids: Array | None, pattern: Pattern,
                     start: Array | int = 0) -> Array:
  """Attention under a mask; the queries are those from number `start` on."""
  positions = jnp.arange(k.shape[1], dtype=jnp.int32)[None]
  documents = jnp.zeros_like(positions)
  if segment_ids is not None:
    documents, positions = number_documents(segment_ids)
  of_queries = {"position": positions, "document": documents}
  if q.shape[1] < k.shape[1]:
    of_queries = {name: jax.lax.dynamic_slice_in_dim(x, start, q.shape[1], axis=1) for name, x in of_queries.items()}

  def mask(query: dict[str, Array]) -> Array:
    same = query["document"][:, :, None] == documents[:, None, :]
    return (seen(pattern, query["position"], positions) & same)[:, None]

  out, _ = softmax.attend_masked(q, k, v, of_queries, mask, isolated=segment_ids is not None)
  return out.astype(q.dtype)


def dilated_attention(q: Array, k: Array, v: Array, dilation: int | None, window: int, sinks: int) -> Array:
  """As `api.dilated_attention`, for one document per row whose positions are 0..T-1."""
  length = q.shape[1]
  strided = None
  if dilation is not None and length >= dilation:
    at = jnp.arange(dilation - 1, length, dilation, dtype=jnp.int32)
    strided = KeysAt(k[:, dilation - 1::dilation], v[:, dilation - 1::dilation], at)
  first = KeysAt(k[:, :sinks], v[:, :sinks], jnp.arange(min(sinks, length), dtype=jnp.int32)) if sinks else None
  return attend_piece(q, k, v, Around(jnp.int32(0), strided, first, None), min(window, length - 1), min(sinks, length))


class Around(NamedTuple):
  """What queries of a piece of a sequence read that need not lie in the piece.

  Attributes:
    start: int32 [], the position of the piece's first token.
    strided, sinks: the last tokens of all blocks of D, and the first tokens, of the whole sequence.
    before: keys and values [B, W, K, H] of the W tokens before the piece; None where there are none.
  """

  start: Array
  strided: KeysAt | None
  sinks: KeysAt | None
  before: tuple[Array, Array] | None


def attend_piece(q: Array, k: Array, v: Array, around: Around, window: int, sinks: int) -> Array:
  """Dilated attention of a piece of a sequence, which stands at `around.start` and after; [B, T, N, H] in q's type."""
  length = q.shape[1]
  block = max(1, min(window, softmax.CHUNK))
  back = -(-window // block)  # blocks before a query's own that its window reaches into
  keys = sum(x.k.shape[1] for x in (around.sinks, around.strided) if x is not None) + (back + 1) * block
  # A chunk's window reaches into the chunk before it and no further.
  target = max(softmax.CHUNK, _SCORES // keys, back * block)
  chunk = max(softmax.chunk_size(length, target, block), back * block)
  local = {name: softmax.split(a, chunk) for name, a in (("q", q), ("k", k), ("v", v))}
  first = around.before or (None, None)
  local |= {"before_" + name: _tails(local[name], back * block, x) for name, x in zip("kv", first, strict=True)}
  local["start"] = around.start + jnp.arange(local["q"].shape[0], dtype=jnp.int32) * chunk

  def attend_chunk(c: dict[str, Array]) -> Array:
    queries = c["start"] + jnp.arange(chunk, dtype=jnp.int32)
    parts = [_window_part(c, queries, block, back, window, sinks)]
    if around.sinks is not None:
      at = around.sinks.at
      seen_sinks = (at >= 0) & (at <= queries[:, None])
      parts.append(softmax.attend_part(c["q"], around.sinks.k, around.sinks.v, seen_sinks[None, None]))
    if around.strided is not None:
      at = around.strided.at
      older = (at < queries[:, None] - window) & (at >= sinks)
      parts.append(softmax.attend_part(c["q"], around.strided.k, around.strided.v, older[None, None]))
    return softmax.merge(parts).astype(q.dtype)

  return softmax.join(softmax.map_chunks(attend_chunk, local), length)


def _tails(chunks: Array, width: int, first: Array | None) -> Array:
  """For every chunk [chunks, B, chunk, ...], the last `width` entries of the one before it.

  For the first chunk these are `first` [B, up to width, ...], after zeros; None is zeros alone.
  """
  tails = chunks[:, :, chunks.shape[2] - width:]
  before = jnp.zeros_like(tails[:1])
  if first is not None and first.shape[1]:
    before = before.at[0, :, width - first.shape[1]:].set(first)
  return jnp.concatenate([before, tails[:-1]])


def _window_part(c: dict[str, Array], queries: Array, block: int, back: int, window: int, sinks: int) -> softmax.Part:
  """Attention of a chunk of queries to the window, block by block: a block reads itself and `back` blocks before."""
  if window == 0:  # the window is the query's own token
    return _own_token_part(c["q"], c["k"], c["v"], visible=queries >= sinks)
  b, chunk = c["q"].shape[:2]
  blocks = chunk // block

  def neighbourhoods(before: Array, own: Array) -> Array:  # -> [B, blocks, (back + 1) * block, K, H]
    x = jnp.concatenate([before, own], axis=1).reshape(b, blocks + back, block, *own.shape[2:])
    return jnp.concatenate([x[:, i:i + blocks] for i in range(back + 1)], axis=2)

  q_at = queries.reshape(blocks, block)
  k_at = q_at[:, :1] + jnp.arange(-back * block, block, dtype=jnp.int32)
  distance = q_at[:, :, None] - k_at[:, None, :]
  mask = (distance >= 0) & (distance <= window) & (k_at >= sinks)[:, None, :]  # none stands before the sequence
  out, lse = jax.vmap(softmax.attend_part, in_axes=(1, 1, 1, 0), out_axes=1)(
      c["q"].reshape(b, blocks, block, *c["q"].shape[2:]),
      neighbourhoods(c["before_k"], c["k"]), neighbourhoods(c["before_v"], c["v"]), mask[:, None, None])
  return out.reshape(b, chunk, *out.shape[3:]), lse.reshape(b, chunk, *lse.shape[3:])


def _own_token_part(q: Array, k: Array, v: Array, visible: Array) -> softmax.Part:
  """Attention of every query to its own token alone: the value itself, and one score."""
  out = jnp.repeat(v.astype(jnp.float32), q.shape[2] // v.shape[2], axis=2)
  visible = visible[None, :, None]
  return jnp.where(visible[..., None], out, 0.0), jnp.where(visible, softmax.own_scores(q, k), softmax.NOTHING)
