"""One softmax over several disjoint sets of keys: attend to each set, then merge by log-sum-exp.

Shapes: q [B, T, N, H]; k, v [B, S, K, H] with N a multiple of K, G = N / K; mask bool, broadcastable to [B, K, T, S]
or, where the query heads of a group see different keys, to [B, K, G, T, S].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp

from pallas_kernels.products import einsum_float32

Array = jax.Array
Part = tuple[Array, Array]  # (weighted mean of the values [B, T, N, H], log-sum-exp of the scores [B, T, N]), float32
Tree = TypeVar("Tree")  # a pytree of arrays
Results = TypeVar("Results")  # likewise

# The log-sum-exp of a query that sees nothing. Finite, so that weights and gradients stay finite.
NOTHING = -1e30
CHUNK = 512  # queries that are in flight at a time


def attend_part(q: Array, k: Array, v: Array, mask: Array) -> Part:
  """Attention of q to the keys that `mask` lets it see; scores and softmax in float32, scale 1/sqrt(H).

  A query that sees nothing gets zeros and the log-sum-exp `NOTHING`.
  """
  b, t, n, h = q.shape
  kv = k.shape[2]
  grouped = q.reshape(b, t, kv, n // kv, h)
  scores = einsum_float32("btkgh,bskh->bkgts", grouped, k) * h**-0.5
  weights, lse = masked_softmax(scores, mask[:, :, None] if mask.ndim == 4 else mask)
  out = einsum_float32("bkgts,bskh->btkgh", weights.astype(v.dtype), v)
  return out.reshape(b, t, n, h), jnp.moveaxis(lse, 3, 1).reshape(b, t, n)


def attend_isolated(q: Array, k: Array, v: Array, mask: Array) -> Part:
  """`attend_part` where what is not finite stays with who sees it.

  A query gets NaN if it is not finite, or sees a token whose key or value is not. A weight of 0 would carry that to
  every other query, and the gradient to every key.
  """
  (q, k, v), (of_q, of_k, of_v) = zip(*map(_finite, (q, k, v)), strict=True)
  out, lse = attend_part(q, k, v, mask)
  bad = jnp.moveaxis(~(of_k & of_v), 1, 2)[:, :, None, None]
  spoilt = jnp.any((mask[:, :, None] if mask.ndim == 4 else mask) & bad, axis=-1)  # [B, K, 1 or G, T]
  b, t, n = lse.shape
  spoilt = jnp.moveaxis(jnp.broadcast_to(spoilt, (b, k.shape[2], n // k.shape[2], t)), 3, 1).reshape(lse.shape)
  spoilt |= ~of_q & (lse > NOTHING)  # padding, which sees nothing, may hold anything
  return jnp.where(spoilt[..., None], jnp.nan, out), jnp.where(spoilt, jnp.nan, lse)


def _finite(x: Array) -> tuple[Array, Array]:
  """(x [..., H] with zeros for what is not finite, which [...] are finite throughout)."""
  finite = jnp.isfinite(x)
  return jnp.where(finite, x, 0), finite.all(axis=-1)


def masked_softmax(scores: Array, mask: Array) -> Part:
  """(weights, log-sum-exp) along the last axis of the float32 scores that `mask` shows.

  Zeros and `NOTHING` where it shows none.
  """
  scores = jnp.where(mask, scores, NOTHING)
  top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
  weights = jnp.where(mask, jnp.exp(scores - top), 0.0)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  empty = total == 0
  total = jnp.where(empty, 1.0, total)
  return weights / total, jnp.where(empty, NOTHING, top + jnp.log(total))[..., 0]


def merge(parts: Sequence[Part]) -> Array:
  """The attention over the union of the parts' keys, float32 [B, T, N, H]. No key may be in two parts."""
  return merge_parts(parts)[0]


def merge_parts(parts: Sequence[Part]) -> Part:
  """`merge` with its log-sum-exp, so that it can be merged again."""
  outs, lses = zip(*parts, strict=True)
  top = jax.lax.stop_gradient(jnp.max(jnp.stack(lses), axis=0))
  weights = [jnp.exp(lse - top) for lse in lses]
  total = functools.reduce(jnp.add, weights)
  out = sum(w[..., None] * out for w, out in zip(weights, outs, strict=True)) / total[..., None]
  return out, top + jnp.log(total)


def own_scores(q: Array, k: Array) -> Array:
  """The score of every query with the key of its own token: float32 [B, T, N] of q [B, T, N, H], k [B, T, K, H]."""
  b, t, n, h = q.shape
  grouped = q.reshape(b, t, k.shape[2], -1, h).astype(jnp.float32)
  scores: Array = jnp.sum(grouped * k[:, :, :, None].astype(jnp.float32), axis=-1).reshape(b, t, n) * h**-0.5
  return scores


def chunk_size(length: int, target: int, multiple: int = 1) -> int:
  """The size of equal chunks, near `target` and a multiple of `multiple`, that cut `length` with little padding."""
  chunks = -(-length // max(target, multiple))
  return -(-length // (chunks * multiple)) * multiple


def split(x: Array, chunk: int, fill: int = 0) -> Array:
  """[B, T, ...] -> [chunks, B, chunk, ...], the last chunk filled up."""
  chunks = -(-x.shape[1] // chunk)
  pad = [(0, 0), (0, chunks * chunk - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
  x = jnp.pad(x, pad, constant_values=fill)
  return jnp.moveaxis(x.reshape(x.shape[0], chunks, chunk, *x.shape[2:]), 1, 0)


def join(x: Array, length: int) -> Array:
  """The inverse of `split`: [chunks, B, chunk, ...] -> [B, length, ...]."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def map_chunks(f: Callable[[Tree], Results], chunked: Tree) -> Results:
  """`f` on every chunk, one after another, its inner arrays recomputed for the gradient rather than kept."""
  results: Results
  if jax.tree.leaves(chunked)[0].shape[0] == 1:
    results = jax.tree.map(lambda a: a[None], f(jax.tree.map(lambda a: a[0], chunked)))
  else:
    results = jax.lax.map(jax.checkpoint(f), chunked)
  return results


def attend_masked(
    q: Array, k: Array, v: Array, q_info: Tree, mask: Callable[[Tree], Array], *, chunk: int = CHUNK,
    isolated: bool = False,
) -> Part:
  """`attend_part` with the queries in chunks, so that memory grows with T and not with T * S.

  Args:
    q_info: pytree of arrays [B or 1, T, ...], what `mask` needs to know of each query (its position, say).
    mask: maps a chunk of `q_info` to a mask for `attend_part`. Filled-up queries have -1 everywhere.
    isolated: as `attend_isolated`, for keys of several documents, and keys that are none.
  """
  part = attend_isolated if isolated else attend_part
  return by_chunks(lambda c: part(c[0], k, v, mask(c[1])), (q, q_info), chunk=chunk)


def by_chunks(f: Callable[[Tree], Results], queries: Tree, *, chunk: int = CHUNK) -> Results:
  """`f` of a pytree of arrays [B or 1, T, ...] that belong to queries, which pass in chunks; results [B, T, ...].

  Filled-up queries have -1 everywhere.
  """
  length = jax.tree.leaves(queries)[0].shape[1]
  size = chunk_size(length, chunk)
  chunks: Tree = jax.tree.map(lambda x: split(x, size, fill=-1), queries)
  results: Results = jax.tree.map(lambda x: join(x, length), map_chunks(f, chunks))
  return results
