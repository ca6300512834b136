"""PerLayer: a mode for every layer (the hybrids of arXiv 2602.18196)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax

from rat_jax.modes.base import Mode


@dataclasses.dataclass(frozen=True, eq=False)
class PerLayer(Mode):
  """Layer i runs under modes[i]. Raises ValueError when empty, nested, or holding something that is no mode."""

  name: ClassVar[str] = "per_layer"
  modes: tuple[Mode, ...]

  def __post_init__(self) -> None:
    self._settle_modes(self.modes, "layer")
    for i, mode in enumerate(self.modes):
      if not isinstance(mode, Mode) or isinstance(mode, PerLayer):
        raise ValueError(f"PerLayer: modes[{i}]={mode!r}; give a mode that is not itself a PerLayer.")
      dense_layers = getattr(mode, "dense_layers", ())
      if dense_layers:
        raise ValueError(f"PerLayer: modes[{i}] has dense_layers={dense_layers}; put Dense() at those layers.")

  def of_layer(self, layer: int, num_layers: int) -> Mode:
    if len(self.modes) != num_layers:
      raise ValueError(f"PerLayer: modes has {len(self.modes)} entries and the model num_layers={num_layers};"
                       " give one mode per layer.")
    return self.modes[layer]

  def sees(self, t: jax.Array, s: jax.Array) -> jax.Array:
    raise ValueError("PerLayer has no rule of its own: `visible` and masks are per layer. Pass one of its modes,"
                     " `mode.modes[layer]`.")

  def of_any_layer(self, layer: int) -> Mode:
    if layer >= len(self.modes):
      raise ValueError(f"layer={layer}; this PerLayer has layers 0..{len(self.modes) - 1}.")
    return self.modes[layer]
