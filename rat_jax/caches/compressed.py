"""A compressed cache: the tokens that a mode keeps of a prompt, with their positions, and then what is generated."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp

from pallas_kernels.attention.gather import take_rows
from pallas_kernels.pattern import DENSE
from rat_jax.attention import by_rule
from rat_jax.attention.terms import Heads, Held, Origin
from rat_jax.axes import Array, CacheRows, Keys, Lengths, Positions
from rat_jax.caches.slots import Slots, aligned, write
from rat_jax.caches.store import KV, NewTokens, Store
from rat_jax.config import RATPlusConfig

if TYPE_CHECKING:
  from rat_jax.modes.base import Mode
  from rat_jax.modes.snapkv import SnapKV


class CompressedKV(NamedTuple):
  """Keys and values [L, B, M, R, H] of M = N or K heads; int32 [L, B, M, R], where each stands, -1 for no token."""

  keys: CacheRows
  values: CacheRows
  positions: Positions


@dataclasses.dataclass(frozen=True)
class Compressed(Store):
  """The store of a compressed prompt. Rows: `CompressedKV`, first those kept of the prompt, then the new ones.

  The prompt stands in an array of `prompt_width` tokens.
  """

  mode: SnapKV
  prompt_width: int

  @property
  def window(self) -> int:
    return self.mode.obs_window

  @property
  def kept(self) -> int:
    """How many rows there are for tokens of the prompt."""
    return self.mode.kept_rows(self.prompt_width)

  def empty(self, config: RATPlusConfig, layers: int, batch: int) -> CompressedKV:
    heads = config.num_kv_heads if self.mode.group == "kv" else config.num_heads
    count = aligned(self.kept + self.max_length - self.prompt_width)
    shape = (layers, batch, heads, count, config.head_dim)
    keys, values = jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)
    return CompressedKV(keys, values, jnp.full(shape[:4], -1, jnp.int32))

  def of_prompt(self, heads: Heads, lengths: Lengths, origin: Origin) -> CompressedKV:
    positions, _ = self.mode.keep(heads.q, heads.k, lengths, origin)
    kept = positions.shape[2]
    free = aligned(kept + self.max_length - heads.k.shape[1], heads.k) - kept
    keys, values = (jnp.pad(take_kept(x, positions), ((0, 0), (0, 0), (0, free), (0, 0))) for x in (heads.k, heads.v))
    return CompressedKV(keys, values, jnp.pad(positions, ((0, 0), (0, 0), (0, free)), constant_values=-1))

  def attend(self, rows: CompressedKV, layer: Array, mode: Mode, heads: Heads, new: NewTokens, origin: Origin
             ) -> Array:
    del mode, origin  # all that was kept and generated is read
    held = Held(rows.keys, rows.values, layer, rows.positions[layer], new.before, self.max_length)
    return by_rule.attend_cached(DENSE, heads, held, new.positions)

  def append(self, rows: CompressedKV, added: KV, new: NewTokens) -> CompressedKV:
    """Rows after the kept ones, in order: the first generated token of every row in the same place."""
    assert new.prompts is not None
    heads, count = rows.keys.shape[2:4]
    shift = (self.kept - new.prompts)[:, None]
    at, slots = jnp.where(new.positions >= 0, new.positions + shift, -1), Slots(count)
    held = new.after + shift[:, 0]

    def put(old: Array, x: Array) -> Array:  # every query head has its own rows where the mode chooses per head
      return write(slots, old, jnp.repeat(x, heads // x.shape[3], axis=3), at, held)

    where = jnp.broadcast_to(new.positions[None, :, :, None, None], (*added.keys.shape[:4], 1))
    return CompressedKV(put(rows.keys, added.keys), put(rows.values, added.values),
                        put(rows.positions[..., None], where)[..., 0])

  def serves(self, form: Mode) -> bool:
    return False

  def room(self, lengths: Lengths, prompts: Lengths | None) -> Array:
    assert prompts is not None
    return jnp.minimum(self.max_length - lengths, self.max_length - self.prompt_width - (lengths - prompts))


def take_kept(x: Keys, positions: Positions) -> CacheRows:
  """x [B, S, K, H] at positions [B, M, X] of each head: [B, M, X, H]; zeros for position -1."""
  taken = take_rows(jnp.swapaxes(x, 1, 2), jnp.maximum(positions, 0))
  return jnp.where((positions >= 0)[..., None], taken, 0)
