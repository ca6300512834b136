"""The caches of decoding: which position each row of a cache holds, and how tokens get into it.

A cache of R rows per head is laid out as

    sinks    rows 0 .. sinks-1      position = row
    ring     the next `ring` rows   the last `ring` positions, position p in row p % ring
    strided  the rest               positions (j+1) * stride - 1

A full cache is all sinks. A Dilated cache has S0 sinks, a ring of W + 1 and floor(max_length / D) strided rows,
and no more: `Slots` knows from a row's length which position each of its slots holds, so none is stored.
Modes that choose blocks have a full cache and the statistics of its blocks. A SnapKV cache holds the kept tokens of
the prompt, with their positions, and then what is generated.
The memory's state (k~, v~ of the last token, before RoPE, float32) completes it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.gather import take_rows
from rat_jax import compression, selection
from rat_jax.axes import Array, Keys, Lengths, Positions, Queries, State
from rat_jax.compression import take_kept
from rat_jax.config import RATPlusConfig
from rat_jax.layout import as_row_ids, check_count
from rat_jax.modes import BlockMode, Mode, Run, SelectingMode, SnapKV, check_modes, layer_runs
from rat_jax.selection import Origin, Statistics


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
    """Slots in all, R."""
    return self.sinks + self.ring + self.strided

  def held(self, lengths: Lengths) -> Array:
    """The position in every slot after `lengths` [B] tokens, int32 [B, R]; -1 for an empty slot."""
    last = lengths[:, None] - 1
    at: list[Any] = [jnp.broadcast_to(jnp.arange(self.sinks, dtype=jnp.int32), (lengths.shape[0], self.sinks))]
    if self.ring:
      at.append(last - (last - jnp.arange(self.ring, dtype=jnp.int32)) % self.ring)
    at.append(jnp.broadcast_to((jnp.arange(self.strided, dtype=jnp.int32) + 1) * self.stride - 1,
                               (lengths.shape[0], self.strided)))
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
    slots: list[Any] = []
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
  """The layout of block statistics: slot p holds those up to the newest token of block p. As `Slots`."""

  block: int
  rows: int

  def held(self, lengths: Lengths) -> Array:
    start = jnp.arange(self.rows, dtype=jnp.int32) * self.block
    return jnp.where(start < lengths[:, None], jnp.minimum(start + self.block, lengths[:, None]) - 1, -1)

  def destinations(self, positions: Positions) -> Array:
    return jnp.where(positions >= 0, positions // self.block, self.rows)[..., None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys (after memory and RoPE) and values (after memory) of a run of layers: [layers, B, K, R, H] each.

  The rows of a head lie together, which is how a decode step reads them. Where these are, a single layer's arrays
  have no layer axis.

  Attributes:
    statistics: of blocks, [layers, B, K, P, H] each, for a mode that is scored by them.
    positions: int32 [layers, B, K, R], the position in each row, where order is lost (SnapKV; K is then N or K).
    queries: [layers, B, obs_window, N, H], the last ones, while a prompt that will be compressed comes in.
  """

  keys: Array
  values: Array
  statistics: Statistics = ()
  positions: Array | None = None
  queries: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """Everything that decoding needs of the tokens so far. A pytree; `prefill` makes it, `decode_step` returns a new one.

  Attributes:
    lengths: int32 [B], tokens that every row has.
    runs: one KVCache for each run of layers, in order.
    state: the memory's state, k~ and v~ float32 [L, B, K, H] each; None for the attention baseline.
    row_ids: int32 [B], for random selection; None without it.
    prompt_lengths: int32 [B], where a prompt was compressed; None elsewhere.
    config, mode, prefill_mode, max_length: static: what the cache was made for.
    prompt_width: static: the padded length of the prompt that was compressed.
  """

  lengths: Array
  runs: tuple[KVCache, ...]
  state: State | None
  row_ids: Array | None
  prompt_lengths: Array | None
  config: RATPlusConfig = dataclasses.field(metadata=dict(static=True))
  mode: Mode = dataclasses.field(metadata=dict(static=True))
  prefill_mode: Mode | None = dataclasses.field(metadata=dict(static=True))
  max_length: int = dataclasses.field(metadata=dict(static=True))
  prompt_width: int | None = dataclasses.field(metadata=dict(static=True))

  @property
  def layer_runs(self) -> tuple[Run, ...]:
    """The runs of layers that share their modes, in the order of the layers."""
    return layer_runs(self.mode, self.config.num_layers, self.prefill_mode)

  def room(self) -> Array:
    """int32 [B], how many tokens every row can still take."""
    room = self.max_length - self.lengths
    if self.prompt_lengths is None or self.prompt_width is None:
      return room
    return jnp.minimum(room, self.max_length - self.prompt_width - (self.lengths - self.prompt_lengths))


