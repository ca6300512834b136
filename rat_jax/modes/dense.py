"""Dense attention: every query reads every key before it. RAT+ is trained in this form."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from pallas_kernels.pattern import DENSE, Pattern
from rat_jax.modes.base import Mode


@dataclasses.dataclass(frozen=True, eq=False)
class Dense(Mode):
  """Causal attention to all keys."""

  name: ClassVar[str] = "dense"

  @property
  def pattern(self) -> Pattern:
    return DENSE
