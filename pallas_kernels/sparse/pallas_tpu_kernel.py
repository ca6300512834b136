"""The TPU kernels of `sparse_attention`: tiles of queries, and for each the list of blocks that one of them reads.

Forward, and backward for the queries, a program has a tile of queries and runs over the blocks of its list; backward
for keys and values it has a block and runs over the tiles of its list. What comes next is copied while this is
computed. So work and copies follow what was chosen: a block that no query of a tile reads is not touched for it.

Scores lie with keys along sublanes and queries along lanes, so that what is known of queries is a row.

Arrays: q, out, d_out [B, M, G, T, H], M the heads that choose and G the query heads of each; k, v [B, K, S, H]; lse,
delta [B, M, G, 1, T]; table int32 [B, M, n, T], the chosen blocks, -1 for none; at int32 [B, 1, T], positions;
lists int32 [B, M, tiles or blocks, 1, 1 + most], how many and then which. T is a multiple of the tile, S of the block.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.softmax import NOTHING
from pallas_kernels.pattern import Rule
from pallas_kernels.tpu import LOG2E, VMEM_LIMIT, product

Array = jax.Array
Ref = Any


@dataclasses.dataclass(frozen=True)
class Plan:
  """The sizes of a call: query heads of a head that chooses, such heads of a key/value head, queries of a tile, keys
  of a block, and what is read besides."""

  groups: int
  choosers: int
  tile: int
  block: int
  rule: Rule | None

  @property
  def rows(self) -> int:
    return self.groups * self.tile

  def mask(self, table: Array, at: Array, block: Array) -> Array:
    """bool [keys, rows] of a block's keys, for a tile's part [n, tile] of the table and positions [1, tile]."""
    chosen = jnp.max(jnp.where(table == block, 1, 0), axis=0, keepdims=True) > 0
    key = block * self.block + jax.lax.broadcasted_iota(jnp.int32, (self.block, 1), 0)
    read = jnp.broadcast_to(chosen, (self.block, self.tile))
    if self.rule is not None:
      read = read | self.rule.sees(at, key)
    read = read & (key <= at)
    return jnp.concatenate([read] * self.groups, axis=1) if self.groups > 1 else read


def forward(q: Array, k: Array, v: Array, table: Array, at: Array, lists: Array, plan: Plan, interpret: Any
            ) -> tuple[Array, Array]:
  """(out float32 like q, lse)."""
  b, m, g, t, h = q.shape
  results: tuple[Array, Array] = pl.pallas_call(
      functools.partial(_forward, plan), name="sparse_attention", grid=(b, m, t // plan.tile),
      in_specs=[_list_of(lists), _of_tile(plan, h), _ANYWHERE, _ANYWHERE, _table_of(plan, table), _at_of(plan)],
      out_specs=[_of_tile(plan, h), _row_of(plan)],
      out_shape=[jax.ShapeDtypeStruct(q.shape, jnp.float32), jax.ShapeDtypeStruct((b, m, g, 1, t), jnp.float32)],
      scratch_shapes=[*_buffers(k, v, plan), *[pltpu.VMEM((1, plan.rows), jnp.float32)] * 2,
                      pltpu.VMEM((h, plan.rows), jnp.float32)],
      interpret=interpret or False, compiler_params=_PARAMS,
  )(lists, q, k, v, table, at)
  return results


def backward_of_queries(q: Array, k: Array, v: Array, table: Array, at: Array, lists: Array, lse: Array, delta: Array,
                        d_out: Array, plan: Plan, interpret: Any) -> Array:
  """d_q like q."""
  b, m, _, t, h = q.shape
  d_q: Array = pl.pallas_call(
      functools.partial(_backward_of_queries, plan), name="sparse_attention_d_queries", grid=(b, m, t // plan.tile),
      in_specs=[_list_of(lists), _of_tile(plan, h), _ANYWHERE, _ANYWHERE, _table_of(plan, table), _at_of(plan),
                _row_of(plan), _row_of(plan), _of_tile(plan, h)],
      out_specs=_of_tile(plan, h), out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
      scratch_shapes=[*_buffers(k, v, plan), pltpu.VMEM((plan.rows, h), jnp.float32)],
      interpret=interpret or False, compiler_params=_PARAMS,
  )(lists, q, k, v, table, at, lse, delta, d_out)
  return d_q


def backward_of_keys(q: Array, k: Array, v: Array, table: Array, at: Array, lists: Array, lse: Array, delta: Array,
                     d_out: Array, plan: Plan, interpret: Any) -> Sequence[Array]:
  """(d_k, d_v) float32 [B, M, S, H], of every head that chooses."""
  b, m, g, _, h = q.shape
  n, blocks = table.shape[2], k.shape[2] // plan.block
  of_block = pl.BlockSpec((1, 1, plan.block, h), lambda b, m, p: (b, jax.lax.div(m, jnp.int32(plan.choosers)), p, 0))
  d_block = pl.BlockSpec((1, 1, plan.block, h), lambda b, m, p: (b, m, p, 0))
  tile = (g, plan.tile, h)
  results: Sequence[Array] = pl.pallas_call(
      functools.partial(_backward_of_keys, plan), name="sparse_attention_d_keys", grid=(b, m, blocks),
      in_specs=[_list_of(lists), of_block, of_block, *[_ANYWHERE] * 6], out_specs=[d_block] * 2,
      out_shape=[jax.ShapeDtypeStruct((b, m, k.shape[2], h), jnp.float32)] * 2,
      scratch_shapes=[pltpu.VMEM((2, *tile), q.dtype), pltpu.VMEM((2, *tile), d_out.dtype),
                      *[pltpu.VMEM((2, g, 1, plan.tile), jnp.float32)] * 2, pltpu.VMEM((2, n, plan.tile), jnp.int32),
                      pltpu.VMEM((2, 1, plan.tile), jnp.int32), pltpu.SemaphoreType.DMA((2,)),
                      *[pltpu.VMEM((plan.block, h), jnp.float32)] * 2],
      interpret=interpret or False, compiler_params=_PARAMS,
  )(lists, k, v, q, d_out, lse, delta, table, at)
  return results


_ANYWHERE = pl.BlockSpec(memory_space=pl.ANY)
_PARAMS = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel"), vmem_limit_bytes=VMEM_LIMIT)


def _list_of(lists: Array) -> pl.BlockSpec:
  return pl.BlockSpec((1, 1, 1, 1, lists.shape[4]), lambda b, m, i: (b, m, i, 0, 0), memory_space=pltpu.SMEM)


def _of_tile(plan: Plan, width: int) -> pl.BlockSpec:
  return pl.BlockSpec((1, 1, plan.groups, plan.tile, width), lambda b, m, i: (b, m, 0, i, 0))


def _row_of(plan: Plan) -> pl.BlockSpec:
  return pl.BlockSpec((1, 1, plan.groups, 1, plan.tile), lambda b, m, i: (b, m, 0, 0, i))


def _table_of(plan: Plan, table: Array) -> pl.BlockSpec:
  return pl.BlockSpec((1, 1, table.shape[2], plan.tile), lambda b, m, i: (b, m, 0, i))


def _at_of(plan: Plan) -> pl.BlockSpec:
  return pl.BlockSpec((1, 1, plan.tile), lambda b, m, i: (b, 0, i))


def _buffers(k: Array, v: Array, plan: Plan) -> list[Any]:
  return [*(pltpu.VMEM((2, plan.block, x.shape[3]), x.dtype) for x in (k, v)), pltpu.SemaphoreType.DMA((2,))]


def _for_each(list_ref: Ref, copies: Callable[[Array, Array], Sequence[Any]], act: Callable[[Array, Array], None]
              ) -> None:
  """`act(which, slot)` of every entry of a list, after its `copies(which, slot)` have come; the next ones are under
  way by then."""
  count = list_ref[0, 0, 0, 0, 0]

  def which(i: Array | int) -> Array:
    entry: Array = list_ref[0, 0, 0, 0, 1 + i]
    return entry

  @pl.when(count > 0)
  def first() -> None:
    for copy in copies(which(0), jnp.int32(0)):
      copy.start()

  def turn(i: Array, _: None) -> None:
    slot = i & 1

    @pl.when(i + 1 < count)
    def following() -> None:
      for copy in copies(which(i + 1), 1 - slot):
        copy.start()

    for copy in copies(which(i), slot):
      copy.wait()
    act(which(i), slot)

  jax.lax.fori_loop(0, count, turn, None)


def _blocks(plan: Plan, k_ref: Ref, v_ref: Ref, k_buffer: Ref, v_buffer: Ref, semaphores: Ref
            ) -> Callable[[Array, Array], Sequence[Any]]:
  """Copies of a block of keys and values of the program's head."""
  b, kv = pl.program_id(0), jax.lax.div(pl.program_id(1), jnp.int32(plan.choosers))

  def copies(block: Array, slot: Array) -> Sequence[Any]:
    rows = pl.ds(pl.multiple_of(block * plan.block, plan.block), plan.block)
    return [pltpu.make_async_copy(source.at[b, kv, rows], buffer.at[slot], semaphores.at[slot])
            for source, buffer in ((k_ref, k_buffer), (v_ref, v_buffer))]

  return copies


