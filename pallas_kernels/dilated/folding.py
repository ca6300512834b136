"""Dilated attention as ordinary causal attention of length T/D, by whatever kernel does that fastest.

The strided keys that query t sees beyond its window and sinks are a prefix of the representatives k[D-1::D]. Write
t - W - D (1 + S0 // D) = D m + r with 0 <= r < D: the prefix ends with number m of those that are no sinks. So with
the queries of one r as heads of their own, N D heads in all, the strided part is plain causal attention over T/D
keys. The window is causal attention with a sliding window; the sinks are a few scores. The three are disjoint, and
one softmax joins them by log-sum-exp.

The gradient of a softmax over parts needs the joint output and log-sum-exp in every part, which no library kernel's
own gradient takes from outside: one rule for the whole (`backward`) hands them to every part.
"""

from __future__ import annotations

import functools
from typing import Protocol

import jax
import jax.numpy as jnp

from pallas_kernels.attention import softmax
from pallas_kernels.pattern import Pattern
from pallas_kernels.products import einsum_float32

Array = jax.Array
Gradients = tuple[Array, Array, Array]
Residuals = tuple[Array, Array, Array, Array, Array]  # q, k, v, the output and its log-sum-exp
_FEW_SINKS = 8  # up to so many, each is a part of its own
_QUERIES = 8192  # that have scores with more sinks at a time


