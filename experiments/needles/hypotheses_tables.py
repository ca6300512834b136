"""The tables of experiments/pages/hypotheses.md, made from experiments/results/hypotheses.json.

The result is {"PART, CASE|CHECKPOINT ...": found}, as `experiments.hypotheses` writes it. Cells of two arms are written
"attention / RAT+".
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.needles.hypotheses_report import quantiles
from experiments.needles.page_tables import PAIR, cells_of, of, seeds
from experiments.needles.report import HARD
from experiments.shared.output import markdown_table
from experiments.shared.page_tables import Read, Table
from rat_jax.evaluate.mini_niah import TASKS

NAMES = ("attention", "RAT+")  # of PAIR


def found(read: Read, part: str) -> dict[str, dict[str, Any]]:
  """{arm: what was found} of a part, its cases together."""
  merged: dict[str, dict[str, Any]] = {}
  for key, value in read("hypotheses").items():
    if key.startswith(f"{part}, "):
      arm = key.split("|")[1].split()[0].rpartition("/")[2]
      merged.setdefault(arm, {}).update(value)
  return merged


def pair(of_arms: Iterable[Any]) -> str:
  """The mean of each arm's numbers."""
  return " / ".join(f"{np.mean(one):.1f}" for one in of_arms)


def best(by_seed: Sequence[Any]) -> list[float]:
  """The hit rate of the best head of every seed, [seeds][layers][heads]."""
  return [float(np.max(of_seed)) for of_seed in by_seed]


def heads(read: Read) -> str:
  """How often the best head has chosen every symbol of the answer, and how often all heads have in the mean."""
  by_arm, lines = found(read, "heads"), []
  for method in ("Quest 16", "MoBA 16 decode", "SnapKV aware", "SnapKV blind"):
    of_method = [by_arm[arm][method] for arm in PAIR]
    lines.append([method, *(pair(best(of_arm[task]) for of_arm in of_method) for task in TASKS),
                  pair([best(of_arm[task]) for task in TASKS] for of_arm in of_method),
                  pair(list(of_arm.values()) for of_arm in of_method)])
  return markdown_table(["best head, hits in %", *TASKS, "mean", "mean over all heads"], lines)


def random(read: Read) -> str:
  """A random quarter of the tokens: means over draws and seeds."""
  by_arm, lines = found(read, "random"), []
  for method in by_arm["ratplus"]:
    of_method = [by_arm[arm][method] for arm in PAIR]
    lines.append([method, *_by_task(of_method)])
  return markdown_table(["a quarter at random", *TASKS, "mean"], lines)


def _by_task(of_arms: Sequence[Mapping[str, Any]]) -> list[str]:
  """The means of {task: numbers} by task, and over tasks."""
  return [*(pair(of_arm[task] for of_arm in of_arms) for task in TASKS),
          pair(list(of_arm.values()) for of_arm in of_arms)]


def layers(read: Read) -> str:
  """One layer alone under the method: the mean over tasks, and multikey_3."""
  by_arm, lines = found(read, "layers"), []
  for method, by_layer in by_arm["attention"].items():
    for name, tasks in (("", tuple(TASKS)), (": multikey_3", ("multikey_3",))):
      lines.append([f"{method}{name}", *(pair([by_arm[arm][method][layer][task] for task in tasks] for arm in PAIR)
                                         for layer in by_layer)])
  return markdown_table(["sparse in one layer", *next(iter(by_arm["attention"].values()))], lines)


def layers_by_seed(read: Read) -> str:
  """SnapKV blind in one layer alone, seed by seed: who finds the needle, and where."""
  by_arm, whole, lines = found(read, "layers"), cells_of(read, "niah_main"), []
  for arm, name in zip(PAIR, NAMES, strict=True):
    for layer, by_task in by_arm[arm]["SnapKV blind"].items():
      lines.append([f"{name}, {layer}", *(f"{one:.0f}" for one in np.mean(list(by_task.values()), axis=0))])
    lines.append([f"{name}, all layers", *(f"{one:.0f}" for one in seeds(whole[arm]["SnapKV blind, 1/8"]))])
  return markdown_table(["SnapKV blind at 1/8 in", *(f"seed {seed}" for seed in range(len(lines[0]) - 1))], lines)


