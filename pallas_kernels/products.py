"""Matrix products that sum in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def einsum_float32(subscripts: str, a: Array, b: Array) -> Array:
  """`jnp.einsum` of float32 or bfloat16 arrays with float32 sums and a float32 result."""
  if jax.default_backend() == "cpu":  # XLA's CPU products cannot widen; the products of bfloat16 are exact in float32
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)
