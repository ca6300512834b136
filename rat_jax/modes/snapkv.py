"""SnapKV: after the prompt, a cache of the keys that its last queries look at (Li et al., arXiv 2404.14469)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from rat_jax.modes.block_mode import SelectingMode, blocks_of


@dataclasses.dataclass(frozen=True, eq=False)
class SnapKV(SelectingMode):
  """The prompt is dense; then the cache keeps the last `obs_window` tokens and the best of the others.

  Attributes:
    capacity: tokens kept of a prompt, window included; a float in (0, 1] is a share of the row's prompt, never
      under obs_window + 1. A prompt of at most `capacity` tokens is kept whole.
    obs_window: last tokens of the prompt, whose attention scores the others; always kept.
    kernel, pool: the scores are pooled over `kernel` (odd) neighbours, by their "avg" or "max".
    dense_layers: layers that keep everything.

  Generated tokens are appended. Raises ValueError for a capacity of at most obs_window or a share outside (0, 1].
  """

  name: ClassVar[str] = "snapkv"
  after_prompt: ClassVar[bool] = True
  capacity: int | float
  obs_window: int = 64
  kernel: int = 5
  pool: Literal["avg", "max"] = "avg"
  dense_layers: tuple[int, ...] = ()

  def __post_init__(self):
    self._settle_int("obs_window", least=1, fix="use at least 1 token")
    self._settle_int("kernel", least=1, fix="use an odd number of neighbours")
    if self.kernel % 2 == 0:
      raise ValueError(f"SnapKV: kernel={self.kernel}; use an odd number of neighbours.")
    self._settle_choice("pool", ("avg", "max"))
    self._settle_budget("capacity", self.obs_window + 1, f"the obs_window={self.obs_window} tokens are kept and count")
    self._settle_options()

  @classmethod
  def upstream(cls) -> SnapKV:
    """The setting of its authors' scripts."""
    return cls(2048, obs_window=32, kernel=7, pool="max")

  def capacity_at(self, prompt_length: int) -> int:
    """The tokens that are kept of a prompt, as far as it has so many."""
    if not isinstance(self.capacity, float):
      return self.capacity
    return max(blocks_of(self.capacity, prompt_length, 1), self.obs_window + 1)
