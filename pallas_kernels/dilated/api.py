"""`dilated_attention`: every D-th key, a window and sinks, in one softmax (arXiv 2602.18196, section 3)."""

from __future__ import annotations

import numbers

import jax
import jax.numpy as jnp

from pallas_kernels import arguments
from pallas_kernels.implementation import Operation, Sequences, call
from pallas_kernels.pattern import Pattern

Array = jax.Array
_MOST = 2**30  # of a window; sums of positions stay within int32


def _axes(q: Array, k: Array, v: Array, segment_ids: Array | None) -> tuple[str | None, ...]:
  return "BTNH", "BTKH", "BTKH", None if segment_ids is None else "BT"


# Filled-up tokens come after all others, so that no other sees them.
OPERATION = Operation("dilated_attention", _axes, "BTNH", lambda q, *_, pattern: q.shape[1],
                      Sequences("T", fills=(0, 0, 0, 0)))


def dilated_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    dilation: int | None,
    window: int = 0,
    sinks: int = 0,
    segment_ids: Array | None = None,
    implementation: str | None = None,
) -> Array:
  """Causal attention in which query t sees key s iff (s+1) % dilation == 0, or t - s <= window, or s < sinks.

  Differentiable. Scores and softmax are float32, scaled by 1/sqrt(H).

  Args:
    q: [B, T, N, H], already rotated.
    k, v: [B, T, K, H], N a multiple of K; for RAT+ already through the memory.
    dilation: the distance of the strided keys, >= 1 (1 is dense); None leaves window and sinks alone.
    window: tokens before the query that it sees besides itself, >= 0.
    sinks: first tokens that every later query sees, >= 0.
    segment_ids: int [B, T], packed documents: equal ids side by side are one document, its positions start at
      0, no query sees another document; 0 is padding, which sees nothing and is seen by nobody.
    implementation: None; "xla"; "cudnn" (NVIDIA GPUs, 16-bit types, no packed rows); "cudnn_masked" (dense attention
      under a mask, for short rows); "mosaic_gpu" (Hopper GPUs, bfloat16, heads of 64 or 128, up to 128 sinks, no
      packed rows; gradients as of "cudnn", of short rows "cudnn_masked"); "pallas_tpu" (TPUs, float32 or bfloat16,
      heads of a multiple of 128, of which up to 32 share keys at a width of 128, no packed rows).

  Returns:
    [B, T, N, H] in q's type; zeros for padding.

  Raises:
    ValueError: shapes or types that do not match, a bad dilation, window or sinks, an unknown implementation; where
      values can be seen, segment_ids beyond int32.
    NotImplementedError: a known implementation that this operation does not have, or that cannot serve these arrays.
  """
  q, k, v = (jnp.asarray(x) for x in (q, k, v))
  if segment_ids is not None:
    segment_ids = arguments.as_int32("segment_ids", segment_ids, f"[B, T] = {q.shape[:2]}")
  _check(q, k, v, dilation, window, sinks, segment_ids)
  out: Array = call(OPERATION, implementation, q, k, v, segment_ids, pattern=Pattern(dilation, window, sinks))
  return out


def _within(least: int, value: int) -> bool:
  return isinstance(value, numbers.Integral) and not isinstance(value, bool) and least <= value <= _MOST


def _check(q: Array, k: Array, v: Array, dilation: int | None, window: int, sinks: int, segment_ids: Array | None
           ) -> None:
  if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
    raise ValueError(f"q, k, v have shapes {q.shape}, {k.shape}, {v.shape}; give q [B, T, N, H] and k, v"
                     " [B, T, K, H].")
  if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
    raise ValueError(f"q has shape {q.shape} and k {k.shape}; B, T and H must be the same.")
  if 0 in q.shape or 0 in k.shape:
    raise ValueError(f"q has shape {q.shape} and k {k.shape}; every axis must have at least one entry.")
  if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
    raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; give them one floating type.")
  if q.shape[2] % k.shape[2]:
    raise ValueError(f"q has {q.shape[2]} heads and k {k.shape[2]}; the first must be a multiple of the second.")
  if dilation is not None and not _within(1, dilation):
    raise ValueError(f"dilation={dilation}; use an integer from 1 (dense) to {_MOST}, or None for window and"
                     " sinks alone.")
  for name, value in (("window", window), ("sinks", sinks)):
    if not _within(0, value):
      raise ValueError(f"{name}={value}; use an integer from 0 to {_MOST}.")
  if segment_ids is not None and segment_ids.shape != q.shape[:2]:
    raise ValueError(f"segment_ids is {segment_ids.dtype} {segment_ids.shape}; give integers [B, T] = {q.shape[:2]}.")
