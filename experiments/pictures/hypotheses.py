"""The figures of `experiments.hypotheses`: one for a question, all checkpoints in it, six panels at most."""

from __future__ import annotations

import fractions
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.needles.report import HARD
from experiments.pictures.canvas import COLOURS, labelled, legend_outside, panels
from rat_jax.evaluate.mini_niah import TASKS

ByName = Mapping[str, Mapping[str, Any]]  # {checkpoint: what was found}


def figure(part: str, by_name: ByName) -> Figure | None:
  """The figure of a question; None where nobody was asked."""
  return _FIGURES[part](by_name) if by_name else None


def _bars(by_name: Mapping[str, ByName], title: str) -> Figure:
  """{series: {group: {task: numbers}}}: a panel for each group, bars of the tasks, a dot for every number.

  Not every series needs every group.
  """
  groups = list(dict.fromkeys(group for found in by_name.values() for group in found))
  drawn, axes = panels(len(groups), 1, 9, 2.3, sharey=True)
  for axis, group in zip(axes, groups, strict=True):
    shown = {name: found[group] for name, found in by_name.items() if group in found}
    tasks = [task for task in TASKS if task in next(iter(shown.values()))]
    width = 0.8 / len(by_name)
    for i, (name, found) in enumerate(shown.items()):
      x = np.arange(len(tasks)) + (i - (len(shown) - 1) / 2) * width
      colour = COLOURS[list(by_name).index(name) % len(COLOURS)]
      axis.bar(x, [np.mean(found[task]) for task in tasks], width, color=colour, alpha=0.6)
      for at, task in zip(x, tasks, strict=True):
        values = np.ravel(found[task])
        axis.plot(np.full(len(values), at), values, ".", color="black", markersize=3)
    labelled(axis, "", "exact match, %", group)
    axis.set_ylim(0, 105)
    axis.set_xticks(range(len(tasks)), tasks)
  legend_outside(drawn, list(by_name))
  drawn.suptitle(title, fontsize=10)
  return drawn


def _lines(axis: Axes, by_name: Mapping[str, Iterable[np.ndarray]], x: np.ndarray | None = None, **style: Any) -> None:
  """The lines of every series in its colour; `x` for all of them, or their index."""
  for colour, lines in zip(itertools.cycle(COLOURS), by_name.values(), strict=False):
    for line in lines:
      axis.plot(np.arange(len(line)) if x is None else x, line, color=colour, **style)


def _heads(by_name: ByName) -> Figure:
  first = next(iter(by_name.values()))
  methods = [method for method in ("Quest 16", "SnapKV aware") if method in first] or list(first)[:2]
  tasks = [task for task in HARD if task in first[methods[0]]] or list(first[methods[0]])[:3]
  drawn, axes = panels(len(methods) * len(tasks), len(tasks), 3, 2.6, sharex=True, sharey=True)
  for axis, (method, task) in zip(axes, itertools.product(methods, tasks), strict=True):
    _lines(axis, {name: [-np.sort(-np.ravel(seed)) for seed in found[method][task]]
                  for name, found in by_name.items()}, linewidth=0.9)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    labelled(axis, "heads, ranked", title=f"{method}: {task}")
  for axis in axes[::len(tasks)]:
    axis.set_ylabel("hit rate, %", fontsize=9)
  legend_outside(drawn, list(by_name))
  drawn.suptitle("Heads that chose every symbol of the answer when it was needed, at 1/16 (line: seed)", fontsize=10)
  return drawn


def _random(by_name: ByName) -> Figure:
  return _bars(by_name, "A quarter of the tokens, chosen at random (dots: draws and seeds)")


