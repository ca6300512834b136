"""What all pictures share: colours, marks, a grid of panels, an axis in powers of two, and how a picture is saved."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# Okabe and Ito's colours, which people with any common colour blindness tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
NEUTRAL = "0.35"  # of what is said of no single model
MARKS = "osD^vPX*"


def panels(count: int, columns: int, width: float, height: float, sharex: bool = False, sharey: bool = False
           ) -> tuple[Figure, list[Axes]]:
  """A figure of `count` panels in so many columns, each of `width` x `height` inches; what is left over is blank."""
  columns = min(columns, count)
  rows = -(-count // columns)
  figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
  axes = list(figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey).flat)
  for axis in axes:
    axis.tick_params(labelsize=8)
  for axis in axes[count:]:
    axis.axis("off")
  return figure, axes[:count]


def labelled(axis: Axes, x: str, y: str = "", title: str = "") -> None:
  """Labels in the sizes that all pictures have, and a light grid."""
  axis.set_xlabel(x, fontsize=9)
  axis.set_ylabel(y, fontsize=9)
  axis.set_title(title, fontsize=10)
  axis.grid(alpha=0.3)


def in_powers_of_two(axis: Axes) -> None:
  """A horizontal axis in powers of two, with plain numbers."""
  axis.set_xscale("log", base=2)
  axis.xaxis.set_major_formatter("{x:g}")


def legend_outside(figure: Figure, names: Sequence[str], marks: Sequence[tuple[str, dict[str, Any]]] = ()) -> None:
  """One legend below the panels: a line in its colour for each name, then neutral marks (label, style)."""
  lines = [Line2D([], [], color=COLOURS[i % len(COLOURS)], linewidth=3, label=name) for i, name in enumerate(names)]
  lines += [Line2D([], [], color=NEUTRAL, linestyle="", markersize=7, label=label, **style) for label, style in marks]
  longest = max(len(str(line.get_label())) for line in lines)
  figure.legend(handles=lines, fontsize=8, loc="outside lower center", ncols=min(4 if longest < 25 else 2, len(lines)))


def save(figure: Figure | None, path: pathlib.Path) -> None:
  """Writes a figure as a PNG; None, of what there was nothing to draw, writes nothing."""
  if figure is not None:
    figure.savefig(path, dpi=130)
