"""Attention to chosen blocks by kernels for TPUs (pallas_tpu_kernel.py), forward and backward."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention.softmax import Part
from pallas_kernels.devices import TPU
from pallas_kernels.implementation import Implementation
from pallas_kernels.pattern import Pattern, Rule
from pallas_kernels.sparse import pallas_tpu_kernel as kernel
from pallas_kernels.sparse.pallas_tpu_kernel import Plan
from pallas_kernels.tpu import LANES, SMEM_LIMIT, by_groups, from_groups, heads_first, too_large, unsupported_heads

Array = jax.Array
Arrays = tuple[Array, Array, Array, Array, Array]  # q, k, v, table and positions, as kernels have them
_QUERIES_LIMIT, _KEYS_LIMIT = 2**21, 2**20  # bytes of arrays in VMEM
_SCORES_LIMIT, _GRADIENT_LIMIT = 2**23, 2**23
_WIDE = 256  # of a head
# Of a tile of queries, all heads of a chooser: at least and at most, else as many as a block has keys. Of more, fewer
# copies are made; of fewer, fewer blocks are read.
_ROWS = 256, 512


def unsupported(q: Array, k: Array, v: Array, blocks: Array, valid: Array, q_positions: Array, *, block: int,
                rule: Rule | None) -> str | None:
  """Why the kernels do not serve these arguments, or None."""
  del v, valid, q_positions
  if why := unsupported_heads(k):
    return why
  tile = 32 // k.dtype.itemsize  # rows of a register
  if block % tile and block < k.shape[1]:
    return f"takes blocks of a multiple of {tile} keys of {k.dtype}, not of {block}"
  if rule is not None and (not isinstance(rule, Pattern) or rule.dilation is not None):
    return f"takes a rule of a window and sinks, not {rule}"
  plan = plan_of(q.shape, k.shape, blocks.shape[2], block, rule)
  lists = (2, 1 + max(-(-k.shape[1] // plan.block), -(-q.shape[1] // plan.tile)))
  smaller = "take smaller blocks"
  queries, table = (plan.rows, q.shape[3]), (blocks.shape[3], plan.tile)
  return (too_large("VMEM", "a tile of queries", queries, jnp.float32, _QUERIES_LIMIT,
                    "take fewer query heads for each head that chooses")
          or too_large("VMEM", "a tile's choices", table, jnp.int32, _QUERIES_LIMIT, "choose fewer blocks")
          or too_large("VMEM", "the scores of a block", (plan.block, plan.rows), jnp.float32, _SCORES_LIMIT,
                    "take smaller blocks, or fewer query heads for each head that chooses")
          or too_large("VMEM", "a block of keys", (plan.block, k.shape[3]), k.dtype, _KEYS_LIMIT, smaller)
          or too_large("SMEM", "two lists of blocks or tiles", lists, jnp.int32, SMEM_LIMIT, "take larger blocks"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def sparse_attention(q: Array, k: Array, v: Array, blocks: Array, valid: Array, q_positions: Array, block: int,
                     rule: Rule | None, interpret: Any) -> Part:
  """As `api.sparse_attention`, of what is not `unsupported`."""
  return _forward(q, k, v, blocks, valid, q_positions, block, rule, interpret)[0]


def _forward(q: Array, k: Array, v: Array, blocks: Array, valid: Array, q_positions: Array, block: int,
             rule: Rule | None, interpret: Any) -> tuple[Part, Any]:
  arguments = (q, k, v, blocks, valid, q_positions)
  part, of_kernel = _forward_program(arguments, block, rule, interpret)
  return part, (arguments, of_kernel)


def _backward(block: int, rule: Rule | None, interpret: Any, residuals: Any, cotangents: Part) -> tuple[Any, ...]:
  return *_backward_program(*residuals, cotangents, block, rule, interpret), None, None, None


sparse_attention.defvjp(_forward, _backward)


def made(interpret: Any = None) -> Implementation:
  """The implementation; with interpreter parameters it runs without a TPU."""

  def run(*arguments: Any, block: int, rule: Rule | None) -> Part:
    part: Part = sparse_attention(*arguments, block, rule, interpret)
    return part

  return Implementation(run, unsupported, TPU, independent="BNK")


IMPLEMENTATION = made()


def plan_of(q: tuple[int, ...], k: tuple[int, ...], choosers: int, block: int, rule: Rule | None) -> Plan:
  """How the kernels cut queries and keys of shapes [B, T, N, H], [B, S, K, H] with so many heads that choose."""
  groups = q[2] // choosers
  if block >= k[1]:  # the only block is filled up to registers
    block += -block % 16
  rows = min(max(block, _ROWS[0]), _ROWS[1])
  return Plan(groups, choosers // k[2], max(rows // groups // LANES * LANES, LANES), block, k[1], rule)


def parts_of(plan: Plan, length: int, width: int) -> tuple[int, int]:
  """(parts, size) of queries, so many tiles' length, whose gradients fit VMEM."""
  limit = _GRADIENT_LIMIT if width <= _WIDE else _GRADIENT_LIMIT // 2  # blocks of wide heads take more beside them
  parts = -(-length * plan.groups * width * 4 // limit)
  return parts, -(-length // (parts * plan.tile)) * plan.tile


def _filled(x: Array, axis: int, multiple: int, fill: int = 0) -> Array:
  widths = [(0, -n % multiple if i == axis else 0) for i, n in enumerate(x.shape)]
  return jnp.pad(x, widths, constant_values=fill)


def _parts(x: Array, axis: int, parts: int, size: int) -> Array:
  """Parts of an axis, the last one filled up, as the first axis."""
  widths = [(0, parts * size - n if i == axis else 0) for i, n in enumerate(x.shape)]
  x = jnp.pad(x, widths).reshape(*x.shape[:axis], parts, size, *x.shape[axis + 1:])
  return jnp.moveaxis(x, axis, 0)


def _live(table: Array, at: Array, count: int, plan: Plan) -> Array:
  """Which blocks a tile of queries may read: bool [B, M, tiles, blocks]."""
  b, m, n, t = table.shape
  numbers = jnp.arange(count, dtype=jnp.int32)
  tiles = table.reshape(b, m, n, t // plan.tile, plan.tile)
  live = jnp.any(tiles[..., None] == numbers, axis=(2, 4))
  of_tile = at.reshape(b, 1, t // plan.tile, plan.tile)
  last = of_tile.max(axis=-1, keepdims=True)
  if plan.rule is not None:
    assert isinstance(plan.rule, Pattern)
    first = jnp.min(jnp.where(of_tile < 0, 2**30, of_tile), axis=-1, keepdims=True) - plan.rule.window
    live |= (numbers + 1) * plan.block > first
    live |= numbers * plan.block < plan.rule.sinks
  return live & (numbers * plan.block <= last)


def _lists(live: Array) -> Array:
  """Of bool [B, M, x, y] for every x how many y are live, and which: int32 [B, M, x, 1, 1 + y]."""
  which = jnp.argsort(~live, axis=-1, stable=True).astype(jnp.int32)
  count = live.sum(axis=-1, keepdims=True, dtype=jnp.int32)
  return jnp.concatenate([count, which], axis=-1)[:, :, :, None]


def _laid_out(arguments: tuple[Array, ...], block: int, rule: Rule | None) -> tuple[Plan, Arrays, Array]:
  """(plan, (q, k, v, table, at) as the kernels have them, which blocks are live for every tile)."""
  q, k, v, blocks, valid, q_positions = arguments
  plan = plan_of(q.shape, k.shape, blocks.shape[2], block, rule)
  table = jnp.moveaxis(_filled(jnp.where(valid, blocks, -1), 1, plan.tile, -1), 1, 3)
  at = _filled(q_positions, 1, plan.tile, -1)[:, None]
  keys, values = (heads_first(x, x.shape[1] + -x.shape[1] % plan.block) for x in (k, v))
  live = _live(table, at[:, 0], keys.shape[2] // plan.block, plan)
  return plan, (by_groups(q, plan.groups, at.shape[2]), keys, values, table, at), live


# Under a jit of its own, a kernel is lowered once for all layers of a program, not once for each.
@functools.partial(jax.jit, static_argnames=("block", "rule", "interpret"))
def _forward_program(arguments: tuple[Array, ...], block: int, rule: Rule | None, interpret: Any) -> tuple[Part, Part]:
  """(the results, and what the kernel gave)."""
  t = arguments[0].shape[1]
  plan, arrays, live = _laid_out(arguments, block, rule)
  out, lse = kernel.forward(*arrays, _lists(live), plan, interpret)
  return (from_groups(out, t), from_groups(jnp.swapaxes(lse, 3, 4), t)[..., 0]), (out, lse)


@functools.partial(jax.jit, static_argnames=("block", "rule", "interpret"))
def _backward_program(arguments: tuple[Array, ...], of_kernel: Part, cotangents: Part, block: int, rule: Rule | None,
                      interpret: Any) -> tuple[Array, Array, Array]:
  plan, (q, keys, values, table, at), live = _laid_out(arguments, block, rule)
  out, lse = of_kernel
  (b, t, _, h), (_, length, kv_heads, _) = (x.shape for x in arguments[:2])
  d_out = by_groups(cotangents[0], plan.groups, q.shape[3])
  d_lse = by_groups(cotangents[1][..., None], plan.groups, q.shape[3])[..., 0][:, :, :, None]
  delta = jnp.sum(out * d_out, axis=-1)[:, :, :, None] - d_lse
  d_out = d_out.astype(values.dtype)  # as products take it
  parts, size = parts_of(plan, q.shape[3], h)
  cut = functools.partial(_parts, parts=parts, size=size)

  def of_part(d_keys: tuple[Array, Array], part: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
    q, d_out, table, at, lse, delta, live = part
    d_q, d_k, d_v = kernel.backward(q, keys, values, table, at, _lists(jnp.swapaxes(live, 2, 3)), lse, delta, d_out,
                                    d_keys, plan, interpret)
    return (d_k, d_v), d_q

  nothing = jnp.zeros((*q.shape[:2], *keys.shape[2:]), jnp.float32)
  of_keys, d_q = jax.lax.scan(of_part, (nothing, nothing), (
      cut(q, axis=3), cut(d_out, axis=3), cut(table, axis=3), cut(at, axis=2), cut(lse, axis=4), cut(delta, axis=4),
      _parts(live, 2, parts, size // plan.tile)))
  d_q = jnp.moveaxis(d_q, 0, 3).reshape(*q.shape[:3], -1, h)
  d_k, d_v = (jnp.swapaxes(d.reshape(b, kv_heads, -1, *d.shape[2:]).sum(axis=2), 1, 2)[:, :length].astype(x.dtype)
              for d, x in zip(of_keys, arguments[1:3], strict=True))
  return from_groups(d_q, t), d_k, d_v