def empty_cache(config: RATPlusConfig, mode: Mode, batch: int, max_length: int, *, prefill_mode: Mode | None = None,
                prompt_width: int | None = None, row_ids: Array | None = None) -> Cache:
  """A cache of no tokens. Raises ValueError for a max_length or batch below 1 and SnapKV without `prompt_width`."""
  for name, value in (("batch", batch), ("max_length", max_length)):
    check_count(name, value)
  check_modes(mode, prefill_mode, config)
  runs = layer_runs(mode, config.num_layers, prefill_mode)
  compressed = any(isinstance(run.mode, SnapKV) for run in runs)
  if compressed and (prompt_width is None or not 1 <= prompt_width <= max_length):
    raise ValueError(f"prompt_length={prompt_width} with max_length={max_length} and {mode}; SnapKV needs the padded"
                     " length of the prompt, from 1 to max_length.")
  random = any(isinstance(m, SelectingMode) and m.selector == "random" for run in runs for m in (run.mode, run.form))
  if random:
    row_ids = as_row_ids(row_ids, batch)
  lengths = jnp.zeros(batch, jnp.int32)
  state = None
  if config.memory:
    shape = (config.num_layers, batch, config.num_kv_heads, config.head_dim)
    state = (jnp.zeros(shape), jnp.zeros(shape))
  empty = tuple(_empty_run(config, run, batch, max_length, prompt_width) for run in runs)
  prompt_lengths = jnp.zeros(batch, jnp.int32) if compressed else None
  return Cache(lengths, empty, state, row_ids if random else None, prompt_lengths, config, mode, prefill_mode,
               max_length, prompt_width if compressed else None)


