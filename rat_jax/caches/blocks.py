"""A full cache with summaries of its blocks beside it, for a mode that chooses blocks by them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from rat_jax.attention.terms import Heads, Origin
from rat_jax.axes import Array, CacheRows, Lengths
from rat_jax.caches.full import Full
from rat_jax.caches.slots import BlockSlots, fill, write
from rat_jax.caches.store import NewTokens
from rat_jax.config import RATPlusConfig
from rat_jax.selection.summary import Summaries

if TYPE_CHECKING:
  from rat_jax.modes.base import Mode
  from rat_jax.modes.block_mode import BlockMode


class SummedKV(NamedTuple):
  """Keys and values [L, B, K, R, H]; the summaries of their blocks [L, B, K, P, H] each, up to the newest token."""

  keys: CacheRows
  values: CacheRows
  summaries: Summaries


@dataclasses.dataclass(frozen=True)
class Blocks(Full):
  """The store that keeps every token and a summary of every block. Rows: `SummedKV`.

  A block has one slot, which a chunk of any size goes on with.
  """

  mode: BlockMode

  @property
  def block_slots(self) -> BlockSlots:
    """Which position each summary goes up to."""
    return BlockSlots(self.mode.block, -(-self.max_length // self.mode.block))

  def empty(self, config: RATPlusConfig, layers: int, batch: int) -> SummedKV:
    blocks = jnp.zeros((layers, batch, config.num_kv_heads, self.block_slots.rows, config.head_dim), config.dtype)
    keys, values = super().empty(config, layers, batch)
    return SummedKV(keys, values, self.mode.summary.of_keys(blocks))

  def of_prompt(self, heads: Heads, lengths: Lengths, origin: Origin) -> SummedKV:
    running = self.mode.summary.running(self.mode.block, heads.k)
    keys, values = super().of_prompt(heads, lengths, origin)
    return SummedKV(keys, values, tuple(fill(self.block_slots, x, lengths) for x in running))

  def attend(self, rows: SummedKV, layer: Array, mode: Mode, heads: Heads, new: NewTokens, origin: Origin) -> Array:
    held = self.held(rows, layer, new)
    if mode == self.mode:
      held = held._replace(summaries=_of_layer(rows.summaries, layer))
    return mode.attend_cached(heads, held, new.positions, origin)

  def added(self, rows: SummedKV, layer: Array, heads: Heads, new: NewTokens) -> SummedKV:
    running = self.mode.summary.continued(self.mode.block, _of_layer(rows.summaries, layer), heads.k, new.positions,
                                          new.before)
    return SummedKV(heads.k, heads.v, running)

  def append(self, rows: SummedKV, added: SummedKV, new: NewTokens) -> SummedKV:
    summaries = tuple(write(self.block_slots, old, x, new.positions, new.after)
                      for old, x in zip(rows.summaries, added.summaries, strict=True))
    keys, values = super().append(rows, added, new)
    return SummedKV(keys, values, summaries)


def _of_layer(summaries: Summaries, layer: Array) -> Summaries:
  return tuple(jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in summaries)
