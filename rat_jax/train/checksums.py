"""Checksums of arrays wherever they lie: the same for every way in which devices and processes share an array.

A checksum is a sum over entries, modulo 2**32, of the entry's bits mixed with its place; so every device adds up its
own entries, and nothing is gathered. There are two of them for every piece of an array, with other constants. A change
of one entry of up to 32 bits always shows; any other change, such as of several entries or of one of 64 bits, whose
halves count as two, but for one time in 2**64.

A piece is as many whole rows as 64 MiB hold, in the order of indices, and at least one. A row is what is left of an
array by an index into each of its first two axes, or into its first where there are two. An array of one axis is one
row.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

_PIECE_BYTES = 64 * 2**20
_SMALL = 2**22  # entries
_SEEDS = (0x9E3779B9, 0x7F4A7C15)


class Summed(NamedTuple):
  """The checksums of an array's pieces, 16 hexadecimal digits each, and whether all of its numbers are finite."""

  sums: list[str]
  finite: bool


def summed(x: jax.Array | np.ndarray) -> Summed:
  """The checksums of an array. Where several processes share it, all of them must ask."""
  small = isinstance(x, np.ndarray) and x.size <= _SMALL  # not worth a program of its own
  with np.errstate(over="ignore"):  # sums are modulo 2**32
    by_row, finite = _rows(np, x) if small else _compiled(_replicated(x))(x)
  rows = np.asarray(by_row)  # [seeds, rows]
  of_row = math.prod(x.shape[_leading(x.ndim):]) * x.dtype.itemsize
  together = max(1, _PIECE_BYTES // max(of_row, 1))
  starts = np.arange(0, max(rows.shape[1], 1), together)
  sums = np.add.reduceat(rows, starts, axis=1, dtype=np.uint32) if rows.size else np.zeros((2, 1), np.uint32)
  return Summed([f"{first:08x}{second:08x}" for first, second in sums.T], bool(finite))


def _leading(ndim: int) -> int:
  """How many first axes make up the rows, of which pieces consist."""
  return min(max(ndim - 1, 0), 2)


def _replicated(x: Any) -> NamedSharding | None:
  """Where the sums of x lie: on every device that has a part of x."""
  sharding = getattr(x, "sharding", None)
  return NamedSharding(sharding.mesh, jax.P()) if isinstance(sharding, NamedSharding) else None


@functools.cache
def _compiled(where: NamedSharding | None) -> Any:
  return jax.jit(functools.partial(_rows, jnp), out_shardings=where)


def _rows(xp: Any, x: Any) -> tuple[Any, Any]:
  """([seeds, rows] of the checksums of rows, whether all is finite), by jax.numpy or by NumPy."""
  finite = xp.isfinite(x).all() if jnp.issubdtype(x.dtype, jnp.floating) else xp.asarray(True)
  leading = _leading(x.ndim)
  bits = _bits(xp, x)
  index, stride = xp.zeros(bits.shape, xp.uint32), 1
  for axis in reversed(range(bits.ndim)):
    along = xp.arange(bits.shape[axis], dtype=xp.uint32) * xp.uint32(stride % 2**32)
    index = index + along.reshape(-1, *(1,) * (bits.ndim - 1 - axis))
    stride *= bits.shape[axis]

  def of_seed(seed: int) -> Any:
    mixed = _mixed(xp, bits ^ _mixed(xp, index + xp.uint32(seed)))
    return xp.sum(mixed, axis=tuple(range(leading, bits.ndim)), dtype=xp.uint32).reshape(-1)

  return xp.stack([of_seed(seed) for seed in _SEEDS]), finite


def _bits(xp: Any, x: Any) -> Any:
  """The bits of every entry, uint32; of 64 bits, halves along a last axis."""
  if x.dtype == bool:
    return x.astype(xp.uint32)
  kind = jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")
  if xp is not np:
    return jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
  halves = (2,) if x.dtype.itemsize == 8 else ()
  return np.ascontiguousarray(x).reshape(-1).view(kind).reshape((*x.shape, *halves)).astype(np.uint32)


def _mixed(xp: Any, x: Any) -> Any:
  """A one-to-one map of 32 bits; each bit of the result depends on all bits of x (the finalizer of MurmurHash3)."""
  x = (x ^ (x >> 16)) * xp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * xp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
