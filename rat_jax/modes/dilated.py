"""Dilated attention: the last token of every block of D, a window and sinks (arXiv 2602.18196, section 3).

The memory carries what the skipped tokens held into the block's last token, so that RAT+ loses little by reading
T/D keys. The window holds W + 1 tokens with the current one, the current token is always read, each key counts
once, and sequences shorter than D are ordinary.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from pallas_kernels.pattern import Pattern
from rat_jax.modes.base import Mode


@dataclasses.dataclass(frozen=True, eq=False)
class Dilated(Mode):
  """Query t reads key s iff (s+1) % dilation == 0, or t - s <= window, or s < sinks.

  `dilation=1` is dense; `dilation=None` reads window and sinks alone. Raises ValueError for a dilation below 1
  or a negative window or sinks.
  """

  name: ClassVar[str] = "dilated"
  dilation: int | None
  window: int = 0
  sinks: int = 0

  def __post_init__(self) -> None:
    if self.dilation is not None:
      self._settle_int("dilation", least=1, fix="use an integer of at least 1 (1 is dense), or None for window and"
                                                " sinks alone")
    self._settle_int("window", least=0, fix="use 0 (the query's own token) or more tokens before it")
    self._settle_int("sinks", least=0, fix="use 0 or more first tokens")

  @property
  def pattern(self) -> Pattern:
    return Pattern(self.dilation, self.window, self.sinks)