def _forward(plan: Plan, list_ref: Ref, q_ref: Ref, k_ref: Ref, v_ref: Ref, table_ref: Ref, at_ref: Ref, out_ref: Ref,
             lse_ref: Ref, k_buffer: Ref, v_buffer: Ref, semaphores: Ref, top_ref: Ref, total_ref: Ref, sum_ref: Ref
             ) -> None:
  q = _rows_of(q_ref, plan)
  top_ref[...] = jnp.full_like(top_ref, NOTHING)
  total_ref[...] = jnp.zeros_like(total_ref)
  sum_ref[...] = jnp.zeros_like(sum_ref)

  def attend(block: Array, slot: Array) -> None:
    k, v = k_buffer[slot], v_buffer[slot]
    mask = plan.mask(table_ref[0, 0], at_ref[0], block)
    scores = jnp.where(mask, product(k, q, (1, 1)) * _scale(q), NOTHING)
    top = jnp.maximum(top_ref[...], scores.max(axis=0, keepdims=True))
    weights = jnp.where(mask, jnp.exp2(scores - top), 0.0)
    shrunk = jnp.exp2(top_ref[...] - top)
    total_ref[...] = total_ref[...] * shrunk + weights.sum(axis=0, keepdims=True)
    top_ref[...] = top
    sum_ref[...] = sum_ref[...] * shrunk + product(_read(v, mask), weights.astype(v.dtype), (0, 0))

  _for_each(list_ref, _blocks(plan, k_ref, v_ref, k_buffer, v_buffer, semaphores), attend)
  empty = total_ref[...] == 0
  total = jnp.where(empty, 1.0, total_ref[...])
  lse = jnp.where(empty, NOTHING, (top_ref[...] + jnp.log2(total)) * (1 / LOG2E))
  out_ref[0, 0] = (sum_ref[...] / total).T.reshape(out_ref.shape[2:])
  for g in range(plan.groups):
    lse_ref[0, 0, g] = lse[:, g * plan.tile:(g + 1) * plan.tile]


