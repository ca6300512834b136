"""Decode attention by kernels for TPUs (pallas_tpu_kernel.py); its gradient is that of plain JAX."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention.softmax import Part
from pallas_kernels.decode import pallas_tpu_kernel as kernel, xla
from pallas_kernels.decode.context import implementation
from pallas_kernels.decode.pallas_tpu_kernel import Tuning
from pallas_kernels.devices import TPU
from pallas_kernels.implementation import Implementation
from pallas_kernels.tpu import LANES, SMEM_LIMIT, largest_divisor, too_large, unsupported_heads

Array = jax.Array
Own = tuple[Array, Array] | None
_BYTES = 5 * 2**19  # of keys that a program copies at a time; values are as many, and of both there are two
_ROWS = 512     # of a block of a cache that has more than twice as many
_MOST_HEADS = 32


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def run(q: Array, keys: Array, values: Array, visible: Array, layer: Array | int | None, own: Own,
        blocks: Array | None, interpret: Any) -> Part:
  """As `api.decode_attention`, of what is not `unsupported`."""
  part: Part = _program(q, keys, values, visible, layer, own, blocks, interpret)
  return part


def _forward(*arguments: Any) -> tuple[Part, tuple[Any, ...]]:
  return run(*arguments), arguments[:-1]


def _backward(interpret: Any, arguments: tuple[Any, ...], cotangents: Part) -> tuple[Any, ...]:
  del interpret
  return xla.cotangents(arguments, cotangents)


run.defvjp(_forward, _backward)


def unsupported(q: Array, keys: Array, values: Array, visible: Array, layer: Array | int | None, own: Own,
                blocks: Array | None) -> str | None:
  """Why the kernels do not serve these arguments, or None."""
  del values, layer, own
  if why := unsupported_heads(keys):
    return why
  tile = 32 // keys.dtype.itemsize  # rows of a register
  if blocks is not None and (visible.shape[3] % tile or keys.shape[-2] % tile or keys.shape[-2] < visible.shape[3]):
    return (f"takes chosen blocks and caches of a multiple of {tile} rows of {keys.dtype}, not blocks of"
            f" {visible.shape[3]} of {keys.shape[-2]} rows")
  if blocks is None:
    rows = min(keys.shape[-2], 2 * _ROWS)
    return too_large("VMEM", "a block of keys", (rows, keys.shape[-1]), keys.dtype, 2 * _BYTES, "take narrower heads")
  chosen = (blocks.shape[2], visible.shape[3], keys.shape[-1])
  return (too_large("VMEM", "the chosen keys of a head", chosen, keys.dtype, 2 * _BYTES,
                    "take fewer blocks, or narrower heads")
          or too_large("SMEM", "the blocks of a row", blocks.shape[1:], jnp.int32, SMEM_LIMIT, "take fewer blocks"))


def made(interpret: Any = None) -> Implementation:
  """The implementation; with interpreter parameters it runs without a TPU."""
  return implementation(lambda *arguments: run(*arguments, interpret), unsupported=unsupported, runs_on=TPU)


IMPLEMENTATION = made()


# Under a jit of its own, a kernel is lowered once for all layers of a program, not once for each.
@functools.partial(jax.jit, static_argnames=("interpret",))
def _program(q: Array, keys: Array, values: Array, visible: Array, layer: Array | int | None, own: Own,
             blocks: Array | None, interpret: Any) -> Part:
  b, n, h = q.shape
  if layer is None:
    keys, values, layer = keys[None], values[None], 0
  at = jnp.asarray(layer, jnp.int32).reshape(1)
  if blocks is None:
    out, lse = _whole_cache(q, keys, values, visible, at, own, interpret)
  else:
    out, lse = _chosen_blocks(q, keys, values, visible, at, own, blocks, interpret)
  return out.reshape(b, n, h), lse[..., 0].reshape(b, n)


def _whole_cache(q: Array, keys: Array, values: Array, visible: Array, layer: Array, own: Own, interpret: Any) -> Part:
  _, b, k, r, h = keys.shape
  rows = r if r <= 2 * _ROWS else _ROWS
  heads = _heads(k, _BYTES // (rows * h * keys.dtype.itemsize))
  seen = visible[:, None] if visible.ndim == 2 else visible
  last = jnp.max(jnp.where(seen, jnp.arange(1, r + 1, dtype=jnp.int32), 0), axis=(1, 2))
  seen = jnp.pad(seen.astype(jnp.int32), ((0, 0), (0, 0), (0, -r % (LANES if rows == r else rows))))[:, :, None]
  return kernel.whole_cache(q.reshape(b, k, -1, h), keys, values, seen, -(-last // rows), layer, own,
                            Tuning(heads, rows), interpret)


def _chosen_blocks(q: Array, keys: Array, values: Array, visible: Array, layer: Array, own: Own, blocks: Array,
                   interpret: Any) -> Part:
  b, m, n, size = visible.shape
  r = keys.shape[3]
  # The last block is copied from where it still fits, so its rows stand later in what is copied.
  first = jnp.clip(blocks, 0, -(-r // size) - 1) * size
  late = jnp.maximum(first - (r - size), 0)
  moved = jnp.roll(visible, -r % size, axis=3) & (jnp.arange(size, dtype=jnp.int32) >= -r % size)
  seen = jnp.where((late > 0)[..., None], moved, visible).reshape(b, m, 1, n * size)
  seen = jnp.pad(seen.astype(jnp.int32), ((0, 0), (0, 0), (0, 0), (0, -(n * size) % LANES)))
  q = q.reshape(b, m, -1, q.shape[2])
  heads = _heads(m, _BYTES // (n * size * keys.shape[-1] * keys.dtype.itemsize))
  rows = max(SMEM_LIMIT // (4 * m * n), 1)  # of the batch, whose table fits
  parts = []
  for start in range(0, b, rows):
    of_rows = slice(start, start + rows)
    parts.append(kernel.chosen_blocks(
        q[of_rows], keys, values, seen[of_rows], ((first - late) // 8)[of_rows],
        jnp.concatenate([layer, jnp.full(1, start, jnp.int32)]), own and (own[0][of_rows], own[1][of_rows]), size,
        Tuning(heads, n * size), interpret))
  out, lse = (jnp.concatenate(of, axis=0) for of in zip(*parts, strict=True))
  return out, lse


def _heads(n: int, fit: int) -> int:
  """How many of n heads a program takes at a time, of which so many fit."""
  return largest_divisor(n, min(fit, _MOST_HEADS))