def _layers(by_name: ByName) -> Figure:
  methods = list(next(iter(by_name.values())))
  drawn, axes = panels(len(methods), 3, 3.2, 2.8, sharey=True)
  for axis, method in zip(axes, methods, strict=True):
    means = {name: np.array([np.mean(list(cells.values()), axis=0) for cells in found[method].values()]).T
             for name, found in by_name.items()}  # [seeds, layers]
    _lines(axis, means, marker=".", linewidth=0.9)
    axis.set_xticks(range(len(next(iter(by_name.values()))[method])))
    labelled(axis, "the layer that is sparse", title=method)
  for axis in axes[::3]:
    axis.set_ylabel("exact match, mean over tasks, %", fontsize=9)
  legend_outside(drawn, list(by_name))
  drawn.suptitle("One layer alone under the method, at 1/8 where no other budget is named (line: seed)", fontsize=10)
  return drawn


def _two_by_two(by_name: ByName) -> Figure:
  settings: dict[str, dict[str, Any]] = {}
  for name, found in by_name.items():
    for label, by_task in found.items():
      mode, _, choice = label.partition(", select ")
      settings.setdefault(f"{name}: select {choice}", {})[mode] = by_task
  return _bars(settings, "Choosing by keys with the memory or plain ones, attending to either")


def _future(by_name: ByName) -> Figure:
  """The mean over tasks against the budget: a panel for each question that is answered."""
  questions = {"A": "asked A, compressed under A", "B": "asked B, compressed under A", "B under B": "B under B"}
  drawn, axes = panels(len(questions), 3, 3.4, 3.1, sharey=True)
  for axis, (label, title) in zip(axes, questions.items(), strict=True):
    budgets: list[str] = []
    means = {}
    for name, found in by_name.items():
      rows = {budget: [cell[label] for cell in by_task.values()] for budget, by_task in found.items()
              if all(label in cell for cell in by_task.values())}
      rows = {budget: rows[budget] for budget in sorted(rows, key=_share, reverse=True)}
      budgets, means[name] = list(rows), np.array([np.mean(cells, axis=0) for cells in rows.values()]).T
    _lines(axis, means, marker=".", linewidth=0.9)
    axis.set_xticks(range(len(budgets)), budgets)
    axis.set_ylim(0, 105)
    labelled(axis, "share of the keys that are kept", title=title)
  axes[0].set_ylabel("exact match, mean over tasks, %", fontsize=9)
  legend_outside(drawn, list(by_name))
  drawn.suptitle("SnapKV compressed under question A, then asked B (line: seed)", fontsize=10)
  return drawn


def _share(budget: str) -> fractions.Fraction:
  return fractions.Fraction(1 if budget == "dense" else budget)


def _reach(by_name: ByName) -> Figure:
  ages = {name: np.array(found["age"]) for name, found in by_name.items()}  # [seeds, layers, heads, H]
  _, layers, _, channels = next(iter(ages.values())).shape
  drawn, axes = panels(layers, 6, 2.8, 2.9, sharey=True)
  for layer, axis in enumerate(axes):
    heads = {name: one[:, layer].reshape(-1, channels) for name, one in ages.items()}
    _lines(axis, heads, np.linspace(0, 100, channels), linewidth=0.7)
    axis.set_yscale("log")
    labelled(axis, "channels, sorted, %", title=f"layer {layer} (line: a head of a seed)")
  axes[0].set_ylabel("mean age of what is held, tokens", fontsize=9)
  legend_outside(drawn, list(by_name))
  return drawn


def _distance(by_name: ByName) -> Figure:
  modes = list(next(iter(by_name.values())))
  drawn, axes = panels(len(modes), 3, 3.6, 3.1, sharey=True)
  for axis, mode in zip(axes, modes, strict=True):
    _lines(axis, {name: found[mode]["right"] for name, found in by_name.items()}, linewidth=0.9)
    labelled(axis, "tokens from the needle to the next kept one", title=f"{mode} (line: seed)")
  axes[0].set_ylabel("exact match, %", fontsize=9)
  legend_outside(drawn, list(by_name))
  return drawn


_FIGURES: dict[str, Callable[[ByName], Figure]] = {
    "heads": _heads, "random": _random, "layers": _layers, "two_by_two": _two_by_two, "future": _future,
    "reach": _reach, "distance": _distance}