def _backward_of_queries(plan: Plan, list_ref: Ref, q_ref: Ref, k_ref: Ref, v_ref: Ref, table_ref: Ref, at_ref: Ref,
                         lse_ref: Ref, delta_ref: Ref, d_out_ref: Ref, d_q_ref: Ref, k_buffer: Ref, v_buffer: Ref,
                         semaphores: Ref, sum_ref: Ref) -> None:
  q, d_out = _rows_of(q_ref, plan), _rows_of(d_out_ref, plan)
  lse, delta = (_row(ref[0, 0], plan) for ref in (lse_ref, delta_ref))
  sum_ref[...] = jnp.zeros_like(sum_ref)

  def add(block: Array, slot: Array) -> None:
    mask = plan.mask(table_ref[0, 0], at_ref[0], block)
    k, v = _read(k_buffer[slot], mask), _read(v_buffer[slot], mask)
    _, d_scores = _gradients(q, k, v, d_out, lse, delta, mask)
    sum_ref[...] += product(d_scores.astype(k.dtype), k, (0, 0))

  _for_each(list_ref, _blocks(plan, k_ref, v_ref, k_buffer, v_buffer, semaphores), add)
  d_q_ref[0, 0] = sum_ref[...].astype(d_q_ref.dtype).reshape(d_q_ref.shape[2:])


