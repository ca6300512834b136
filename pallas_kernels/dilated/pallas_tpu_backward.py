"""The TPU kernels of `dilated_attention` backward: one for compact keys and the own one, one for those of the window.

Both compute every score once. Scores lie with keys along sublanes, so that what is known of queries is a row.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dilated.pallas_tpu_shapes import Plan, divided, of_every_head, own_scores
from pallas_kernels.tpu import LANES, LOG2E, in_a_row, in_rows, params, product

Array = jax.Array
Ref = Any
_DOUBLE = 2**21  # bytes of compact keys, from which on there is one copy of them in VMEM and not two


def backward_of_compact(q: Array, compact: Sequence[Array], own: Sequence[Array], lse: Array, delta: Array,
                        d_out: Array, first: int, plan: Plan, dtype: Any, interpret: Any) -> Sequence[Array]:
  """(d_q of `dtype`, d_k, d_v float32 of compact keys, and d_k, d_v like k, v of every query's own one).

  A program has a block of queries, after those before it; the gradients of all compact keys stay in VMEM.

  Args:
    compact: keys and values from number `first` on, all of which fit VMEM.
    own: keys and values of all tokens, where a query's own one is to be seen here; else nothing.
  """
  b, k, g, t, h = q.shape
  size = plan.tuning.queries
  of_queries = pl.BlockSpec((1, 1, g, size, h), lambda b, k, i: (b, k, 0, i, 0))
  of_rows = pl.BlockSpec((1, 1, g, 1, size), lambda b, k, i: (b, k, 0, 0, i))
  of_own = [pl.BlockSpec((1, 1, size, h), lambda b, k, i: (b, k, i, 0))] * len(own)
  count = compact[0].shape[2] if compact else 0
  once = pl.Buffered(1) if count * h * q.dtype.itemsize > _DOUBLE else None
  of_compact = [pl.BlockSpec((1, 1, count, h), lambda b, k, i: (b, k, 0, 0), pipeline_mode=once)] * len(compact)
  results: Sequence[Array] = pl.pallas_call(
      functools.partial(_of_compact, plan, first, bool(compact), bool(own)), name="dilated_attention_backward",
      grid=(b, k, t // size), interpret=interpret or False,
      in_specs=[of_queries, of_queries, of_rows, of_rows, *of_compact, *of_own],
      out_specs=[of_queries, *of_compact, *of_own],
      out_shape=[jax.ShapeDtypeStruct(q.shape, dtype), *[jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in compact],
                 *[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in own]],
      scratch_shapes=[pltpu.VMEM((plan.rows, h), jnp.float32)],
      compiler_params=params("parallel", "parallel", "arbitrary"),
  )(q, d_out, lse, delta, *compact, *own)
  return results


def _of_compact(plan: Plan, first: int, has_compact: bool, has_own: bool, q_ref: Ref, d_out_ref: Ref, lse_ref: Ref,
                delta_ref: Ref, *refs: Ref) -> None:
  counts = 2 * has_compact, 2 * has_own, 1, 2 * has_compact, 2 * has_own, 1
  ends = list(itertools.accumulate(counts))
  compact, own, (d_q_ref,), d_compact, d_own, (sum_ref,) = (
      refs[end - count:end] for end, count in zip(ends, counts, strict=True))
  i, scale = pl.program_id(2), plan.width**-0.5
  q, d_out = in_rows(q_ref[0, 0]), in_rows(d_out_ref[0, 0])
  top, delta = in_a_row(lse_ref[0, 0]) * LOG2E, in_a_row(delta_ref[0, 0])
  if has_own:
    _of_own(plan, q, d_out, lse_ref, delta_ref, own, d_own, sum_ref)
  else:
    sum_ref[...] = jnp.zeros_like(sum_ref)

  if has_compact:
    @pl.when(i == 0)
    def begin() -> None:
      for ref in d_compact:
        ref[...] = jnp.zeros_like(ref)

    t, size = plan.queries_at(i, 1), plan.tuning.chunk

    def of_chunk(c: Array, _: None) -> None:
      chunk = (0, 0, pl.ds(pl.multiple_of(c * size, size), size))
      k, v = (ref[chunk] for ref in compact)
      weights = jnp.exp2(product(k, q, (1, 1)) * plan.scale - top)

      def add(weights: Array) -> None:
        d_scores = (weights * (product(v, d_out, (1, 1)) - delta)).astype(k.dtype)
        d_compact[1][chunk] += product(weights.astype(v.dtype), d_out)
        d_compact[0][chunk] += product(d_scores, q)
        sum_ref[...] += product(d_scores, k, (0, 0))

      whole = plan.all_see(i, first + c * size, size)

      @pl.when(whole)
      def without_mask() -> None:
        add(weights)

      @pl.when(jnp.logical_not(whole))
      def with_mask() -> None:
        add(jnp.where(plan.sees_compact(t, plan.at(first + c * size, size, 0)), weights, 0.0))

    chunks = divided(jnp.clip(plan.seen(i) - first, 0, compact[0].shape[2]) + size - 1, size)
    jax.lax.fori_loop(0, chunks, of_chunk, None)

    @pl.when(i == pl.num_programs(2) - 1)
    def end() -> None:
      d_compact[0][...] *= scale

  d_q_ref[0, 0] = (sum_ref[...] * scale).astype(d_q_ref.dtype).reshape(d_q_ref.shape[2:])


def _of_own(plan: Plan, q: Array, d_out: Array, lse_ref: Ref, delta_ref: Ref, own: Sequence[Ref], d_own: Sequence[Ref],
            sum_ref: Ref) -> None:
  """The queries' own keys, of which each sees one: no product, and the first part of the queries' gradients."""
  k, v = (of_every_head(ref, plan) for ref in own)
  weights = jnp.exp2(own_scores(q, k, plan) - _column(lse_ref, plan) * LOG2E)
  wide = d_out.astype(jnp.float32)
  d_scores = weights * (jnp.sum(v * wide, axis=1, keepdims=True) - _column(delta_ref, plan))
  sum_ref[...] = d_scores * k
  of_rows = d_scores * q.astype(jnp.float32) * plan.width**-0.5, weights * wide
  for ref, x in zip(d_own, of_rows, strict=True):
    ref[0, 0] = x.reshape(plan.groups, *ref.shape[2:]).sum(axis=0).astype(ref.dtype)


def backward_of_window(q: Array, k: Array, v: Array, lse: Array, delta: Array, d_out: Array, plan: Plan,
                       interpret: Any) -> Sequence[Array]:
  """(d_q float32, d_k, d_v like k, v) of the window and the own key.

  A program has a block of keys and a block of queries that may see it, the nearest first. The gradients of queries stay
  in VMEM from the first block of keys that they see to their own, which is the last.
  """
  b, heads, g, t, h = q.shape
  size, back = plan.tuning.local, plan.back

  def queries(j: Array, i: Array) -> Array:
    return jnp.minimum(j + i, t // size - 1)

  of_queries = pl.BlockSpec((1, 1, g, size, h), lambda b, k, j, i: (b, k, 0, queries(j, i), 0))
  of_rows = pl.BlockSpec((1, 1, g, 1, size), lambda b, k, j, i: (b, k, 0, 0, queries(j, i)))
  of_keys = pl.BlockSpec((1, 1, size, h), lambda b, k, j, i: (b, k, j, 0))
  d_queries = pl.BlockSpec((1, 1, g, size, h), lambda b, k, j, i: (b, k, 0, j, 0))
  results: Sequence[Array] = pl.pallas_call(
      functools.partial(_of_window, plan), name="dilated_attention_backward_window",
      grid=(b, heads, t // size, min(back + 1, t // size)), interpret=interpret or False,
      in_specs=[of_queries, of_keys, of_keys, of_rows, of_rows, of_queries],
      out_specs=[d_queries, of_keys, of_keys],
      out_shape=[jax.ShapeDtypeStruct(q.shape, jnp.float32), *[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)]],
      scratch_shapes=[pltpu.VMEM((back + 1, g, size, h), jnp.float32), *[pltpu.VMEM((size, h), jnp.float32)] * 2],
      compiler_params=params("parallel", "parallel", "arbitrary", "arbitrary"),
  )(q, k, v, lse, delta, d_out)
  return results


def _of_window(plan: Plan, q_ref: Ref, k_ref: Ref, v_ref: Ref, lse_ref: Ref, delta_ref: Ref, d_out_ref: Ref,
               d_q_ref: Ref, d_k_ref: Ref, d_v_ref: Ref, d_q_sum: Ref, d_k_sum: Ref, d_v_sum: Ref) -> None:
  j, i, size = pl.program_id(2), pl.program_id(3), plan.tuning.local
  slot, scale = jax.lax.rem(j + i, jnp.int32(d_q_sum.shape[0])), plan.width**-0.5

  @pl.when(i == 0)
  def begin() -> None:
    d_k_sum[...] = jnp.zeros_like(d_k_sum)
    d_v_sum[...] = jnp.zeros_like(d_v_sum)

  @pl.when((i == pl.num_programs(3) - 1) | (j == 0))
  def begin_queries() -> None:
    d_q_sum[slot] = jnp.zeros(d_q_sum.shape[1:], jnp.float32)

  @pl.when(j + i < pl.num_programs(2))
  def add() -> None:
    t = (j + i) * size + jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
    mask = plan.sees_local(t, j * size + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0))
    k, v = k_ref[0, 0], v_ref[0, 0]

    def of_head(head: Array, _: None) -> None:
      q, d_out = q_ref[0, 0, head], d_out_ref[0, 0, head]
      scores = product(k, q, (1, 1)) * plan.scale - lse_ref[0, 0, head] * LOG2E
      weights = jnp.exp2(jnp.where(mask, scores, -jnp.inf))
      d_scores = (weights * (product(v, d_out, (1, 1)) - delta_ref[0, 0, head])).astype(k.dtype)
      d_v_sum[...] += product(weights.astype(v.dtype), d_out)
      d_k_sum[...] += product(d_scores, q)
      d_q_sum[slot, head] += product(d_scores, k, (0, 0))

    jax.lax.fori_loop(0, plan.groups, of_head, None)

  @pl.when(i == 0)
  def end_queries() -> None:
    d_q_ref[0, 0] = d_q_sum[slot] * scale

  @pl.when(i == pl.num_programs(3) - 1)
  def end() -> None:
    d_k_ref[0, 0] = (d_k_sum[...] * scale).astype(d_k_ref.dtype)
    d_v_ref[0, 0] = d_v_sum[...].astype(d_v_ref.dtype)


def _column(ref: Ref, plan: Plan) -> Array:
  """A block [1, 1, G, 1, queries] as [rows, 1]."""
  of_heads = [jnp.broadcast_to(ref[0, 0, g], (LANES, plan.tuning.queries)).T[:, :1] for g in range(plan.groups)]
  return jnp.concatenate(of_heads, axis=0)
