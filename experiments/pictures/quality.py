"""Quality against what is read: bits or accuracy against keys, and accuracy against a share of the keys."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.pictures.canvas import COLOURS, MARKS, in_powers_of_two, labelled, legend_outside, panels


def against_keys(points: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], y: str, title: str,
                 x: str = "keys that the last query reads (mean over layers)") -> Figure:
  """{model: {method: [(keys, quality), ...]}}: a colour for each model, a mark for each method.

  The points of a method are joined; marks of the first are filled, the others hollow.
  """
  figure, (axis,) = panels(1, 1, 7.5, 5)
  methods = list(dict.fromkeys(method for of_model in points.values() for method in of_model))
  styles: dict[str, dict[str, Any]] = {
      method: {"marker": mark, "markerfacecolor": "none" if mark != MARKS[0] else None}
      for method, mark in zip(methods, itertools.cycle(MARKS))}
  for colour, of_model in zip(COLOURS, points.values(), strict=False):
    for method, found in of_model.items():
      axis.plot(*zip(*sorted(found), strict=True), "-" if len(found) > 1 else "", color=colour, linewidth=1,
                markersize=7, **styles[method])
  in_powers_of_two(axis)
  labelled(axis, x, y, title)
  legend_outside(figure, list(points), list(styles.items()))
  return figure


def against_budget(found: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]) -> Figure | None:
  """Percent right against the share of keys read: {panel: {model: {share: a percentage for each seed}}}."""
  if not found:
    return None
  figure, axes = panels(len(found), 3, 3.4, 3.1, sharey=True)
  for axis, (title, models) in zip(axes, found.items(), strict=True):
    for colour, by_share in zip(COLOURS, models.values(), strict=False):
      axis.plot(range(len(by_share)), [np.mean(of_seeds) for of_seeds in by_share.values()], color=colour)
      for at, of_seeds in enumerate(by_share.values()):
        axis.plot([at] * len(of_seeds), of_seeds, ".", color=colour, markersize=5)
      axis.set_xticks(range(len(by_share)), list(by_share))
    labelled(axis, "share of the keys that are read (dot: a seed)", title=title)
    axis.set_ylim(0, 103)
  for axis in axes[::3]:
    axis.set_ylabel("% answered right", fontsize=9)
  legend_outside(figure, list(dict.fromkeys(name for models in found.values() for name in models)))
  return figure
