"""The pictures: who sees whom, and quality against keys per query."""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

import rat_jax
from rat_jax import Dense, Dilated, RATPlusLM, Selection, visible
from rat_jax.axes import Params
from rat_jax.modes import Mode, PerLayer

COLOURS = ("#1b6ca8", "#d1495b", "#8d96a3", "#66a182", "#edae49")


def draw_masks(modes: Sequence[Mode], path: pathlib.Path, length: int = 96) -> None:
  """One square per mode: row t is a query, a dark cell is a key that it reads. A PerLayer has no square of its own."""
  modes = [mode for mode in modes if not isinstance(mode, PerLayer)]
  rows = -(-len(modes) // 4)
  figure, axes = plt.subplots(rows, 4, figsize=(11, 3.2 * rows), layout="constrained", sharex=True, sharey=True)
  for axis, mode in zip(axes.flat, modes, strict=False):
    seen = np.asarray(visible(mode, np.arange(length), np.arange(length)))
    axis.imshow(seen, cmap="Blues", vmin=0, vmax=1.25, interpolation="nearest")
    axis.set_title(f"{mode}\n{seen.sum(1)[-1]} of {length} keys read at the end", fontsize=9)
    axis.set_xlabel("key", fontsize=8)
    axis.set_ylabel("query", fontsize=8)
    axis.tick_params(labelsize=7, labelbottom=True)
  for axis in axes.flat[len(modes):]:
    axis.axis("off")
  figure.savefig(path, dpi=130)
  plt.close(figure)


def draw_choices(model: RATPlusLM, params: Params, tokens: np.ndarray, modes: Sequence[Mode], prompt_length: int,
                 path: pathlib.Path) -> None:
  """What the queries after a prompt chose on a real text, tokens [1, T]: a row of squares per mode, one per layer.

  Shown is the first head; a dark cell is a key that the query chose, or that the prompt's compression kept.
  """
  length = tokens.shape[1]
  figure, axes = plt.subplots(len(modes), model.config.num_layers, layout="constrained", sharex=True, sharey=True,
                              squeeze=False, figsize=(3.2 * model.config.num_layers, 3.4 * len(modes)))
  at = np.arange(length)
  for row, mode in zip(axes, modes, strict=True):
    for layer, (axis, chosen) in enumerate(zip(row, rat_jax.inspect(
        model, params, tokens, mode, prompt_lengths=np.array([prompt_length])), strict=True)):
      if isinstance(chosen, Selection):
        blocks = np.asarray(chosen.blocks)[0, :, 0, :, None]
        seen = (blocks == at // mode.block).any(axis=1)  # type: ignore[attr-defined]
      else:
        seen = np.isin(at, np.asarray(chosen.positions)[0, 0]) | (at >= prompt_length)
      seen = (seen & (at <= at[:, None]))[prompt_length:]
      axis.imshow(seen, cmap="Blues", vmin=0, vmax=1.25, interpolation="nearest", aspect="auto",
                  extent=(-0.5, length - 0.5, length - 0.5, prompt_length - 0.5))
      axis.set_title(f"{mode}\nlayer {layer}: {seen[-1].sum()} of {length} keys chosen at the end", fontsize=8)
      axis.axvline(prompt_length - 0.5, color="#d1495b", linewidth=0.8)
      axis.tick_params(labelsize=7, labelbottom=True)
  for axis in axes[-1]:
    axis.set_xlabel("key (the prompt ends at the red line)", fontsize=8)
  for axis in axes[:, 0]:
    axis.set_ylabel("query", fontsize=8)
  figure.savefig(path, dpi=130)
  plt.close(figure)


def draw_quality(curves: Mapping[str, Mapping[Mode, tuple[float, float]]], path: pathlib.Path) -> None:
  """Bits per byte against keys per query: {model: {mode: (keys, bits)}}. Pure dilation is joined by a line."""
  figure, axis = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
  for colour, (model, points) in zip(COLOURS, curves.items(), strict=False):
    line = sorted(xy for mode, xy in points.items() if mode == Dense() or _is_pure_dilation(mode))
    axis.plot(*zip(*line, strict=True), "-o", color=colour, label=model, markersize=5)
    for marker, (mode, xy) in zip("s^Dv", ((m, p) for m, p in points.items() if p not in line), strict=False):
      axis.plot(*xy, marker, color=colour, markersize=7, markerfacecolor="white",
                label=f"{mode.name if isinstance(mode, PerLayer) else mode}" if colour == COLOURS[0] else None)
  axis.set_xscale("log", base=2)
  axis.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
  axis.set_xlabel("keys per query at the end of the sequence (mean over layers)")
  axis.set_ylabel("held-out bits per byte")
  axis.set_title("One set of parameters per curve, the mode chosen at inference")
  axis.grid(alpha=0.3)
  axis.legend(fontsize=8)
  figure.savefig(path, dpi=150)
  plt.close(figure)


def draw_times(lines: Sequence[Mapping[str, Any]], folder: pathlib.Path) -> None:
  """Milliseconds against T, a figure for every operation of bench_ops that was timed at two lengths or more."""
  for op in dict.fromkeys(line["case"]["op"] for line in lines):
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
      case = line["case"]
      if case["op"] == op:
        pattern = "dense" if case["dilation"] == 1 else f"D={case['dilation']}, W={case['window']}"
        pattern = f"Quest, blocks of {case['block']}" if case["block"] else pattern
        label = f"{line['implementation']}, B={case['batch']}" + f", {pattern}" * (op != "scan")
        curves.setdefault(label, []).append((case["length"], 1e3 * line["seconds"]))
    if max(len(points) for points in curves.values()) < 2:
      continue
    figure, axis = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for label, points in curves.items():
      axis.plot(*zip(*sorted(points), strict=True), "-o", label=label, markersize=4)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("tokens")
    axis.set_ylabel("ms")
    axis.set_title(op + " and gradient" * lines[0]["case"]["gradient"])
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    figure.savefig(folder / f"{op}.png", dpi=130)
    plt.close(figure)


def draw_throughput(lines: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
  """Decoded tokens/s against batch and context, a curve for every mode; nothing where neither varies."""
  axes_of = [(name, other) for name, other in (("batch_size", "context"), ("context", "batch_size"))
             if len({line[name] for line in lines}) > 1]
  if not axes_of:
    return
  figure, axes = plt.subplots(1, len(axes_of), figsize=(6.5 * len(axes_of), 4.5), layout="constrained", squeeze=False)
  for axis, (name, other) in zip(axes[0], axes_of, strict=True):
    modes = dict.fromkeys(line["mode"] for line in lines)
    for mode, colour in zip(modes, itertools.cycle(COLOURS), strict=False):
      for fixed, style in zip(sorted({line[other] for line in lines}), itertools.cycle(("-o", "--s", ":^", "-.v"))):
        points = sorted((line[name], line["batch_size"] / line["seconds"]) for line in lines
                        if line["mode"] == mode and line[other] == fixed)
        if points:
          axis.plot(*zip(*points, strict=True), style, color=colour, markersize=4,
                    label=f"{mode}, {other.replace('_', ' ')} {fixed}")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel(name.replace("_", " "))
    axis.set_ylabel("decoded tokens/s")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=6)
  figure.savefig(path, dpi=130)
  plt.close(figure)


def draw_training(metrics: pathlib.Path, modes: Sequence[Mode], path: pathlib.Path) -> None:
  """The losses of a training run and, where the chip is known, its utilisation, from the loop's JSON lines."""
  lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
  steps = [line["step"] for line in lines]
  figure, axis = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
  for colour, mode, losses in zip(COLOURS, modes, zip(*(line["loss"] for line in lines), strict=True), strict=False):
    axis.plot(steps, losses, color=colour, linewidth=1, label=f"loss, {mode}")
  axis.set_xlabel("batch")
  axis.set_ylabel("nats per token")
  axis.grid(alpha=0.3)
  axis.legend(fontsize=8)
  if lines[-1]["utilisation"] is not None:
    other = axis.twinx()
    other.plot(steps, [100 * line["utilisation"] for line in lines], color=COLOURS[2], linewidth=1)
    other.set_ylim(0, 100)
    other.set_ylabel("% of the chip's peak (grey)")
  figure.savefig(path, dpi=130)
  plt.close(figure)


def _is_pure_dilation(mode: Mode) -> bool:
  return isinstance(mode, Dilated) and mode.window == mode.sinks == 0
