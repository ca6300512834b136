"""The exponentially decaying memory on keys and values: the one thing that RAT+ adds to attention.

    g_t  = sigmoid(gate logits)               per channel, shared by keys and values
    k~_t = g_t * k~_(t-1) + (1 - g_t) * k_t   from k~_(-1) = 0
    v~_t = g_t * v~_(t-1) + (1 - g_t) * v_t

It runs before RoPE and before anything is cached, in float32 inside (arXiv 2602.18196, section 3). The recurrence
itself, in its parallel, sequential and one-step forms, is `pallas_kernels.gated_scan`; here are documents, padding
and the pair of keys and values.
"""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.arguments import as_floats
from pallas_kernels.packing import number_documents
from pallas_kernels.scan.api import gated_scan
from rat_jax import checks
from rat_jax.axes import Array, Keys, State


def memory(gate_logits: Array, k: Keys, v: Keys, state: State | None = None, *,
           segment_ids: Array | None = None) -> tuple[Keys, Keys, State]:
  """Passes keys and values through the memory, document by document; returns them and the memory's last state.

  Args:
    gate_logits, k, v: [B, T, K, H], floating; k and v before RoPE.
    state: (k~, v~) float32 [B, K, H] each before the first token, of the document that the first token is in;
      None is zero.
    segment_ids: int [B, T]; the memory starts afresh where a document does. Segment 0 is padding: it writes
      nothing and leaves the state as it is.

  Returns:
    (k~, v~, state): [B, T, K, H] each, bfloat16 where k and v are (rounded once, as by the RAT+ authors), else
    float32; and the state after the last real token, float32.

  Raises:
    ValueError: shapes that do not match, what is not floating.
  """
  gate_logits, k, v = (as_floats(name, x) for name, x in (("gate_logits", gate_logits), ("k", k), ("v", v)))
  if gate_logits.ndim != 4 or k.shape != gate_logits.shape or v.shape != gate_logits.shape:
    raise ValueError(f"gate_logits, k, v have shapes {gate_logits.shape}, {k.shape}, {v.shape}; give [B, T, K, H]"
                     " each.")
  reset = None
  if segment_ids is not None:
    documents, positions = number_documents(jnp.asarray(checks.as_integers("segment_ids", segment_ids, k.shape[:2])))
    reset = (positions == 0) & (documents > 1)
    real = (documents > 0)[:, :, None, None]
    gate_logits = jnp.where(real, gate_logits, jnp.inf)
    k, v = jnp.where(real, k, 0), jnp.where(real, v, 0)
  inputs = tuple(x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32) for x in (k, v))
  (k_mem, v_mem), last = gated_scan(gate_logits, inputs, state, reset)
  return k_mem, v_mem, (last[0], last[1])
