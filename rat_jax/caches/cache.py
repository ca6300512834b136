"""The cache of a model: one store for each run of layers, and the memory's state."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from rat_jax import checks, plan
from rat_jax.axes import Array, ArrayLike, Lengths, RowIds, State
from rat_jax.caches.arriving import Arriving
from rat_jax.caches.store import Store
from rat_jax.config import RATPlusConfig
from rat_jax.modes import Mode
from rat_jax.plan import Run


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """Everything that decoding needs of the tokens so far. A pytree; `prefill` makes it, `decode_step` returns a new one.

  Attributes:
    lengths: int32 [B], tokens that every row has.
    runs: the rows of each run of layers, in order, as its store keeps them.
    state: the memory's state after the last token, k~ and v~ before RoPE, float32 [L, B, K, H] each; None for the
      attention baseline.
    row_ids: int32 [B], for random selection; None without it.
    prompt_lengths: int32 [B], where a prompt was compressed; None elsewhere.
    config, mode, prefill_mode, max_length: static: what the cache was made for.
    prompt_width: static: the padded length of the prompt that was compressed.
    arriving: static: the most tokens of a prompt that comes in in pieces, which is kept whole where a run's own store
      would not hold it; None before and after.
  """

  lengths: Lengths
  runs: tuple[Any, ...]
  state: State | None
  row_ids: RowIds | None
  prompt_lengths: Lengths | None
  config: RATPlusConfig = dataclasses.field(metadata=dict(static=True))
  mode: Mode = dataclasses.field(metadata=dict(static=True))
  prefill_mode: Mode | None = dataclasses.field(metadata=dict(static=True))
  max_length: int = dataclasses.field(metadata=dict(static=True))
  prompt_width: int | None = dataclasses.field(metadata=dict(static=True))
  arriving: int | None = dataclasses.field(default=None, metadata=dict(static=True))

  @property
  def plan(self) -> tuple[Run, ...]:
    """The runs of layers that share their modes, in the order of the layers."""
    return plan.layer_runs(self.mode, self.config.num_layers, self.prefill_mode)

  @property
  def stores(self) -> tuple[Store, ...]:
    """How each run of layers keeps its tokens."""
    return tuple(self._store(run) for run in self.plan)

  def _store(self, run: Run) -> Store:
    store = run.mode.store(self.max_length, self.prompt_width)
    if self.arriving is None or store.serves(run.form):
      return store
    return Arriving(self.arriving, store)

  @property
  def numbers(self) -> RowIds:
    """The rows' numbers for random draws, int32 [B]; zeros where nothing is drawn."""
    return checks.as_row_ids(self.row_ids, self.lengths.shape[0])

  def room(self) -> Array:
    """int32 [B], how many tokens every row can still take."""
    kinds = dict.fromkeys(self.stores)  # most runs have the same
    return functools.reduce(jnp.minimum, (store.room(self.lengths, self.prompt_lengths) for store in kinds))

  def rows(self, index: ArrayLike) -> Cache:
    """The cache whose row b is row index[b] of this one; int [B'], which may repeat, drop and reorder rows.

    Raises ValueError for what is no list of integers and, where values can be seen, for a row that is not there.
    """
    index = checks.as_rows(index, self.lengths.shape[0])
    runs = tuple(store.rows(rows, index) for store, rows in zip(self.stores, self.runs, strict=True))
    by_row = (self.lengths, self.row_ids, self.prompt_lengths)
    lengths, row_ids, prompt_lengths = jax.tree.map(lambda x: x[index], by_row)
    state = jax.tree.map(lambda x: x[:, index], self.state)
    return dataclasses.replace(self, lengths=lengths, runs=runs, state=state, row_ids=row_ids,
                               prompt_lengths=prompt_lengths)


def empty_cache(config: RATPlusConfig, mode: Mode, batch: int, max_length: int, *, prefill_mode: Mode | None = None,
                prompt_width: int | None = None, row_ids: RowIds | None = None) -> Cache:
  """A cache of no tokens. Raises ValueError for a max_length or batch below 1 and SnapKV without `prompt_width`."""
  for name, value in (("batch", batch), ("max_length", max_length)):
    checks.check_count(name, value)
  plan.check_modes(mode, prefill_mode, config)
  runs = plan.layer_runs(mode, config.num_layers, prefill_mode)
  compressed = any(run.mode.after_prompt for run in runs)
  if compressed and (prompt_width is None or not 1 <= prompt_width <= max_length):
    raise ValueError(f"prompt_length={prompt_width} with max_length={max_length} and {mode}; SnapKV needs the padded"
                     " length of the prompt, from 1 to max_length.")
  state = None
  if config.memory:
    shape = (config.num_layers, batch, config.num_kv_heads, config.head_dim)
    state = (jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))
  random = any(one.draws for run in runs for one in (run.mode, run.form))
  cache = Cache(jnp.zeros(batch, jnp.int32), (), state, checks.as_row_ids(row_ids, batch) if random else None,
                jnp.zeros(batch, jnp.int32) if compressed else None, config, mode, prefill_mode, max_length,
                prompt_width if compressed else None)
  return _emptied(cache)


def _emptied(cache: Cache) -> Cache:
  runs = tuple(store.empty(cache.config, run.stop - run.start, cache.lengths.shape[0])
               for store, run in zip(cache.stores, cache.plan, strict=True))
  return dataclasses.replace(cache, runs=runs)


def arriving(cache: Cache, length: int) -> Cache:
  """The empty cache for a prompt of up to `length` tokens that comes in in pieces; `arrived` makes `cache` of it."""
  return _emptied(dataclasses.replace(cache, arriving=length))


def arrived(cache: Cache) -> Cache:
  """The cache that was wanted, when all of the prompt has come in."""
  runs = tuple(store.finish(rows, cache.lengths, cache.numbers, run.start)
               for store, rows, run in zip(cache.stores, cache.runs, cache.plan, strict=True))
  return dataclasses.replace(cache, runs=runs, arriving=None)


def cache_bytes(config: RATPlusConfig, mode: Mode, batch: int, max_length: int, prompt_length: int | None = None
                ) -> int:
  """The bytes that a cache allocates, every leaf counted. Nothing is allocated to find out.

  SnapKV needs `prompt_length`, the padded length of the prompt. A `prefill_mode` adds nothing, but for the rows' ids
  (int32 [B]) where it chooses at random. Raises ValueError as `empty_cache`, and for a
  `prompt_length` that is no count or beyond `max_length`.
  """
  if prompt_length is not None:
    checks.check_count("prompt_length", prompt_length, least=0)
    checks.check_count("max_length", max_length)
    if prompt_length > max_length:
      raise ValueError(f"prompt_length={prompt_length} with max_length={max_length}; a cache has room for its prompt,"
                       " so use a prompt_length of at most max_length.")
  leaves = jax.tree.leaves(jax.eval_shape(
      lambda: empty_cache(config, mode, batch, max_length, prompt_width=prompt_length)))
  return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
