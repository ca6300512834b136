"""The needle tables of README.md and experiments/pages, made from experiments/results.

A table is a function of `read`, which gives a result by its name, such as "niah_main". Cells of two arms are written
"attention / RAT+".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from experiments.needles.report import HARD, Cells, accuracies, claim, left_out, matched, side_by_side, without
from experiments.shared.output import markdown_table
from experiments.shared.page_tables import Read, Table
from experiments.shared.table_of_runs import SHARES, adapted_name

Row = Mapping[str, dict[str, Any]]  # {task: cell}

PAIR = ("attention", "ratplus")
ARMS = {"RAT+": "ratplus", "attention": "attention"}  # of figures, in the order of their colours
CHOICES = ("random", "oracle")


def cells_of(read: Read, name: str) -> Cells:
  """A result's cells. Accuracies are shares of whole questions again, of which results keep three decimals."""
  return exact(read(name))


def exact(result: dict[str, Any]) -> Any:
  if "accuracy" in result:
    return result | {"accuracy": [100 * round(one / 100 * result["count"]) / result["count"]
                                  for one in result["accuracy"]]}
  return {name: exact(value) if isinstance(value, dict) else value for name, value in result.items()}


def seeds(by_task: Row) -> np.ndarray:
  """The mean over the tasks of every seed."""
  return accuracies(by_task).mean(axis=0)


def mean(by_task: Row) -> str:
  return f"{seeds(by_task).mean():.1f}"


def with_seeds(by_task: Row) -> str:
  """The mean over tasks and seeds, and every seed's."""
  return f"{mean(by_task)} ({' '.join(f'{one:.0f}' for one in seeds(by_task))})"


def of(task: str) -> Callable[[Row], str]:
  """What a cell says: the mean over its seeds."""
  return lambda by_task: f"{np.mean(by_task[task]['accuracy']):.1f}"


def both(cells: Cells, label: str, shown: Callable[[Row], str] = mean) -> str:
  """A row as "attention / RAT+"."""
  return " / ".join(shown(cells[arm][label]) for arm in PAIR)


def rows(cells: Cells, labels: Iterable[str]) -> Cells:
  """The cells of these rows, RAT+ first, as `side_by_side` takes them."""
  return {arm: {label: cells[arm][label] for label in labels} for arm in reversed(PAIR)}


def main(read: Read) -> str:
  """The rows whose blocks are chosen by the mode, and the first is not kept."""
  cells = cells_of(read, "niah_main")
  special = (", first", *(f", {choice}" for choice in CHOICES))
  return side_by_side(rows(cells, [label for label in cells["ratplus"] if not label.endswith(special)]))


def leads(read: Read) -> str:
  """In how many cells RAT+ is ahead, method by method."""
  cells = cells_of(read, "niah_main")
  return claim(rows(cells, cells["ratplus"]))


def choices(read: Read) -> str:
  """The mode's own choice between a random one and the oracle's."""
  cells, lines = cells_of(read, "niah_main"), []
  for method in ("Quest 16", "MoBA 16 decode", "MoBA 16 prompt", "SnapKV aware", "SnapKV blind"):
    for share in ("1/4", "1/16"):
      label = f"{method}, {share}"
      lines.append([label, *(both(cells, one) for one in (f"{label}, random", label, f"{label}, oracle"))])
  return markdown_table(["mode", "random", "its own", "oracle"], lines)


def late(read: Read) -> str:
  """Attention's seeds that learned early, and the two that learned late."""
  cells, lines = cells_of(read, "niah_main"), []
  for label in ("Quest 16, 1/16", "MoBA 16 decode, 1/16", "MoBA 16 prompt, 1/16", "SnapKV aware, 1/16"):
    attention = seeds(cells["attention"][label])
    lines.append([label, f"{attention[[0, 2, 3]].mean():.0f}", f"{attention[[1, 4]].mean():.0f}",
                  f"{seeds(cells['ratplus'][label]).mean():.0f}"])
  return markdown_table(["mode", "attention, seeds 0, 2 and 3", "attention, seeds 1 and 4", "RAT+"], lines)


def of_seeds(task: str) -> Callable[[Row], str]:
  """What every seed has in a task."""
  return lambda by_task: " ".join(f"{one:.0f}" for one in by_task[task]["accuracy"])


