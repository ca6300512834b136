"""Looks at what a caller hands in before jax casts it, which drops in silence what 32 bits do not hold."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
LEAST, MOST = -2**31, 2**31 - 1  # of int32


def is_concrete(x: object) -> bool:
  """Whether the values of x can be looked at: not while a program is traced, nor where other hosts hold a part."""
  return x is not None and not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)


def as_array(value: Any) -> Array | np.ndarray:
  """An array on the host, unless something of the value (a list too) is on a device or traced."""
  on_device = any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value))
  return jnp.asarray(value) if on_device else np.asarray(value)


def beyond_int32(given: Array | np.ndarray) -> tuple[int, int] | None:
  """(the least, the most) of integers that int32 does not hold, where values can be seen: a cast would wrap them."""
  if given.dtype.itemsize < 4 or given.dtype == np.int32 or not given.size or not is_concrete(given):
    return None
  low, high = int(np.min(np.asarray(given))), int(np.max(np.asarray(given)))
  return None if low >= LEAST and high <= MOST else (low, high)


def as_int32(name: str, value: Any, axes: str) -> Array:
  """Integers of any type as int32; `axes` says what an error asks for.

  Raises ValueError for another type and, where values can be seen, for one that int32 does not hold.
  """
  given = as_array(value)
  if not jnp.issubdtype(given.dtype, jnp.integer):
    raise ValueError(f"{name} is {_named(given)} {given.shape}; give integers {axes}.")
  if beyond := beyond_int32(given):
    found = next(x for x in beyond if not LEAST <= x <= MOST)
    raise ValueError(f"{name} holds {found}, which int32 does not; use {LEAST}..{MOST}.")
  return jnp.asarray(given, jnp.int32)


def as_floats(name: str, value: Any) -> Array:
  """Floats in their type, float64 as float32. Raises ValueError for another type, such as integers."""
  given = as_array(value)
  if not jnp.issubdtype(given.dtype, jnp.floating):
    raise ValueError(f"{name} is {_named(given)}; use float32 or bfloat16.")
  return jnp.asarray(given, jnp.float32 if given.dtype == np.float64 else given.dtype)


def _named(given: Any) -> str:
  """The type as jax has it: float64 is float32 unless 64-bit types are enabled."""
  return str(jax.dtypes.canonicalize_dtype(given.dtype))


def check_blocks(blocks: Array, read: Array, count: int) -> None:
  """Raises ValueError, where values can be seen, for blocks [...] outside 0..count-1 of which something is read.

  Args:
    read: bool, of the shape of blocks, or with an axis for the rows of each.
  """
  if is_concrete(blocks) and is_concrete(read):
    wrong = np.asarray(blocks)[np.asarray(read).reshape(*blocks.shape, -1).any(axis=-1)]
    wrong = wrong[(wrong < 0) | (wrong >= count)]
    if wrong.size:
      raise ValueError(f"blocks holds {wrong[0]}, which is read; the blocks of these keys are 0..{count - 1}.")
