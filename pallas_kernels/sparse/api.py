"""`sparse_attention`: every query reads blocks of keys that were chosen for it, and what a rule on positions adds."""

from __future__ import annotations

import numbers

import jax
import jax.numpy as jnp

from pallas_kernels import arguments
from pallas_kernels.implementation import Operation, call
from pallas_kernels.pattern import Rule

Array = jax.Array


def _axes(q: Array, k: Array, v: Array, blocks: Array, valid: Array, q_positions: Array) -> tuple[str, ...]:
  chosen = "BTKn" if blocks.shape[2] == k.shape[2] else "BTNn"
  return "BTNH", "BSKH", "BSKH", chosen, chosen, "BT"


OPERATION = Operation("sparse_attention", _axes, ("BTNH", "BTN"), lambda q, k, *_, **__: q.shape[1] * k.shape[1])


def sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    blocks: Array,
    valid: Array,
    *,
    block: int,
    q_positions: Array | None = None,
    rule: Rule | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array]:
  """Causal attention to chosen blocks: key s stands at position s, block i holds the keys i*block .. (i+1)*block-1.

  A query at position t reads the keys s <= t that are in a block chosen for it, or that the rule lets it read, each
  once, in one softmax. Scores and softmax are float32, scaled by 1/sqrt(H). Differentiable in q, k, v. A key that no
  query of its head reads may hold anything, and so may its value: they reach no result and no gradient. What is read
  should be finite: it may reach other queries of the call.

  `blocks` is as large as T * n for every head: give queries in chunks, so that it exists for one chunk alone.

  Args:
    q: [B, T, N, H], already rotated.
    k, v: [B, S, K, H], N a multiple of K; for RAT+ already through the memory.
    blocks: int [B, T, K or N, n], the blocks that are chosen by a key/value head, or by every query head for itself,
      in any order. The same one twice counts once.
    valid: bool, alike: where it is False, `blocks` may hold anything.
    block: the keys of a block, >= 1. The last block ends with the keys.
    q_positions: int [B, T]; default: the last T of 0..S-1. A query below 0 reads nothing. Of a row that has fewer
      than S keys, queries come before those that are none.
    rule: what is read besides, by positions alone (`pattern.Rule`); static and hashable.
    implementation: None; "xla"; "pallas_tpu" (TPUs, float32 or bfloat16, H of a multiple of 128, blocks of a multiple
      of 16 keys (float32: 8) or one that holds all keys, a rule of a window and sinks alone).

  Returns:
    (out, lse): float32 [B, T, N, H] and float32 [B, T, N]; zeros and `softmax.NOTHING` where nothing is read.

  Raises:
    ValueError: shapes or types that do not match, a bad block, an unknown implementation; where values can be seen,
      integers beyond int32, and a valid entry of `blocks` that is no block of the keys.
    NotImplementedError: a known implementation that this operation, the device or these arrays do not have.
  """
  q, k, v, valid = (jnp.asarray(x) for x in (q, k, v, valid))
  blocks = arguments.as_int32("blocks", blocks, "[B, T, K or N, n]")
  q_positions = None if q_positions is None else arguments.as_int32("q_positions", q_positions, "[B, T]")
  _check(q, k, v, block, q_positions)
  block = min(int(block), k.shape[1])  # what a larger one holds besides is no key
  _check_blocks(q, k, blocks, valid, block)
  if q_positions is None:
    last = jnp.arange(k.shape[1] - q.shape[1], k.shape[1], dtype=jnp.int32)
    q_positions = jnp.broadcast_to(last, q.shape[:2])
  part: tuple[Array, Array] = call(OPERATION, implementation, q, k, v, blocks, valid, q_positions, block=block,
                                   rule=rule)
  return part


def _check(q: Array, k: Array, v: Array, block: int, q_positions: Array | None) -> None:
  if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
    raise ValueError(f"q, k, v have shapes {q.shape}, {k.shape}, {v.shape}; give q [B, T, N, H] and k, v"
                     " [B, S, K, H].")
  if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
    raise ValueError(f"q has shape {q.shape} and k {k.shape}; B and H must be the same.")
  if 0 in q.shape or 0 in k.shape:
    raise ValueError(f"q has shape {q.shape} and k {k.shape}; every axis must have at least one entry.")
  if q.shape[2] % k.shape[2]:
    raise ValueError(f"q has {q.shape[2]} heads and k {k.shape[2]}; the first must be a multiple of the second.")
  if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
    raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; give them one floating type.")
  if not isinstance(block, numbers.Integral) or isinstance(block, bool) or block < 1:
    raise ValueError(f"block={block}; use an integer of at least 1, the keys of a block.")
  if q_positions is None and q.shape[1] > k.shape[1]:
    raise ValueError(f"q has {q.shape[1]} tokens and k {k.shape[1]}; give q_positions, as queries are no longer the"
                     " last of the keys.")
  if q_positions is not None and q_positions.shape != q.shape[:2]:
    raise ValueError(f"q_positions is {q_positions.dtype} {q_positions.shape}; give integers [B, T] = {q.shape[:2]}.")


def _check_blocks(q: Array, k: Array, blocks: Array, valid: Array, block: int) -> None:
  heads, kv_heads = q.shape[2], k.shape[2]
  if (blocks.ndim != 4 or blocks.shape[:2] != q.shape[:2] or blocks.shape[2] not in (heads, kv_heads)
      or blocks.shape[3] < 1):
    raise ValueError(f"blocks is {blocks.dtype} {blocks.shape}; give integers [B, T, K or N, n], here B={q.shape[0]},"
                     f" T={q.shape[1]}, K={kv_heads}, N={heads}.")
  if valid.dtype != jnp.bool_ or valid.shape != blocks.shape:
    raise ValueError(f"valid is {valid.dtype} {valid.shape}; give bool of the shape of blocks, {blocks.shape}.")
  arguments.check_blocks(blocks, valid, -(-k.shape[1] // block))
