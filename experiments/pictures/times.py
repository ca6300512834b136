"""Times: milliseconds against tokens, and decoded tokens per second against batch and context."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from experiments.pictures.canvas import COLOURS, MARKS, in_powers_of_two, labelled, legend_outside, panels

Line = Mapping[str, Any]
_NAMES = {"xla": "plain JAX", "xla, xla": "plain JAX", "xla, cudnn": "cuDNN", "mosaic_gpu": "kernels",
          "mosaic_gpu, cudnn": "folded, cuDNN", "mosaic_gpu, mosaic_gpu": "kernels",
          "mosaic_gpu, cudnn_masked": "masked, cuDNN", "authors, torch": "RAT+ authors"}


def against_length(lines: Sequence[Line], op: str) -> Figure | None:
  """Milliseconds of an operation of bench_ops against tokens; None where it was timed at a single length.

  A panel for each batch size, a colour for each pattern, a mark for each implementation.
  """
  curves: dict[tuple[int, str, str], list[tuple[int, float]]] = {}
  for line in lines:
    if line["case"]["op"] == op:
      key = line["case"]["batch"], _pattern(line["case"]), line["implementation"]
      curves.setdefault(key, []).append((line["case"]["length"], 1e3 * line["seconds"]))
  curves = {key: points for key, points in curves.items() if len(points) > 1}
  if not curves:
    return None
  batches, patterns, implementations = (list(dict.fromkeys(names)) for names in zip(*curves, strict=True))
  figure, axes = panels(len(batches), 3, 6.5, 4.4, sharey=True)
  for (batch, pattern, implementation), points in curves.items():
    axes[batches.index(batch)].plot(
        *zip(*sorted(points), strict=True), "-", marker=MARKS[implementations.index(implementation) % len(MARKS)],
        color=COLOURS[patterns.index(pattern) % len(COLOURS)], markersize=5)
  for axis, batch in zip(axes, batches, strict=True):
    in_powers_of_two(axis)
    axis.set_yscale("log")
    labelled(axis, "tokens", "ms", f"{op}{' and gradient' * lines[0]['case']['gradient']}, batch {batch}")
  legend_outside(figure, patterns, [(_NAMES.get(name, name), {"marker": MARKS[i % len(MARKS)]})
                                    for i, name in enumerate(implementations)])
  return figure


def _pattern(case: Mapping[str, Any]) -> str:
  if case["op"] == "scan":
    return "memory"
  if case["block"]:
    return f"{'Quest, ' * (case['op'] == 'decode')}blocks of {case['block']}"
  window = f", W={case['window']}" if case["window"] else ""
  return "dense" if case["dilation"] == 1 else f"D={case['dilation']}{window}"


def throughput(lines: Sequence[Line]) -> Figure | None:
  """Decoded tokens per second against batch and context, a colour for every mode; None where neither varies."""
  lines = [line for line in lines if line["part"] == "decode"]
  varying = [(name, other) for name, other in (("batch_size", "context"), ("context", "batch_size"))
             if len({line[name] for line in lines}) > 1]
  if not varying:
    return None
  figure, axes = panels(len(varying), 2, 6, 4.4)
  modes, styles = list(dict.fromkeys(line["mode"] for line in lines)), []
  for axis, (name, other) in zip(axes, varying, strict=True):
    for fixed, (mark, line_style) in zip(sorted({line[other] for line in lines}), itertools.cycle(
        (("o", "-"), ("s", "--"), ("^", ":"), ("v", "-.")))):
      styles.append((f"{other.replace('_', ' ')} {fixed}", {"marker": mark}))
      for mode in modes:
        points = sorted((line[name], line["batch_size"] / line["seconds"]) for line in lines
                        if line["mode"] == mode and line[other] == fixed)
        if points:
          axis.plot(*zip(*points, strict=True), marker=mark, linestyle=line_style, markersize=4,
                    color=COLOURS[modes.index(mode) % len(COLOURS)])
    in_powers_of_two(axis)
    axis.set_yscale("log")
    labelled(axis, name.replace("_", " "), "decoded tokens/s")
  legend_outside(figure, modes, styles)
  return figure