def multiquery(read: Read, result: str = "niah_main") -> str:
  """Multiquery under MoBA by seeds, in the prompt and in decoding."""
  cells, lines = cells_of(read, result), []
  for form in ("prompt", "decode"):
    for share in SHARES:
      for label in (f"MoBA 16 {form}, {share}", f"MoBA 16 {form}, {share}, first"):
        if "blank" not in cells["ratplus"][label]["multiquery"]:
          lines.append([label, both(cells, label, of("multiquery")),
                        *(of_seeds("multiquery")(cells[arm][label]) for arm in PAIR)])
  return markdown_table(["multiquery", "mean", "attention, seeds", "RAT+, seeds"], lines)


def single(read: Read) -> str:
  """The easiest task under MoBA by seeds, with and without the first block."""
  cells, lines = cells_of(read, "niah_main"), []
  for form in ("decode", "prompt"):
    for share in ("1/4", "1/16"):
      for label in (f"MoBA 16 {form}, {share}", f"MoBA 16 {form}, {share}, first"):
        lines.append([label, *(of_seeds("single_1")(cells[arm][label]) for arm in PAIR)])
  return markdown_table(["single_1", "attention, seeds", "RAT+, seeds"], lines)


def three(read: Read) -> str:
  """The second training beside the first."""
  first, second = cells_of(read, "niah_main"), cells_of(read, "niah_three_seeds")
  labels = ("dense", "Quest 16, 1/8", "Quest 16, 1/16", "Quest 8, 1/16", "MoBA 16 decode, 1/16",
            "MoBA 16 prompt, 1/16", "SnapKV aware, 1/4", "SnapKV aware, 1/16", "SnapKV blind, 1/4",
            "DilatedTopK 16, 4 blocks", "dilated:16 everywhere", "Quest 16, 1/16, oracle")
  lines = [[label, both(first, label), both(second, label, with_seeds)] for label in labels]
  return markdown_table(["mode", "five seeds, the main table", "three seeds"], lines)


def three_leads(read: Read) -> str:
  """`leads` of the second training."""
  cells = cells_of(read, "niah_three_seeds")
  return claim(rows(cells, cells["ratplus"]))


def three_multiquery(read: Read) -> str:
  return multiquery(read, "niah_three_seeds")


def topk(read: Read) -> str:
  cells = cells_of(read, "niah_topk")
  lines = [[label, both(cells, label, with_seeds), *(both(cells, label, of(task)) for task in HARD)]
           for label in cells["ratplus"]]
  return markdown_table(["mode", "mean (seeds)", *HARD], lines)


def answer(read: Read) -> str:
  return side_by_side(rows(cells_of(read, "niah_answer"), (
      "dense", "Quest 16, 1/8", "Quest 16, 1/16", "MoBA 16 decode, 1/8", "MoBA 16 decode, 1/16",
      "DilatedTopK 16, 4 blocks", "DilatedTopK 16, 8 blocks", "dilated:16 everywhere")))


def spaced(read: Read) -> str:
  """RAT+ under dilation alone, by the space around needles."""
  found, lines = cells_of(read, "niah_spaced"), []
  by_spacing = {"as they come": cells_of(read, "niah_main"), "half a needle per 16 tokens": found["spacing 32"],
                "half a needle per 32 tokens": found["spacing 64"]}
  tasks = ("multikey_2", "multikey_3", "multiquery")
  for dilation in (8, 16, 32):
    for name, cells in by_spacing.items():
      by_task = cells["ratplus"][f"dilated:{dilation} everywhere"]
      lines.append([f"D={dilation}, {name}", *(of(task)(by_task) for task in tasks)])
  return markdown_table(["RAT+, needles", *tasks], lines)


def adapted(read: Read) -> str:
  """Before and after a thousand updates under the mode, seeds 0 to 2."""
  before, after, lines = cells_of(read, "niah_main"), cells_of(read, "niah_adapted"), []
  for mode in ("dilated:8", "dilated:16", "dilated:32", "dilated:16,window=32"):
    line = [mode]
    for arm in reversed(PAIR):
      trained = after[adapted_name(arm, mode)]
      line += [f"{seeds(before[arm][f'{mode} everywhere'])[:3].mean():.1f}", with_seeds(trained[f"{mode} everywhere"]),
               with_seeds(trained["dense"])]
    lines.append(line)
  return markdown_table(["mode", "RAT+: before", "after adapting to it", "dense, after", "attention: before",
                         "after adapting to it", "dense, after"], lines)


def window(read: Read) -> str:
  """What a window beside D=16 brings, both adapted to."""
  found, tasks = cells_of(read, "niah_adapted"), ("multikey_2", "multikey_3", "multiquery")
  lines = []
  for mode, arm in (("dilated:16,window=32", "ratplus-dilated_16_window_32"), ("dilated:16", "ratplus-dilated_16")):
    by_task = found[arm][f"{mode} everywhere"]
    lines.append([mode, mean(by_task), *(of(task)(by_task) for task in tasks)])
  return markdown_table(["RAT+ after 1000 updates under the mode", "mean", *tasks], lines)


