"""How the TPU kernels of `dilated_attention` work: one forward, one backward, and one backward for a window.

The keys lie in two arrays. The compact one has the sinks and the last key of every block of D; the whole one serves
the window. Who sees whom follows from positions alone:

  compact   a key older than the window: pos < t - W; a strided key that is a sink too counts as the sink
  window    a key of the W tokens before the query, and its own: t - W <= pos <= t

Without a window the query's own key is a score by itself, no product. A program of the grid has a block of queries, of
all query heads of a key/value head, and runs over the keys in chunks, of which it skips those that none of its queries
sees. Scores are in base 2.

Arrays: q, out [B, K, G, T, H]; k, v [B, K, T, H]; compact keys and values [B, K, M, H]; lse, delta [B, K, G, 1, T]
float32. T is a multiple of the block of queries, M of the chunk.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.pattern import Pattern
from pallas_kernels.tpu import scale

Array = jax.Array
Ref = Any
_NEVER = 2**30  # a position that no query has before it


@dataclasses.dataclass(frozen=True)
class Tuning:
  """How the kernels cut their work, in queries and keys; all are powers of two.

  Attributes:
    queries: of a block, of every query head; rows of a product are as many for each head of a group.
    keys: of a block of compact keys.
    chunk: keys whose scores are in flight at a time.
    local: keys of a block of the window; backward, queries too.
  """

  queries: int
  keys: int
  chunk: int
  local: int

  def __post_init__(self) -> None:
    assert all(n & (n - 1) == 0 for n in dataclasses.astuple(self)), self


@dataclasses.dataclass(frozen=True)
class Plan:
  """The sizes of a call. `pattern` is such that a window of 0 means that only its own token is seen besides the
  compact keys."""

  pattern: Pattern
  length: int
  groups: int
  width: int
  tuning: Tuning

  @property
  def rows(self) -> int:
    """Of a block of queries, all heads of a group."""
    return self.groups * self.tuning.queries

  @property
  def blocks(self) -> int:
    """Of queries."""
    return self.length // self.tuning.queries

  @property
  def compact(self) -> int:
    """Compact keys, without what fills up the last block."""
    return self.pattern.sinks + (self.length // self.pattern.dilation if self.pattern.dilation else 0)

  @property
  def compact_blocks(self) -> int:
    return -(-self.compact // self.tuning.keys)

  @property
  def back(self) -> int:
    """Blocks of the window before those of the queries themselves."""
    return -(-self.pattern.window // self.tuning.local)

  @property
  def local_blocks(self) -> int:
    """Blocks of the window that a block of queries may see; 0 without a window."""
    return self.back + self.tuning.queries // self.tuning.local if self.pattern.window else 0

  @property
  def scale(self) -> float:
    """Of scores, in base 2."""
    return scale(self.width)

  def seen(self, block: Array) -> Array:
    """Compact keys before and at the last one that the last query of a block sees; 0 where it sees none."""
    last = (block + 1) * self.tuning.queries - 1 - self.pattern.window  # keys before it are seen
    sinks = jnp.clip(last, 0, self.pattern.sinks)
    if not self.pattern.dilation:
      return sinks
    strided = divided(last, self.pattern.dilation)
    return jnp.maximum(sinks, jnp.where(strided > 0, strided + self.pattern.sinks, 0))

  def all_see(self, block: Array, first: Array, count: int) -> Array:
    """Whether all queries of a block see `count` compact keys from number `first` on, none of them a second sink."""
    oldest = block * self.tuning.queries - self.pattern.window  # the first query sees what is before it
    if not self.pattern.dilation:
      return jnp.minimum(oldest, self.pattern.sinks) >= first + count
    d, sinks = self.pattern.dilation, self.pattern.sinks
    distinct = sinks + sinks // d if sinks else 0  # from there on no strided key is a sink
    return (divided(jnp.maximum(oldest, 0), d) + sinks >= first + count) & (first >= distinct)

  def at(self, first: Array, count: int, axis: int) -> Array:
    """Positions of compact keys from number `first` on, int32 along `axis` of two; `_NEVER` for a second sink."""
    number = first + jax.lax.broadcasted_iota(jnp.int32, (1, count) if axis else (count, 1), axis)
    strided = jnp.full_like(number, _NEVER)
    if self.pattern.dilation:
      strided = (number - self.pattern.sinks) * self.pattern.dilation + self.pattern.dilation - 1
      strided = jnp.where(strided < self.pattern.sinks, _NEVER, strided)
    return jnp.where(number < self.pattern.sinks, number, strided)

  def queries_at(self, block: Array, axis: int) -> Array:
    """Positions of the rows of a block of queries, int32 along `axis` of two."""
    number = jax.lax.broadcasted_iota(jnp.int32, (1, self.rows) if axis else (self.rows, 1), axis)
    return block * self.tuning.queries + (number & (self.tuning.queries - 1))

  def sees_compact(self, t: Array, at: Array) -> Array:
    return at < t - self.pattern.window

  def sees_local(self, t: Array, at: Array) -> Array:
    return (at <= t) & (at >= t - self.pattern.window)


def of_every_head(ref: Ref, plan: Plan) -> Array:
  """A block [1, 1, queries, H] of keys or values, once for every query head: float32 [rows, H]."""
  return jnp.concatenate([ref[0, 0].astype(jnp.float32)] * plan.groups, axis=0)


def own_scores(q: Array, k: Array, plan: Plan) -> Array:
  """Of rows of queries with their own keys: [rows, 1], in base 2."""
  return jnp.sum(q.astype(jnp.float32) * k, axis=1, keepdims=True) * plan.scale


def divided(x: Array, by: int) -> Array:
  """x / by, rounded towards zero: `//` asks for the device, which need not be here."""
  return jax.lax.div(jnp.asarray(x, jnp.int32), jnp.int32(by))
