"""Dilated attention as dense attention under a mask, by cuDNN: for rows so short that all else costs more than keys.

It computes as many scores as dense attention does, which the other forms save; but it is one kernel, where they are
copies, several kernels and a merge.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.dilated_attention import cudnn
from pallas_kernels.dilated_attention.folded import Pattern
from pallas_kernels.dilated_attention.reference import dilated_pattern

Array = jax.Array


def dilated_attention(q: Array, k: Array, v: Array, pattern: Pattern) -> Array:
  """As `api.dilated_attention`, for one document per row whose positions are 0..T-1."""
  length = q.shape[1]
  # cuDNN takes a bias of an even length; a token after the last one is seen by none.
  q, k, v = (jnp.pad(x, ((0, 0), (0, length % 2), (0, 0), (0, 0))) for x in (q, k, v))
  return _attend(q, k, v, pattern)[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(q: Array, k: Array, v: Array, pattern: Pattern) -> Array:
  return _forward(q, k, v, pattern)[0]


def _forward(q: Array, k: Array, v: Array, pattern: Pattern):
  out, lse = cudnn.forward(q, k, v, None, functools.partial(_seen, q.shape[1], pattern))
  return out, (q, k, v, out, lse)


def _backward(pattern: Pattern, residuals, d_out: Array) -> tuple[Array, Array, Array]:
  q, k, v, out, lse = residuals
  return cudnn.backward(q, k, v, None, out, lse, d_out, functools.partial(_seen, q.shape[1], pattern))


_attend.defvjp(_forward, _backward)


def _seen(length: int, pattern: Pattern) -> Array:
  at = jnp.arange(length, dtype=jnp.int32)
  return dilated_pattern(at[:, None], at, *pattern)