def near(read: Read) -> str:
  cells = matched(cells_of(read, "niah_near"))
  labels = ("dense", "Quest 16, 1/8", "Quest 16, 1/16", "MoBA 16 decode, 1/16", "SnapKV aware, 1/16")
  tasks = ("multikey_2", "multikey_3")
  return markdown_table(["mode", *tasks], [[label, *(both(cells, label, of(task)) for task in tasks)]
                                           for label in labels])


def controls(read: Read) -> str:
  """The other arms beside the main ones."""
  arms = matched({**cells_of(read, "niah_controls"), **cells_of(read, "niah_main")})
  names = {"sparse_branch": "attention, sparse branch", "ratplus_dense": "RAT+, dense alone",
           "ratplus_mixed": "RAT+, several D", "attention": "attention", "ratplus": "RAT+"}
  labels = ("dense", "Quest 16, 1/8", "Quest 16, 1/16", "Quest 8, 1/16", "MoBA 16 decode, 1/8", "MoBA 16 decode, 1/16",
            "MoBA 16 prompt, 1/16", "MoBA 32 decode, 1/4", "MoBA 32 decode, 1/8", "SnapKV aware, 1/4",
            "SnapKV aware, 1/16", "SnapKV blind, 1/8", "DilatedTopK 16, 4 blocks", "dilated:8 everywhere",
            "dilated:32 everywhere")
  return markdown_table(["mode", *names.values()],
                        [[label, *(with_seeds(arms[arm][label]) for arm in names)] for label in labels])


def memory_alone(read: Read) -> str:
  """How much of RAT+'s gain the memory has that was trained densely."""
  arms = {**cells_of(read, "niah_controls"), **cells_of(read, "niah_main")}
  lines = []
  for label in ("SnapKV aware, 1/16", "SnapKV aware, 1/4", "MoBA 16 decode, 1/16", "MoBA 16 prompt, 1/16",
                "Quest 16, 1/16", "Quest 16, 1/8", "DilatedTopK 16, 4 blocks", "dilated:8 everywhere"):
    without, alone, whole = (seeds(arms[arm][label]).mean() for arm in ("attention", "ratplus_dense", "ratplus"))
    lines.append([label, f"{without:.1f}", f"{alone:.1f}", f"{whole:.1f}",
                  f"{100 * (alone - without) / (whole - without):.0f}%"])
  return markdown_table(["mode", "attention", "RAT+, dense alone", "RAT+", "share of the gain"], lines)


def long_cells(read: Read, name: str = "niah_long") -> Cells:
  return {arm.removesuffix("-4096"): by_label for arm, by_label in cells_of(read, name).items()}


def long(read: Read) -> str:
  cells = long_cells(read)
  return side_by_side(rows(cells, cells["ratplus"]))


_SHORT = {"single_1": "S-1", "single_2": "S-2", "single_3": "S-3", "multikey_1": "MK-1", "multikey_2": "MK-2",
          "multikey_3": "MK-3", "multivalue": "MV", "multiquery": "MQ"}  # as the paper calls them
_PAPER = (  # what is compared, its tasks, the paper's numbers, our rows at T=1024 and T=4096 (arXiv 2605.28640)
    ("Quest 1/16", ("multikey_2", "multikey_3", "multivalue"), "34.4/70.4, 0.2/18.6, 96.5/99.5", "Quest 16, 1/16",
     "Quest 64, 1/16, first"),
    ("MoBA 1/16", ("single_1", "single_2", "single_3", "multikey_1"), "87/100, 69/100, 46/100, 76/99.8",
     "MoBA 16 prompt, 1/16", "MoBA 64 prompt, 1/16, first"),
    ("MoBA 1/16", ("multikey_2", "multikey_3", "multivalue", "multiquery"), "83.8/100, 50/96.2, 73.9/98.4, 93.9/99.9",
     "MoBA 16 prompt, 1/16", "MoBA 64 prompt, 1/16, first"),
    ("SnapKV 1/16 (here: aware)", ("single_1", "multikey_2", "multikey_3", "multivalue", "multiquery"),
     "39/84, 5/41, 0/0.4, 4/43, 2/50", "SnapKV aware, 1/16", "SnapKV aware, 1/16"),
    ("the same, window of 64", ("single_1", "multikey_2", "multikey_3", "multivalue", "multiquery"), "", None,
     "SnapKV, window of 64, 1/16"),
    ("Quest at 1/4, random (OLMo2 7B)", ("single_1",), "48/84", "Quest 16, 1/4, random", None),
    ("MoBA at 1/4, random (OLMo2 7B)", ("single_1",), "59/99", "MoBA 16 prompt, 1/4, random", None),
    ("SnapKV at 1/4, random (OLMo2 7B)", ("single_1",), "44/98", "SnapKV aware, 1/4, random", None))


