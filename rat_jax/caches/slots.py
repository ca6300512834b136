"""Which position each row of a cache holds, and how tokens get into their rows.

A cache of R rows per head is laid out as

    sinks    rows 0 .. sinks-1      position = row
    ring     the next `ring` rows   the last `ring` positions, position p in row p % ring
    strided  the next ones          positions (j+1) * stride - 1
    padding  the rest               no position

A full cache is all sinks. From a row's length `Slots` knows which position each of its slots holds, so none is stored.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import devices
from pallas_kernels.attention.gather import take_rows
from pallas_kernels.pattern import Pattern
from rat_jax.axes import Array, Lengths, Positions

_NEVER = 2**31 - 1  # a position after every length
_TILE = 16          # rows of a tile of a TPU's memory, for bfloat16


def aligned(rows: int, *arrays: Array) -> int:
  """How many rows a cache has that needs so many, on the device of the arrays or else of the context.

  On a TPU whole tiles: the compiler would lay out others in another order, and copy them for a kernel at every step.
  """
  return rows + -rows % _TILE if devices.platform_of(*arrays) == "tpu" else rows


@dataclasses.dataclass(frozen=True)
class Slots:
  """The layout of a cache's rows."""

  sinks: int
  ring: int = 0
  stride: int = 1
  strided: int = 0
  padding: int = 0

  @classmethod
  def of(cls, pattern: Pattern | None, max_length: int) -> Slots:
    """The smallest layout that serves a pattern, or any rule (None), up to `max_length` tokens."""
    full = cls(max_length)
    if pattern is None:
      return full
    stride = pattern.dilation or max_length + 1
    compact = cls(pattern.sinks, pattern.window + 1, stride, max_length // stride)
    return min(full, compact, key=lambda slots: slots.rows)

  @property
  def rows(self) -> int:
    """Slots in all, R."""
    return self.sinks + self.ring + self.strided + self.padding

  def padded(self, rows: int) -> Slots:
    """The layout with padding up to so many rows."""
    return dataclasses.replace(self, padding=self.padding + rows - self.rows)

  def held(self, lengths: Lengths) -> Array:
    """The position in every slot after `lengths` [B] tokens, int32 [B, R]; -1 for an empty slot."""
    last = lengths[:, None] - 1
    at = [jnp.broadcast_to(jnp.arange(self.sinks, dtype=jnp.int32), (lengths.shape[0], self.sinks))]
    if self.ring:
      at.append(last - (last - jnp.arange(self.ring, dtype=jnp.int32)) % self.ring)
    at.append(jnp.broadcast_to((jnp.arange(self.strided, dtype=jnp.int32) + 1) * self.stride - 1,
                               (lengths.shape[0], self.strided)))
    at.append(jnp.full((lengths.shape[0], self.padding), _NEVER, jnp.int32))
    held = jnp.concatenate(at, axis=1)
    return jnp.where(held <= last, held, -1)

  def readable(self, lengths: Lengths) -> Array:
    """As `held`, with a position that stands in several slots shown in one of them alone."""
    held = self.held(lengths)
    slot = jnp.arange(self.rows, dtype=jnp.int32)
    in_ring, in_strided = self._is_ring(slot), slot >= self.sinks + self.ring
    also_sink = (in_ring | in_strided) & (held < self.sinks)
    also_in_ring = in_strided & (held >= lengths[:, None] - self.ring)
    return jnp.where(also_sink | also_in_ring, -1, held)

  def destinations(self, positions: Positions) -> Array:
    """The slots that take a position [B, T] when it comes: int32 [B, T, up to 3]; `rows` where there is none."""
    nowhere = self.rows
    slots: list[Array] = []
    if self.sinks:
      slots.append(jnp.where(positions < self.sinks, positions, nowhere))
    if self.ring:
      slots.append(self.sinks + positions % self.ring)
    if self.strided:
      block = positions // self.stride
      slots.append(jnp.where(((positions + 1) % self.stride == 0) & (block < self.strided),
                             self.sinks + self.ring + block, nowhere))
    return jnp.where((positions >= 0)[..., None], jnp.stack(slots, axis=-1), nowhere)

  def _is_ring(self, slot: Array) -> Array:
    return (slot >= self.sinks) & (slot < self.sinks + self.ring)


@dataclasses.dataclass(frozen=True)
class BlockSlots:
  """The layout of block summaries: slot p holds those up to the newest token of block p. As `Slots`."""

  block: int
  rows: int

  def held(self, lengths: Lengths) -> Array:
    start = jnp.arange(self.rows, dtype=jnp.int32) * self.block
    return jnp.where(start < lengths[:, None], jnp.minimum(start + self.block, lengths[:, None]) - 1, -1)

  def destinations(self, positions: Positions) -> Array:
    return jnp.where(positions >= 0, positions // self.block, self.rows)[..., None]


def fill(slots: Slots | BlockSlots, new: Array, lengths: Lengths) -> Array:
  """The rows [B, K, R, H] that hold what `slots` say of new [B, T, K, H]; zeros in empty ones."""
  held = jnp.broadcast_to(slots.held(lengths)[:, None], (new.shape[0], new.shape[2], slots.rows))
  rows = take_rows(jnp.swapaxes(new, 1, 2), jnp.clip(held, 0, new.shape[1] - 1))
  return jnp.where(held[..., None] >= 0, rows, 0)


def write(slots: Slots | BlockSlots, old: Array, new: Array, positions: Positions, lengths: Lengths) -> Array:
  """Rows old [layers, B, K, R, H] with new [layers, B, T, K, H] at `positions` [B, T] in the slots that take them.

  Of several tokens that share a slot, the one that the slot holds at `lengths` [B] is written; position -1 is not.
  """
  slot = slots.destinations(positions)
  held = jnp.pad(slots.held(lengths), ((0, 0), (0, 1)), constant_values=-1)
  stays = jnp.take_along_axis(held[:, None], slot, axis=2) == positions[:, :, None]
  slot = jnp.where(stays & (positions >= 0)[:, :, None], slot, slots.rows)
  row = jnp.arange(slot.shape[0], dtype=jnp.int32)[:, None, None]
  # XLA would fuse what makes slots and rows into the scatter and compute it again for every number that is written.
  slot, new = jax.lax.optimization_barrier((slot, new))
  # Indices [B, T, places] come first, then layers, K, H.
  return old.at[:, row, :, slot].set(jnp.moveaxis(new, 0, 2)[:, :, None], mode="drop", unique_indices=True)