def layers_of_multiquery(read: Read) -> str:
  """MoBA in the prompt in one layer alone, multiquery at 1/16 by seeds."""
  by_arm, whole, lines = found(read, "layers"), cells_of(read, "niah_main"), []
  case, task = "MoBA 16 prompt, 1/16", "multiquery"
  for arm, name in zip(PAIR, NAMES, strict=True):
    for layer, by_task in [*by_arm[arm][case].items(), ("all layers", {task: whole[arm][case][task]["accuracy"]})]:
      lines.append([f"{name}, {layer}", *(f"{one:.0f}" for one in by_task[task])])
  return markdown_table([f"{case}, {task}, in", *(f"seed {seed}" for seed in range(len(lines[0]) - 1))], lines)


def heads_of_multiquery(read: Read) -> str:
  """How often the best head has a whole answer's blocks under MoBA in decoding, and how often the answer is right."""
  by_arm, cells = found(read, "heads"), cells_of(read, "niah_main")
  lines = [[name, " ".join(f"{one:.0f}" for one in best(by_arm[arm]["MoBA 16 decode"]["multiquery"])),
            of("multiquery")(cells[arm]["MoBA 16 decode, 1/16"])] for arm, name in zip(PAIR, NAMES, strict=True)]
  return markdown_table(["MoBA 16 decode, 1/16, multiquery", "best head, hits in %, seeds", "right in %"], lines)


def two_by_two(read: Read) -> str:
  """RAT+ attends to the memory's keys and chooses by them or by plain ones."""
  cells, names = found(read, "two_by_two")["ratplus"], {"memory": "the memory's keys", "plain": "plain keys"}
  lines = [[f"Quest 16, {share}, by {name}", *_by_task([
      cells[f"quest:{tokens},block=16,keep_first=false, select from {keys}, attend to memory"]])]
           for share, tokens in (("1/8", 128), ("1/16", 64)) for keys, name in names.items()]
  return markdown_table(["RAT+ chooses", *TASKS, "mean"], lines)


def future(read: Read) -> str:
  """SnapKV compressed under question A and asked B, or compressed under B."""
  by_arm, lines, tasks = found(read, "future"), [], ("multikey_1", *HARD)
  names = {"A": "A, compressed under A", "B": "B, compressed under A", "B under B": "B, compressed under B"}
  for budget in ("dense", "1/4", "1/8", "1/16"):
    of_budget = [by_arm[arm][budget] for arm in PAIR]
    for asked in (asked for asked in names if asked in of_budget[0]["multikey_1"]):
      lines.append([f"{budget}: {asked if budget == 'dense' else names[asked]}",
                    *(pair(of_arm[task][asked] for of_arm in of_budget) for task in tasks)])
  return markdown_table(["asked", *tasks], lines)


def reach(read: Read) -> str:
  """The mean age of what a channel holds: quantiles over channels, and the median of every seed."""
  ages = np.array(found(read, "reach")["ratplus"]["age"])  # [seeds, layers, heads, H]
  lines = [[f"layer {i}", *quantiles(ages[:, i]), " ".join(f"{np.median(of_seed[i]):.0f}" for of_seed in ages)]
           for i in range(ages.shape[1])]
  return markdown_table(["mean age in tokens", "10%", "median", "90%", "median by seeds"], lines)


def distance(read: Read) -> str:
  """Accuracy by the distance to the next kept token, in quarters of D; the last one without D - 1."""
  lines = []
  for mode, cell in found(read, "distance")["ratplus"].items():
    by_distance = np.mean(cell["right"], axis=0)
    edges = np.linspace(0, len(by_distance), 5).astype(int)
    edges[-1] -= 1
    lines.append([mode, *(f"{by_distance[a:b].mean():.1f}" for a, b in itertools.pairwise(edges)),
                  f"{by_distance[-1]:.1f}"])
  return markdown_table(["RAT+", "first quarter of D", "second", "third", "fourth, without D - 1", "D - 1"], lines)


TABLES: dict[str, Table] = {
    "hypotheses_heads": heads, "hypotheses_random": random, "hypotheses_layers": layers,
    "hypotheses_layers_by_seed": layers_by_seed, "hypotheses_layers_multiquery": layers_of_multiquery,
    "hypotheses_heads_multiquery": heads_of_multiquery, "hypotheses_two_by_two": two_by_two,
    "hypotheses_future": future, "hypotheses_reach": reach, "hypotheses_distance": distance}
