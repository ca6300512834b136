"""The TPU kernel of `dilated_attention` forward: blocks of queries, each with the keys that one of them sees."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dilated.pallas_tpu_shapes import Plan, divided, of_every_head, own_scores
from pallas_kernels.tpu import LANES, LOG2E, in_rows, params, product

Array = jax.Array
Ref = Any


def forward(q: Array, k: Array, v: Array, compact: Sequence[Array], plan: Plan, interpret: Any) -> tuple[Array, Array]:
  """(out like q, lse); `compact` are keys and values, or nothing."""
  grid = _Grid(plan, q.shape, bool(compact))
  results: tuple[Array, Array] = pl.pallas_call(
      functools.partial(_forward, grid), name="dilated_attention", grid=grid.sizes, interpret=interpret or False,
      in_specs=[grid.of_queries, *grid.of_keys],
      out_specs=[grid.of_queries, pl.BlockSpec((1, 1, plan.groups, 1, plan.tuning.queries),
                                               lambda b, k, i, j: (b, k, 0, 0, i))],
      out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype),
                 jax.ShapeDtypeStruct((*q.shape[:3], 1, q.shape[3]), jnp.float32)],
      scratch_shapes=[*[pltpu.VMEM((plan.rows, LANES), jnp.float32)] * 2,
                      pltpu.VMEM((plan.rows, plan.width), jnp.float32)],
      compiler_params=params("parallel", "parallel", "parallel", "arbitrary"),
  )(q, k, v, *compact)
  return results


@dataclasses.dataclass(frozen=True)
class _Grid:
  """Batch, key/value heads, blocks of queries, and their blocks of keys: those of the window first."""

  plan: Plan
  shape: tuple[int, ...]  # of q
  has_compact: bool

  @property
  def sizes(self) -> tuple[int, ...]:
    keys = self.plan.local_blocks + (self.plan.compact_blocks if self.has_compact else 0)
    return (*self.shape[:2], self.plan.blocks, max(keys, 1))

  @property
  def of_queries(self) -> pl.BlockSpec:
    cut = (1, 1, self.plan.groups, self.plan.tuning.queries, self.plan.width)
    return pl.BlockSpec(cut, lambda b, k, i, j: (b, k, 0, i, 0))

  @property
  def of_keys(self) -> list[pl.BlockSpec]:
    """Of k and v, and of the compact ones."""
    plan = self.plan
    local = pl.BlockSpec((1, 1, plan.tuning.queries, plan.width), lambda b, k, i, j: (b, k, i, 0))
    if plan.pattern.window:
      local = pl.BlockSpec((1, 1, plan.tuning.local, plan.width), lambda b, k, i, j: (
          b, k, jnp.maximum(self.local_block(i, jnp.minimum(j, plan.local_blocks - 1)), 0), 0))
    compact = pl.BlockSpec((1, 1, plan.tuning.keys, plan.width), lambda b, k, i, j: (
        b, k, jnp.clip(j - plan.local_blocks, 0, jnp.maximum(self.live_blocks(i) - 1, 0)), 0))
    return [local, local, *[compact, compact] * self.has_compact]

  def local_block(self, i: Array, j: Array) -> Array:
    """The number of the window's block j of a block of queries; negative before the first token."""
    return i * (self.plan.tuning.queries // self.plan.tuning.local) - self.plan.back + j

  def live_blocks(self, i: Array) -> Array:
    """Blocks of compact keys that a block of queries sees a key of."""
    return divided(self.plan.seen(i) + self.plan.tuning.keys - 1, self.plan.tuning.keys)


def _forward(grid: _Grid, q_ref: Ref, *refs: Ref) -> None:
  plan = grid.plan
  *of_keys, out_ref, lse_ref, top_ref, total_ref, sum_ref = refs
  keys, values = of_keys[::2], of_keys[1::2]
  i, j = pl.program_id(2), pl.program_id(3)

  @pl.when(j == 0)
  def begin() -> None:
    if plan.pattern.window:
      top_ref[...] = jnp.full_like(top_ref, -jnp.inf)
      total_ref[...] = jnp.zeros_like(total_ref)
      sum_ref[...] = jnp.zeros_like(sum_ref)
    else:  # the softmax begins with the query's own key
      k, v = (of_every_head(ref, plan) for ref in (keys[0], values[0]))
      top_ref[...] = jnp.broadcast_to(own_scores(in_rows(q_ref[0, 0]), k, plan), top_ref.shape)
      total_ref[...] = jnp.ones_like(total_ref)
      sum_ref[...] = v

  def attend(rows: Any, q: Array, k: Array, v: Array, mask: Array | None) -> None:
    """Some rows of the state, of queries q; without a mask they see all of the keys."""
    scores = product(q, k, (1, 1)) * plan.scale
    scores = scores if mask is None else jnp.where(mask, scores, -jnp.inf)
    old = top_ref[rows, :1]
    top = jnp.maximum(old, scores.max(axis=1, keepdims=True))
    base = jnp.where(top == -jnp.inf, 0.0, top)  # of a row that has seen nothing yet
    weights = jnp.exp2(scores - base)
    shrunk = jnp.exp2(old - base)
    total = total_ref[rows, :1] * shrunk + weights.sum(axis=1, keepdims=True)
    total_ref[rows] = jnp.broadcast_to(total, (total.shape[0], LANES))
    top_ref[rows] = jnp.broadcast_to(top, (top.shape[0], LANES))
    sum_ref[rows] = sum_ref[rows] * shrunk + product(weights.astype(v.dtype), v)

  if plan.local_blocks:
    block = grid.local_block(i, j)

    @pl.when((j < plan.local_blocks) & (block >= 0))
    def of_window() -> None:
      _attend_window(plan, i, block, q_ref, keys[0][0, 0], values[0][0, 0], attend)

  if grid.has_compact:
    _attend_compact(plan, i, j, q_ref, keys[1], values[1], attend)

  @pl.when(j == pl.num_programs(3) - 1)
  def end() -> None:
    out = sum_ref[...] / total_ref[:, :1]
    out_ref[0, 0] = out.astype(out_ref.dtype).reshape(out_ref.shape[2:])
    lse = ((top_ref[...] + jnp.log2(total_ref[...])) * (1 / LOG2E)).T[:1]  # a column in every lane as a row
    for g in range(plan.groups):
      lse_ref[0, 0, g] = lse[:, g * plan.tuning.queries:(g + 1) * plan.tuning.queries]


def _attend_window(plan: Plan, i: Array, block: Array, q_ref: Ref, k: Array, v: Array, attend: Any) -> None:
  """The queries of a block that a window can let see a block of keys, of every query head."""
  queries, local = plan.tuning.queries, plan.tuning.local
  size = min(queries, local + plan.pattern.window + -plan.pattern.window % LANES)
  start = pl.multiple_of(jnp.clip(block * local - i * queries, 0, queries - size), LANES)
  t = i * queries + start + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
  mask = plan.sees_local(t, block * local + jax.lax.broadcasted_iota(jnp.int32, (1, local), 1))

  def of_head(g: Array, _: None) -> None:
    rows = pl.ds(pl.multiple_of(g * queries + start, LANES), size)
    attend(rows, q_ref[0, 0, g, pl.ds(start, size)], k, v, mask)

  jax.lax.fori_loop(0, plan.groups, of_head, None)


def _attend_compact(plan: Plan, i: Array, j: Array, q_ref: Ref, k_ref: Ref, v_ref: Ref, attend: Any) -> None:
  """A block of queries and the chunks of a block of compact keys of which one of them sees a key."""
  first = (j - plan.local_blocks) * plan.tuning.keys
  chunks = divided(plan.seen(i) - first + plan.tuning.chunk - 1, plan.tuning.chunk)
  chunks = jnp.where(j < plan.local_blocks, 0, jnp.clip(chunks, 0, plan.tuning.keys // plan.tuning.chunk))

  def of_chunk(c: Array, _: None) -> None:
    start = pl.multiple_of(c * plan.tuning.chunk, plan.tuning.chunk)
    chunk = (0, 0, pl.ds(start, plan.tuning.chunk))
    k, v, every, q = k_ref[chunk], v_ref[chunk], slice(None), in_rows(q_ref[0, 0])
    whole = plan.all_see(i, first + start, plan.tuning.chunk)

    @pl.when(whole)
    def without_mask() -> None:
      attend(every, q, k, v, None)

    @pl.when(jnp.logical_not(whole))
    def with_mask() -> None:
      at = plan.at(first + start, plan.tuning.chunk, 1)
      attend(every, q, k, v, plan.sees_compact(plan.queries_at(i, 0), at))

  jax.lax.fori_loop(0, chunks, of_chunk, None)
