"""Dilated attention by kernels for TPUs, forward and backward; `pallas_tpu_shapes.py` says how they work."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.devices import TPU
from pallas_kernels.dilated.pallas_tpu_keys import backward_of_keys
from pallas_kernels.dilated.pallas_tpu_queries import backward_of_queries, forward
from pallas_kernels.dilated.pallas_tpu_shapes import Plan, Tuning
from pallas_kernels.implementation import Implementation
from pallas_kernels.pattern import DENSE, Pattern
from pallas_kernels.tpu import LANES, too_large, unsupported_heads

Array = jax.Array
Gradients = tuple[Array, Array, Array]
Residuals = tuple[Array, Array, Array, Array, Array]  # q, k, v, the output and its log-sum-exp, as kernels have them
_ROWS = 2048   # of a block of queries, all query heads of a key/value head
_KEYS = 4096   # of a block of compact keys
_CHUNK = 512   # keys whose scores are in flight at a time, of so many rows
_QUERIES_LIMIT = 2**22  # bytes


def unsupported(q: Array, k: Array, v: Array, segment_ids: Array | None, *, pattern: Pattern) -> str | None:
  """Why the kernels do not serve these arguments, or None."""
  if segment_ids is not None:
    return "takes no packed rows (segment_ids)"
  heads = (LANES, q.shape[2] // k.shape[2], q.shape[3])
  return unsupported_heads(q) or too_large("VMEM", f"{LANES} queries of a key/value head", heads, jnp.float32,
                                           _QUERIES_LIMIT, "take fewer query heads for each key/value head")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def dilated_attention(q: Array, k: Array, v: Array, pattern: Pattern, interpret: Any) -> Array:
  """As `api.dilated_attention`, for one document per row whose positions are 0..T-1."""
  return _forward(q, k, v, pattern, interpret)[0]


def _forward(q: Array, k: Array, v: Array, pattern: Pattern, interpret: Any) -> tuple[Array, Residuals]:
  out, residuals = _forward_program(q, k, v, pattern, interpret)
  return out, residuals


def _backward(pattern: Pattern, interpret: Any, residuals: Residuals, d_out: Array) -> Gradients:
  gradients: Gradients = _backward_program(residuals, d_out, pattern, interpret)
  return gradients


dilated_attention.defvjp(_forward, _backward)


def plan_of(shape: tuple[int, ...], kv_heads: int, pattern: Pattern) -> Plan:
  """How the kernels cut queries [B, T, N, H]; T is filled up to `Plan.length`."""
  _, length, heads, width = shape
  if pattern.dilation == 1 or pattern.window >= length - 1:
    pattern = DENSE
  pattern = pattern._replace(sinks=min(pattern.sinks, length))
  groups = heads // kv_heads
  rows = _ROWS // max(width // 256, 1)
  queries = max(_power_of_two(rows // groups + 1) // 2, LANES)
  queries = max(min(queries, _power_of_two(length)), LANES)
  chunk = max(_CHUNK * rows // _power_of_two(max(groups * queries, rows)), LANES)
  padded = length + -length % queries
  compact = pattern.sinks + (padded // pattern.dilation if pattern.dilation else 0)
  keys = min(max(_power_of_two(compact), LANES), _KEYS)
  local = min(max(_power_of_two(pattern.window), LANES), queries, chunk)
  return Plan(pattern, padded, groups, width, Tuning(queries, keys, min(chunk, keys), local))


def _power_of_two(n: int) -> int:
  """The least that is not less than n."""
  return 1 << max(n - 1, 0).bit_length()


def _laid_out(x: Array, plan: Plan) -> Array:
  """[B, T, K, H] as [B, K, T filled up, H]."""
  return jnp.swapaxes(jnp.pad(x, ((0, 0), (0, plan.length - x.shape[1]), (0, 0), (0, 0))), 1, 2)


def _by_groups(x: Array, plan: Plan) -> Array:
  """[B, T, N, H] as [B, K, G, T filled up, H]."""
  x = _laid_out(x, plan)
  return x.reshape(x.shape[0], -1, plan.groups, *x.shape[2:])


def _from_groups(x: Array, length: int) -> Array:
  """The inverse of `_by_groups`."""
  return jnp.swapaxes(x.reshape(x.shape[0], -1, *x.shape[3:]), 1, 2)[:, :length]


def _compact(x: Array, plan: Plan) -> Array:
  """Of [B, K, T, H] the sinks and the last ones of all blocks of D, filled up to whole blocks."""
  pattern = plan.pattern
  parts = [x[:, :, :pattern.sinks]]
  if pattern.dilation:
    parts.append(x[:, :, pattern.dilation - 1::pattern.dilation])
  x = jnp.concatenate(parts, axis=2) if pattern.sinks else parts[-1]
  return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % plan.tuning.keys), (0, 0)))


def _scattered(d: Array, plan: Plan, onto: Array) -> Array:
  """Gradients of compact keys, float32, added to those of all keys."""
  pattern = plan.pattern
  wide = onto.astype(jnp.float32)
  if pattern.sinks:
    wide = wide.at[:, :, :pattern.sinks].add(d[:, :, :pattern.sinks])
  if pattern.dilation:
    strided = d[:, :, pattern.sinks:plan.compact]
    wide = wide.at[:, :, pattern.dilation - 1::pattern.dilation].add(strided)
  return wide.astype(onto.dtype)


# Under a jit of its own, a kernel is lowered once for all layers of a program, not once for each.
@functools.partial(jax.jit, static_argnames=("pattern", "interpret"))
def _forward_program(q: Array, k: Array, v: Array, pattern: Pattern, interpret: Any) -> tuple[Array, Residuals]:
  length = q.shape[1]
  plan = plan_of(q.shape, k.shape[2], pattern)
  q, k, v = _by_groups(q, plan), _laid_out(k, plan), _laid_out(v, plan)
  compact = [_compact(x, plan) for x in (k, v)] if plan.compact else []
  out, lse = forward(q, k, v, compact, plan, interpret)
  return _from_groups(out, length), (q, k, v, out, lse)


@functools.partial(jax.jit, static_argnames=("pattern", "interpret"))
def _backward_program(residuals: Residuals, d_out: Array, pattern: Pattern, interpret: Any) -> Gradients:
  q, k, v, out, lse = residuals
  length, kv_heads = d_out.shape[1], k.shape[1]
  plan = plan_of(d_out.shape, kv_heads, pattern)
  d_out = _by_groups(d_out, plan)
  delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)[:, :, :, None]
  compact = [_compact(x, plan) for x in (k, v)] if plan.compact else []
  d_q, *d_keys = backward_of_queries(q, k, v, compact, lse, delta, d_out, plan, interpret)
  if plan.pattern.window:
    d_keys = list(backward_of_keys(q, k, v, lse, delta, d_out, plan, True, interpret))
  if compact:
    found = backward_of_keys(q, compact[0], compact[1], lse, delta, d_out, plan, False, interpret)
    d_keys = [_scattered(d, plan, onto) for d, onto in zip(found, d_keys, strict=True)]
  d_k, d_v = (jnp.swapaxes(d, 1, 2)[:, :length] for d in d_keys)
  return _from_groups(d_q, length), d_k, d_v


def made(interpret: Any = None) -> Implementation:
  """The implementation; with interpreter parameters it runs without a TPU."""

  def run(q: Array, k: Array, v: Array, segment_ids: Array | None, *, pattern: Pattern) -> Array:
    del segment_ids
    return dilated_attention(q, k, v, pattern, interpret)

  return Implementation(run, unsupported, TPU, independent="BNK")


IMPLEMENTATION = made()
