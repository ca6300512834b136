"""Tables and figures of `experiments.hypotheses`: one of each for a question."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from experiments.common import markdown_table
from experiments.plots import COLOURS, plt
from rat_jax.evaluate.mini_niah import TASKS


def table(part: str, found: dict[str, Any]) -> str:
  """The numbers of a question for one checkpoint, means over seeds."""
  return _TABLES[part](found)


def draw(part: str, by_name: dict[str, Any], path: pathlib.Path) -> None:
  """The figure of a question, all checkpoints in it."""
  if by_name:
    figure = _FIGURES[part](by_name)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _table_of_tasks(rows: dict[str, dict[str, Any]], of_seeds: tuple[str, ...] = ()) -> str:
  """Rows of {task: numbers}; every cell is the mean of its numbers, the first column that of the row.

  In the rows `of_seeds` every number is shown behind their mean.
  """
  tasks = list(next(iter(rows.values())))
  lines = []
  for label, cells in rows.items():
    means = [float(np.mean(cells[task])) for task in tasks]
    every = [f" ({' '.join(f'{x:.0f}' for x in cells[task])})" if label in of_seeds else "" for task in tasks]
    shown = [f"{mean:.1f}{one}" for mean, one in zip(means, every, strict=True)]
    lines.append([label, f"{np.mean(means):.1f}", *shown])
  return markdown_table(["", "mean", *tasks], lines)


def _heads_table(found: dict[str, Any]) -> str:
  """The best head of every seed and their mean, then the mean over all heads."""
  rows = {}
  for method, by_task in found.items():
    rows[f"{method}: best head"] = {task: [np.max(seed) for seed in seeds] for task, seeds in by_task.items()}
    rows[f"{method}: mean of heads"] = by_task
  return _table_of_tasks(rows, tuple(label for label in rows if label.endswith("best head")))


def _layers_table(found: dict[str, Any]) -> str:
  rows = {f"{method}, {layer}": cells for method, by_layer in found.items() for layer, cells in by_layer.items()}
  return _table_of_tasks(rows, tuple(rows))


def _by_question(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
  """{budget: {task: {question: numbers}}} as {budget and question: {task: numbers}}."""
  return {f"{budget}, {label}": {task: cell[label] for task, cell in by_task.items()}
          for label in ("A", "B", "B under B") for budget, by_task in found.items()
          if all(label in cell for cell in by_task.values())}


def _future_table(found: dict[str, Any]) -> str:
  return _table_of_tasks(_by_question(found))


def _reach_table(found: dict[str, Any]) -> str:
  ages = np.array(found["age"])  # [seeds, layers, heads, H]
  lines = [[f"layer {i}", *(f"{np.quantile(ages[:, i], q):.1f}" for q in (0.1, 0.5, 0.9)),
            f"{100 * np.mean(ages[:, i] > 8):.0f}"] for i in range(ages.shape[1])]
  return markdown_table(["mean age, tokens", "10%", "median", "90%", "% of channels over 8"], lines)


def _distance_table(found: dict[str, Any]) -> str:
  lines = []
  for mode, cell in found.items():
    mean, edges = np.mean(cell["right"], axis=0), np.linspace(0, len(cell["count"]), 5).astype(int)
    lines.append([mode, *(f"{mean[a:b].mean():.1f}" for a, b in itertools.pairwise(edges))])
  return markdown_table(["distance, in quarters of D", "1", "2", "3", "4"], lines)


def _bars(by_name: dict[str, dict[str, dict[str, Any]]], title: str, columns: int = 1) -> plt.Figure:
  """{series: {group: {task: numbers}}}: a panel for each group, bars of the tasks, a dot for every number.

  Not every series needs every group.
  """
  groups = list(dict.fromkeys(group for found in by_name.values() for group in found))
  rows = -(-len(groups) // columns)
  figure, axes = plt.subplots(rows, columns, figsize=(9 if columns == 1 else 4 * columns, 2.4 * rows),
                              layout="constrained", sharey=True, squeeze=False)
  for axis in axes.flat[len(groups):]:
    axis.axis("off")
  for axis, group in zip(axes.flat, groups, strict=False):
    shown = {name: found[group] for name, found in by_name.items() if group in found}
    tasks = [task for task in TASKS if task in next(iter(shown.values()))]
    width = 0.8 / len(by_name)
    for i, (name, found) in enumerate(shown.items()):
      x = np.arange(len(tasks)) + (i - (len(shown) - 1) / 2) * width
      means = [np.mean(found[task]) for task in tasks]
      axis.bar(x, means, width, color=COLOURS[list(by_name).index(name) % len(COLOURS)], alpha=0.6, label=name)
      for at, task in zip(x, tasks, strict=True):
        values = np.ravel(found[task])
        axis.plot(np.full(len(values), at), values, ".", color="black", markersize=3)
    axis.set_title(group, fontsize=9)
    axis.set_ylim(0, 105)
    axis.set_xticks(range(len(tasks)), tasks, fontsize=8 if columns == 1 else 7)
  for axis in axes[:, 0]:
    axis.set_ylabel("exact match, %", fontsize=8)
  handles: dict[str, Any] = {}
  for axis in axes.flat[:len(groups)]:
    handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
  figure.legend(handles.values(), handles.keys(), fontsize=7, loc="outside lower center", ncols=2)
  figure.suptitle(title, fontsize=10)
  return figure


def _panels(titles: list[str], width: float, height: float, xlabel: str, ylabel: str) -> tuple[plt.Figure, np.ndarray]:
  """A row of panels, with the axes [len(titles)]."""
  figure, axes = plt.subplots(1, len(titles), figsize=(width * len(titles), height), layout="constrained", sharey=True,
                              squeeze=False)
  for axis, title in zip(axes[0], titles, strict=True):
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(xlabel, fontsize=8)
  axes[0, 0].set_ylabel(ylabel, fontsize=8)
  return figure, axes[0]


def _draw_lines(axis: plt.Axes, by_name: Mapping[str, Iterable[np.ndarray]], x: np.ndarray | None = None, **style: Any
                ) -> None:
  """The lines of every series in its colour; `x` for all of them, or their index."""
  for colour, (name, lines) in zip(itertools.cycle(COLOURS), by_name.items(), strict=False):
    for i, line in enumerate(lines):
      axis.plot(np.arange(len(line)) if x is None else x, line, color=colour, label=name if i == 0 else None, **style)


def _heads_figure(by_name: dict[str, Any]) -> plt.Figure:
  methods = list(next(iter(by_name.values())))
  tasks = list(next(iter(by_name.values()))[methods[0]])
  figure, axes = plt.subplots(len(methods), len(tasks), figsize=(2.1 * len(tasks), 2.5 * len(methods)), sharey=True,
                              layout="constrained", squeeze=False)
  for row, method in zip(axes, methods, strict=True):
    for axis, task in zip(row, tasks, strict=True):
      _draw_lines(axis, {name: [-np.sort(-np.ravel(seed)) for seed in found[method][task]]
                         for name, found in by_name.items()}, linewidth=0.9)
      axis.set_title(task, fontsize=8)
      axis.tick_params(labelsize=7)
    row[0].set_ylabel(f"{method}\nhit rate, %", fontsize=8)
  for axis in axes[-1]:
    axis.set_xlabel("heads, ranked", fontsize=8)
  axes[0, 0].legend(fontsize=7)
  figure.suptitle("Heads that chose every symbol of the answer when it was needed, at 1/16 (line: seed)", fontsize=9)
  return figure


def _random_figure(by_name: dict[str, Any]) -> plt.Figure:
  return _bars(by_name, "A quarter of the tokens, chosen at random (dots: draws and seeds)")


def _layers_figure(by_name: dict[str, Any]) -> plt.Figure:
  methods = list(next(iter(by_name.values())))
  figure, axes = _panels(methods, 3, 3, "the layer that is sparse", "exact match, mean over tasks, %")
  for axis, method in zip(axes, methods, strict=True):
    means = {name: np.array([np.mean(list(cells.values()), axis=0) for cells in found[method].values()]).T
             for name, found in by_name.items()}  # [seeds, layers]
    _draw_lines(axis, means, marker=".", linewidth=0.9)
    axis.set_xticks(range(len(next(iter(by_name.values()))[method])))
  axes[0].legend(fontsize=7)
  figure.suptitle("One layer alone under the method, at 1/8 where no other budget is named (line: seed)", fontsize=9)
  return figure


def _two_by_two_figure(by_name: dict[str, Any]) -> plt.Figure:
  settings: dict[str, dict[str, Any]] = {}
  for name, found in by_name.items():
    for label, by_task in found.items():
      mode, _, choice = label.partition(", select ")
      settings.setdefault(f"{name}: select {choice}", {})[mode] = by_task
  return _bars(settings, "Choosing by keys with the memory or plain ones, attending to either")


def _future_figure(by_name: dict[str, Any]) -> plt.Figure:
  grouped = {name: _by_question(found) for name, found in by_name.items()}
  return _bars(grouped, "SnapKV compressed under question A, then asked B", columns=4)


def _reach_figure(by_name: dict[str, Any]) -> plt.Figure:
  ages = {name: np.array(found["age"]) for name, found in by_name.items()}  # [seeds, layers, heads, H]
  _, layers, _, channels = next(iter(ages.values())).shape
  figure, axes = _panels([f"layer {i}" for i in range(layers)], 2.6, 2.8, "channels of a head, sorted, %",
                         "mean age of what is held, tokens")
  for layer, axis in enumerate(axes):
    heads = {name: one[:, layer].reshape(-1, channels) for name, one in ages.items()}
    _draw_lines(axis, heads, np.linspace(0, 100, channels), linewidth=0.7)
    axis.set_yscale("log")
  axes[0].legend(fontsize=7)
  return figure


def _distance_figure(by_name: dict[str, Any]) -> plt.Figure:
  modes = list(next(iter(by_name.values())))
  figure, axes = _panels(modes, 3.6, 3, "tokens from the needle's end to the next kept one", "exact match, %")
  for axis, mode in zip(axes, modes, strict=True):
    _draw_lines(axis, {name: found[mode]["right"] for name, found in by_name.items()}, linewidth=0.9)
  axes[-1].legend(fontsize=7)
  return figure


_TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "heads": _heads_table, "random": _table_of_tasks, "layers": _layers_table, "two_by_two": _table_of_tasks,
    "future": _future_table, "reach": _reach_table, "distance": _distance_table}
_FIGURES: dict[str, Callable[[dict[str, Any]], plt.Figure]] = {
    "heads": _heads_figure, "random": _random_figure, "layers": _layers_figure, "two_by_two": _two_by_two_figure,
    "future": _future_figure, "reach": _reach_figure, "distance": _distance_figure}
