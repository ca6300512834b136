"""Matrix products that sum in float32."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import devices

Array = jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum_float32(subscripts: str, a: Array, b: Array) -> Array:
  """`jnp.einsum` of two float32 or two bfloat16 arrays with float32 sums and a float32 result.

  The gradient's products run in the arrays' own type, again with float32 sums: left to itself, the float32 cotangent
  would widen them, at a fraction of the speed.
  """
  return _product(subscripts, a, b)


def _product(subscripts: str, a: Array, b: Array) -> Array:
  if devices.platform_of(a, b) == "cpu":  # XLA's CPU products cannot widen; those of bfloat16 are exact in float32
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _forward(subscripts: str, a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
  return _product(subscripts, a, b), (a, b)


def _backward(subscripts: str, operands: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
  _, transpose = jax.vjp(functools.partial(jnp.einsum, subscripts), *operands)
  of_operands: tuple[Array, Array] = transpose(cotangent.astype(operands[0].dtype))
  return of_operands


einsum_float32.defvjp(_forward, _backward)
