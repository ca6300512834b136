"""The TPU kernels of `sparse_attention`: tiles of queries, and for each the list of blocks that one of them reads.

Forward, a program has a tile of queries and runs over the blocks of its list; backward it has a block and runs over the
tiles of its list, while the gradients of all queries stay in VMEM. What comes next is copied while this is computed. So
work and copies follow what was chosen: a block that no query of a tile reads is not touched for it.

A block that lies before all queries of a tile, and that the rule adds nothing to, is read whole or not at all: then the
mask is a row, one number for every query.

Scores lie with keys along sublanes and queries along lanes, so that what is known of queries is a row.

Arrays: q, out, d_out [B, M, G, T, H], M the heads that choose and G the query heads of each; k, v [B, K, S, H]; lse,
delta [B, M, G, 1, T]; table int32 [B, M, n, T], the chosen blocks, -1 for none; at int32 [B, 1, T], positions;
lists int32 [B, M, tiles or blocks, 1, 1 + most], how many and then which. T is a multiple of the tile, S of the block.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.softmax import NOTHING
from pallas_kernels.pattern import Pattern, Rule
from pallas_kernels.tpu import LOG2E, in_a_row, in_rows, params, product, scale

Array = jax.Array
Ref = Any


@dataclasses.dataclass(frozen=True)
class Plan:
  """The sizes of a call.

  Attributes:
    groups: query heads of a head that chooses; shared: such heads of a key/value head.
    tile, block: queries of a tile, keys of a block; length: keys in all, of which the last block may lack some.
    rule: what is read besides.
  """

  groups: int
  shared: int
  tile: int
  block: int
  length: int
  rule: Rule | None

  @property
  def rows(self) -> int:
    return self.groups * self.tile

  def chosen(self, table: Array, block: Array) -> Array:
    """bool [1, tile]: the queries that chose a block, by their part [n, tile] of the table."""
    found: Array = jnp.max(jnp.where(table == block, 1, 0), axis=0, keepdims=True) > 0
    return found

  def mask(self, chosen: Array, at: Array, block: Array) -> Array:
    """bool [keys, rows] of a block's keys, for queries at positions [1, tile]."""
    key = block * self.block + jax.lax.broadcasted_iota(jnp.int32, (self.block, 1), 0)
    read = jnp.broadcast_to(chosen, (self.block, self.tile))
    if self.rule is not None:
      read = read | self.rule.sees(at, key)
    return self.of_rows(read & (key <= jnp.minimum(at, self.length - 1)))

  def is_whole(self, at: Array, block: Array) -> Array:
    """Whether every query reads all of a block's keys or none."""
    first, reach = block * self.block, jnp.minimum(jnp.min(at), self.length - 1)
    if self.rule is None:
      return first + self.block <= reach + 1
    assert isinstance(self.rule, Pattern)
    last, oldest = first + self.block, jnp.min(at) - self.rule.window
    return (last <= jnp.minimum(oldest, self.length)) & (first >= self.rule.sinks)

  def of_rows(self, x: Array) -> Array:
    """[..., tile] of every query as [..., rows]: of every query head."""
    return jnp.concatenate([x] * self.groups, axis=1) if self.groups > 1 else x


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
      interpret=interpret or False, compiler_params=params("parallel", "parallel", "parallel"),
  )(lists, q, k, v, table, at)
  return results