class Causal(Protocol):
  """Causal attention of two tokens or more with its softmax laid open.

  `window`: keys before the query that it sees, at least one; None for all.
  """

  def forward(self, q: Array, k: Array, v: Array, window: int | None) -> softmax.Part:
    """(output [B, T, N, H], log-sum-exp float32 [B, T, N]) of q [B, T, N, H] and k, v [B, T, K, H]."""

  def backward(self, q: Array, k: Array, v: Array, window: int | None, out: Array, lse: Array, d_out: Array
               ) -> Gradients:
    """Gradients of q, k, v where these keys are a part of a softmax whose output is `out`, its log-sum-exp `lse`."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def dilated_attention(q: Array, k: Array, v: Array, pattern: Pattern, causal: Causal) -> Array:
  """As `api.dilated_attention`, for one document per row whose positions are 0..T-1."""
  return forward(q, k, v, pattern, causal)[0]


def forward(q: Array, k: Array, v: Array, pattern: Pattern, causal: Causal) -> tuple[Array, Residuals]:
  """(output, what `backward` needs)."""
  parts = [_causal_forward(q, k, v, _reach(pattern, q), causal)]
  if pattern.sinks:
    parts += _sinks_forward(q, k, v, pattern)
  if pattern.dilation and pattern.offset < q.shape[1]:
    parts.append(_strided_forward(q, k, v, pattern, causal))
  out, lse = softmax.merge_parts(parts) if len(parts) > 1 else parts[0]
  out = out.astype(q.dtype)
  return out, (q, k, v, out, lse)


def backward(pattern: Pattern, causal: Causal, residuals: Residuals, d_out: Array) -> Gradients:
  """Gradients of q, k, v; `residuals` are these, the output and its log-sum-exp [B, T, N], whoever computed them."""
  q, k, v, out, lse = residuals
  parts = [_causal_backward(q, k, v, _reach(pattern, q), causal, out, lse, d_out)]
  if pattern.sinks:
    parts.append(_sinks_backward(q, k, v, pattern, out, lse, d_out))
  if pattern.dilation and pattern.offset < q.shape[1]:
    parts.append(_strided_backward(q, k, v, pattern, causal, out, lse, d_out))
  summed = [sum(one.astype(jnp.float32) for one in of_input) for of_input in zip(*parts, strict=True)]
  d_q, d_k, d_v = (d.astype(x.dtype) for d, x in zip(summed, (q, k, v), strict=True))
  return d_q, d_k, d_v


dilated_attention.defvjp(forward, backward)


# Causal attention, which the window is (the W keys before the query and its own) and the folded strided keys are.


def _causal_forward(q: Array, k: Array, v: Array, window: int | None, causal: Causal) -> softmax.Part:
  return _one_key_forward(q, k, v) if window == 0 or q.shape[1] == 1 else causal.forward(q, k, v, window)


def _causal_backward(q: Array, k: Array, v: Array, window: int | None, causal: Causal, out: Array, lse: Array,
                     d_out: Array) -> Gradients:
  if window == 0 or q.shape[1] == 1:
    return _one_key_backward(q, k, v, out, lse, d_out)
  return causal.backward(q, k, v, window, out, lse, d_out)


def _reach(pattern: Pattern, q: Array) -> int | None:
  return pattern.window if pattern.window < q.shape[1] - 1 else None


# One key for each query (k, v [B, T, K, H]) or the same for all ([B, 1, K, H]): sums that fuse with their neighbours.


def _one_key_forward(q: Array, k: Array, v: Array, seen: Array | bool = True) -> softmax.Part:
  return _heads(v, q), jnp.where(seen, softmax.own_scores(q, k), softmax.NOTHING)


def _one_key_backward(q: Array, k: Array, v: Array, out: Array, lse: Array, d_out: Array, seen: Array | bool = True
                      ) -> Gradients:
  d_out = d_out.astype(jnp.float32)

  def of_key(x: Array) -> Array:  # [B, T, N, H] -> the sum over the heads, and the queries, of a key
    x = jnp.sum(x.reshape(*x.shape[:2], k.shape[2], -1, x.shape[-1]), axis=3)
    return jnp.sum(x, axis=1, keepdims=True) if k.shape[1] < q.shape[1] else x

  weight = jnp.where(seen, jnp.exp(softmax.own_scores(q, k) - lse), 0.0)[..., None]
  d_score = weight * jnp.sum((_heads(v, q) - out.astype(jnp.float32)) * d_out, -1, keepdims=True) * q.shape[-1]**-0.5
  return d_score * _heads(k, q), of_key(d_score * q.astype(jnp.float32)), of_key(weight * d_out)


def _heads(x: Array, q: Array) -> Array:
  """[B, T, K, H] -> float32 [B, T, N, H], a key/value head for each query head."""
  return jnp.repeat(x.astype(jnp.float32), q.shape[2] // x.shape[2], axis=2)


# The sinks: the first S0 keys, where the window does not show them.


def _sinks_seen(t: Array, k: Array, window: int) -> Array:
  """Which of the sinks k [B, S0, K, H] queries at t [1, T] see: bool [1, T, S0]."""
  return t[..., None] - jnp.arange(k.shape[1], dtype=jnp.int32) > window


def _positions(q: Array) -> Array:
  return jnp.arange(q.shape[1], dtype=jnp.int32)[None]


def _sinks_forward(q: Array, k: Array, v: Array, pattern: Pattern) -> list[softmax.Part]:
  k, v = k[:, :pattern.sinks], v[:, :pattern.sinks]
  if pattern.sinks > _FEW_SINKS:
    return [softmax.attend_masked(q, k, v, _positions(q), lambda t: _sinks_seen(t, k, pattern.window)[:, None],
                                  chunk=_QUERIES)]
  seen = _sinks_seen(_positions(q), k, pattern.window)
  return [_one_key_forward(q, k[:, s:s + 1], v[:, s:s + 1], seen[:, :, s:s + 1]) for s in range(k.shape[1])]


def _sinks_backward(q: Array, k: Array, v: Array, pattern: Pattern, out: Array, lse: Array, d_out: Array) -> Gradients:
  k, v, length = k[:, :pattern.sinks], v[:, :pattern.sinks], k.shape[1]
  if pattern.sinks > _FEW_SINKS:
    d_q, d_k, d_v = _many_sinks_backward(q, k, v, pattern.window, out, lse, d_out)
  else:
    seen = _sinks_seen(_positions(q), k, pattern.window)
    of_sink = [_one_key_backward(q, k[:, s:s + 1], v[:, s:s + 1], out, lse, d_out, seen[:, :, s:s + 1])
               for s in range(k.shape[1])]
    d_qs, d_ks, d_vs = zip(*of_sink, strict=True)
    d_q, d_k, d_v = sum(d_qs), jnp.concatenate(d_ks, axis=1), jnp.concatenate(d_vs, axis=1)
  rest = ((0, 0), (0, length - k.shape[1]), (0, 0), (0, 0))
  return d_q, jnp.pad(d_k, rest), jnp.pad(d_v, rest)


def _many_sinks_backward(q: Array, k: Array, v: Array, window: int, out: Array, lse: Array, d_out: Array) -> Gradients:
  """In chunks of queries, so that memory does not grow with T times the sinks."""
  size = softmax.chunk_size(q.shape[1], _QUERIES)
  chunks = (*(softmax.split(x, size) for x in (q, out, lse, d_out)), softmax.split(_positions(q), size, fill=-1))

  def of_chunk(chunk: tuple[Array, ...]) -> Gradients:
    q, out, lse, d_out, t = chunk
    return _attended_backward(q, k, v, _sinks_seen(t, k, window), out, lse, d_out)

  d_q, d_k, d_v = jax.lax.map(of_chunk, chunks)
  return softmax.join(d_q, q.shape[1]), d_k.sum(axis=0), d_v.sum(axis=0)


def _attended_backward(q: Array, k: Array, v: Array, seen: Array, out: Array, lse: Array, d_out: Array) -> Gradients:
  def grouped(x: Array) -> Array:
    return x.reshape(*x.shape[:2], k.shape[2], -1, *x.shape[3:])

  def of_rows(x: Array) -> Array:  # [B, T, N] -> [B, K, G, T, 1]
    return jnp.moveaxis(grouped(x), 1, 3)[..., None]

  scores = einsum_float32("btkgh,bskh->bkgts", grouped(q), k) * q.shape[-1]**-0.5
  weights = jnp.where(seen[:, None, None], jnp.exp(scores - of_rows(lse)), 0.0)
  delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
  d_scores = weights * (einsum_float32("btkgh,bskh->bkgts", grouped(d_out), v) - of_rows(delta)) * q.shape[-1]**-0.5
  d_q = einsum_float32("bkgts,bskh->btkgh", d_scores.astype(q.dtype), k).reshape(q.shape)
  d_k = einsum_float32("bkgts,btkgh->bskh", d_scores.astype(q.dtype), grouped(q))
  d_v = einsum_float32("bkgts,btkgh->bskh", weights.astype(q.dtype), grouped(d_out))
  return d_q, d_k, d_v


# The strided keys, folded.


def _strided_forward(q: Array, k: Array, v: Array, pattern: Pattern, causal: Causal) -> softmax.Part:
  folded, length = _fold(q, k, pattern), q.shape[1]
  keys, values = (_representatives(x, pattern, folded.shape[1]) for x in (k, v))
  out, lse = _causal_forward(folded, keys, values, None, causal)
  out = _unfold(out, k, pattern, length)
  lse = _unfold(lse[..., None], k, pattern, length, softmax.NOTHING)[..., 0]
  return out, lse


def _strided_backward(q: Array, k: Array, v: Array, pattern: Pattern, causal: Causal, out: Array, lse: Array,
                      d_out: Array) -> Gradients:
  length = q.shape[1]
  folded, out, d_out = (_fold(x, k, pattern) for x in (q, out, d_out))
  lse = _fold(lse[..., None], k, pattern)[..., 0]
  keys, values = (_representatives(x, pattern, folded.shape[1]) for x in (k, v))
  d_q, d_k, d_v = _causal_backward(folded, keys, values, None, causal, out, lse, d_out)
  return (_unfold(d_q, k, pattern, length), _scatter(d_k, pattern, k), _scatter(d_v, pattern, v))


def _fold(x: Array, k: Array, pattern: Pattern) -> Array:
  """[B, T, N, X] -> [B, M, N D, X]: rows from the offset on, filled up with zeros; heads in the order K, G, D."""
  d, kv = pattern.dilation or 1, k.shape[2]
  x = x[:, pattern.offset:]
  x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % d), (0, 0), (0, 0)))
  b, t, n, width = x.shape
  x = x.reshape(b, t // d, d, kv, n // kv, width)
  return x.transpose(0, 1, 3, 4, 2, 5).reshape(b, t // d, n * d, width)


def _unfold(x: Array, k: Array, pattern: Pattern, length: int, fill: float = 0.0) -> Array:
  """The inverse of `_fold`; rows before the offset are `fill`."""
  d, kv = pattern.dilation or 1, k.shape[2]
  b, m, heads, width = x.shape
  x = x.reshape(b, m, kv, heads // (kv * d), d, width).transpose(0, 1, 4, 2, 3, 5)
  x = x.reshape(b, m * d, heads // d, width)[:, :length - pattern.offset]
  return jnp.pad(x, ((0, 0), (pattern.offset, 0), (0, 0), (0, 0)), constant_values=fill)


def _representatives(x: Array, pattern: Pattern, count: int) -> Array:
  """The first `count` of the strided keys that are no sinks: [B, count, K, H]."""
  d = pattern.dilation or 1
  first = d * (1 + pattern.sinks // d) - 1
  return x[:, first:first + d * (count - 1) + 1:d]


def _scatter(d_x: Array, pattern: Pattern, x: Array) -> Array:
  """Gradients of the representatives at their places among those of all keys."""
  d = pattern.dilation or 1
  first = d * (1 + pattern.sinks // d) - 1
  rest = x.shape[1] - first - d * (d_x.shape[1] - 1) - 1
  return jax.lax.pad(d_x, jnp.zeros((), d_x.dtype), ((0, 0, 0), (first, rest, d - 1), (0, 0, 0), (0, 0, 0)))
