"""Decode attention in plain JAX: keys and values are read where they lie, in their own type, with no copy of either.

With one query per key/value head both products are matrix times vector, which is no work for matrix units: written as
a product and a sum in float32 each is made to fuse, on GPUs and TPUs, into one pass over the keys, or the values, with
type and mask applied on the way. Grouped query heads share what is read, so there the products stay matrix products;
so they do on CPUs, where the fused form is ten times slower.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from pallas_kernels import devices
from pallas_kernels.attention.gather import take_rows
from pallas_kernels.attention.softmax import Part, masked_softmax, merge_parts, own_scores
from pallas_kernels.decode.context import implementation
from pallas_kernels.products import einsum_float32

Array = jax.Array


def decode_attention(q: Array, keys: Array, values: Array, visible: Array, layer: Array | int | None = None,
                     own: tuple[Array, Array] | None = None, blocks: Array | None = None) -> tuple[Array, Array]:
  """As `api.decode_attention`. Differentiable."""
  if layer is not None:
    keys, values = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (keys, values))
  if devices.platform_of(q, keys) == "gpu":
    # Left to itself the compiler transposes the whole cache, all its layers, before the loop over them.
    keys, values = (with_layout_constraint(x, Layout((0, 1, 2, 3))) for x in (keys, values))
  if blocks is not None:
    rows = blocks[..., None] * visible.shape[3] + jnp.arange(visible.shape[3], dtype=jnp.int32)
    visible, last = visible & (rows < keys.shape[2]), keys.shape[2] - 1
    rows, visible = (x.reshape(*blocks.shape[:2], -1) for x in (jnp.clip(rows, 0, last), visible))
    keys, values = take_rows(keys, rows), take_rows(values, rows)
  b, n, h = q.shape
  kv = keys.shape[1]
  seen = (visible[:, None] if visible.ndim == 2 else visible)[:, :, None]  # [B, 1 or K, 1, R]
  weights, lse = masked_softmax(_scores(q.reshape(b, kv, n // kv, h), keys) * h**-0.5, seen)
  # A weight of 0 is not enough: what is not visible may hold what is not finite.
  out = _weighted_sum(weights, jnp.where(seen[:, :, 0, :, None], values, 0))
  out, lse = out.reshape(b, n, h), lse.reshape(b, n)
  if own is None:
    return out, lse
  value = jnp.repeat(own[1].astype(jnp.float32), n // own[1].shape[1], axis=1)
  return merge_parts([(out, lse), (value, own_scores(q[:, None], own[0][:, None])[:, 0])])


def cotangents(arguments: tuple[Any, ...], of_results: Part) -> tuple[Any, ...]:
  """Those of `decode_attention`'s arguments, for a kernel that has no gradient of its own."""
  q, keys, values, visible, layer, own, blocks = arguments
  _, pull = jax.vjp(lambda q, keys, values, own: decode_attention(q, keys, values, visible, layer, own, blocks),
                    q, keys, values, own)
  *d_cache, d_own = pull(of_results)
  return *d_cache, None, None, d_own, None


def _as_matrices(x: Array, cache: Array) -> bool:
  """Whether x [B, K, G, ...] takes part in matrix products with keys or values [B, K, R, H]."""
  return x.shape[2] > 1 or devices.platform_of(cache, x) == "cpu"


def _scores(q: Array, keys: Array) -> Array:
  """q [B, K, G, H] by keys [B, K, R, H]: float32 [B, K, G, R]."""
  if _as_matrices(q, keys):
    return einsum_float32("bkgh,bkrh->bkgr", q, keys)
  return jnp.sum(q.astype(jnp.float32) * keys.astype(jnp.float32), axis=-1)[:, :, None]


def _weighted_sum(weights: Array, values: Array) -> Array:
  """weights float32 [B, K, G, R] by values [B, K, R, H]: float32 [B, K, G, H]."""
  if _as_matrices(weights, values):
    is_cpu = devices.platform_of(values, weights) == "cpu"
    dtype = jnp.float32 if is_cpu else values.dtype  # a CPU's products are float32 anyway
    return einsum_float32("bkgr,bkrh->bkgh", weights.astype(dtype), values.astype(dtype))
  return jnp.sum(weights[:, :, 0, :, None] * values.astype(jnp.float32), axis=2, keepdims=True)


IMPLEMENTATION = implementation(decode_attention)
