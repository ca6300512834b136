"""What is told of cells: a table, paired differences, and accuracy by budget.

Cells are {checkpoint: {row's label: {task: cell}}}, a cell as `questions.cells` and `words.cells` make it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

from experiments.needles.seeds import MATCHED, from_hex, name_of
from experiments.shared.output import markdown_table

Rows = Mapping[str, Mapping[str, dict[str, Any]]]  # of a checkpoint
Cells = Mapping[str, Rows]
HARD = ("multikey_2", "multikey_3", "multivalue")  # where attention under a small budget fails
_MAIN = ("Quest 16", "MoBA 16 decode", "MoBA 16 prompt", "SnapKV aware", "SnapKV blind", "Quest 8")  # of a figure
_BUDGET = re.compile(r"(.*), 1/(\d+)(.*)")

_BY_SEED = ("accuracy", "error_over_examples", "right")  # what of a cell is a list over seeds
_OF_EXAMPLES = ("right", "by_example", "comma_recall_by_example")  # what each sequence scored


def is_whole(by_task: Mapping[str, dict[str, Any]]) -> bool:
  """Whether no cell of a row is blank."""
  return not any("blank" in cell for cell in by_task.values())


def accuracies(by_task: Mapping[str, dict[str, Any]]) -> np.ndarray:
  """Percentages [tasks, seeds]."""
  return np.array([cell["accuracy"] for cell in by_task.values()])


def standard_error(values: np.ndarray) -> float:
  """Of the mean of the values; NaN of a single one."""
  return float(values.std(ddof=1) / len(values)**0.5) if len(values) > 1 else float("nan")


def report(every: Cells, match: bool = True) -> str:
  """Everything that is told in words and numbers, as Markdown; without `match` of all seeds."""
  cells = matched(every) if match else every
  compared = {"differences": differences, "first above second checkpoint, where that is below 95": claim,
              "as in the paper: second / first checkpoint": side_by_side} if len(cells) > 1 else {}
  if len(cells) > 2:
    compared["means over tasks (seeds)"] = means
  parts = {"": table(cells), "s.e. over seeds, examples": errors_by_task(cells),
           "comma_recall": table(_scored(cells, "comma_recall")),
           **{title: of(cells) for title, of in compared.items()},
           "not matched": unmatched(every) if match else "", "greedy decoding, first seed": checks(cells),
           "blank": blanks(cells)}
  return "\n\n".join(f"{title}\n\n{part}".strip() for title, part in parts.items() if part)


def _scored(cells: Cells, score: str) -> Cells:
  """The cells with another score as their accuracy, empty where they have none; blanks stay.

  Errors over examples are of that score too; NaN of cells that were made before it was kept by example.
  """
  every = [cell for rows in cells.values() for by_task in rows.values() for cell in by_task.values()]
  if not any(score in cell for cell in every):
    return {}
  of_score = lambda cell: {"accuracy": [cell.get(score)],
                           "by_example": cell.get(f"{score}_by_example", [float("nan")])}
  return {checkpoint: {label: {task: cell | of_score(cell) for task, cell in by_task.items()}
                       for label, by_task in rows.items()} for checkpoint, rows in cells.items()}


def compact(cells: Cells) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
  """{checkpoint's name: {row: {task: cell}}}, what is kept of large tables: cells without what each sequence scored.

  Those of several seeds also have the "error_over_seeds".
  """
  return {name_of(checkpoint): {label: {task: _compact(cell) for task, cell in by_task.items()}
                                  for label, by_task in rows.items()} for checkpoint, rows in cells.items()}


def _compact(cell: dict[str, Any]) -> dict[str, Any]:
  kept = {name: value for name, value in cell.items() if name not in _OF_EXAMPLES}
  if len(cell.get("accuracy", [])) > 1:
    kept["error_over_seeds"] = standard_error(np.array(cell["accuracy"]))
  return jax.tree.map(lambda x: round(x, 3) if isinstance(x, float) else x, kept)


def by_example(cell: dict[str, Any]) -> np.ndarray:
  """What every example scored, as shares, means over seeds."""
  return np.array(cell["by_example"]) / 100 if "by_example" in cell else from_hex(cell).mean(axis=0)


def error_over_examples(cell: dict[str, Any]) -> float:
  """The standard error over examples, in percent, of a cell's mean over seeds."""
  return float(100 * np.sqrt(by_example(cell).var() / cell["count"]))


def table(cells: Cells) -> str:
  """A line per row and checkpoint: the mean over tasks, its standard errors over seeds and examples, tasks, seeds.

  A row with a blank cell has no mean.
  """
  if not cells:
    return ""
  first = next(iter(cells.values()))
  tasks = list(next(iter(first.values())))
  lines = []
  for label in first:
    for checkpoint, rows in cells.items():
      of_tasks = ["" if "blank" in cell else f"{np.mean(cell['accuracy']):.1f}" for cell in rows[label].values()]
      mean, errors, of_seeds = "", "", ""
      if is_whole(rows[label]):
        seeds = accuracies(rows[label]).mean(axis=0)
        mean, of_seeds = f"{seeds.mean():.1f}", " ".join(f"{x:.0f}" for x in seeds)
        of_examples = np.linalg.norm([error_over_examples(cell) for cell in rows[label].values()]) / len(tasks)
        errors = _both_errors(seeds, float(of_examples))
      lines.append([label, name_of(checkpoint), mean, errors, *of_tasks, of_seeds])
  return markdown_table(["mode", "checkpoint", "mean", "s.e. seeds, examples", *tasks, "seeds"], lines)


def errors_by_task(cells: Cells) -> str:
  """The standard errors of the cells of `table`, over seeds, if there are several, and over examples."""
  tasks = list(next(iter(next(iter(cells.values())).values())))
  lines = [[label, name_of(checkpoint), *(
      "" if "blank" in cell else _both_errors(np.array(cell["accuracy"]), error_over_examples(cell))
      for cell in rows[label].values())] for label in next(iter(cells.values())) for checkpoint, rows in cells.items()]
  return markdown_table(["mode", "checkpoint", *tasks], lines)


def _both_errors(seeds: np.ndarray, of_examples: float) -> str:
  return f"{standard_error(seeds):.1f}, {of_examples:.1f}" if len(seeds) > 1 else f"{of_examples:.1f}"


def side_by_side(cells: Cells) -> str:
  """The paper's layout: a line per row, "second / first checkpoint" in every cell; the last has the seeds' means."""
  first, second = list(cells.values())[:2]
  tasks = list(next(iter(first.values())))
  lines = []
  for label in first:
    both = second[label], first[label]
    pairs = [[one[task] for one in both] for task in tasks]
    of_tasks = ["" if any("blank" in cell for cell in pair) else " / ".join(
        f"{np.mean(cell['accuracy']):.1f}" for cell in pair) for pair in pairs]
    lines.append([label, *of_tasks, " / ".join(map(_mean_of_seeds, both)) if all(map(is_whole, both)) else ""])
  return markdown_table(["mode", *tasks, "mean (seeds)"], lines)


def means(cells: Cells) -> str:
  """A line per row, a column per checkpoint: the mean over tasks, and every seed's."""
  lines = [[label, *(_mean_of_seeds(rows[label]) if is_whole(rows[label]) else "" for rows in cells.values())]
           for label in next(iter(cells.values()))]
  return markdown_table(["mode", *map(name_of, cells)], lines)


def _mean_of_seeds(by_task: Mapping[str, dict[str, Any]]) -> str:
  seeds = accuracies(by_task).mean(axis=0)
  return f"{seeds.mean():.1f} ({' '.join(f'{x:.0f}' for x in seeds)})"


def _too_low(rows: Rows) -> dict[int, str]:
  """{seed: "task accuracy, ..."} of the seeds that are too low under Dense to be compared under sparse modes."""
  low: dict[int, list[str]] = {}
  for task, cell in rows.get("dense", {}).items():
    for seed, accuracy in enumerate(cell.get("accuracy", [])):
      if accuracy < MATCHED:
        low.setdefault(seed, []).append(f"{task} {accuracy:.1f}")
  return {seed: ", ".join(tasks) for seed, tasks in sorted(low.items())}


def _seeds(rows: Rows) -> int:
  return max((len(cell.get("accuracy", [])) for by_task in rows.values() for cell in by_task.values()), default=0)


def left_out(rows: Rows) -> list[int]:
  """The seeds of a checkpoint that are too low under Dense; none where none is high enough."""
  low = _too_low(rows)
  return list(low) if len(low) < _seeds(rows) else []


def matched(cells: Cells) -> Cells:
  """The cells without the seeds that are `left_out`."""
  return {checkpoint: without(rows, left_out(rows)) for checkpoint, rows in cells.items()}


def without(rows: Rows, out: Collection[int]) -> dict[str, dict[str, dict[str, Any]]]:
  """The rows of a checkpoint without these seeds."""
  return {label: {task: {
      name: [one for i, one in enumerate(value) if i not in out] if name in _BY_SEED else value
      for name, value in cell.items()} for task, cell in by_task.items()} for label, by_task in rows.items()}


def unmatched(cells: Cells) -> str:
  """A line for every seed that is too low under Dense."""
  lines = []
  for checkpoint, rows in cells.items():
    fate = "left out" if left_out(rows) else "kept, for want of others"
    lines += [f"{name_of(checkpoint)}, seed {seed}, {fate}: dense accuracy below {MATCHED:g} in {tasks}"
              for seed, tasks in _too_low(rows).items()]
  return "\n".join(lines)


def blanks(cells: Cells) -> str:
  """Why cells are blank, a line each."""
  tasks: dict[tuple[str, str], list[str]] = {}
  for label, by_task in next(iter(cells.values())).items():
    for task, cell in by_task.items():
      if "blank" in cell:
        tasks.setdefault((label, cell["blank"]), []).append(task)
  every = len(next(iter(next(iter(cells.values())).values())))
  return "\n".join(f"{label}{'' if len(of_row) == every else ' (' + ', '.join(of_row) + ')'}: {why}"
                   for (label, why), of_row in tasks.items())


def checks(cells: Cells) -> str:
  """The cells that were also decoded greedily: the share of sequences that agree, and the scores in percent."""
  scores = ("exact_match", "string_match_all", "comma_recall")
  lines = [[label, name_of(checkpoint), task, f"{100 * cell['free_running']['agrees']:.1f}",
            *(f"{cell['free_running'][score]:.1f}" for score in scores)]
           for checkpoint, rows in cells.items() for label, by_task in rows.items() for task, cell in by_task.items()
           if "free_running" in cell]
  return markdown_table(["decoded greedily", "checkpoint", "task", "agrees, %", *scores], lines) if lines else ""


def differences(cells: Cells) -> str:
  """Every other checkpoint less the second, on the same sequences.

  The error over examples is that of the paired differences (means over seeds), the one over seeds joins both sides'. A
  + marks tasks in which the one's worst seed is above the second's best.
  """
  second_name, second = list(cells.items())[1]
  tasks = list(next(iter(second.values())))
  lines = []
  for label, (checkpoint, first) in itertools.product(second, cells.items()):
    if checkpoint == second_name or not (is_whole(first[label]) and is_whole(second[label])):
      continue
    a, b = accuracies(first[label]), accuracies(second[label])
    shares = [[by_example(one[label][task]) for task in tasks] for one in (first, second)]
    paired = [x - y for x, y in zip(*shares, strict=True)]
    of_examples = 100 * np.sqrt(sum(x.var(ddof=1) / len(x) for x in paired)) / len(tasks)
    of_seeds = np.hypot(standard_error(a.mean(axis=0)), standard_error(b.mean(axis=0)))
    several = min(a.shape[1], b.shape[1]) > 1
    of_tasks = [f"{x.mean() - y.mean():+.1f}{'+' if several and x.min() > y.max() else ''}"
                for x, y in zip(a, b, strict=True)]
    lines.append([label, name_of(checkpoint), f"{a.mean() - b.mean():+.1f}", f"{of_examples:.1f}",
                  f"{of_seeds:.1f}" if several else "", *of_tasks])
  return markdown_table(["mode", f"less {name_of(second_name)}", "difference", "s.e. examples", "s.e. seeds", *tasks],
                        lines)


def claim(cells: Cells) -> str:
  """A line for every method: the cells in which the second checkpoint is below `MATCHED`, how many of them the first is
  ahead in, its lead there, and its lead at 1/16 in the tasks that attention misses most.
  """
  first, second = list(cells.values())[:2]
  leads: dict[str, dict[tuple[str, str], tuple[float, float]]] = {}
  for label, by_task in second.items():
    method, _, rest = label.partition(", ")
    if method.startswith(("Quest", "MoBA", "SnapKV aware")) and _BUDGET.fullmatch(label) and "," not in rest:
      for task, cell in by_task.items():
        if "blank" not in cell and "blank" not in first[label][task]:
          below = float(np.mean(cell["accuracy"]))
          leads.setdefault(method, {})[task, rest] = below, float(np.mean(first[label][task]["accuracy"])) - below
  lines = []
  for method, found in leads.items():
    low = [lead for below, lead in found.values() if below < MATCHED]
    at_16 = [f"{found[task, '1/16'][1]:+.1f}" if (task, "1/16") in found else "" for task in HARD]
    of_low = [str(len(low)), str(sum(lead > 0 for lead in low)), f"{np.mean(low):+.1f}" if low else ""]
    lines.append([method, *of_low, *at_16])
  return markdown_table(["method", "cells", "ahead in", "lead", *(f"{task}, 1/16" for task in HARD)], lines)


def by_budget(cells: Cells) -> dict[str, dict[str, dict[str, list[float]]]]:
  """{method: {checkpoint: {share: the mean over tasks of every seed}}} of six methods that have several budgets.

  They are the main ones, or where those were not asked, the first.
  """
  families: dict[str, dict[str, str]] = {}
  for label in next(iter(cells.values())):
    match = _BUDGET.fullmatch(label)
    if match and all(is_whole(rows[label]) for rows in cells.values()):
      families.setdefault(match[1] + match[3], {})[f"1/{match[2]}"] = label
  several = {method: labels for method, labels in families.items() if len(labels) > 1}
  shown = [method for method in _MAIN if method in several] or list(several)[:len(_MAIN)]
  return {method: {name_of(checkpoint): {share: accuracies(rows[label]).mean(axis=0).tolist()
                                         for share, label in several[method].items()}
                   for checkpoint, rows in cells.items()} for method in shown}
