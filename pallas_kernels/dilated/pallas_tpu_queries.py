"""The TPU kernels of `dilated_attention` that go by blocks of queries: forward, and backward for the queries."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dilated.pallas_tpu_shapes import PARAMS, Plan, divided
from pallas_kernels.tpu import LANES, LOG2E, product

Array = jax.Array
Ref = Any


def forward(q: Array, k: Array, v: Array, compact: Sequence[Array], plan: Plan, interpret: Any) -> tuple[Array, Array]:
  """(out like q, lse); `compact` are keys and values, or nothing."""
  by_query = _ByQuery(plan, q.shape, bool(compact))
  results: tuple[Array, Array] = pl.pallas_call(
      functools.partial(_forward, by_query), name="dilated_attention", grid=by_query.grid, interpret=interpret or False,
      in_specs=[by_query.of_queries, *by_query.of_keys],
      out_specs=[by_query.of_queries, by_query.of_rows],
      out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype),
                 jax.ShapeDtypeStruct((*q.shape[:3], 1, q.shape[3]), jnp.float32)],
      scratch_shapes=[by_query.column, by_query.column, by_query.accumulated],
      compiler_params=PARAMS,
  )(q, k, v, *compact)
  return results


def backward_of_queries(q: Array, k: Array, v: Array, compact: Sequence[Array], lse: Array, delta: Array, d_out: Array,
                        plan: Plan, interpret: Any) -> Sequence[Array]:
  """(d_q like q); without a window (d_q, d_k, d_v), the latter of every query's own key alone."""
  by_query = _ByQuery(plan, q.shape, bool(compact))
  own = [] if plan.pattern.window else [k, v]
  results: Sequence[Array] = pl.pallas_call(
      functools.partial(_backward_of_queries, by_query), name="dilated_attention_d_queries", grid=by_query.grid,
      interpret=interpret or False,
      in_specs=[by_query.of_queries, *by_query.of_keys, by_query.of_rows, by_query.of_rows, by_query.of_queries],
      out_specs=[by_query.of_queries, *[by_query.of_own] * len(own)],
      out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, *own)],
      scratch_shapes=[by_query.column, by_query.column, by_query.accumulated],
      compiler_params=PARAMS,
  )(q, k, v, *compact, lse, delta, d_out)
  return results


