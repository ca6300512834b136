"""PerLayer: another mode in every layer (the hybrids of arXiv 2602.18196), and how a mode spreads over layers."""

from __future__ import annotations

import dataclasses
import itertools
import numbers
from typing import ClassVar, NamedTuple

import jax

from rat_jax.config import RATPlusConfig
from rat_jax.modes.base import Mode, check_mode


@dataclasses.dataclass(frozen=True, eq=False)
class PerLayer(Mode):
  """Layer i runs under modes[i]. Raises ValueError when empty, nested, or holding something that is no mode."""

  name: ClassVar[str] = "per_layer"
  modes: tuple[Mode, ...]

  def __post_init__(self):
    self._settle_modes("layer")
    for i, mode in enumerate(self.modes):
      if not isinstance(mode, Mode) or isinstance(mode, PerLayer):
        raise ValueError(f"PerLayer: modes[{i}]={mode!r}; give a mode that is not itself a PerLayer.")
      if getattr(mode, "dense_layers", ()):
        raise ValueError(f"PerLayer: modes[{i}] has dense_layers={mode.dense_layers}; put Dense() at those layers.")  # type: ignore[attr-defined]

  def of_layer(self, layer: int, num_layers: int) -> Mode:
    if len(self.modes) != num_layers:
      raise ValueError(f"PerLayer: modes has {len(self.modes)} entries and the model num_layers={num_layers};"
                       " give one mode per layer.")
    return self.modes[layer]

  def sees(self, t: jax.Array, s: jax.Array) -> jax.Array:
    raise ValueError("PerLayer has no rule of its own: `visible` and masks are per layer. Pass one of its modes,"
                     " `mode.modes[layer]`.")


class Run(NamedTuple):
  """Consecutive layers that one loop serves: layers start .. stop-1, of equal mode and equal form of the prompt."""

  mode: Mode
  form: Mode
  start: int
  stop: int


def mode_of_layer(mode: Mode, layer: int) -> Mode:
  """The mode of one layer, for operators that know no model. Raises ValueError where a PerLayer has no such layer."""
  check_mode(mode)
  if not isinstance(layer, numbers.Integral) or layer < 0:
    raise ValueError(f"layer={layer!r}; give the layer's number, 0 or more.")
  if not isinstance(mode, PerLayer):
    return mode
  if layer >= len(mode.modes):
    raise ValueError(f"layer={layer}; this PerLayer has layers 0..{len(mode.modes) - 1}.")
  return mode.modes[layer]


def layer_modes(mode: Mode, num_layers: int) -> tuple[Mode, ...]:
  """The mode of every layer. Raises ValueError for a PerLayer of another length, and for what is no mode."""
  check_mode(mode)
  return tuple(mode.of_layer(i, num_layers) for i in range(num_layers))


def layer_runs(mode: Mode, num_layers: int, prefill_mode: Mode | None = None) -> tuple[Run, ...]:
  """The layers cut into runs that share a loop, in order; `prefill_mode` overrides the form of the prompt."""
  modes = layer_modes(mode, num_layers)
  forms = tuple(m.prompt_form for m in modes) if prefill_mode is None else layer_modes(prefill_mode, num_layers)
  runs, start = [], 0
  for (same, form), layers in itertools.groupby(zip(modes, forms, strict=True)):
    stop = start + len(list(layers))
    runs.append(Run(same, form, start, stop))
    start = stop
  return tuple(runs)


def check_modes(mode: Mode, prefill_mode: Mode | None, config: RATPlusConfig) -> None:
  """Raises ValueError for modes that a model, or a prompt, cannot run under."""
  for run in layer_runs(mode, config.num_layers, prefill_mode):
    run.mode.check_heads(config.num_kv_heads)
    run.form.check_heads(config.num_kv_heads)
    if run.form.after_prompt:
      raise ValueError(f"prefill_mode={prefill_mode}: {run.form} acts when the prompt has ended; give it as mode.")
