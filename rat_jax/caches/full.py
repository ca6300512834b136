"""A full cache: all keys and values, position p in row p."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from rat_jax.attention.terms import Heads, Held, Origin
from rat_jax.axes import Array, Lengths
from rat_jax.caches.slots import Slots, aligned, fill, write
from rat_jax.caches.store import KV, NewTokens, Store
from rat_jax.config import RATPlusConfig

if TYPE_CHECKING:
  from rat_jax.modes.base import Mode


@dataclasses.dataclass(frozen=True)
class Full(Store):
  """The store that keeps every token, and so serves every mode and every form of the prompt. Rows: `KV`."""

  @property
  def slots(self) -> Slots:
    """Which position each row holds; there may be more rows, which hold none."""
    return Slots(self.max_length)

  def empty(self, config: RATPlusConfig, layers: int, batch: int) -> Any:
    shape = (layers, batch, config.num_kv_heads, aligned(self.slots.rows), config.head_dim)
    return KV(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))

  def of_prompt(self, heads: Heads, lengths: Lengths, origin: Origin) -> Any:
    slots = self.slots.padded(aligned(self.slots.rows, heads.k))
    return KV(fill(slots, heads.k, lengths), fill(slots, heads.v, lengths))

  def attend(self, rows: Any, layer: Array, mode: Mode, heads: Heads, new: NewTokens, origin: Origin) -> Array:
    return mode.attend_cached(heads, self.held(rows, layer, new), new.positions, origin)

  def held(self, rows: Any, layer: Array, new: NewTokens) -> Held:
    """What a layer holds for new tokens to read."""
    readable = self.slots.padded(rows.keys.shape[3]).readable(new.before)
    return Held(rows.keys, rows.values, layer, readable, new.before, self.max_length)

  def append(self, rows: Any, added: Any, new: NewTokens) -> Any:
    slots = self.slots.padded(rows.keys.shape[3])
    keys, values = (write(slots, old, x, new.positions, new.after)
                    for old, x in ((rows.keys, added.keys), (rows.values, added.values)))
    return KV(keys, values)

  def serves(self, form: Mode) -> bool:
    return True
