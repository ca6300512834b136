"""How the Hopper kernel of `gated_scan` cuts its work: tiles of [pieces of time, tokens of a piece, channels]."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

Array = jax.Array
Ref = Any

CHANNELS = (32, 64, 128)     # that a block can take
VECTOR = 2                   # neighbouring channels of one thread: a 4-byte read of bfloat16
SHARED_MEMORY = 227 * 1024   # bytes, of a block on Hopper
_PER_STEP = 128 * VECTOR     # (piece, channel) pairs that one warpgroup holds


@dataclasses.dataclass(frozen=True)
class Tuning:
  """How a kernel cuts its work.

  Attributes:
    channels: of one block: 32, 64 or 128. Few channels give many blocks; a row of a tile is one piece of memory.
    steps: tokens that a thread runs over in a tile. It holds 2 * (inputs + 1) * steps floats in registers.
    stages: tiles in shared memory, a multiple of `workers`; `stages - workers` of them are fetched ahead.
    workers: warpgroups that compute.
    segments: pieces of time that run at once. More than 1 costs a pass over the inputs before the real one; it serves
      where rows * (all channels / channels) is less than the number of multiprocessors.
  """

  channels: int = 32
  steps: int = 16
  stages: int = 4
  workers: int = 2
  segments: int = 1

  def __post_init__(self) -> None:
    if self.channels not in CHANNELS:
      raise ValueError(f"channels={self.channels}; a block takes 32, 64 or 128 channels.")
    if self.workers < 1 or self.stages % self.workers or self.stages < 1:
      raise ValueError(f"stages={self.stages} is no multiple of workers={self.workers}: a worker must find each of its"
                       " tiles in the same places of shared memory.")
    if self.tile < 32 or self.segments < 1:
      raise ValueError(f"steps={self.steps}, segments={self.segments}: a tile has at least 32 tokens (it has"
                       f" {self.subs} pieces of `steps`), and there is at least one segment.")

  @property
  def subs(self) -> int:
    """Pieces of time in a tile."""
    return _PER_STEP // self.channels

  @property
  def tile(self) -> int:
    """Tokens in a tile."""
    return self.subs * self.steps


@dataclasses.dataclass(frozen=True)
class Operand:
  """An array that passes tile by tile.

  Attributes:
    kind: "tokens": the array is [N, pieces, steps, 1, C], a tile of it [subs, steps, 1, channels]; "pieces":
      [N, pieces, 1, C] and [subs, 1, channels]; "flags": [N, tiles, 1, steps * subs] and [1, steps * subs], where
      the pieces of a tile lie side by side.
    array: the array, or its type.
  """

  kind: str
  array: Any

  def tile_shape(self, tuning: Tuning) -> tuple[int, ...]:
    subs, steps, channels = tuning.subs, tuning.steps, tuning.channels
    return {"tokens": (subs, steps, 1, channels), "pieces": (subs, 1, channels), "flags": (1, subs * steps)}[self.kind]

  def tile_bytes(self, tuning: Tuning) -> int:
    itemsize: int = jnp.dtype(self.array.dtype).itemsize
    return math.prod(self.tile_shape(tuning)) * itemsize

  def tile_of(self, ref: Ref, row: Array, tile: Array, block: Array, tuning: Tuning) -> Ref:
    pieces = pl.ds(tile * tuning.subs, tuning.subs)
    channels = pl.ds(block * tuning.channels, tuning.channels)
    every = slice(None)
    return ref.at[{"tokens": (row, pieces, every, every, channels), "pieces": (row, pieces, every, channels),
                   "flags": (row, tile)}[self.kind]]


def shared_bytes(operands: Sequence[Operand], outputs: Sequence[Operand], drives: int, tuning: Tuning) -> int:
  """Shared memory that a block takes, without barriers, each array rounded up to 1024 bytes."""
  states = 4 * _PER_STEP
  sizes = [tuning.stages * x.tile_bytes(tuning) for x in operands]
  sizes += [tuning.workers * x.tile_bytes(tuning) for x in outputs]
  sizes += [tuning.workers * (1 + drives) * states, max(tuning.workers, 2) * (1 + drives) * states]
  return sum(-(-size // 1024) * 1024 for size in sizes)
