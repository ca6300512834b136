"""The TPU kernels of `decode_attention`: of the rows of a cache as they lie, and of blocks of them that were chosen.

Whole cache: a program has a row of the batch, some key/value heads and a block of their rows, in the order of rows; the
softmax is carried in VMEM. Blocks after the last one with a visible row are neither copied nor computed.

Chosen blocks: a program has a row of the batch. It copies the blocks of some heads at a time, found by a table in SMEM,
while it attends to those of the heads before.

Arrays: q [B, M, G, H], G the query heads of a head that has a mask; keys and values [L, B, K, R, H]; seen int32, a mask
as a row; out [B, M, G, H] and lse [B, M, G, LANES], float32. Scores are in base 2.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.softmax import NOTHING
from pallas_kernels.tpu import LANES, LOG2E, params, product, scale

Array = jax.Array
Ref = Any
_STATE = 3  # arrays that a softmax is carried in: the highest score, the sum of weights, the weighted sum


@dataclasses.dataclass(frozen=True)
class Tuning:
  """How work is cut: key/value heads, or heads with a mask, that a program takes at a time, and rows of a block."""

  heads: int
  rows: int


def whole_cache(q: Array, keys: Array, values: Array, seen: Array, live: Array, layer: Array,
                own: tuple[Array, Array] | None, tuning: Tuning, interpret: Any) -> tuple[Array, Array]:
  """(out, lse); `seen` is [B, 1 or K, 1, R filled up to lanes and blocks], `live` int32 [B] the blocks with a row."""
  b, k, g, h = q.shape
  rows, heads = tuning.rows, tuning.heads
  blocks = -(-keys.shape[3] // rows)
  of_all = 1 if seen.shape[1] == 1 else heads
  padded = seen.shape[3] if blocks == 1 else rows

  def block(j: Array, b: Array, live: Ref) -> Array:
    return jnp.clip(j, 0, jnp.maximum(live[b] - 1, 0))

  def of_head(*shape: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, heads, *shape), lambda b, k, j, *_: (b, k, *[0] * len(shape)))

  of_cache = pl.BlockSpec((None, 1, heads, rows, h),
                          lambda b, k, j, layer, live: (layer[0], b, k, block(j, b, live), 0))
  of_seen = pl.BlockSpec((1, of_all, 1, padded), lambda b, k, j, layer, live: (
      b, 0 if of_all == 1 else k, 0, block(j, b, live)))
  results: tuple[Array, Array] = pl.pallas_call(
      functools.partial(_whole_cache, keys.shape[3], rows, own is not None), name="decode_attention",
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=2, grid=(b, k // heads, blocks),
          in_specs=[of_head(g, h), of_cache, of_cache, of_seen, *[of_head(1, h)] * (2 if own else 0)],
          out_specs=[of_head(g, h), of_head(g, LANES)],
          scratch_shapes=_state(heads, g, h)),
      out_shape=[jax.ShapeDtypeStruct(q.shape, jnp.float32), jax.ShapeDtypeStruct((b, k, g, LANES), jnp.float32)],
      interpret=interpret or False,
      compiler_params=params("parallel", "parallel", "arbitrary"),
  )(layer, live, q, keys, values, seen, *_as_rows(own))
  return results


def chosen_blocks(q: Array, keys: Array, values: Array, seen: Array, blocks: Array, start: Array,
                  own: tuple[Array, Array] | None, block: int, tuning: Tuning, interpret: Any) -> tuple[Array, Array]:
  """(out, lse) of rows of the batch; `blocks` [rows, M, n] are row numbers // 8, `seen` is [rows, M, 1, n * S].

  `start` is int32 [2], the layer and the first row; keys and values are of all rows.
  """
  b, m, g, h = q.shape
  n = blocks.shape[2]

  def of_row(*shape: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, *shape), lambda b, *_: (b, *[0] * len(shape)))

  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  buffer = pltpu.VMEM((2, tuning.heads, n * block, h), keys.dtype)
  kv_heads = keys.shape[2]
  results: tuple[Array, Array] = pl.pallas_call(
      functools.partial(_chosen_blocks, block, tuning.heads, m // kv_heads, own is not None),
      name="decode_attention_blocks",
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=2, grid=(b,),
          in_specs=[of_row(m, g, h), anywhere, anywhere, of_row(m, 1, seen.shape[3]),
                    *[of_row(kv_heads, 1, h)] * (2 if own else 0)],
          out_specs=[of_row(m, g, h), of_row(m, g, LANES)],
          scratch_shapes=[buffer, buffer, pltpu.SemaphoreType.DMA((2,)), *_state(1, g, h)]),
      out_shape=[jax.ShapeDtypeStruct(q.shape, jnp.float32), jax.ShapeDtypeStruct((b, m, g, LANES), jnp.float32)],
      interpret=interpret or False,
      compiler_params=params("parallel"),
  )(start, blocks.reshape(-1), q, keys, values, seen, *_as_rows(own))
  return results


def _as_rows(own: tuple[Array, Array] | None) -> list[Array]:
  return [x[:, :, None] for x in own or ()]


def _state(heads: int, groups: int, width: int) -> list[Any]:
  return [*[pltpu.VMEM((heads, groups, LANES), jnp.float32)] * (_STATE - 1),
          pltpu.VMEM((heads, groups, width), jnp.float32)]


def _whole_cache(length: int, rows: int, has_own: bool, layer_ref: Ref, live_ref: Ref, q_ref: Ref, k_ref: Ref,
                 v_ref: Ref, seen_ref: Ref, *refs: Ref) -> None:
  del layer_ref
  own, (out_ref, lse_ref, *state) = (refs[:2], refs[2:]) if has_own else ((), refs)
  b, j = pl.program_id(0), pl.program_id(2)
  heads = range(q_ref.shape[1])

  @pl.when(j == 0)
  def begin() -> None:
    for i in heads:
      _begin(i, q_ref[0, i], [ref[0, i] for ref in own], state)

  @pl.when(j < live_ref[b])
  def attend() -> None:
    left = length - j * rows
    of_all = _masks(seen_ref[0, 0], rows, left, v_ref.shape[-1])
    for i in heads:
      masks = of_all if seen_ref.shape[1] == 1 else _masks(seen_ref[0, i], rows, left, v_ref.shape[-1])
      _attend(i, q_ref[0, i], k_ref[0, i], v_ref[0, i], masks, state)

  @pl.when(j == pl.num_programs(2) - 1)
  def end() -> None:
    for i in heads:
      out_ref[0, i], lse_ref[0, i] = _ended(i, state)


def _chosen_blocks(block: int, heads: int, per_kv_head: int, has_own: bool, start_ref: Ref, table_ref: Ref, q_ref: Ref,
                   keys_ref: Ref, values_ref: Ref, seen_ref: Ref, *refs: Ref) -> None:
  own, rest = (refs[:2], refs[2:]) if has_own else ((), refs)
  out_ref, lse_ref, k_buffer, v_buffer, semaphores, *state = rest
  b, m = pl.program_id(0), q_ref.shape[1]
  n = k_buffer.shape[2] // block
  layer, row = start_ref[0], start_ref[1] + b

  def for_each_copy(part: Array, slot: Array, act: Any) -> None:
    """Of the blocks of a part of the heads into one half of the buffers."""
    for i in range(heads):
      head = part * heads + i

      def of_block(c: Array, _: None, head: Array = head, i: int = i) -> None:
        first = pl.multiple_of(table_ref[(b * m + head) * n + c] * 8, 8)
        for source, buffer in ((keys_ref, k_buffer), (values_ref, v_buffer)):
          here = source.at[layer, row, jax.lax.div(head, jnp.int32(per_kv_head)), pl.ds(first, block)]
          there = buffer.at[slot, i, pl.ds(pl.multiple_of(c * block, block), block)]
          act(pltpu.make_async_copy(here, there, semaphores.at[slot]))

      jax.lax.fori_loop(0, n, of_block, None)

  parts = m // heads
  for_each_copy(jnp.int32(0), jnp.int32(0), lambda copy: copy.start())

  def of_part(part: Array, _: None) -> None:
    slot = part & 1

    @pl.when(part + 1 < parts)
    def fetch() -> None:
      for_each_copy(part + 1, 1 - slot, lambda copy: copy.start())

    for_each_copy(part, slot, lambda copy: copy.wait())
    for i in range(heads):
      head = part * heads + i
      kv = jax.lax.div(head, jnp.int32(per_kv_head))
      masks = _masks(seen_ref[0, head], n * block, n * block, v_buffer.shape[-1])
      _begin(0, q_ref[0, head], [ref[0, kv] for ref in own], state)
      _attend(0, q_ref[0, head], k_buffer[slot, i], v_buffer[slot, i], masks, state)
      out_ref[0, head], lse_ref[0, head] = _ended(0, state)

  jax.lax.fori_loop(0, parts, of_part, None)


def _masks(seen: Array, rows: int, left: Array | int, width: int) -> tuple[Array, Array]:
  """(bool [1, rows], bool [rows, width]) of a mask int32 [1, rows filled up]; from `left` on there are no rows."""
  seen = jnp.where(jax.lax.broadcasted_iota(jnp.int32, seen.shape, 1) < left, seen, 0)
  column = jnp.broadcast_to(seen, (LANES, seen.shape[1])).T[:rows]
  return seen[:, :rows] != 0, jnp.concatenate([column] * (width // LANES), axis=1) != 0


def _begin(i: int, q: Array, own: Sequence[Array], state: Sequence[Ref]) -> None:
  """A softmax over nothing, or over the new token's own key and value [1, H]."""
  top, total, out = state
  if own:
    key, value = (x.astype(jnp.float32) for x in own)
    score = jnp.sum(q.astype(jnp.float32) * key, axis=1, keepdims=True) * scale(q.shape[1])
    top[i] = jnp.broadcast_to(score, top.shape[1:])
    total[i] = jnp.ones(total.shape[1:], jnp.float32)
    out[i] = jnp.broadcast_to(value, out.shape[1:])
  else:
    top[i] = jnp.full(top.shape[1:], NOTHING, jnp.float32)
    total[i] = jnp.zeros(total.shape[1:], jnp.float32)
    out[i] = jnp.zeros(out.shape[1:], jnp.float32)


