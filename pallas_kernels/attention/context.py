"""What a device's piece of a sequence fetches of the others, inside `jax.shard_map` over the axis "context"."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.split import CONTEXT

Array = jax.Array
_GATHERED = 1 << 26  # entries of gathered keys that are held at a time


class KeysAt(NamedTuple):
  """Keys and values [B, S, K, H], and where they stand: int32 [S]; a negative position is none."""

  k: Array
  v: Array
  at: Array


def start(piece: Array) -> Array:
  """The position of the first token of a piece [B, T, ...]: int32 []."""
  first: Array = jax.lax.axis_index(CONTEXT) * jnp.int32(piece.shape[1])
  return first


def gathered(piece: Array) -> Array:
  """The whole sequence [B, S, ...] of pieces [B, T, ...]."""
  whole: Array = jax.lax.all_gather(piece, CONTEXT, axis=1, tiled=True)
  return whole


def strided(k: Array, v: Array, dilation: int) -> KeysAt:
  """The last tokens of all blocks of `dilation` tokens of the whole sequence."""
  length = k.shape[1]
  if length % dilation == 0:
    own = [x[:, dilation - 1::dilation] for x in (k, v)]
    at = start(k) + jnp.arange(dilation - 1, length, dilation, dtype=jnp.int32)
  else:  # pieces begin inside of blocks, so that they hold different numbers of last tokens
    index = (-1 - start(k)) % dilation + dilation * jnp.arange(-(-length // dilation), dtype=jnp.int32)
    own = [jnp.take(x, index, axis=1, mode="clip") for x in (k, v)]
    at = jnp.where(index < length, start(k) + index, -1)
  return KeysAt(gathered(own[0]), gathered(own[1]), jax.lax.all_gather(at, CONTEXT, tiled=True))


def first(k: Array, v: Array, count: int) -> KeysAt | None:
  """The first `count` tokens of the whole sequence."""
  if not count:
    return None
  own, pieces = min(count, k.shape[1]), -(-count // k.shape[1])
  whole = [jax.lax.all_gather(x[:, :own], CONTEXT)[:pieces] for x in (k, v)]
  keys, values = (jnp.concatenate([*x], axis=1)[:, :count] for x in whole)
  return KeysAt(keys, values, jnp.arange(keys.shape[1], dtype=jnp.int32))


def before(k: Array, v: Array, count: int) -> tuple[Array, Array] | None:
  """Keys and values [B, count, K, H] of the tokens before the piece; zeros where the sequence begins."""
  if not count:
    return None
  length, size = k.shape[1], jax.lax.axis_size(CONTEXT)
  found: list[tuple[Array, Array]] = []
  for hop in range(1, -(-count // length) + 1):  # the nearest piece first
    missing = min(length, count - (hop - 1) * length)
    ends = (k[:, length - missing:], v[:, length - missing:])
    found.append(jax.lax.ppermute(ends, CONTEXT, [(i, i + hop) for i in range(size - hop)]))
  keys, values = (jnp.concatenate(parts, axis=1) for parts in zip(*reversed(found), strict=True))
  return keys, values


def attend_by_heads(attend: Callable[..., Array], q: Array, *of_keys: Array | None, together: int | None = None
                    ) -> Array:
  """`attend` of the piece's queries to what belongs to the keys of the whole sequence, some heads at a time.

  Args:
    attend: of q [B, T, n, H] and the others [B, S, m, H] of some heads: [B, T, n, H].
    q: [B, T, N, H]; of_keys: keys, values and the like, [B, T, K, H] each, of the piece, or None.
    together: key/value heads at a time; default as many as leave memory bounded.
  """
  like = next(x for x in of_keys if x is not None)
  heads, entries = like.shape[2], like.size // like.shape[2] * jax.lax.axis_size(CONTEXT)
  if together is None:
    together = max((n for n in range(1, heads + 1) if heads % n == 0 and n * entries <= _GATHERED), default=1)

  def split(x: Array) -> Array:  # -> [parts, B, T, heads of a part, H]
    return jnp.moveaxis(x.reshape(*x.shape[:2], heads // together, -1, x.shape[3]), 2, 0)

  def of_part(part: tuple[Array, tuple[Array | None, ...]]) -> Array:
    q, of_keys = part
    return attend(q, *jax.tree.map(gathered, of_keys))

  if together == heads:
    return of_part((q, of_keys))
  parts = jax.lax.map(jax.checkpoint(of_part), jax.tree.map(split, (q, of_keys)))
  return jnp.moveaxis(parts, 0, 2).reshape(q.shape)
