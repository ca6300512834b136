"""PerHead: a position-only mode for every key/value head."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from rat_jax.modes.base import Mode
from rat_jax.modes.per_layer import PerLayer
from rat_jax.modes.selecting import SelectingMode


@dataclasses.dataclass(frozen=True, eq=False)
class PerHead(Mode):
  """Key/value head i, and its query heads, run under modes[i]. The cache is full.

  Raises ValueError when empty, or for something that is no position-only mode of a single head.
  """

  name: ClassVar[str] = "per_head"
  modes: tuple[Mode, ...]

  def __post_init__(self) -> None:
    self._settle_modes(self.modes, "key/value head")
    for i, mode in enumerate(self.modes):
      if not isinstance(mode, Mode) or isinstance(mode, (SelectingMode, PerLayer, PerHead)):
        raise ValueError(f"PerHead: modes[{i}]={mode!r}; give a position-only mode such as Dilated(16).")

  @property
  def heads_differ(self) -> bool:
    return True

  def sees(self, t: jax.Array, s: jax.Array) -> jax.Array:
    """bool [..., K, T, S]: one rule per head, before the axes of queries and keys."""
    shape = jnp.broadcast_shapes(t.shape, s.shape)
    return jnp.stack([jnp.broadcast_to(mode.sees(t, s), shape) for mode in self.modes], axis=-3)

  def check_heads(self, num_kv_heads: int) -> None:
    if len(self.modes) != num_kv_heads:
      raise ValueError(f"PerHead: modes has {len(self.modes)} entries and there are num_kv_heads={num_kv_heads}; give"
                       " one mode for each key/value head.")
