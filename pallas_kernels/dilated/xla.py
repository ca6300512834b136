"""Dilated attention in plain JAX, with memory that grows with T and work that grows with T * (T/D + W + S0).

The keys of a query fall into disjoint sets, which one softmax joins by log-sum-exp (`attention.softmax`):
  strided   the last token of every block of D, older than the window and no sink
  window    the W tokens before the query and itself, sinks left out
  sinks     the first S0 tokens
Queries go through in chunks. A chunk reads all strided keys, its own neighbourhood and the sinks.

Packed rows, whose positions restart, and patterns that leave hardly a key out go by a mask over all keys.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.attention import softmax
from pallas_kernels.implementation import Implementation
from pallas_kernels.packing import number_documents
from pallas_kernels.pattern import Pattern, seen

Array = jax.Array
_SCORES = 1 << 19  # scores of a head that are in flight at a time, with queries enough to fill a device


def run(q: Array, k: Array, v: Array, segment_ids: Array | None, *, pattern: Pattern) -> Array:
  """As `api.dilated_attention`."""
  length = q.shape[1]
  strided = length // pattern.dilation if pattern.dilation else 0
  if segment_ids is None and strided + 2 * pattern.window + pattern.sinks < length:
    return dilated_attention(q, k, v, *pattern)
  return _attend_all_keys(q, k, v, segment_ids, pattern)


IMPLEMENTATION = Implementation(run, independent="BNK")


def _attend_all_keys(q: Array, k: Array, v: Array, segment_ids: Array | None, pattern: Pattern) -> Array:
  positions = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
  documents = jnp.zeros_like(positions)
  if segment_ids is not None:
    documents, positions = number_documents(segment_ids)

  def mask(query: dict[str, Array]) -> Array:
    same = query["document"][:, :, None] == documents[:, None, :]
    return (seen(pattern, query["position"], positions) & same)[:, None]

  out, _ = softmax.attend_masked(q, k, v, {"position": positions, "document": documents}, mask,
                                 isolated=segment_ids is not None)
  return out.astype(q.dtype)


def dilated_attention(q: Array, k: Array, v: Array, dilation: int | None, window: int, sinks: int) -> Array:
  """As `api.dilated_attention`, for one document per row whose positions are 0..T-1."""
  length = q.shape[1]
  window, sinks = min(window, length - 1), min(sinks, length)
  block = max(1, min(window, softmax.CHUNK))
  back = -(-window // block)  # blocks before a query's own that its window reaches into
  keys = sinks + (length // dilation if dilation else 0) + (back + 1) * block
  # A chunk's window reaches into the chunk before it and no further.
  target = max(softmax.CHUNK, _SCORES // keys, back * block)
  chunk = max(softmax.chunk_size(length, target, block), back * block)
  positions = jnp.arange(length, dtype=jnp.int32)[None]
  local = {name: softmax.split(a, chunk) for name, a in (("q", q), ("k", k), ("v", v))}
  local |= {"before_" + name: _tails(local[name], back * block) for name in ("k", "v")}
  local["start"] = jnp.arange(local["q"].shape[0], dtype=jnp.int32) * chunk

  def attend_chunk(c: dict[str, Array]) -> Array:
    queries = c["start"] + jnp.arange(chunk, dtype=jnp.int32)
    parts = [_window_part(c, queries, block, back, window, sinks)]
    if sinks:
      at = positions[0, :sinks]
      parts.append(softmax.attend_part(
          c["q"], k[:, :sinks], v[:, :sinks], (at <= queries[:, None])[None, None]))
    if dilation is not None and length // dilation:
      at = positions[0, dilation - 1::dilation]
      older = (at < queries[:, None] - window) & (at >= sinks)
      parts.append(softmax.attend_part(
          c["q"], k[:, dilation - 1::dilation], v[:, dilation - 1::dilation], older[None, None]))
    return softmax.merge(parts).astype(q.dtype)

  return softmax.join(softmax.map_chunks(attend_chunk, local), length)


def _tails(chunks: Array, width: int) -> Array:
  """For every chunk [chunks, B, chunk, ...], the last `width` entries of the one before it (zeros for the first)."""
  tails = chunks[:, :, chunks.shape[2] - width:]
  return jnp.concatenate([jnp.zeros_like(tails[:1]), tails[:-1]])


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
  mask = (distance >= 0) & (distance <= window) & (k_at >= sinks)[:, None, :]
  out, lse = jax.vmap(softmax.attend_part, in_axes=(1, 1, 1, 0), out_axes=1)(
      c["q"].reshape(b, blocks, block, *c["q"].shape[2:]),
      neighbourhoods(c["before_k"], c["k"]), neighbourhoods(c["before_v"], c["v"]), mask[:, None, None])
  return out.reshape(b, chunk, *out.shape[3:]), lse.reshape(b, chunk, *lse.shape[3:])


def _own_token_part(q: Array, k: Array, v: Array, visible: Array) -> softmax.Part:
  """Attention of every query to its own token alone: the value itself, and one score."""
  out = jnp.repeat(v.astype(jnp.float32), q.shape[2] // v.shape[2], axis=2)
  visible = visible[None, :, None]
  return jnp.where(visible[..., None], out, 0.0), jnp.where(visible, softmax.own_scores(q, k), softmax.NOTHING)