def _backward_of_keys(plan: Plan, list_ref: Ref, k_ref: Ref, v_ref: Ref, *refs: Ref) -> None:
  sources, (d_k_ref, d_v_ref), buffers, (semaphores, d_k_sum, d_v_sum) = refs[:6], refs[6:8], refs[8:14], refs[14:]
  b, m, block = (pl.program_id(axis) for axis in range(3))
  d_k_sum[...] = jnp.zeros_like(d_k_sum)
  d_v_sum[...] = jnp.zeros_like(d_v_sum)

  def copies(tile: Array, slot: Array) -> Sequence[Any]:
    rows = pl.ds(pl.multiple_of(tile * plan.tile, plan.tile), plan.tile)
    every = slice(None)
    places = [(b, m, every, rows)] * 2 + [(b, m, every, every, rows)] * 2 + [(b, m, every, rows), (b, every, rows)]
    return [pltpu.make_async_copy(source.at[place], buffer.at[slot], semaphores.at[slot])
            for source, buffer, place in zip(sources, buffers, places, strict=True)]

  def add(tile: Array, slot: Array) -> None:
    del tile
    q, d_out, lse, delta, table, at = (buffer[slot] for buffer in buffers)
    mask = plan.mask(table, at, block)
    q, d_out = (x.reshape(plan.rows, x.shape[2]) for x in (q, d_out))
    k, v = _read(k_ref[0, 0], mask), _read(v_ref[0, 0], mask)
    weights, d_scores = _gradients(q, k, v, d_out, _row(lse, plan), _row(delta, plan), mask)
    d_v_sum[...] += product(weights.astype(v.dtype), d_out.astype(v.dtype), (1, 0))
    d_k_sum[...] += product(d_scores.astype(k.dtype), q, (1, 0))

  _for_each(list_ref, copies, add)
  d_k_ref[0, 0] = d_k_sum[...]
  d_v_ref[0, 0] = d_v_sum[...]


def _gradients(q: Array, k: Array, v: Array, d_out: Array, lse: Array, delta: Array, mask: Array
               ) -> tuple[Array, Array]:
  """(weights, cotangents of q . k), float32 [keys, rows]."""
  weights = jnp.where(mask, jnp.exp2(product(k, q, (1, 1)) * _scale(q) - lse * LOG2E), 0.0)
  d_weights = product(v, d_out.astype(v.dtype), (1, 1))
  return weights, jnp.where(mask, weights * (d_weights - delta) * q.shape[1]**-0.5, 0.0)


def _read(x: Array, mask: Array) -> Array:
  """Keys or values with zeros for those that no query reads: they may hold what is not finite."""
  read = jnp.max(jnp.where(mask, 1, 0), axis=1, keepdims=True) > 0
  return jnp.where(read, x, jnp.zeros_like(x))


def _rows_of(ref: Ref, plan: Plan) -> Array:
  """A block [1, 1, G, tile, H] as [rows, H]."""
  rows: Array = ref[0, 0].reshape(plan.rows, ref.shape[4])
  return rows


def _row(x: Array, plan: Plan) -> Array:
  """[G, 1, tile] as [1, rows]."""
  return jnp.concatenate([x[g] for g in range(plan.groups)], axis=1)


def _scale(q: Array) -> float:
  """Of scores, in base 2."""
  return LOG2E / math.sqrt(q.shape[-1])
