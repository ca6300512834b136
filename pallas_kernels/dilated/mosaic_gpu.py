"""Dilated attention by the kernel that reads queries and keys where they lie; its gradients are cuDNN's.

Under a gradient the kernel runs where that of short rows follows, which takes any forward pass's output and
log-sum-exp. Where the gradient folds, so does the forward pass: both need the same copies, which XLA then makes once.
"""

from __future__ import annotations

import functools

import jax

from pallas_kernels.devices import HOPPER
from pallas_kernels.dilated import cudnn_call, cudnn_masked, folding, mosaic_gpu_kernel
from pallas_kernels.dilated.folding import Gradients, Residuals
from pallas_kernels.implementation import Implementation
from pallas_kernels.pattern import Pattern

Array = jax.Array
_MASKED = range(32, 2049)  # tokens; elsewhere the folded gradient is faster (bench_ops --crossovers --gradient)


def run(q: Array, k: Array, v: Array, segment_ids: None, *, pattern: Pattern) -> Array:
  """As `api.dilated_attention`, of what is not `unsupported`."""
  del segment_ids
  return dilated_attention(q, k, v, pattern)


def unsupported(q: Array, k: Array, v: Array, segment_ids: Array | None, *, pattern: Pattern) -> str | None:
  """Why the kernel, or the gradient by cuDNN, does not serve these arguments, or None."""
  return cudnn_call.unsupported(q, k, v, segment_ids) or mosaic_gpu_kernel.unsupported(q, k, pattern.sinks)


IMPLEMENTATION = Implementation(run, unsupported, HOPPER, independent="BNK")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def dilated_attention(q: Array, k: Array, v: Array, pattern: Pattern) -> Array:
  """As `api.dilated_attention`, for one document per row whose positions are 0..T-1."""
  out: Array = mosaic_gpu_kernel.forward(q, k, v, pattern)[0]
  return out


def _forward(q: Array, k: Array, v: Array, pattern: Pattern) -> tuple[Array, Residuals]:
  if q.shape[1] not in _MASKED:
    return folding.forward(q, k, v, pattern, cudnn_call)
  out, lse = mosaic_gpu_kernel.forward(q, k, v, pattern)
  return out, (q, k, v, out, lse)


def _backward(pattern: Pattern, residuals: Residuals, d_out: Array) -> Gradients:
  if d_out.shape[1] in _MASKED:
    return cudnn_masked.backward(pattern, residuals, d_out)
  return folding.backward(pattern, cudnn_call, residuals, d_out)


dilated_attention.defvjp(_forward, _backward)
