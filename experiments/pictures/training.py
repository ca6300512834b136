"""Training curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from experiments.pictures.canvas import COLOURS, NEUTRAL, labelled, panels


def losses(lines: Sequence[Mapping[str, Any]], modes: Sequence[str]) -> Figure:
  """The losses in bits of a training run and, where the chip is known, its utilisation: the loop's lines of metrics."""
  steps = [line["step"] for line in lines]
  figure, (axis,) = panels(1, 1, 7.5, 4.5)
  for colour, mode, nats in zip(COLOURS, modes, zip(*(line["loss"] for line in lines), strict=True), strict=False):
    bits = [math.nan if one is None else one / math.log(2) for one in nats]
    axis.plot(steps, bits, color=colour, linewidth=1, label=f"loss, {mode}")
  labelled(axis, "batch", "bits per token")
  axis.legend(fontsize=8)
  of_peak = [math.nan if line["utilisation"] is None else 100 * line["utilisation"] for line in lines]
  if not all(map(math.isnan, of_peak)):
    other = axis.twinx()
    other.plot(steps, of_peak, color=NEUTRAL, linewidth=1)
    other.set_ylim(0, 100)
    other.set_ylabel("% of the chip's peak (grey)", fontsize=9)
  return figure
