"""A prompt that comes in pieces, kept whole until it has ended and the cache that is wanted can be made of it."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rat_jax.attention.terms import Heads, Origin
from rat_jax.axes import Array, CacheRows, Lengths, Queries, RowIds
from rat_jax.caches.full import Full
from rat_jax.caches.store import NewTokens, Store
from rat_jax.config import RATPlusConfig


class ArrivingKV(NamedTuple):
  """Keys and values [L, B, K, R, H]; the last queries so far, right-aligned: [L, B, window, N, H]."""

  keys: CacheRows
  values: CacheRows
  queries: Queries


@dataclasses.dataclass(frozen=True)
class Arriving(Full):
  """The store of a prompt that comes in pieces. Rows: `ArrivingKV`; `finish` makes the rows of the store `wanted`."""

  wanted: Store

  def empty(self, config: RATPlusConfig, layers: int, batch: int) -> ArrivingKV:
    shape = (layers, batch, self.wanted.window, config.num_heads, config.head_dim)
    keys, values = super().empty(config, layers, batch)
    return ArrivingKV(keys, values, jnp.zeros(shape, config.dtype))

  def added(self, rows: ArrivingKV, layer: Array, heads: Heads, new: NewTokens) -> ArrivingKV:
    return ArrivingKV(heads.k, heads.v, heads.q)

  def append(self, rows: ArrivingKV, added: ArrivingKV, new: NewTokens) -> ArrivingKV:
    at = (new.after - new.before)[:, None] + jnp.arange(self.wanted.window, dtype=jnp.int32)
    queries = jnp.concatenate([rows.queries, added.queries], axis=2)
    queries = jnp.take_along_axis(queries, at[None, :, :, None, None], axis=2)
    keys, values = super().append(rows, added, new)
    return ArrivingKV(keys, values, queries)

  def finish(self, rows: ArrivingKV, lengths: Lengths, row_ids: RowIds, first_layer: int) -> Any:
    def of_layer(_: None, at_layer: tuple[ArrivingKV, Array]) -> tuple[None, Any]:
      rows, layer = at_layer
      keys, values = (jnp.swapaxes(x[:, :, :self.max_length], 1, 2) for x in (rows.keys, rows.values))
      heads = Heads(rows.queries, keys, values)
      return None, self.wanted.of_prompt(heads, lengths, Origin(row_ids, layer))

    layers = first_layer + jnp.arange(rows.keys.shape[0], dtype=jnp.int32)
    return jax.lax.scan(of_layer, None, (rows, layers))[1]
