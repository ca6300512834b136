"""Dilated attention as dense attention under a mask, by cuDNN: for rows so short that all else costs more than keys.

It computes as many scores as dense attention does, which the other forms save; but it is one kernel, where they are
copies, several kernels and a merge.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.devices import AMPERE
from pallas_kernels.dilated import cudnn_call
from pallas_kernels.dilated.folding import Gradients, Residuals
from pallas_kernels.implementation import Implementation
from pallas_kernels.pattern import Pattern

Array = jax.Array


def run(q: Array, k: Array, v: Array, segment_ids: None, *, pattern: Pattern) -> Array:
  """As `api.dilated_attention`, of what is not `cudnn_call.unsupported`."""
  del segment_ids
  return dilated_attention(q, k, v, pattern)


IMPLEMENTATION = Implementation(run, cudnn_call.unsupported, AMPERE, independent="BNK")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def dilated_attention(q: Array, k: Array, v: Array, pattern: Pattern) -> Array:
  """As `api.dilated_attention`, for one document per row whose positions are 0..T-1."""
  return _forward(q, k, v, pattern)[0]


def _forward(q: Array, k: Array, v: Array, pattern: Pattern) -> tuple[Array, Residuals]:
  length = q.shape[1]
  out, lse = cudnn_call.forward(_even(q), _even(k), _even(v), None, functools.partial(_seen, length, pattern))
  out, lse = out[:, :length], lse[:, :length]
  return out, (q, k, v, out, lse)


def backward(pattern: Pattern, residuals: Residuals, d_out: Array) -> Gradients:
  """Gradients of q, k, v; `residuals` are these, the output and its log-sum-exp [B, T, N], whoever computed them."""
  q, k, v, out, lse = residuals
  d_q, d_k, d_v = cudnn_call.backward(_even(q), _even(k), _even(v), None, _even(out), _even(lse), _even(d_out),
                                      functools.partial(_seen, q.shape[1], pattern))
  return d_q[:, :q.shape[1]], d_k[:, :q.shape[1]], d_v[:, :q.shape[1]]


dilated_attention.defvjp(_forward, backward)


def _even(x: Array) -> Array:
  """cuDNN takes a bias of an even length; a token of zeros after the last one is seen by none."""
  return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), *[(0, 0)] * (x.ndim - 2)))


def _seen(length: int, pattern: Pattern) -> Array:
  at = jnp.arange(length + length % 2, dtype=jnp.int32)
  return pattern.sees(at[:, None], at)