def backward(q: Array, k: Array, v: Array, table: Array, at: Array, lists: Array, lse: Array, delta: Array,
             d_out: Array, d_keys: Sequence[Array], plan: Plan, interpret: Any) -> Sequence[Array]:
  """(d_q like q, d_k, d_v): the latter float32 [B, M, S, H] of every head that chooses, added to `d_keys`, in place."""
  b, m, g, t, h = q.shape
  n, blocks = table.shape[2], k.shape[2] // plan.block
  of_block = pl.BlockSpec((1, 1, plan.block, h), lambda b, m, p: (b, jax.lax.div(m, jnp.int32(plan.shared)), p, 0))
  d_block = pl.BlockSpec((1, 1, plan.block, h), lambda b, m, p: (b, m, p, 0))
  tile = (g, plan.tile, h)
  results: Sequence[Array] = pl.pallas_call(
      functools.partial(_backward, plan), name="sparse_attention_backward", grid=(b, m, blocks),
      in_specs=[_list_of(lists), of_block, of_block, *[_ANYWHERE] * 6, d_block, d_block],
      input_output_aliases={9: 1, 10: 2},
      out_specs=[pl.BlockSpec((1, 1, g, t, h), lambda b, m, p: (b, m, 0, 0, 0)), d_block, d_block],
      out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype),
                 *[jax.ShapeDtypeStruct((b, m, k.shape[2], h), jnp.float32)] * 2],
      scratch_shapes=[pltpu.VMEM((2, *tile), q.dtype), pltpu.VMEM((2, *tile), d_out.dtype),
                      *[pltpu.VMEM((2, g, 1, plan.tile), jnp.float32)] * 2, pltpu.VMEM((2, n, plan.tile), jnp.int32),
                      pltpu.VMEM((2, 1, plan.tile), jnp.int32), pltpu.SemaphoreType.DMA((2,)),
                      pltpu.VMEM((g, t, h), jnp.float32), *[pltpu.VMEM((plan.block, h), jnp.float32)] * 2],
      interpret=interpret or False, compiler_params=params("parallel", "parallel", "arbitrary"),
  )(lists, k, v, q, d_out, lse, delta, table, at, *d_keys)
  return results


_ANYWHERE = pl.BlockSpec(memory_space=pl.ANY)


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
  count = jnp.minimum(list_ref[0, 0, 0, 0, 0], list_ref.shape[4] - 1)

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
  b, kv = pl.program_id(0), jax.lax.div(pl.program_id(1), jnp.int32(plan.shared))

  def copies(block: Array, slot: Array) -> Sequence[Any]:
    rows = pl.ds(pl.multiple_of(block * plan.block, plan.block), plan.block)
    return [pltpu.make_async_copy(source.at[b, kv, rows], buffer.at[slot], semaphores.at[slot])
            for source, buffer in ((k_ref, k_buffer), (v_ref, v_buffer))]

  return copies


def _forward(plan: Plan, list_ref: Ref, q_ref: Ref, k_ref: Ref, v_ref: Ref, table_ref: Ref, at_ref: Ref, out_ref: Ref,
             lse_ref: Ref, k_buffer: Ref, v_buffer: Ref, semaphores: Ref, top_ref: Ref, total_ref: Ref, sum_ref: Ref
             ) -> None:
  q = in_rows(q_ref[0, 0])
  top_ref[...] = jnp.full_like(top_ref, NOTHING)
  total_ref[...] = jnp.zeros_like(total_ref)
  sum_ref[...] = jnp.zeros_like(sum_ref)

  def add(scores: Array, v: Array) -> None:
    top = jnp.maximum(top_ref[...], scores.max(axis=0, keepdims=True))
    base = jnp.where(top == NOTHING, 0.0, top)  # of a query that has read nothing yet
    weights = jnp.exp2(scores - base)
    shrunk = jnp.exp2(top_ref[...] - base)
    total_ref[...] = total_ref[...] * shrunk + weights.sum(axis=0, keepdims=True)
    top_ref[...] = top
    sum_ref[...] = sum_ref[...] * shrunk + product(v, weights.astype(v.dtype), (0, 0))

  def attend(block: Array, slot: Array) -> None:
    chosen = plan.chosen(table_ref[0, 0], block)
    scores = product(k_buffer[slot], q, (1, 1)) * scale(q.shape[1])

    def with_row() -> None:
      add(scores + plan.of_rows(jnp.where(chosen, 0.0, NOTHING)), v_buffer[slot])

    def with_mask() -> None:
      mask = plan.mask(chosen, at_ref[0], block)
      add(jnp.where(mask, scores, NOTHING), _read(v_buffer[slot], mask))

    jax.lax.cond(plan.is_whole(at_ref[0], block), with_row, with_mask)

  _for_each(list_ref, _blocks(plan, k_ref, v_ref, k_buffer, v_buffer, semaphores), attend)
  empty = total_ref[...] == 0
  total = jnp.where(empty, 1.0, total_ref[...])
  lse = jnp.where(empty, NOTHING, (top_ref[...] + jnp.log2(total)) * (1 / LOG2E))
  out_ref[0, 0] = (sum_ref[...] / total).T.reshape(out_ref.shape[2:])
  for g in range(plan.groups):
    lse_ref[0, 0, g] = lse[:, g * plan.tile:(g + 1) * plan.tile]