@dataclasses.dataclass(frozen=True)
class _ByQuery:
  """A grid of batch, key/value heads, blocks of queries, and their blocks of keys: those of the window first."""

  plan: Plan
  shape: tuple[int, ...]  # of q
  has_compact: bool

  @property
  def grid(self) -> tuple[int, ...]:
    keys = self.plan.local_blocks + (self.plan.compact_blocks if self.has_compact else 0)
    return (*self.shape[:2], self.plan.blocks, max(keys, 1))

  @property
  def of_queries(self) -> pl.BlockSpec:
    cut = (1, 1, self.plan.groups, self.plan.tuning.queries, self.plan.width)
    return pl.BlockSpec(cut, lambda b, k, i, j: (b, k, 0, i, 0))

  @property
  def of_rows(self) -> pl.BlockSpec:
    return pl.BlockSpec((1, 1, self.plan.groups, 1, self.plan.tuning.queries), lambda b, k, i, j: (b, k, 0, 0, i))

  @property
  def of_own(self) -> pl.BlockSpec:
    return pl.BlockSpec((1, 1, self.plan.tuning.queries, self.plan.width), lambda b, k, i, j: (b, k, i, 0))

  @property
  def of_keys(self) -> list[pl.BlockSpec]:
    """Of k and v, and of the compact ones."""
    plan = self.plan
    local = self.of_own
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

  @property
  def column(self) -> Any:
    return pltpu.VMEM((self.plan.rows, LANES), jnp.float32)

  @property
  def accumulated(self) -> Any:
    return pltpu.VMEM((self.plan.rows, self.plan.width), jnp.float32)

  def rows_of(self, ref: Ref) -> Array:
    """A block [1, 1, G, queries, H] as [rows, H]."""
    rows: Array = ref[0, 0].reshape(self.plan.rows, self.plan.width)
    return rows

  def for_each_chunk(self, keys: Sequence[Ref], values: Sequence[Ref],
                     f: Callable[[Array, Array, Array | None], None]) -> None:
    """`f(keys, values, mask)` of every chunk of the block of keys of which a query sees a key; None: all see all."""
    plan, i, j = self.plan, pl.program_id(2), pl.program_id(3)
    t = plan.queries_at(i, 0)
    if plan.local_blocks:
      block = self.local_block(i, j)

      @pl.when((j < plan.local_blocks) & (block >= 0))
      def _() -> None:
        at = block * plan.tuning.local + jax.lax.broadcasted_iota(jnp.int32, (1, plan.tuning.local), 1)
        f(keys[0][0, 0], values[0][0, 0], plan.sees_local(t, at))

    if self.has_compact:
      first = (j - plan.local_blocks) * plan.tuning.keys
      chunks = divided(plan.seen(i) - first + plan.tuning.chunk - 1, plan.tuning.chunk)
      chunks = jnp.where(j < plan.local_blocks, 0, jnp.clip(chunks, 0, plan.tuning.keys // plan.tuning.chunk))

      def of_chunk(c: Array, _: None) -> None:
        start = pl.multiple_of(c * plan.tuning.chunk, plan.tuning.chunk)
        rows = (0, 0, pl.ds(start, plan.tuning.chunk), slice(None))
        whole = plan.all_see(i, first + start, plan.tuning.chunk)

        @pl.when(whole)
        def without_mask() -> None:
          f(keys[1][rows], values[1][rows], None)

        @pl.when(jnp.logical_not(whole))
        def with_mask() -> None:
          f(keys[1][rows], values[1][rows], plan.sees_compact(t, plan.at(first + start, plan.tuning.chunk, 1)))

      jax.lax.fori_loop(0, chunks, of_chunk, None)


def _forward(call: _ByQuery, q_ref: Ref, *refs: Ref) -> None:
  plan = call.plan
  *of_keys, out_ref, lse_ref, top_ref, total_ref, sum_ref = refs
  keys, values = of_keys[::2], of_keys[1::2]
  q = call.rows_of(q_ref)

  @pl.when(pl.program_id(3) == 0)
  def _() -> None:
    if plan.pattern.window:
      top_ref[...] = jnp.full_like(top_ref, -jnp.inf)
      total_ref[...] = jnp.zeros_like(total_ref)
      sum_ref[...] = jnp.zeros_like(sum_ref)
    else:  # the softmax begins with the query's own key
      k, v = (_of_every_head(ref, plan) for ref in (keys[0], values[0]))
      top_ref[...] = jnp.broadcast_to(_own_scores(q, k, plan), top_ref.shape)
      total_ref[...] = jnp.ones_like(total_ref)
      sum_ref[...] = v

  def of_chunk(k: Array, v: Array, mask: Array | None) -> None:
    scores = product(q, k, (1, 1)) * plan.scale
    scores = scores if mask is None else jnp.where(mask, scores, -jnp.inf)
    old = top_ref[:, :1]
    top = jnp.maximum(old, scores.max(axis=1, keepdims=True))
    base = jnp.where(top == -jnp.inf, 0.0, top)  # of a row that has seen nothing yet
    weights = jnp.exp2(scores - base)
    shrunk = jnp.exp2(old - base)
    total = total_ref[:, :1] * shrunk + weights.sum(axis=1, keepdims=True)
    total_ref[...] = jnp.broadcast_to(total, total_ref.shape)
    top_ref[...] = jnp.broadcast_to(top, top_ref.shape)
    sum_ref[...] = sum_ref[...] * shrunk + product(weights.astype(v.dtype), v)

  call.for_each_chunk(keys, values, of_chunk)

  @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
  def _() -> None:
    out = sum_ref[...] / total_ref[:, :1]
    out_ref[0, 0] = out.astype(out_ref.dtype).reshape(out_ref.shape[2:])
    lse = ((top_ref[...] + jnp.log2(total_ref[...])) * (1 / LOG2E)).T[:1]  # a column in every lane as a row
    for g in range(plan.groups):
      lse_ref[0, 0, g] = lse[:, g * plan.tuning.queries:(g + 1) * plan.tuning.queries]


def _backward_of_queries(call: _ByQuery, q_ref: Ref, *refs: Ref) -> None:
  plan = call.plan
  of_keys, refs = refs[:2 + 2 * call.has_compact], refs[2 + 2 * call.has_compact:]
  lse_ref, delta_ref, d_out_ref, d_q_ref, *rest = refs
  *own_refs, lse_column, delta_column, sum_ref = rest
  keys, values = of_keys[::2], of_keys[1::2]
  q, d_out = call.rows_of(q_ref), call.rows_of(d_out_ref)

  @pl.when(pl.program_id(3) == 0)
  def _() -> None:
    lse_column[...] = _as_column(lse_ref, plan) * LOG2E
    delta_column[...] = _as_column(delta_ref, plan)
    sum_ref[...] = jnp.zeros_like(sum_ref)
    if not plan.pattern.window:
      k, v = (_of_every_head(ref, plan) for ref in (keys[0], values[0]))
      weights = jnp.exp2(_own_scores(q, k, plan) - lse_column[:, :1])
      wide = d_out.astype(jnp.float32)
      d_scores = weights * (jnp.sum(v * wide, axis=1, keepdims=True) - delta_column[:, :1]) * plan.width**-0.5
      sum_ref[...] = d_scores * k
      for ref, of_rows in zip(own_refs, (d_scores * q.astype(jnp.float32), weights * wide), strict=True):
        ref[0, 0] = of_rows.reshape(plan.groups, *ref.shape[2:]).sum(axis=0).astype(ref.dtype)

  def of_chunk(k: Array, v: Array, mask: Array | None) -> None:
    weights = jnp.exp2(product(q, k, (1, 1)) * plan.scale - lse_column[:, :1])
    weights = weights if mask is None else jnp.where(mask, weights, 0.0)
    d_scores = weights * (product(d_out, v, (1, 1)) - delta_column[:, :1]) * plan.width**-0.5
    sum_ref[...] += product(d_scores.astype(k.dtype), k)

  call.for_each_chunk(keys, values, of_chunk)

  @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
  def _() -> None:
    d_q_ref[0, 0] = sum_ref[...].astype(d_q_ref.dtype).reshape(d_q_ref.shape[2:])


def _own_scores(q: Array, k: Array, plan: Plan) -> Array:
  """[rows, 1], in base 2."""
  return jnp.sum(q.astype(jnp.float32) * k, axis=1, keepdims=True) * plan.scale


def _of_every_head(ref: Ref, plan: Plan) -> Array:
  """A block [1, 1, queries, H] of keys or values, once for every query head: float32 [rows, H]."""
  return jnp.concatenate([ref[0, 0].astype(jnp.float32)] * plan.groups, axis=0)


def _as_column(ref: Ref, plan: Plan) -> Array:
  """A block [1, 1, G, 1, queries] as [rows, LANES], the same in every lane."""
  return jnp.concatenate([jnp.broadcast_to(ref[0, 0, g], (LANES, plan.tuning.queries)).T for g in range(plan.groups)],
                         axis=0)
