"""The plan of a model: which mode every layer runs under, and which layers share a loop."""

from __future__ import annotations

import itertools
import numbers
from typing import NamedTuple

from rat_jax.config import RATPlusConfig
from rat_jax.modes.base import Mode, check_mode


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
  return mode.of_any_layer(int(layer))


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


def refuse_packed(mode: Mode) -> None:
  """Raises NotImplementedError for a mode that does not serve packed rows."""
  if mode.chooses:
    raise NotImplementedError(f"{mode} does not serve packed rows (segment_ids): its blocks would span documents. Give"
                              " every document its own row.")