def _backward(plan: Plan, list_ref: Ref, k_ref: Ref, v_ref: Ref, *refs: Ref) -> None:
  sources, (d_k_before, d_v_before), refs = refs[:6], refs[6:8], refs[8:]
  (d_q_ref, d_k_ref, d_v_ref), buffers, (semaphores, d_q_sum, d_k_sum, d_v_sum) = refs[:3], refs[3:9], refs[9:]
  b, m, block = (pl.program_id(axis) for axis in range(3))
  d_k_sum[...] = jnp.zeros_like(d_k_sum)
  d_v_sum[...] = jnp.zeros_like(d_v_sum)

  @pl.when(block == 0)
  def begin() -> None:
    d_q_sum[...] = jnp.zeros_like(d_q_sum)

  def rows_of(tile: Array) -> Any:
    return pl.ds(pl.multiple_of(tile * plan.tile, plan.tile), plan.tile)

  def copies(tile: Array, slot: Array) -> Sequence[Any]:
    rows, every = rows_of(tile), slice(None)
    places = [(b, m, every, rows)] * 2 + [(b, m, every, every, rows)] * 2 + [(b, m, every, rows), (b, every, rows)]
    return [pltpu.make_async_copy(source.at[place], buffer.at[slot], semaphores.at[slot])
            for source, buffer, place in zip(sources, buffers, places, strict=True)]

  def of_tile(tile: Array, slot: Array) -> None:
    q, d_out, lse, delta, table, at = (buffer[slot] for buffer in buffers)
    q, d_out = in_rows(q), in_rows(d_out)
    lse, delta = in_a_row(lse), in_a_row(delta)
    top = jnp.where(lse == NOTHING, -NOTHING, lse * LOG2E)  # what reads nothing has weights of 0
    chosen = plan.chosen(table, block)

    def add(k: Array, v: Array, weights: Array) -> None:
      d_scores = (weights * (product(v, d_out, (1, 1)) - delta)).astype(k.dtype)
      d_v_sum[...] += product(weights.astype(v.dtype), d_out)
      d_k_sum[...] += product(d_scores, q)
      d_q = product(d_scores, k, (0, 0))
      for g in range(plan.groups):
        d_q_sum[g, rows_of(tile)] += d_q[g * plan.tile:(g + 1) * plan.tile]

    def with_row() -> None:
      k, v = k_ref[0, 0], v_ref[0, 0]
      row = jnp.where(plan.of_rows(jnp.where(chosen, 1, 0)) > 0, top, -NOTHING)
      add(k, v, jnp.exp2(product(k, q, (1, 1)) * scale(q.shape[1]) - row))

    def with_mask() -> None:
      mask = plan.mask(chosen, at, block)
      k, v = _read(k_ref[0, 0], mask), _read(v_ref[0, 0], mask)
      add(k, v, jnp.where(mask, jnp.exp2(product(k, q, (1, 1)) * scale(q.shape[1]) - top), 0.0))

    jax.lax.cond(plan.is_whole(at, block), with_row, with_mask)

  _for_each(list_ref, copies, of_tile)
  of_scores = k_ref.shape[3]**-0.5
  d_k_ref[0, 0] = d_k_before[0, 0] + d_k_sum[...] * of_scores
  d_v_ref[0, 0] = d_v_before[0, 0] + d_v_sum[...]

  @pl.when(block == pl.num_programs(2) - 1)
  def end() -> None:
    d_q_ref[0, 0] = (d_q_sum[...] * of_scores).astype(d_q_ref.dtype)


def _read(x: Array, mask: Array) -> Array:
  """Keys or values with zeros for those that no query reads: they may hold what is not finite."""
  read = jnp.max(jnp.where(mask, 1, 0), axis=1, keepdims=True) > 0
  return jnp.where(read, x, jnp.zeros_like(x))
