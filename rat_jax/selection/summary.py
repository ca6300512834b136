"""Summaries of blocks of keys: what is kept of a block, so that a query can score it without reading it.

Block p of size `block` holds the keys at positions p * block .. (p+1) * block - 1. How a block is summed up is the idea
of a mode and stands in the mode's file; here is how summaries of all blocks come about, and how new tokens go on.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rat_jax.axes import Array, Keys, Lengths, Positions

Summaries = tuple[Array, ...]  # of blocks: [B, K, P, H] each; of the block so far at every token: [B, T, K, H] each
_Started = tuple[Array, Summaries]  # whether a block starts, bool [B, T, 1, 1], and summaries
Product = Callable[[Array, Array], Array]  # of queries and summaries, over H, in float32


class Summary:
  """How the keys of a block are summed up. Stateless."""

  cached = True  # a cache keeps it; False: a cache has it among its keys

  def of_keys(self, k: Keys) -> Summaries:
    """The summary of every key [B, T, K, H] alone: [B, T, K, H] each."""
    raise NotImplementedError

  def join(self, earlier: Summaries, later: Summaries) -> Summaries:
    """The summary of two parts of keys from the parts' summaries. Associative."""
    raise NotImplementedError

  def score(self, product: Product, q: Array, summaries: Summaries, count: Array | int) -> Array:
    """How much a query q wants a block of `count` keys; `product` sums over the channels H."""
    raise NotImplementedError

  def running(self, block: int, k: Keys, positions: Positions | None = None, before: Summaries | None = None
              ) -> Summaries:
    """The summary of every token's own block up to that token: [B, T, K, H] each.

    Args:
      k: [B, T, K, H], at consecutive `positions` [B, T]; default 0..T-1.
      before: [B, K, H] each, the summary so far of the block that the first token is in, if it is not its first.
    """
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(k.shape[1], dtype=jnp.int32), k.shape[:2])
    values, restart = self.of_keys(k), (positions % block == 0)[:, :, None, None]
    if before is None:
      restart = restart.at[:, 0].set(True)
    else:
      first = self.join(tuple(b.astype(v.dtype) for b, v in zip(before, values, strict=True)),
                        tuple(v[:, 0] for v in values))
      values = tuple(v.at[:, 0].set(jnp.where(restart[:, 0], v[:, 0], f)) for v, f in zip(values, first, strict=True))

    def combine(a: _Started, b: _Started) -> _Started:
      joined = self.join(a[1], b[1])
      return a[0] | b[0], tuple(jnp.where(b[0], new, both) for new, both in zip(b[1], joined, strict=True))

    scanned: _Started = jax.lax.associative_scan(combine, (restart, values), axis=1)
    return scanned[1]

  def of_blocks(self, block: int, k: Keys, lengths: Lengths | None = None, running: Summaries | None = None
                ) -> Summaries:
    """The summaries of all blocks of keys [B, S, K, H] at positions 0..S-1: [B, K, P, H] each.

    Args:
      lengths: int32 [B], the keys that count; default S.
      running: what `running` makes of these keys, where it is known.
    """
    batch, length = k.shape[:2]
    running = self.running(block, k) if running is None else running
    ends = jnp.arange(1, -(-length // block) + 1, dtype=jnp.int32) * block
    count = jnp.full((batch, 1), length, jnp.int32) if lengths is None else lengths[:, None]
    at = jnp.maximum(jnp.minimum(ends, count) - 1, 0)[:, :, None, None]
    return tuple(jnp.swapaxes(jnp.take_along_axis(x, at, axis=1), 1, 2) for x in running)

  def of_blocks_and_own(self, block: int, k: Keys, q_positions: Positions) -> tuple[Summaries, Summaries]:
    """(of all blocks [B, K, P, H] each, of the queries' own blocks up to the query [B, T, K, H] each).

    Keys stand at positions 0..S-1, queries at `q_positions` [B, T].
    """
    running = self.running(block, k)
    at = jnp.clip(q_positions, 0, k.shape[1] - 1)[:, :, None, None]
    return self.of_blocks(block, k, running=running), tuple(jnp.take_along_axis(x, at, axis=1) for x in running)

  def continued(self, block: int, summaries: Summaries, k: Keys, positions: Positions, lengths: Lengths) -> Summaries:
    """`running` of new keys [B, T, K, H] that follow `lengths` [B] tokens with these summaries of blocks."""
    at = jnp.minimum(lengths // block, summaries[0].shape[2] - 1)[:, None, None, None]
    before = tuple(jnp.take_along_axis(x, at, axis=2)[:, :, 0] for x in summaries)
    return self.running(block, k, positions, before)
