"""Dense attention: every query reads every key before it. RAT+ is trained in this form."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from rat_jax.modes.base import Mode
from rat_jax.modes.dilated import Dilated


@dataclasses.dataclass(frozen=True, eq=False)
class Dense(Mode):
  """Causal attention to all keys."""

  name: ClassVar[str] = "dense"

  def sees(self, t: jax.Array, s: jax.Array) -> jax.Array:
    return jnp.broadcast_to(True, jnp.broadcast_shapes(t.shape, s.shape))

  @property
  def pattern(self) -> Dilated:
    return Dilated(1)
