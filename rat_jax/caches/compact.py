"""A compact cache, for a rule of dilation, window and sinks: S0 sinks, a ring of W + 1, floor(max_length / D) rows.

It holds what later queries read, and no more (arXiv 2602.18196, section 3).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from pallas_kernels.pattern import Pattern
from rat_jax.caches.full import Full
from rat_jax.caches.slots import Slots

if TYPE_CHECKING:
  from rat_jax.modes.base import Mode


@dataclasses.dataclass(frozen=True)
class Compact(Full):
  """The store that keeps only what a pattern can still read. Rows: `KV`, as `Slots.of` lays them out.

  A prompt can go through it in pieces if its form reads no more than the pattern.
  """

  pattern: Pattern

  @property
  def slots(self) -> Slots:
    return Slots.of(self.pattern, self.max_length)

  def serves(self, form: Mode) -> bool:
    if form.pattern is None:
      return False
    mine, of_form = self.pattern, form.pattern
    strided = of_form.dilation is None or (mine.dilation is not None and of_form.dilation % mine.dilation == 0)
    return strided and of_form.window <= mine.window and of_form.sinks <= mine.sinks


def smallest(pattern: Pattern | None, max_length: int) -> Full:
  """The smallest cache that serves a pattern, or any rule (None), up to `max_length` tokens."""
  if pattern is None or Slots.of(pattern, max_length) == Slots(max_length):
    return Full(max_length)
  return Compact(max_length, pattern)
