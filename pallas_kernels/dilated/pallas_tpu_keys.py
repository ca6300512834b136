"""The TPU kernel of `dilated_attention` that goes by blocks of keys: backward for keys and values."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dilated.pallas_tpu_shapes import PARAMS, Plan, divided
from pallas_kernels.tpu import LANES, LOG2E, product

Array = jax.Array
Ref = Any
_KEYS = 2048     # of a block of compact keys, at most
_PARTS = 4       # that they are cut into at least, so that queries before a block do nothing for it
_QUERIES = 1024  # whose scores are in flight at a time


def backward_of_keys(q: Array, k: Array, v: Array, lse: Array, delta: Array, d_out: Array, plan: Plan, local: bool,
                     interpret: Any) -> Sequence[Array]:
  """(d_k, d_v) of compact keys and values, float32; with `local` of those of the window, like k and v."""
  by_key = _ByKey(plan, q.shape, k.shape, local)
  results: Sequence[Array] = pl.pallas_call(
      functools.partial(_backward_of_keys, by_key), name=f"dilated_attention_d_{'window' if local else 'compact'}",
      grid=by_key.grid, interpret=interpret or False,
      in_specs=[by_key.of_queries, by_key.of_keys, by_key.of_keys, by_key.of_rows, by_key.of_rows, by_key.of_queries],
      out_specs=[by_key.of_keys] * 2,
      out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype if local else jnp.float32) for x in (k, v)],
      scratch_shapes=[by_key.accumulated] * 2,
      compiler_params=PARAMS,
  )(q, k, v, lse, delta, d_out)
  return results


@dataclasses.dataclass(frozen=True)
class _ByKey:
  """A grid of batch, key/value heads, blocks of keys, and the blocks of queries that may see them."""

  plan: Plan
  shape: tuple[int, ...]  # of q
  shape_of_keys: tuple[int, ...]
  local: bool

  @property
  def keys(self) -> int:
    """Of a block."""
    if self.local:
      return self.plan.tuning.queries
    parts = 1 << max(self.plan.compact // _PARTS, 1).bit_length() - 1
    return min(self.plan.tuning.keys, max(parts, LANES), _KEYS)

  @property
  def grid(self) -> tuple[int, ...]:
    plan = self.plan
    queries = min(plan.blocks, -(-plan.pattern.window // plan.tuning.queries) + 1) if self.local else plan.blocks
    return (*self.shape[:2], -(-self.shape_of_keys[2] // self.keys), queries)

  def query_block(self, j: Array, i: Array) -> Array:
    """The number of the block of queries that is the i-th for a block of keys; it may be beyond the last one."""
    return j + i if self.local else i

  def first_block(self, j: Array) -> Array:
    """The first block of queries of which one sees a compact key of a block of keys, or a later one."""
    plan, first = self.plan, j * self.keys
    strided = jnp.int32(plan.length)
    if plan.pattern.dilation:
      strided = (jnp.maximum(first - plan.pattern.sinks, 0) + 1) * plan.pattern.dilation - 1
    at = jnp.where(first < plan.pattern.sinks, jnp.minimum(first, strided), strided)
    return jnp.minimum(divided(at + plan.pattern.window + 1, plan.tuning.queries), plan.blocks - 1)

  def live_block(self, j: Array, i: Array) -> Array:
    if self.local:
      return jnp.minimum(j + i, self.plan.blocks - 1)
    return jnp.maximum(i, self.first_block(j))

  def is_live(self, j: Array, i: Array) -> Array:
    return j + i < self.plan.blocks if self.local else i >= self.first_block(j)

  @property
  def of_queries(self) -> pl.BlockSpec:
    cut = (1, 1, self.plan.groups, self.plan.tuning.queries, self.plan.width)
    return pl.BlockSpec(cut, lambda b, k, j, i: (b, k, 0, self.live_block(j, i), 0))

  @property
  def of_rows(self) -> pl.BlockSpec:
    cut = (1, 1, self.plan.groups, 1, self.plan.tuning.queries)
    return pl.BlockSpec(cut, lambda b, k, j, i: (b, k, 0, 0, self.live_block(j, i)))

  @property
  def of_keys(self) -> pl.BlockSpec:
    return pl.BlockSpec((1, 1, self.keys, self.plan.width), lambda b, k, j, i: (b, k, j, 0))

  @property
  def accumulated(self) -> Any:
    return pltpu.VMEM((self.keys, self.plan.width), jnp.float32)


def _backward_of_keys(call: _ByKey, q_ref: Ref, k_ref: Ref, v_ref: Ref, lse_ref: Ref, delta_ref: Ref, d_out_ref: Ref,
                      d_k_ref: Ref, d_v_ref: Ref, d_k_sum: Ref, d_v_sum: Ref) -> None:
  plan, j, i = call.plan, pl.program_id(2), pl.program_id(3)

  @pl.when(i == 0)
  def begin() -> None:
    d_k_sum[...] = jnp.zeros_like(d_k_sum)
    d_v_sum[...] = jnp.zeros_like(d_v_sum)

  def add(seen: Array | None) -> None:
    """The block's queries; `seen` is bool [keys, queries], None where all see all."""
    k, v = k_ref[0, 0], v_ref[0, 0]
    size = min(plan.tuning.queries, _QUERIES)
    for g, start in itertools.product(range(plan.groups), range(0, plan.tuning.queries, size)):
      rows = slice(start, start + size)
      q, d_out = q_ref[0, 0, g, rows], d_out_ref[0, 0, g, rows]
      lse, delta = lse_ref[0, 0, g][:, rows], delta_ref[0, 0, g][:, rows]
      weights = jnp.exp2(product(k, q, (1, 1)) * plan.scale - lse * LOG2E)
      weights = weights if seen is None else jnp.where(seen[:, rows], weights, 0.0)
      d_v_sum[...] += product(weights.astype(v.dtype), d_out)
      d_scores = weights * (product(v, d_out, (1, 1)) - delta) * plan.width**-0.5
      d_k_sum[...] += product(d_scores.astype(k.dtype), q)

  live = call.is_live(j, i)
  whole = live & (jnp.bool_(False) if call.local else plan.all_see(i, j * call.keys, call.keys))
  t = plan.queries_at(call.query_block(j, i), 1)[:, :plan.tuning.queries]

  @pl.when(whole)
  def without_mask() -> None:
    add(None)

  @pl.when(live & jnp.logical_not(whole))
  def with_mask() -> None:
    if call.local:
      add(plan.sees_local(t, j * call.keys + jax.lax.broadcasted_iota(jnp.int32, (call.keys, 1), 0)))
    else:
      add(plan.sees_compact(t, plan.at(j * call.keys, call.keys, 0)))

  @pl.when(i == pl.num_programs(3) - 1)
  def end() -> None:
    d_k_ref[0, 0] = d_k_sum[...].astype(d_k_ref.dtype)
    d_v_ref[0, 0] = d_v_sum[...].astype(d_v_ref.dtype)
