"""PerLayer: another mode in every layer (the hybrids of arXiv 2602.18196), and how a mode spreads over layers."""

from __future__ import annotations

import dataclasses
import itertools
from typing import ClassVar, NamedTuple

import jax

from rat_jax.modes.base import Mode


@dataclasses.dataclass(frozen=True)
class PerLayer(Mode):
  """Layer i runs under modes[i]. Raises ValueError when empty, nested, or holding something that is no mode."""

  name: ClassVar[str] = "per_layer"
  modes: tuple[Mode, ...]

  def __post_init__(self):
    object.__setattr__(self, "modes", tuple(self.modes))
    if not self.modes:
      raise ValueError("PerLayer: modes=() is empty; give one mode per layer.")
    for i, mode in enumerate(self.modes):
      if not isinstance(mode, Mode) or isinstance(mode, PerLayer):
        raise ValueError(f"PerLayer: modes[{i}]={mode!r}; give a mode that is not itself a PerLayer.")

  def sees(self, t: jax.Array, s: jax.Array) -> jax.Array:
    raise ValueError("PerLayer has no rule of its own: `visible` and masks are per layer. Pass one of its modes,"
                     " `mode.modes[layer]`.")


def mode_of_layer(mode: Mode, layer: int) -> Mode:
  """The mode of one layer, for operators that know no model. Raises ValueError where a PerLayer has no such layer."""
  if not isinstance(mode, Mode):
    raise ValueError(f"mode={mode!r} is no mode; give one such as Dilated(16), or read a text with rat_jax.parse_mode.")
  if not isinstance(mode, PerLayer):
    return mode
  if not 0 <= layer < len(mode.modes):
    raise ValueError(f"layer={layer}; this PerLayer has layers 0..{len(mode.modes) - 1}.")
  return mode.modes[layer]


class Run(NamedTuple):
  """Consecutive layers of equal mode, which one loop serves: layers start .. stop-1."""

  mode: Mode
  start: int
  stop: int


def layer_modes(mode: Mode, num_layers: int) -> tuple[Mode, ...]:
  """The mode of every layer. Raises ValueError for a PerLayer of another length, and for what is no mode."""
  if not isinstance(mode, PerLayer):
    return (mode_of_layer(mode, 0),) * num_layers
  if len(mode.modes) != num_layers:
    raise ValueError(f"PerLayer: modes has {len(mode.modes)} entries and the model num_layers={num_layers};"
                     " give one mode per layer.")
  return mode.modes


def layer_runs(mode: Mode, num_layers: int) -> tuple[Run, ...]:
  """The layers cut into runs of equal mode, in order."""
  runs, start = [], 0
  for same, layers in itertools.groupby(layer_modes(mode, num_layers)):
    stop = start + len(list(layers))
    runs.append(Run(same, start, stop))
    start = stop
  return tuple(runs)
