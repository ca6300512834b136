"""Attention under a rule on positions: whole sequences by the fastest form that serves, new tokens after a cache.

Every form is one softmax per query, float32 inside, and gives zeros where a query sees nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import decode_attention, devices, dilated_attention
from pallas_kernels.attention import softmax
from pallas_kernels.devices import AMPERE
from pallas_kernels.dilated import cudnn_call
from pallas_kernels.pattern import Pattern, Rule, seen
from rat_jax.attention.terms import Heads, Held, Placement
from rat_jax.axes import Array, Mask, Positions

# Below this length the scores of dense attention [T, T] are small enough to be held at once.
_WHOLE_DENSE = 1024


def attend(rule: Rule, pattern: Pattern | None, heads: Heads, at: Placement) -> Array:
  """Attention of queries to keys that a rule shows them: [B, T, N, H] in q's type.

  `pattern` is the same rule as dilation, window and sinks, where it is one: this opens the fast forms.
  """
  q, k, v = heads[:3]
  if at.plain and pattern is not None:
    # Right padding needs no mask of its own: it comes after every real query.
    if pattern.dilation != 1:
      return dilated_attention(q, k, v, dilation=pattern.dilation, window=pattern.window, sinks=pattern.sinks)
    if q.dtype == jnp.bfloat16 and _cudnn_serves(heads):
      return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    if q.shape[1] <= _WHOLE_DENSE and not (q.dtype == jnp.bfloat16 and devices.platform_of(q, k, v) == "cpu"):
      return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")
  return attend_masked(rule, heads, at)[0].astype(q.dtype)


def _cudnn_serves(heads: Heads) -> bool:
  q, k, v = heads[:3]
  return AMPERE.unsupported(devices.device_of(q, k, v)) is None and cudnn_call.unsupported(q, k, v, None) is None


def attend_masked(rule: Rule, heads: Heads, at: Placement) -> softmax.Part:
  """The mask form: any queries [B, T, N, H] and keys [B, S, K, H] at any positions.

  Positions of keys may differ by head: [B, K, S]. Returns the float32 output and its log-sum-exp, to be merged with
  the attention to other keys. Memory grows with T and S, not with T * S.
  """

  def mask(query: dict[str, Array]) -> Mask:
    by_head = at.keys.ndim == 3
    visible = seen(rule, query["position"][:, None] if by_head else query["position"], at.keys)
    visible = visible[:, None] if visible.ndim == 3 else visible
    if at.k_documents is not None:
      visible &= (query["document"][:, :, None] == at.k_documents[:, None, :])[:, None]
    return visible

  query = {"position": at.queries}
  if at.q_documents is not None:
    query["document"] = at.q_documents
  return softmax.attend_masked(heads.q, heads.k, heads.v, query, mask,
                               isolated=at.isolated or at.k_documents is not None)


def attend_cached(rule: Rule, heads: Heads, held: Held, positions: Positions) -> Array:
  """Attention of new tokens, at `positions` [B, T], to a cache and to themselves: float32 [B, T, N, H]."""
  if positions.shape[1] == 1:
    return _attend_step(rule, heads, held, positions)
  k, v = held.of_layer()
  return softmax.merge([attend_masked(rule, Heads(heads.q, k, v), Placement(positions, held.positions)),
                        attend_masked(rule, heads, Placement(positions, positions))])


def _attend_step(rule: Rule, heads: Heads, held: Held, positions: Positions) -> Array:
  """One token a row: the cache of all layers is read where it lies."""
  of_layer = held.positions
  readable = seen(rule, positions if of_layer.ndim == 2 else positions[:, None], of_layer)
  own = _own_of_each_head(heads, held.keys.shape[2])
  out, _ = decode_attention(heads.q[:, 0], held.keys, held.values, jnp.squeeze(readable, -2), layer=held.layer,
                            own=own)
  return out[:, None]


def _own_of_each_head(heads: Heads, count: int) -> tuple[Array, Array]:
  """Key and value [B, count, H] of the first new token; a compressed cache may have a head for every query head."""
  k, v = (jnp.repeat(x[:, 0], count // x.shape[2], axis=1) for x in (heads.k, heads.v))
  return k, v
