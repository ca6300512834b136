"""What the modes that choose blocks of keys by the query share: forced blocks, budgets, how they attend and cache.

Such a mode is a file with its fields and three answers:
  summary              how a block is summed up, and scored by that (`rat_jax.selection.summary.Summary`)
  blocks_at(length)    how many blocks the query reads that has `length` tokens up to itself, forced ones included
  rule                 a position-only mode that it reads besides, or None
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.pattern import seen
from rat_jax.attention.terms import Heads, Held, Origin, Placement
from rat_jax.axes import Array, Positions
from rat_jax.caches.blocks import Blocks
from rat_jax.caches.full import Full
from rat_jax.caches.store import Store
from rat_jax.modes.base import Mode
from rat_jax.modes.selecting import SelectingMode, by_length
from rat_jax.selection import attention
from rat_jax.selection.choice import Selection, select_blocks
from rat_jax.selection.summary import Summary


@dataclasses.dataclass(frozen=True, eq=False)
class BlockMode(SelectingMode):
  """The base class of the modes that read whole blocks: block p is positions p * block .. (p+1) * block - 1."""

  also: Mode | None = dataclasses.field(default=None, kw_only=True)  # `mode | self` sets it

  block = 0           # tokens in a block
  keep_first = False  # the first block is always read, and counts

  @property
  def summary(self) -> Summary:
    """How a block is summed up, to be scored by it."""
    return Summary()

  @property
  def forces_own(self) -> bool:
    """Whether the query's own block is always read, and counts."""
    return True

  @property
  def rule(self) -> Mode | None:
    """A position-only mode whose keys are read besides the chosen blocks, and do not count."""
    return self.also

  def __ror__(self, other: Mode) -> Mode:
    """`StreamingLLM(64) | Quest(1024)`: the union of a position-only mode and a selection, in one softmax."""
    if self.also is not None:
      raise ValueError(f"{other} | {self}: it has also={self.also} already; join the two rules in one mode.")
    return dataclasses.replace(self, also=other)

  def _settle_options(self) -> None:
    super()._settle_options()
    position_only = isinstance(self.also, Mode) and not isinstance(self.also, SelectingMode) and not hasattr(
        self.also, "modes")  # of one layer and of all heads
    if self.also is not None and not position_only:
      raise ValueError(f"{type(self).__name__}: also={self.also!r}; give a position-only mode such as StreamingLLM(8).")

  def blocks_at(self, length: int) -> int:
    """Blocks that the query at position length-1 reads, before what is forced and what there is."""
    raise NotImplementedError

  def forced(self, block: Any, own: Any) -> Any:
    """Whether a query of block `own` always reads a block: numbers or arrays of them, broadcast together."""
    return ((block == own) & self.forces_own) | ((block == 0) & self.keep_first)

  def forced_at(self, length: int) -> int:
    """How many blocks are forced for the query at position length-1."""
    own = (length - 1) // self.block
    return sum(bool(self.forced(block, own)) for block in {0, own})

  def count_at(self, length: int) -> int:
    """How many blocks the query at position length-1 reads, if there are so many."""
    return max(self.blocks_at(length), self.forced_at(length))

  def block_counts(self, max_length: int) -> np.ndarray:
    """int32 [max_length]: `count_at` of the query at each position."""
    return by_length(BlockMode.count_at, self, range(1, max_length + 1))

  def attend(self, heads: Heads, at: Placement, origin: Origin) -> Array:
    return attention.attend_blocks(self, heads, at, origin)

  def attend_cached(self, heads: Heads, held: Held, positions: Positions, origin: Origin) -> Array:
    return attention.attend_cached(self, heads, held, positions, origin)

  def store(self, max_length: int, prompt_width: int | None = None) -> Store:
    return Blocks(max_length, self) if self.summary.cached else Full(max_length)

  def select(self, heads: Heads, at: Placement, origin: Origin) -> Selection:
    return select_blocks(self, heads, at, origin)

  def most_read(self, lengths: np.ndarray, prompt_length: int | None = None) -> np.ndarray:
    return np.array([self._most_read(int(length)) for length in lengths])

  def _most_read(self, length: int) -> int:
    """The most keys that a query at position length-1 can read: the rule's, the forced blocks', the largest others'."""
    own, count = (length - 1) // self.block, -(-length // self.block)
    by_rule = np.zeros(length, bool)
    if self.rule is not None:
      by_rule = np.asarray(seen(self.rule, jnp.array([length - 1]), jnp.arange(length, dtype=jnp.int32)))[0]
    adds = np.bincount(np.arange(length) // self.block, weights=~by_rule, minlength=count).astype(int)
    forced = np.asarray(self.forced(np.arange(count), own))
    chosen = self.count_at(length) - int(forced.sum())
    free = np.sort(adds[~forced])[::-1]
    return int(by_rule.sum() + adds[forced].sum() + free[:max(chosen, 0)].sum())
