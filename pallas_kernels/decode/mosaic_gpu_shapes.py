"""How decode attention on a Hopper GPU cuts its work into blocks and tiles; the kernel is in `mosaic_gpu_kernel.py`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.devices import MULTIPROCESSORS

Array = jax.Array

WIDTHS = (64, 128, 256)
_HEADS_PER_BLOCK = 4  # more queries and outputs than this leave too few registers
_BLOCKS = 3 * MULTIPROCESSORS  # that run at a time
_TILE_BYTES = 16384
SHARED_BYTES = 220 * 1024  # for tiles; a block has 227 KiB, and some are for the rest
_MOST_STAGES = 8
_COPY_WORDS = 32  # an asynchronous copy goes to a multiple of 128 bytes in shared memory


@dataclasses.dataclass(frozen=True)
class Tuning:
  """How the work is cut.

  Attributes:
    tile_rows: cache rows per tile, rounded up to the rows that a warpgroup takes at a time; None makes tiles of 16 KiB.
    stages: tiles that are in shared memory at a time; None is 2, and more where blocks make tiles smaller than 16 KiB.
    splits: blocks that share the cache of a head; None chooses by the shapes.
  """

  tile_rows: int | None = None
  stages: int | None = None
  splits: int | None = None

  def __post_init__(self) -> None:
    if self.stages is not None and not 1 <= self.stages <= _MOST_STAGES:
      raise ValueError(f"Tuning: stages={self.stages}; use 1..{_MOST_STAGES}, or None.")
    if self.tile_rows is not None and not 1 <= self.tile_rows <= 256:  # an asynchronous copy takes no more
      raise ValueError(f"Tuning: tile_rows={self.tile_rows}; use 1..256, or None to choose by the shapes.")
    if self.splits is not None and self.splits < 1:
      raise ValueError(f"Tuning: splits={self.splits}; use at least 1, or None to choose by the shapes.")


@dataclasses.dataclass(frozen=True)
class Cut:
  """The shapes of one call, cut into blocks and tiles.

  Attributes:
    mask_heads: heads that have a mask of their own: 1, all K, or, with chosen blocks, all N.
    chosen: (how many, of how many rows) blocks of the cache a mask's head reads; None is the whole cache.
  """

  batch: int
  heads: int
  kv_heads: int
  rows: int
  width: int
  dtype: Any
  tuning: Tuning
  mask_heads: int = 1
  chosen: tuple[int, int] | None = None

  @property
  def lanes(self) -> int:
    """Lanes that share a cache row, 16 bytes at a time."""
    return min(32, self.row_bytes // 16)

  @property
  def step(self) -> int:
    """Cache rows that a warpgroup takes at a time."""
    return 4 * 32 // self.lanes

  @property
  def block_heads(self) -> int:
    """Query heads of a block: the most that divide the group, or what shares a mask."""
    group = self.heads // max(self.kv_heads, self.mask_heads)
    return max(n for n in range(1, _HEADS_PER_BLOCK + 1) if group % n == 0)

  @property
  def row_bytes(self) -> int:
    itemsize: int = jnp.dtype(self.dtype).itemsize
    return self.width * itemsize

  @property
  def tile(self) -> int:
    """Rows of a tile: tiles are as equal as the step lets them be, and of a block all are equal."""
    most = self.tuning.tile_rows or _TILE_BYTES // self.row_bytes
    if self.chosen is not None:
      of_block = range(self.step, self.chosen[1] + 1, self.step)
      return max(n for n in of_block if self.chosen[1] % n == 0 and n <= max(most, self.step))
    tiles = -(-self.rows // most)
    return -(-self.rows // (tiles * self.step)) * self.step

  @property
  def tiles(self) -> int:
    if self.chosen is not None:
      return self.chosen[0] * self.chosen[1] // self.tile
    return -(-self.rows // self.tile)

  @property
  def copied(self) -> int:
    """Rows of a tile that are copied: fewer than it has where the whole cache is smaller than one."""
    return min(self.tile, self.rows)

  @property
  def flags(self) -> int:
    """Entries of a tile's mask, padded to what a copy needs."""
    return -(-self.tile // _COPY_WORDS) * _COPY_WORDS

  @property
  def tiles_per_split(self) -> int:
    splits = self.tuning.splits or -(-_BLOCKS // (self.batch * self.heads // self.block_heads))
    return -(-self.tiles // min(splits, self.tiles))

  @property
  def splits(self) -> int:
    return -(-self.tiles // self.tiles_per_split)

  @property
  def stages(self) -> int:
    stages = self.tuning.stages
    if stages is None:
      stages = 2 if self.chosen is None else min(_MOST_STAGES, 2 * _TILE_BYTES // (self.tile * self.row_bytes))
    return min(stages, self.tiles_per_split)

  def starts(self) -> Array:
    """The first row of every tile of a whole cache, int32 [tiles]."""
    return jnp.minimum(jnp.arange(self.tiles, dtype=jnp.int32) * self.tile, self.rows - self.copied)
