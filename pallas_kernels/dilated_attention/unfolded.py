"""Dilated attention by the kernel that reads queries and keys where they lie; its gradients are cuDNN's.

Under a gradient the kernel runs where that of short rows follows, which takes any forward pass's output and
log-sum-exp. Where the gradient folds, so does the forward pass: both need the same copies, which XLA then makes once.
"""

from __future__ import annotations

import functools

import jax

from pallas_kernels.dilated_attention import cudnn, folded, masked, mosaic_gpu
from pallas_kernels.dilated_attention.folded import Gradients, Pattern

Array = jax.Array
_MASKED = range(32, 2049)  # tokens; elsewhere the folded gradient is faster (bench_ops --crossovers --gradient)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def dilated_attention(q: Array, k: Array, v: Array, pattern: Pattern) -> Array:
  """As `api.dilated_attention`, for one document per row whose positions are 0..T-1."""
  return mosaic_gpu.forward(q, k, v, pattern)[0]


def _forward(q: Array, k: Array, v: Array, pattern: Pattern):
  if q.shape[1] not in _MASKED:
    return folded.forward(q, k, v, pattern, cudnn)
  out, lse = mosaic_gpu.forward(q, k, v, pattern)
  return out, (q, k, v, out, lse)


def _backward(pattern: Pattern, residuals, d_out: Array) -> Gradients:
  if d_out.shape[1] in _MASKED:
    return masked.backward(pattern, residuals, d_out)
  return folded.backward(pattern, cudnn, residuals, d_out)


dilated_attention.defvjp(_forward, _backward)