def _empty_run(config: RATPlusConfig, run: Run, batch: int, max_length: int, prompt_width: int | None) -> KVCache:
  heads, rows = config.num_kv_heads, Slots.of(run.mode, max_length).rows
  if isinstance(run.mode, SnapKV) and prompt_width is not None:
    heads = config.num_kv_heads if run.mode.group == "kv" else config.num_heads
    rows = compression.kept_rows(run.mode, prompt_width) + max_length - prompt_width
  shape = (run.stop - run.start, batch, heads, rows, config.head_dim)
  kv = KVCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
  if isinstance(run.mode, BlockMode) and run.mode.statistic != "last":
    blocks = (*shape[:3], -(-max_length // run.mode.block), config.head_dim)
    lifted = selection.STATISTICS[run.mode.statistic].lift(jnp.zeros(blocks, config.dtype))
    kv = dataclasses.replace(kv, statistics=lifted)
  if isinstance(run.mode, SnapKV):
    kv = dataclasses.replace(kv, positions=jnp.full(shape[:4], -1, jnp.int32))
  return kv


def cache_bytes(config: RATPlusConfig, mode: Mode, batch: int, max_length: int, prompt_length: int | None = None
                ) -> int:
  """The bytes that a cache allocates, every leaf counted. Nothing is allocated to find out.

  SnapKV needs `prompt_length`, the padded length of the prompt. A `prefill_mode` adds nothing, but for the rows' ids
  (int32 [B]) where it chooses at random. Raises ValueError as `empty_cache`.
  """
  leaves = jax.tree.leaves(jax.eval_shape(
      lambda: empty_cache(config, mode, batch, max_length, prompt_width=prompt_length)))
  return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def of_prompt(run: Run, q_window: Queries | None, k: Keys, v: Keys, lengths: Lengths, max_length: int, origin: Origin
              ) -> KVCache:
  """The cache of one layer that takes a whole prompt: k, v [B, T, K, H] of `lengths` [B] tokens.

  SnapKV needs `q_window` [B, obs_window, N, H], every row's last queries, right-aligned.
  """
  if isinstance(run.mode, SnapKV):
    assert q_window is not None
    positions, _ = compression.keep(run.mode, q_window, k, lengths, origin)
    free = max_length - k.shape[1]
    keys, values = (jnp.pad(take_kept(jnp.swapaxes(x, 1, 2), positions), ((0, 0), (0, 0), (0, free), (0, 0)))
                    for x in (k, v))
    return KVCache(keys, values, positions=jnp.pad(positions, ((0, 0), (0, 0), (0, free)), constant_values=-1))
  slots = Slots.of(run.mode, max_length)
  kv = KVCache(fill(slots, k, lengths), fill(slots, v, lengths))
  if isinstance(run.mode, BlockMode) and run.mode.statistic != "last":
    blocks = BlockSlots(run.mode.block, -(-max_length // run.mode.block))
    at_token = selection.running(run.mode, k)
    kv = dataclasses.replace(kv, statistics=tuple(fill(blocks, x, lengths) for x in at_token))
  return kv


def fill(slots: Slots | BlockSlots, new: Array, lengths: Lengths) -> Array:
  """The rows [B, K, R, H] that hold what `slots` say of new [B, T, K, H]; zeros in empty ones."""
  held = jnp.broadcast_to(slots.held(lengths)[:, None], (new.shape[0], new.shape[2], slots.rows))
  rows = take_rows(jnp.swapaxes(new, 1, 2), jnp.clip(held, 0, new.shape[1] - 1))
  return jnp.where(held[..., None] >= 0, rows, 0)


def append(cache: Cache, run: Run, kv: KVCache, new: KVCache, positions: Positions, lengths: Lengths) -> KVCache:
  """The cache of a run of layers with new tokens in it; in place, where the compiler may.

  Args:
    kv: of the run, as it was.
    new: keys and values [layers, B, T, K, H], and `selection.running` of them where the run keeps statistics.
    positions: [B, T], where they are; position -1 is not written.
    lengths: int32 [B], the rows' lengths with the new tokens.
  """
  if isinstance(run.mode, SnapKV) and cache.prompt_lengths is not None:
    return _append_generated(cache, kv, new, positions, lengths)
  slots = Slots.of(run.mode, cache.max_length)
  keys, values = (write(slots, old, x, positions, lengths) for old, x in ((kv.keys, new.keys), (kv.values, new.values)))
  statistics: Statistics = ()
  if kv.statistics and isinstance(run.mode, BlockMode):
    blocks = BlockSlots(run.mode.block, kv.statistics[0].shape[3])
    statistics = tuple(write(blocks, old, x, positions, lengths)
                       for old, x in zip(kv.statistics, new.statistics, strict=True))
  queries = kv.queries
  if queries is not None and new.queries is not None:
    width, count = queries.shape[2], jnp.sum(positions >= 0, axis=1)
    at = (count[:, None] + jnp.arange(width))[None, :, :, None, None]
    queries = jnp.take_along_axis(jnp.concatenate([queries, new.queries], axis=2), at, axis=2)
  return KVCache(keys, values, statistics, queries=queries)


def _append_generated(cache: Cache, kv: KVCache, new: KVCache, positions: Positions, lengths: Lengths) -> KVCache:
  """Rows after the kept ones, in order: the first generated token of every row in the same place."""
  assert cache.prompt_lengths is not None
  assert cache.prompt_width is not None
  assert kv.positions is not None
  heads, rows = kv.keys.shape[2:4]
  first = rows - (cache.max_length - cache.prompt_width)
  shift = (first - cache.prompt_lengths)[:, None]
  at, slots = jnp.where(positions >= 0, positions + shift, -1), Slots(rows)
  held = lengths + shift[:, 0]

  def put(old, x):  # every query head has its own rows where the mode chooses per head
    return write(slots, old, jnp.repeat(x, heads // x.shape[3], axis=3), at, held)

  where = jnp.broadcast_to(positions[None, :, :, None, None], (*new.keys.shape[:4], 1))
  return KVCache(put(kv.keys, new.keys), put(kv.values, new.values),
                 positions=put(kv.positions[..., None], where)[..., 0])


def write(slots: Slots | BlockSlots, old: Array, new: Array, positions: Positions, lengths: Lengths) -> Array:
  """Rows old [layers, B, K, R, H] with new [layers, B, T, K, H] at `positions` [B, T] in the slots that take them.

  Of several tokens that share a slot, the one that the slot holds at `lengths` [B] is written; position -1 is not.
  """
  slot = slots.destinations(positions)
  held = jnp.pad(slots.held(lengths), ((0, 0), (0, 1)), constant_values=-1)
  stays = jnp.take_along_axis(held[:, None], slot, axis=2) == positions[:, :, None]
  slot = jnp.where(stays & (positions >= 0)[:, :, None], slot, slots.rows)
  row = jnp.arange(slot.shape[0])[:, None, None]
  # XLA would fuse what makes slots and rows into the scatter and compute it again for every number that is written.
  slot, new = jax.lax.optimization_barrier((slot, new))
  # Indices [B, T, places] come first, then layers, K, H.
  return old.at[:, row, :, slot].set(jnp.moveaxis(new, 0, 2)[:, :, None], mode="drop", unique_indices=True)
