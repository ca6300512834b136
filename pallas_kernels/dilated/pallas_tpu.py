"""Dilated attention by kernels for TPUs, forward and backward; `pallas_tpu_shapes.py` says how they work."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.devices import TPU
from pallas_kernels.dilated.pallas_tpu_backward import backward_of_compact, backward_of_window
from pallas_kernels.dilated.pallas_tpu_forward import forward
from pallas_kernels.dilated.pallas_tpu_shapes import Plan, Tuning
from pallas_kernels.implementation import Implementation
from pallas_kernels.pattern import DENSE, Pattern
from pallas_kernels.tpu import LANES, by_groups, from_groups, heads_first, too_large, unsupported_heads

Array = jax.Array
Gradients = tuple[Array, Array, Array]
Residuals = tuple[Array, Array, Array, Array, Array]  # q, k, v, the output and its log-sum-exp, as kernels have them
_ROWS = 2048   # of a block of queries, all query heads of a key/value head; of wide heads fewer
_KEYS = 4096   # of a block of compact keys, likewise
_BYTES = 512   # from which on heads are wide
_FEW = 256     # compact keys
_CHUNK = 512   # keys whose scores are in flight at a time, of so many rows
# Bytes in VMEM: of queries of a block, of their gradients while a window sees them, and of compact keys and values with
# their gradients.
_QUERIES_LIMIT, _WINDOW_LIMIT, _COMPACT_LIMIT = 2**21, 20 * 2**20, 26 * 2**20


def unsupported(q: Array, k: Array, v: Array, segment_ids: Array | None, *, pattern: Pattern) -> str | None:
  """Why the kernels do not serve these arguments, or None."""
  if segment_ids is not None:
    return "takes no packed rows (segment_ids)"
  if why := unsupported_heads(q):
    return why
  heads, plan = (q.shape[2] // k.shape[2], q.shape[3]), plan_of(q, k.shape[2], pattern)
  fewer = "take fewer query heads for each key/value head"
  in_window = ((plan.back + 1) * plan.tuning.local, *heads) if plan.pattern.window else (0, *heads)
  return (too_large("VMEM", f"{LANES} queries of a key/value head", (LANES, *heads), jnp.float32, _QUERIES_LIMIT, fewer)
          or too_large("VMEM", "the gradients of queries that a window sees", in_window, jnp.float32, _WINDOW_LIMIT,
                       f"{fewer}, or a smaller window"))


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


def plan_of(q: Array, kv_heads: int, pattern: Pattern) -> Plan:
  """How the kernels cut queries [B, T, N, H]; T is filled up to `Plan.length`."""
  _, length, heads, width = q.shape
  if pattern.dilation == 1 or pattern.window >= length - 1:
    pattern = DENSE
  elif pattern.dilation and pattern.dilation >= length:  # no query has a strided key before it
    pattern = pattern._replace(dilation=None)
  pattern = pattern._replace(sinks=min(pattern.sinks, length))
  groups = heads // kv_heads
  wide = _power_of_two(-(-width * q.dtype.itemsize // _BYTES))
  rows = _ROWS // wide
  strided = length // pattern.dilation if pattern.dilation else 0
  if pattern.sinks + strided <= _FEW:  # a block has little to compute
    rows *= 2
  queries = max(_power_of_two(rows // groups + 1) // 2, LANES)
  if strided >= queries:  # half of the last block of keys is computed in vain
    queries = min(queries, max(_power_of_two(length // 8), 2 * LANES))
  queries = max(min(queries, _power_of_two(length)), LANES)
  chunk = max(_CHUNK * _ROWS // wide // _power_of_two(max(groups * queries, _ROWS // wide)), LANES)
  padded = length + -length % queries
  compact = pattern.sinks + (padded // pattern.dilation if pattern.dilation else 0)
  keys = min(max(_power_of_two(compact), LANES), _KEYS // wide)
  local = min(max(_power_of_two(pattern.window), _CHUNK), queries, chunk)
  return Plan(pattern, padded, groups, width, Tuning(queries, keys, min(chunk, keys), local))


def _power_of_two(n: int) -> int:
  """The least that is not less than n."""
  return 1 << max(n - 1, 0).bit_length()


def _compact(x: Array, plan: Plan, multiple: int) -> Array:
  """Of [B, K, T, H] the sinks and the last ones of all blocks of D, filled up to a multiple."""
  pattern = plan.pattern
  parts = [x[:, :, :pattern.sinks]]
  if pattern.dilation:
    parts.append(x[:, :, pattern.dilation - 1::pattern.dilation])
  x = jnp.concatenate(parts, axis=2) if pattern.sinks else parts[-1]
  return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % multiple), (0, 0)))


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
  plan = plan_of(q, k.shape[2], pattern)
  q, k, v = by_groups(q, plan.groups, plan.length), *(heads_first(x, plan.length) for x in (k, v))
  compact = [_compact(x, plan, plan.tuning.keys) for x in (k, v)] if plan.compact else []
  out, lse = forward(q, k, v, compact, plan, interpret)
  return from_groups(out, length), (q, k, v, out, lse)


@functools.partial(jax.jit, static_argnames=("pattern", "interpret"))
def _backward_program(residuals: Residuals, d_out: Array, pattern: Pattern, interpret: Any) -> Gradients:
  q, k, v, out, lse = residuals
  length, kv_heads = d_out.shape[1], k.shape[1]
  plan = plan_of(d_out, kv_heads, pattern)
  d_out = by_groups(d_out, plan.groups, plan.length)
  delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)[:, :, :, None]
  compact = [_compact(x, plan, plan.tuning.chunk) for x in (k, v)] if plan.compact else []
  if plan.pattern.window:
    d_q, *d_keys = backward_of_window(q, k, v, lse, delta, d_out, plan, interpret)
    if compact:
      d_q_of_compact, d_compact, _ = _backward_in_parts(q, compact, [], lse, delta, d_out, plan, interpret)
      d_q += d_q_of_compact
  else:
    d_q, d_compact, d_keys = _backward_in_parts(q, compact, [k, v], lse, delta, d_out, plan, interpret)
  if compact:
    d_keys = [_scattered(d, plan, onto) for d, onto in zip(d_compact, d_keys, strict=True)]
  d_k, d_v = (jnp.swapaxes(d, 1, 2)[:, :length] for d in d_keys)
  return from_groups(d_q.astype(q.dtype), length), d_k, d_v


def _backward_in_parts(q: Array, compact: list[Array], own: list[Array], lse: Array, delta: Array, d_out: Array,
                       plan: Plan, interpret: Any) -> tuple[Array, list[Array], list[Array]]:
  """(d_q, d_k and d_v of compact keys, those of own ones), with as many compact keys at a time as fit VMEM."""
  count, of_chunk = compact[0].shape[2] if compact else 1, 2 * plan.tuning.chunk * q.shape[-1] * (q.dtype.itemsize + 4)
  wide = q.shape[-1] * q.dtype.itemsize > _BYTES
  limit = _COMPACT_LIMIT // 2 if wide else _COMPACT_LIMIT  # wide blocks take more beside them
  chunks, most = -(-count // plan.tuning.chunk), max(limit // of_chunk, 1)
  parts = -(-chunks // most)
  size = -(-chunks // parts) * plan.tuning.chunk
  dtype = q.dtype if own and parts == 1 else jnp.dtype(jnp.float32)
  found = []
  for first in range(0, count, size):
    part = [x[:, :, first:first + size] for x in compact]
    own_of_part = [] if first else own
    found.append(backward_of_compact(q, part, own_of_part, lse, delta, d_out, first, plan, dtype, interpret))
  of_compact = (of_part[1:1 + len(compact)] for of_part in found)
  d_compact = [jnp.concatenate(d, axis=2) for d in zip(*of_compact, strict=True)]
  d_q = functools.reduce(jnp.add, (of_part[0] for of_part in found))
  return d_q, d_compact, list(found[0][1 + len(compact):])


def made(interpret: Any = None) -> Implementation:
  """The implementation; with interpreter parameters it runs without a TPU."""

  def run(q: Array, k: Array, v: Array, segment_ids: Array | None, *, pattern: Pattern) -> Array:
    del segment_ids
    return dilated_attention(q, k, v, pattern, interpret)

  return Implementation(run, unsupported, TPU, independent="BNK")


IMPLEMENTATION = made()