def _attend(i: int, q: Array, k: Array, v: Array, masks: tuple[Array, Array], state: Sequence[Ref]) -> None:
  """Adds the rows k, v [rows, H] that the masks show."""
  top, total, out = state
  row, column = masks
  scores = jnp.where(row, product(q, k, (1, 1)) * scale(q.shape[1]), NOTHING)
  old = top[i][:, :1]
  new = jnp.maximum(old, scores.max(axis=1, keepdims=True))
  weights = jnp.where(row, jnp.exp2(scores - new), 0.0)
  shrunk = jnp.exp2(old - new)
  total[i] = jnp.broadcast_to(total[i][:, :1] * shrunk + weights.sum(axis=1, keepdims=True), total.shape[1:])
  top[i] = jnp.broadcast_to(new, top.shape[1:])
  # A weight of 0 is not enough: what is not visible may hold what is not finite.
  out[i] = out[i] * shrunk + product(weights.astype(v.dtype), jnp.where(column, v, jnp.zeros_like(v)))


def _ended(i: int, state: Sequence[Ref]) -> tuple[Array, Array]:
  """(out [G, H], lse [G, LANES])."""
  top, total, out = state
  empty = total[i] == 0
  whole = jnp.where(empty, 1.0, total[i])
  lse = jnp.where(empty, NOTHING, (top[i] + jnp.log2(whole)) * (1 / LOG2E))
  return out[i] / whole[:, :1], lse
