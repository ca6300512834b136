"""StreamingLLM: attention sinks and a sliding window (Xiao et al., arXiv 2309.17453), with absolute positions."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from pallas_kernels.pattern import Pattern
from rat_jax.modes.base import Mode


@dataclasses.dataclass(frozen=True, eq=False)
class StreamingLLM(Mode):
  """The first `sinks` tokens, the `window` tokens before the query, and itself: Dilated(None, window, sinks)."""

  name: ClassVar[str] = "streaming_llm"
  window: int
  sinks: int = 4

  def __post_init__(self) -> None:
    self._settle_int("window", least=0, fix="use 0 (the query's own token) or more tokens before it")
    self._settle_int("sinks", least=0, fix="use 0 or more first tokens")

  @property
  def pattern(self) -> Pattern:
    return Pattern(None, self.window, self.sinks)
