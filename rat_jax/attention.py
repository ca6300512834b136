"""Attention under a mode: the mask form for every mode, and the fast forms for whole sequences.

`attend` is the operator on plain arrays; `attend_sequence` and `attend_keys` are its two halves, which the model
uses. All give one softmax per query, float32 inside, and zeros where a query sees nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import softmax
from pallas_kernels.dilated_attention.api import dilated_attention
from rat_jax import layout as layouts
from rat_jax.axes import Array, Keys, Lengths, Positions, Queries
from rat_jax.layout import Layout
from rat_jax.modes import Mode, mode_of_layer, visible

# Below this length the scores of dense attention [T, T] are small enough to be held at once.
_WHOLE_DENSE = 1024


def attend(q: Queries, k: Keys, v: Keys, mode: Mode, *, q_positions: Positions | None = None,
           lengths: Lengths | None = None, segment_ids: Array | None = None, layer: int = 0,
           row_ids: Array | None = None) -> Array:
  """Attention of q to k, v under a mode, for any model's arrays.

  Args:
    q: [B, T, N, H]; k, v: [B, S, K, H]; already rotated and, for RAT+, already through the memory.
    mode: who sees whom; of a PerLayer, its mode number `layer`.
    q_positions: int32 [B, T]; default: the last T positions of every row, so T=1 is a decode step.
    lengths: int32 [B], the keys that a row has; default S.
    segment_ids: int [B, T] for packed rows, T = S; positions restart in every document.
    layer: the layer, for a PerLayer.
    row_ids: int32 [B]; position-only modes have no use for it.

  Returns:
    [B, T, N, H] in q's type.

  Raises:
    ValueError: shapes that do not match, `segment_ids` together with `q_positions` or `lengths`, a PerLayer without
      such a layer.
  """
  del row_ids
  if (q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]
      or q.shape[2] % k.shape[2]):
    raise ValueError(f"q, k, v have shapes {q.shape}, {k.shape}, {v.shape}; give q [B, T, N, H] and k, v [B, S, K, H]"
                     " with N a multiple of K.")
  batch, width = k.shape[:2]
  mode = mode_of_layer(mode, layer)
  if segment_ids is not None:
    if q_positions is not None or lengths is not None or q.shape[1] != width:
      raise ValueError("segment_ids serve whole sequences (T = S) without q_positions and lengths; mark padding by"
                       " segment id 0.")
    return attend_sequence(q, k, v, mode, layouts.of_tokens((batch, width), segment_ids=segment_ids))
  keys = layouts.of_tokens((batch, width), lengths=lengths)
  if q_positions is None:
    if q.shape[1] == width and lengths is None:
      return attend_sequence(q, k, v, mode, keys)
    count = layouts.as_lengths(lengths, batch, width)
    q_positions = count[:, None] + jnp.arange(-q.shape[1], 0, dtype=jnp.int32)
  q_positions = jnp.asarray(layouts.as_integers("q_positions", q_positions, q.shape[:2]), jnp.int32)
  return attend_keys(q, k, v, mode, q_positions, keys.positions)[0].astype(q.dtype)


def attend_sequence(q: Queries, k: Keys, v: Keys, mode: Mode, layout: Layout) -> Array:
  """Causal attention of a whole sequence to itself, by the fastest form that serves; [B, T, N, H] in q's type."""
  pattern = mode.pattern
  if not layout.plain or pattern is None:
    return attend_keys(q, k, v, mode, layout.positions, layout.positions,
                       layout.documents, layout.documents)[0].astype(q.dtype)
  # Right padding needs no mask of its own: it comes after every real query.
  if pattern.dilation == 1:
    return _dense(q, k, v, mode, layout)
  return dilated_attention(q, k, v, dilation=pattern.dilation, window=pattern.window, sinks=pattern.sinks)


def attend_keys(q: Queries, k: Keys, v: Keys, mode: Mode, q_positions: Positions, k_positions: Positions,
                q_documents: Array | None = None, k_documents: Array | None = None) -> softmax.Part:
  """The mask form: attention of q [B, T, N, H] to any keys k, v [B, S, K, H] with a position [B or 1, S] each.

  Documents, where given, see themselves alone. Returns the float32 output and its log-sum-exp, to be merged with
  the attention to other keys. Memory grows with T and S, not with T * S.
  """

  def mask(query):
    seen = visible(mode, query["position"], k_positions)
    if k_documents is not None:
      seen &= query["document"][:, :, None] == k_documents[:, None, :]
    return seen[:, None] if seen.ndim == 3 else seen

  query = {"position": q_positions}
  if q_documents is not None:
    query["document"] = q_documents
  return softmax.attend_masked(q, k, v, query, mask)


def _dense(q: Queries, k: Keys, v: Keys, mode: Mode, layout: Layout) -> Array:
  if q.dtype == jnp.bfloat16 and jax.default_backend() == "gpu" and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
  if q.shape[1] <= _WHOLE_DENSE and not (q.dtype == jnp.bfloat16 and jax.default_backend() == "cpu"):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")
  return attend_keys(q, k, v, mode, layout.positions, layout.positions)[0].astype(q.dtype)
