"""What the kernels for TPUs share: the sizes of the device, products, and rows of several heads."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

Array = jax.Array
LANES = 128
VMEM_LIMIT = 56 * 2**20  # bytes that the compiler may take, of the 64 MiB and more that every TPU from v5e on has
SMEM_LIMIT = 2**19  # bytes of tables, half of what there is
LOG2E = math.log2(math.e)  # scores are in base 2
_TYPES = ("float32", "bfloat16")


def unsupported_heads(x: Any) -> str | None:
  """Why the kernels of attention do not serve heads [..., H] of this type and width, or None."""
  if str(x.dtype) not in _TYPES:
    return f"takes {' or '.join(_TYPES)}, not {x.dtype}"
  if x.shape[-1] % LANES:
    return f"takes heads of a multiple of {LANES}, not of {x.shape[-1]}, which fill no lanes"
  return None


def too_large(memory: str, name: str, shape: tuple[int, ...], dtype: Any, limit: int, fix: str) -> str | None:
  """Why an array that a kernel keeps in "VMEM" or "SMEM" is above a limit in bytes, or None."""
  size = math.prod(shape) * jnp.dtype(dtype).itemsize
  if size <= limit:
    return None
  return f"keeps {name}, {jnp.dtype(dtype)} {shape} of {size} bytes, in {memory}, with room for {limit}; {fix}"


def largest_divisor(n: int, most: int) -> int:
  """The largest that divides n and is not above `most`; at least 1."""
  return next(d for d in range(max(min(n, most), 1), 0, -1) if n % d == 0)


def params(*axes: Any) -> Any:
  """Of a grid whose axes are "parallel", or "arbitrary" where results are summed up along them."""
  return pltpu.CompilerParams(dimension_semantics=axes, vmem_limit_bytes=VMEM_LIMIT)


def scale(width: int) -> float:
  """Of scores of heads so wide, in base 2."""
  return LOG2E / math.sqrt(width)


def heads_first(x: Array, length: int) -> Array:
  """[B, T, N, H] as [B, N, length, H], filled up with zeros."""
  return jnp.swapaxes(jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0))), 1, 2)


def by_groups(x: Array, groups: int, length: int) -> Array:
  """[B, T, N, H] as [B, N / G, G, length, H], filled up with zeros."""
  x = heads_first(x, length)
  return x.reshape(x.shape[0], -1, groups, *x.shape[2:])


def from_groups(x: Array, length: int) -> Array:
  """The inverse of `by_groups`, of the first `length` tokens."""
  return jnp.swapaxes(x.reshape(x.shape[0], -1, *x.shape[3:]), 1, 2)[:, :length]


def in_rows(x: Array) -> Array:
  """[G, n, H] of the heads of a group as [G * n, H]."""
  return x.reshape(-1, x.shape[2])


def in_a_row(x: Array) -> Array:
  """[G, 1, n] of the heads of a group as [1, G * n]."""
  return jnp.concatenate([x[g] for g in range(x.shape[0])], axis=1)


def product(a: Array, b: Array, over: tuple[int, int] = (1, 0)) -> Array:
  """The product over one axis of each of two matrices: float32, and exact where the arguments are."""
  # None would be what the user configured, and the compiler takes no "highest" for bfloat16.
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
  return jax.lax.dot_general(a, b, (((over[0],), (over[1],)), ((), ())), precision=precision,
                             preferred_element_type=jnp.float32)
