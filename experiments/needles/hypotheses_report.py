"""What `experiments.hypotheses` prints: the numbers of a question for one checkpoint, as Markdown."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.shared.output import markdown_table


def table(part: str, found: dict[str, Any]) -> str:
  """The numbers of a question for one checkpoint, means over seeds."""
  return _TABLES[part](found)


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


def quantiles(ages: np.ndarray) -> list[str]:
  """The 10, 50 and 90% quantiles of ages, of any shape."""
  return [f"{np.quantile(ages, q):.1f}" for q in (0.1, 0.5, 0.9)]


def _reach_table(found: dict[str, Any]) -> str:
  ages = np.array(found["age"])  # [seeds, layers, heads, H]
  lines = [[f"layer {i}", *quantiles(ages[:, i]), f"{100 * np.mean(ages[:, i] > 8):.0f}"] for i in range(ages.shape[1])]
  return markdown_table(["mean age, tokens", "10%", "median", "90%", "% of channels over 8"], lines)


def _distance_table(found: dict[str, Any]) -> str:
  lines = []
  for mode, cell in found.items():
    mean, edges = np.mean(cell["right"], axis=0), np.linspace(0, len(cell["count"]), 5).astype(int)
    lines.append([mode, *(f"{mean[a:b].mean():.1f}" for a, b in itertools.pairwise(edges))])
  return markdown_table(["distance, in quarters of D", "1", "2", "3", "4"], lines)


_TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "heads": _heads_table, "random": _table_of_tasks, "layers": _layers_table, "two_by_two": _table_of_tasks,
    "future": _future_table, "reach": _reach_table, "distance": _distance_table}