def paper(read: Read) -> str:
  """Our cells beside the paper's."""
  lines, at_lengths = [], (cells_of(read, "niah_main"), long_cells(read))
  for name, tasks, theirs, *ours in _PAPER:
    cells = [", ".join(_as_in_the_paper(of_length, label, task) for task in tasks) if label else ""
             for of_length, label in zip(at_lengths, ours, strict=True)]
    lines.append([f"{name}: {', '.join(_SHORT[task] for task in tasks)}", theirs, *cells])
  easy = ("single_1", "single_2", "single_3", "multikey_1")
  least = [min(float(np.mean(cells[arm][label][task]["accuracy"])) for arm in PAIR for task in easy)
           for cells, label in zip(at_lengths, _PAPER[0][3:], strict=True)]
  lines.insert(1, ["Quest 1/16: S-1 to MK-1", "all 99.6 or more", *(f"all {one:.1f} or more" for one in least)])
  return markdown_table(["", "paper, released 7B, T=4096, blocks of 64", "here, T=1024, blocks of 16",
                         "here, T=4096, blocks of 64, first kept"], lines)


def _as_in_the_paper(cells: Cells, label: str, task: str) -> str:
  values = [float(np.mean(cells[arm][label][task]["accuracy"])) for arm in PAIR]
  return "/".join(f"{value:.1f}" if 99.5 <= value < 99.95 else f"{value:.0f}" for value in values)


def retrofit_cells(read: Read, equal: bool = False) -> Cells:
  """The seeds that know the tasks under Dense; with `equal` of every arm those that do in all of them."""
  every = cells_of(read, "niah_retrofit")
  if not equal:
    return matched(every)
  out = {seed for by_label in every.values() for seed in left_out(by_label)}
  return {arm: without(by_label, out) for arm, by_label in every.items()}


def retrofit(read: Read) -> str:
  return _retrofit(retrofit_cells(read))


def retrofit_equal(read: Read) -> str:
  return _retrofit(retrofit_cells(read, equal=True))


def _retrofit(cells: Cells) -> str:
  names = {"text": "before", "text-attention": "attention, 4000 more", "text-memory": "memory, ARL",
           "text-memory-dense": "memory, dense"}
  labels = ("dense", "Quest 16, 1/8", "Quest 16, 1/16", "MoBA 16 decode, 1/8", "MoBA 16 decode, 1/16",
            "MoBA 16 prompt, 1/8", "MoBA 16 prompt, 1/8, first", "MoBA 16 prompt, 1/16", "MoBA 16 prompt, 1/16, first",
            "SnapKV aware, 1/8", "SnapKV aware, 1/16")
  return markdown_table(["mean over the eight tasks (seeds)", *names.values()],
                        [[label, *(with_seeds(cells[arm][label]) for arm in names)] for label in labels])


def budgets(read: Read) -> dict[str, dict[str, dict[str, list[float]]]]:
  """{method: {model: {share: the mean over tasks of every seed}}} for `pictures.against_budget`."""
  cells = matched(cells_of(read, "niah_main"))
  methods = {"Quest, blocks of 16": "Quest 16", "MoBA in decoding, blocks of 16": "MoBA 16 decode",
             "SnapKV that knows the question": "SnapKV aware"}
  return {title: {name: {share: seeds(cells[arm][f"{label}, {share}"]).tolist() for share in SHARES}
                  for name, arm in ARMS.items()}
          for title, label in methods.items()}


TABLES: dict[str, Table] = {
    "needles": main, "needles_leads": leads, "needles_choices": choices, "needles_late": late,
    "needles_multiquery": multiquery, "needles_single": single, "needles_three": three,
    "needles_three_leads": three_leads, "needles_three_multiquery": three_multiquery, "needles_topk": topk,
    "needles_answer": answer, "needles_spaced": spaced, "needles_adapted": adapted, "needles_window": window,
    "needles_near": near, "needles_controls": controls, "needles_memory_alone": memory_alone, "needles_long": long,
    "needles_paper": paper, "retrofit": retrofit, "retrofit_equal": retrofit_equal}
