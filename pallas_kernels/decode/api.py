"""`decode_attention`: one query per row and head against a cache of which each row reads a part."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import arguments
from pallas_kernels.implementation import Operation, Sequences, call
from pallas_kernels.split import Letters

Array = jax.Array


def _axes(q: Array, keys: Array, values: Array, visible: Array, layer: Array | int | None,
          own: tuple[Array, Array] | None, blocks: Array | None) -> tuple[Letters, ...]:
  cache = "BKRH" if layer is None else "LBKRH"
  heads = "K" if visible.ndim > 2 and visible.shape[1] == keys.shape[-3] else "N"
  seen = f"B{heads}nS" if blocks is not None else "BR" if visible.ndim == 2 else "BKR"
  return ("BNH", cache, cache, seen, None if layer is None else "", None if own is None else ("BKH", "BKH"),
          None if blocks is None else f"B{heads}n")


def _size(q: Array, keys: Array, values: Array, visible: Array, layer: Array | int | None,
          own: tuple[Array, Array] | None, blocks: Array | None) -> int:
  return math.prod(keys.shape[-4:]) if blocks is None else visible.size * q.shape[2]


def _unit(q: Array, keys: Array, values: Array, visible: Array, *_: Any) -> int:
  return visible.shape[3] if visible.ndim == 4 else 1


def _entry(q: Array, keys: Array, values: Array, visible: Array, layer: Array | int | None,
           own: tuple[Array, Array] | None, blocks: Array | None) -> str:
  return "decode_attention" if blocks is None else "decode_attention_blocks"


OPERATION = Operation("decode_attention", _axes, ("BNH", "BN"), _size, Sequences("R", unit=_unit), _entry)


def decode_attention(
    q: Array,
    keys: Array,
    values: Array,
    visible: Array,
    *,
    layer: Array | int | None = None,
    own: tuple[Array, Array] | None = None,
    blocks: Array | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array]:
  """Attention of one new token per row to the cache; scores and softmax in float32, scale 1/sqrt(H).

  The log-sum-exp lets attention to other keys be merged with it (`attention.softmax`). What is not visible
  reaches no result, whatever it holds; gradients want it finite.

  Args:
    q: [B, N, H], already rotated.
    keys, values: [B, K, R, H], N a multiple of K; the rows of a head lie together.
    visible: bool, the cache rows that a row reads: [B, R], or [B, K, R] where heads differ.
    layer: int [], which layer of keys and values that are [L, B, K, R, H], 0..L-1. A loop over layers should say it
      here rather than hand over slices: before a kernel a slice is a copy.
    own: key and value [B, K, H] of the new token itself, which are not in the cache yet and always seen.
    blocks: int [B, K or N, n], the only blocks of S rows that are read, by a key/value head or by every query head
      for itself: block i holds rows i*S .. i*S+S-1. `visible` is then [B, K or N, n, S], of the rows of these blocks;
      a block has visible rows in one place at most, and any index may stand where it has none.
    implementation: None, "xla", "mosaic_gpu" or "pallas_tpu". "mosaic_gpu" runs on Hopper GPUs, for arrays that are all
      bfloat16 or all float32, H of 64, 128 or 256, and blocks of a multiple of 4 to 16 rows (the wider a row, the
      fewer); its gradient is that of "xla". "pallas_tpu" runs on TPUs, for float32 or bfloat16, H of a multiple of
      128, and chosen blocks of a multiple of 16 rows (float32: 8) that divide R; its gradient likewise.

  Returns:
    (out, lse): float32 [B, N, H] and float32 [B, N]; zeros and `softmax.NOTHING` where nothing is visible.

  Raises:
    ValueError: shapes or types that do not match, an unknown implementation; where values can be seen, a layer or a
      block with visible rows that is not there, and integers beyond int32.
    NotImplementedError: a known implementation that this operation, the device or these shapes do not have.
  """
  q, keys, values, visible = (jnp.asarray(x) for x in (q, keys, values, visible))
  if own is not None and len(own) != 2:
    raise ValueError(f"own has length {len(own)}; give a key and a value, [B, K, H] each.")
  own = None if own is None else (jnp.asarray(own[0]), jnp.asarray(own[1]))
  blocks = None if blocks is None else arguments.as_int32("blocks", blocks, "[B, K or N, n]")
  _check(q, keys, values, visible, layer, own, blocks)
  part: tuple[Array, Array] = call(OPERATION, implementation, q, keys, values, visible, layer, own, blocks)
  return part


def _check(q: Array, keys: Array, values: Array, visible: Array, layer: Array | int | None,
           own: tuple[Array, Array] | None, blocks: Array | None) -> None:
  if q.ndim != 3 or keys.ndim != (4 if layer is None else 5) or keys.shape != values.shape:
    cache = "[B, K, R, H]" if layer is None else "[L, B, K, R, H], as layer is given"
    raise ValueError(f"q, keys, values have shapes {q.shape}, {keys.shape}, {values.shape}; give q [B, N, H] and keys,"
                     f" values {cache}.")
  b, kv, rows, h = keys.shape[-4:]
  if q.shape[0] != b or q.shape[2] != h:
    raise ValueError(f"q has shape {q.shape} and keys {keys.shape}; B and H must be the same.")
  if min(*q.shape, *keys.shape) < 1:
    raise ValueError(f"q has shape {q.shape} and keys {keys.shape}; every axis must have at least one entry.")
  if layer is not None and (jnp.ndim(layer) or not jnp.issubdtype(jnp.result_type(layer), jnp.integer)):
    raise ValueError(f"layer={layer}; give an integer, or an integer array without axes.")
  if layer is not None and arguments.is_concrete(layer) and not 0 <= int(np.asarray(layer)) < keys.shape[0]:
    raise ValueError(f"layer={layer}; there are {keys.shape[0]}, from 0 on.")
  if q.shape[1] % kv:
    raise ValueError(f"q has {q.shape[1]} heads and keys {kv}; the first must be a multiple of the second.")
  if not q.dtype == keys.dtype == values.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
    raise ValueError(f"q, keys, values are {q.dtype}, {keys.dtype}, {values.dtype}; give them one floating type.")
  if blocks is not None:
    heads = q.shape[1]
    if blocks.ndim != 3 or blocks.shape[0] != b or blocks.shape[1] not in (kv, heads):
      raise ValueError(f"blocks is {blocks.dtype} {blocks.shape}; give integers [B, K or N, n], here B={b}, K={kv},"
                       f" N={heads}.")
    if visible.dtype != jnp.bool_ or visible.shape[:-1] != blocks.shape or 0 in visible.shape:
      raise ValueError(f"visible is {visible.dtype} {visible.shape}; with blocks {blocks.shape} give bool"
                       " [B, K or N, n, S], with a row in every block.")
    arguments.check_blocks(blocks, visible, -(-rows // visible.shape[-1]))
  elif visible.dtype != jnp.bool_ or visible.shape not in ((b, rows), (b, kv, rows)):
    raise ValueError(f"visible is {visible.dtype} {visible.shape}; give bool [B, R] = {(b, rows)} or"
                     f" [B, K, R] = {(b, kv, rows)}.")
  if own is not None and any(x.shape != (b, kv, h) or x.dtype != keys.dtype for x in own):
    raise ValueError(f"own has shapes {[x.shape for x in own]} and types {[str(x.dtype) for x in own]}; give key and"
                     f" value [B, K, H] = {(b, kv, h)} of the cache's type, {keys.dtype}.")
