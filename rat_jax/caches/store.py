"""What a store, the cache of a run of layers, is: the methods that every kind of store has.

A store is static: it says how a cache is laid out. The cache itself, its rows, is a pytree of arrays [L, B, ...] of the
run's layers, of the store's own type. A mode names its store (`Mode.store`). A new kind of cache is a new file here.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from rat_jax.attention.terms import Heads, Origin
from rat_jax.axes import Array, CacheRows, Lengths, Positions, RowIds
from rat_jax.config import RATPlusConfig

if TYPE_CHECKING:
  from rat_jax.modes.base import Mode


class KV(NamedTuple):
  """Keys (after memory and RoPE) and values (after memory): [L, B, K, R, H] each; of a single layer no layer axis."""

  keys: CacheRows
  values: CacheRows


class NewTokens(NamedTuple):
  """Tokens that follow those in a cache.

  Attributes:
    positions: int32 [B, T], where they stand; -1 for padding.
    before, after: int32 [B], the rows' lengths without and with them.
    prompts: int32 [B], the rows' prompts, where these were compressed; None elsewhere.
  """

  positions: Positions
  before: Lengths
  after: Lengths
  prompts: Lengths | None = None


@dataclasses.dataclass(frozen=True)
class Store:
  """How a run of layers keeps up to `max_length` tokens."""

  max_length: int

  @property
  def window(self) -> int:
    """How many of the prompt's last queries `of_prompt` asks for."""
    return 0

  def empty(self, config: RATPlusConfig, layers: int, batch: int) -> Any:
    """The rows of no tokens."""
    raise NotImplementedError

  def of_prompt(self, heads: Heads, lengths: Lengths, origin: Origin) -> Any:
    """The rows of one layer, without a layer axis, that hold a whole prompt of `lengths` [B] tokens.

    Of the queries, `heads` has the last `window`: [B, window, N, H], right-aligned.
    """
    raise NotImplementedError

  def attend(self, rows: Any, layer: Array, mode: Mode, heads: Heads, new: NewTokens, origin: Origin) -> Array:
    """Attention of new tokens, under `mode`, to layer `layer` of the cache and to themselves: float32 [B, T, N, H].

    One softmax. `mode` is the mode that the store is made for, or a form of the prompt that it serves.
    """
    raise NotImplementedError

  def added(self, rows: Any, layer: Array, heads: Heads, new: NewTokens) -> Any:
    """What a layer adds for new tokens: [B, T, ...] each, for `append`."""
    del rows, layer, new
    return KV(heads.k, heads.v)

  def append(self, rows: Any, added: Any, new: NewTokens) -> Any:
    """The rows with new tokens in them, of all layers of the run at once; in place, where the compiler may.

    `added` is what `added` returned, with a layer axis in front. Position -1 is not written.
    """
    raise NotImplementedError

  def finish(self, rows: Any, lengths: Lengths, row_ids: RowIds, first_layer: int) -> Any:
    """The rows that decoding goes on with, when a prompt that came in in pieces has ended.

    `row_ids` [B] are the rows' numbers; the run's layers are numbered from `first_layer` on.
    """
    del lengths, row_ids, first_layer
    return rows

  def serves(self, form: Mode) -> bool:
    """Whether the store holds all that a form of the prompt reads, so that a prompt can go through it in pieces."""
    raise NotImplementedError

  def room(self, lengths: Lengths, prompts: Lengths | None) -> Array:
    """int32 [B], how many tokens every row can still take."""
    del prompts
    return self.max_length - lengths

  def rows(self, rows: Any, index: Array) -> Any:
    """The rows whose row b is row index[b] of the given ones; `index` is int32 [B']."""
    return jax.tree.map(lambda x: jnp.take(x, index, axis=1), rows)
