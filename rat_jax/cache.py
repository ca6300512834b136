"""The caches of decoding: which position each row of a cache holds, and how tokens get into it.

A cache of R rows per head is laid out as

    sinks    rows 0 .. sinks-1      position = row
    ring     the next `ring` rows   the last `ring` positions, position p in row p % ring
    strided  the rest               positions (j+1) * stride - 1

A full cache is all sinks. A Dilated cache has S0 sinks, a ring of W + 1 and floor(max_length / D) strided rows,
and no more: `Slots` knows from a row's length which position each of its slots holds, so none is stored.
The memory's state (k~, v~ of the last token, before RoPE, float32) completes it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from rat_jax.axes import Array, State
from rat_jax.config import RATPlusConfig
from rat_jax.modes import Mode, layer_runs


@dataclasses.dataclass(frozen=True)
class Slots:
  """The layout of a cache's rows."""

  sinks: int
  ring: int = 0
  stride: int = 1
  strided: int = 0

  @classmethod
  def of(cls, mode: Mode, max_length: int) -> Slots:
    """The smallest layout that serves a mode up to `max_length` tokens."""
    full, pattern = cls(max_length), mode.pattern
    if pattern is None:
      return full
    stride = pattern.dilation or max_length + 1
    compact = cls(pattern.sinks, pattern.window + 1, stride, max_length // stride)
    return min(full, compact, key=lambda slots: slots.rows)

  @property
  def rows(self) -> int:
    return self.sinks + self.ring + self.strided

  def held(self, lengths: Array) -> Array:
    """The position in every slot after `lengths` [B] tokens, int32 [B, R]; -1 for an empty slot."""
    last = lengths[:, None] - 1
    at = [jnp.broadcast_to(jnp.arange(self.sinks, dtype=jnp.int32), (lengths.shape[0], self.sinks))]
    if self.ring:
      at.append(last - (last - jnp.arange(self.ring, dtype=jnp.int32)) % self.ring)
    at.append(jnp.broadcast_to((jnp.arange(self.strided, dtype=jnp.int32) + 1) * self.stride - 1,
                               (lengths.shape[0], self.strided)))
    held = jnp.concatenate(at, axis=1)
    return jnp.where(held <= last, held, -1)

  def readable(self, lengths: Array) -> Array:
    """As `held`, with a position that stands in several slots shown in one of them alone."""
    held = self.held(lengths)
    slot = jnp.arange(self.rows, dtype=jnp.int32)
    in_ring, in_strided = self._is_ring(slot), slot >= self.sinks + self.ring
    also_sink = (in_ring | in_strided) & (held < self.sinks)
    also_in_ring = in_strided & (held >= lengths[:, None] - self.ring)
    return jnp.where(also_sink | also_in_ring, -1, held)

  def destinations(self, positions: Array) -> Array:
    """The slots that take a position [B, T] when it comes: int32 [B, T, 3]; `rows` where there is none."""
    nowhere = self.rows
    sink = jnp.where(positions < self.sinks, positions, nowhere)
    ring = self.sinks + positions % self.ring if self.ring else jnp.full_like(positions, nowhere)
    block = positions // self.stride
    strided = jnp.where(((positions + 1) % self.stride == 0) & (block < self.strided),
                        self.sinks + self.ring + block, nowhere)
    slots = jnp.stack([sink, ring, strided], axis=-1)
    return jnp.where((positions >= 0)[..., None], slots, nowhere)

  def _is_ring(self, slot: Array) -> Array:
    return (slot >= self.sinks) & (slot < self.sinks + self.ring)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys (after memory and RoPE) and values (after memory) of a run of layers: [layers, B, K, R, H] each.

  The rows of a head lie together, which is how a decode step reads them.
  """

  keys: Array
  values: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """Everything that decoding needs of the tokens so far. A pytree; `prefill` makes it, `decode_step` returns a new one.

  Attributes:
    lengths: int32 [B], tokens that every row has.
    runs: one KVCache for each run of layers of equal mode, in order.
    state: the memory's state, k~ and v~ float32 [L, B, K, H] each; None for the attention baseline.
    config, mode, max_length: static: what the cache was made for.
  """

  lengths: Array
  runs: tuple[KVCache, ...]
  state: State | None
  config: RATPlusConfig = dataclasses.field(metadata=dict(static=True))
  mode: Mode = dataclasses.field(metadata=dict(static=True))
  max_length: int = dataclasses.field(metadata=dict(static=True))


def empty_cache(config: RATPlusConfig, mode: Mode, batch: int, max_length: int) -> Cache:
  """A cache of no tokens. Raises ValueError for a max_length or batch below 1."""
  for name, value in (("batch", batch), ("max_length", max_length)):
    if value < 1:
      raise ValueError(f"{name}={value}; use at least 1.")

  def run_cache(run):
    shape = (run.stop - run.start, batch, config.num_kv_heads, Slots.of(run.mode, max_length).rows, config.head_dim)
    return KVCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))

  runs = tuple(run_cache(run) for run in layer_runs(mode, config.num_layers))
  state = None
  if config.memory:
    shape = (config.num_layers, batch, config.num_kv_heads, config.head_dim)
    state = (jnp.zeros(shape), jnp.zeros(shape))
  return Cache(jnp.zeros(batch, jnp.int32), runs, state, config, mode, max_length)


def cache_bytes(config: RATPlusConfig, mode: Mode, batch: int, max_length: int) -> int:
  """The bytes that a cache allocates, every leaf counted. Nothing is allocated to find out."""
  leaves = jax.tree.leaves(jax.eval_shape(lambda: empty_cache(config, mode, batch, max_length)))
  return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def fill(slots: Slots, k: Array, v: Array, lengths: Array) -> KVCache:
  """The cache [B, K, R, H] of one layer that takes a whole prompt: k, v [B, T, K, H] of `lengths` [B] tokens."""
  held = slots.held(lengths)[:, None, :, None]

  def rows(new):
    index = jnp.clip(held, 0, new.shape[1] - 1)
    return jnp.where(held >= 0, jnp.take_along_axis(jnp.swapaxes(new, 1, 2), index, axis=2), 0)

  return KVCache(rows(k), rows(v))


def append(slots: Slots, kv: KVCache, k: Array, v: Array, positions: Array, lengths: Array) -> KVCache:
  """The cache of a run of layers with new tokens in it; in place, where the compiler may.

  Args:
    k, v: [layers, B, T, K, H], at `positions` [B, T]; position -1 is not written.
    lengths: int32 [B], the rows' lengths with the new tokens: of several tokens that share a slot, the one that
      the slot then holds is written.
  """
  slot = slots.destinations(positions)
  held = jnp.pad(slots.held(lengths), ((0, 0), (0, 1)), constant_values=-1)
  stays = jnp.take_along_axis(held[:, None], slot, axis=2) == positions[:, :, None]
  slot = jnp.where(stays, slot, slots.rows)
  row = jnp.arange(slot.shape[0])[:, None, None]

  def write(old, new):  # indices [B, T, 3] come first, then layers, K, H
    return old.at[:, row, :, slot].set(jnp.moveaxis(new, 0, 2)[:, :, None], mode="drop")

  return KVCache(write(kv.keys, k), write(kv.values, v))
