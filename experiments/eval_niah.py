"""Accuracy on mini-NIAH under many modes and budgets: the table that the claim stands on.

Claim: the same sparse methods at the same budgets lose far less on a backbone with the memory than on one without.
Expected: both at 99 or more under Dense; RAT+ ahead under Quest, MoBA and question-aware SnapKV, most at 1/16 on
multikey_2, multikey_3 and multivalue.  Cost: about 10 minutes for two arms of three seeds on one H100.
Command: python -m experiments.eval_niah --checkpoint=runs/niah/ratplus --checkpoint=runs/niah/attention
A checkpoint is a folder of seed-* (experiments.sft_niah). All see the same sequences; finished cells are kept.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

import rat_jax
from experiments import common
from rat_jax import Dense, Dilated, DilatedTopK, MoBA, Quest, RATPlusConfig, RATPlusLM, SnapKV, StreamingLLM
from rat_jax.evaluate import mini_niah
from rat_jax.evaluate.mini_niah import TASKS, Task
from rat_jax.evaluate.needles import answered
from rat_jax.modes import Mode
from rat_jax.train import Checkpoints

CHECKPOINTS = flags.DEFINE_multi_string("checkpoint", None, "Folder of seed-* checkpoints; repeat it for several.",
                                        required=True)
LENGTH = flags.DEFINE_integer("length", 1024, "Tokens of a sequence.", lower_bound=16)
COUNT = flags.DEFINE_integer("count", 512, "Sequences per task, shared by all checkpoints and seeds.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Sequences at a time.", lower_bound=1)
ONLY = flags.DEFINE_list("only", [], "Rows of the table to compute, by their start, such as Quest,dense.")
TASK_NAMES = flags.DEFINE_list("tasks", list(TASKS), "Tasks.")
PROMPT_END = flags.DEFINE_enum("prompt_end", "main", ["main", "answer"], "main: the prompt ends at the question (MoBA"
                               " in the paper's form and aware SnapKV: at the answer); answer: there for all.")
FREE_RUNNING = flags.DEFINE_integer("free_running", 32, "Sequences of a task that are also decoded greedily, for every"
                                    " eighth row of the table.", lower_bound=0)
DATA_SEED = 20_000_003  # of the sequences; training seeds are small numbers


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of the table.

  Attributes:
    build: (mode, prefill_mode) for a task, None for the mode's own form; ValueError where no such mode can be built.
    at_answer: the prompt ends at the answer (p = index of ANS + 1) rather than at the question (p = index of QRY).
  """

  label: str
  build: Callable[[Task], tuple[Mode, Mode | None]]
  at_answer: bool = False


def table_rows(length: int) -> list[Row]:
  """The rows of the main table."""
  rows = [Row("dense", lambda task: (Dense(), None))]

  def fixed(label: str, build: Callable[[], Mode], prefill_mode: Mode | None = None) -> None:
    rows.append(Row(label, lambda task: (build(), prefill_mode)))

  def paper(label: str, build: Callable[[], Mode]) -> None:
    rows.append(Row(label, lambda task: (Dense(), build()), at_answer=True))

  def aware(label: str, budget: int, **options: Any) -> None:
    rows.append(Row(label, lambda task: (SnapKV(budget, obs_window=task.query_length, **options), None),
                    at_answer=True))

  for block, shares in ((16, (4, 8, 16, 32)), (8, (4, 8, 16, 32))):
    for n in shares:
      for first in (False, True):
        fixed(f"Quest {block}, 1/{n}{', first' if first else ''}",
              functools.partial(Quest, length // n, block=block, keep_first=first))
  for block, n in [*((16, n) for n in (4, 8, 16, 32)), (32, 4), (32, 16)]:
    moba = functools.partial(MoBA, length // n // block, block=block, keep_first=False)
    fixed(f"MoBA {block}, 1/{n} (decode)", moba, Dense())
    fixed(f"MoBA {block}, 1/{n} (everywhere)", moba)
    paper(f"MoBA {block}, 1/{n} (paper: prompt)", moba)
  for n in (4, 8, 16, 32):
    aware(f"SnapKV aware, 1/{n}", length // n)
    fixed(f"SnapKV blind, 1/{n}", functools.partial(SnapKV, length // n, obs_window=8))
  for n in (4, 16):
    fixed(f"Quest 16, 1/{n}, random", functools.partial(Quest, length // n, block=16, keep_first=False,
                                                         selector="random"))
    fixed(f"Quest 16, 1/{n}, oracle", functools.partial(Quest, length // n, block=16, keep_first=False,
                                                         selector="oracle"))
    aware(f"SnapKV aware, 1/{n}, random", length // n, selector="random")
  for top_k in (4, 8):
    fixed(f"DilatedTopK 16, {top_k}", functools.partial(DilatedTopK, 16, top_k))
  for mode in (Dilated(8), Dilated(16), Dilated(32), Dilated(16, window=32), StreamingLLM(60, 4)):
    fixed(f"{mode} (everywhere)", functools.partial(dataclasses.replace, mode))
  fixed("dilated:16 (question rows)", lambda: Dilated(16), Dense())
  return rows


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _right(model: RATPlusLM, mode: Mode, prefill_mode: Mode | None, params, batch, prompt_lengths, row_ids):
  return jax.vmap(lambda p: answered(model, p, batch, mode=mode, prefill_mode=prefill_mode,
                                     prompt_lengths=prompt_lengths, row_ids=row_ids))(params)


@functools.lru_cache(maxsize=len(TASKS))
def sequences(task: Task, length: int, count: int) -> dict[str, jax.Array]:
  """The sequences of a task, the same for every row of the table and every checkpoint."""
  rows = mini_niah.evaluation_rows(task, count)
  return jax.jit(lambda: mini_niah.batch(rows, length, DATA_SEED, 0))()


def cell(model: RATPlusLM, params, row: Row, task: Task) -> dict[str, Any]:
  """One cell: which sequences every seed answers, as percentages; ValueError where the mode cannot be."""
  (mode, prefill_mode), right = row.build(task), []
  if COUNT.value % BATCH_SIZE.value:
    raise ValueError(f"--count={COUNT.value} is no multiple of --batch_size={BATCH_SIZE.value}.")
  at_answer = row.at_answer or PROMPT_END.value == "answer"
  for first in range(0, COUNT.value, BATCH_SIZE.value):
    made = jax.tree.map(lambda x, first=first: x[first:first + BATCH_SIZE.value],
                        sequences(task, LENGTH.value, COUNT.value))
    prompts = made["answer"] if at_answer else made["question"]
    ids = jnp.arange(first, first + BATCH_SIZE.value, dtype=jnp.int32)
    right.append(np.asarray(_right(model, mode, prefill_mode, params, made, prompts, ids)))
  by_seed = np.concatenate(right, axis=1)
  prompt = int(prompts[0])
  return {"accuracy": (100 * by_seed.mean(axis=1)).tolist(), "count": COUNT.value,
          "error_over_examples": (100 * by_seed.std(axis=1) / math.sqrt(COUNT.value)).tolist(),
          "tokens_read": float(np.mean(rat_jax.tokens_read(model.config, mode, LENGTH.value, prompt)))}


def free_running(model: RATPlusLM, params, row: Row, task: Task) -> float:
  """The share of sequences on which free-running greedy decoding and the teacher-forced pass agree (first seed)."""
  (mode, prefill_mode), one = row.build(task), jax.tree.map(lambda x: x[0], params)
  made = jax.tree.map(lambda x: x[:FREE_RUNNING.value], sequences(task, LENGTH.value, COUNT.value))
  at_answer = row.at_answer or PROMPT_END.value == "answer"
  answer = int(made["answer"][0])
  start = answer if at_answer else int(made["question"][0])
  ids = jnp.arange(len(made["tokens"]), dtype=jnp.int32)
  logits, cache = rat_jax.prefill(model, one, made["tokens"][:, :start], mode=mode, prefill_mode=prefill_mode,
                                  max_length=LENGTH.value, row_ids=ids)
  if start < answer:
    every, cache = rat_jax.extend(model, one, made["tokens"][:, start:answer], cache)
    logits = every[:, -1]
  right = np.ones(len(ids), bool)
  for at in range(answer, LENGTH.value):
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    right &= np.asarray(token == made["tokens"][:, at])
    if at + 1 < LENGTH.value:
      logits, cache = rat_jax.decode_step(model, one, token, cache)
  forced = answered(model, one, made, mode=mode, prefill_mode=prefill_mode,
                    prompt_lengths=made["answer" if at_answer else "question"], row_ids=ids)
  return float(np.mean(np.asarray(forced) == right))


def load(folder: str) -> tuple[RATPlusConfig, Any]:
  """(config, the parameters of all seeds, stacked) of a folder of seed-*."""
  paths = sorted(pathlib.Path(folder).glob("seed-*"), key=lambda path: int(path.name.removeprefix("seed-")))
  if not paths:
    raise FileNotFoundError(f"{folder} holds no seed-* checkpoints; experiments.sft_niah makes them.")
  configs, params, _ = zip(*(Checkpoints(path).load_params() for path in paths), strict=True)
  if configs[0].vocab_size != mini_niah.VOCAB_SIZE:
    raise ValueError(f"{folder} has vocab_size={configs[0].vocab_size}; mini-NIAH's is {mini_niah.VOCAB_SIZE}.")
  return configs[0], jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)


def main() -> None:
  folder = common.workdir("eval_niah")
  path = folder / "results.json"
  results = json.loads(path.read_text()) if path.exists() else {}
  rows = [row for row in table_rows(LENGTH.value) if not ONLY.value or row.label.startswith(tuple(ONLY.value))]
  unknown = set(TASK_NAMES.value) - TASKS.keys()
  if unknown:
    raise ValueError(f"--tasks={sorted(unknown)} are unknown; use some of {list(TASKS)}.")
  tasks = [TASKS[name] for name in TASK_NAMES.value]
  for checkpoint in CHECKPOINTS.value:
    config, params = load(checkpoint)
    model = RATPlusLM(config)
    for i, row in enumerate(tqdm(rows, desc=checkpoint, unit="row", disable=None)):
      for task in tasks:
        key = f"{checkpoint}|{PROMPT_END.value}|{LENGTH.value}|{COUNT.value}|{row.label}|{task.name}"
        if key in results:
          continue
        try:
          results[key] = cell(model, params, row, task)
          if FREE_RUNNING.value and i % 8 == 0:
            results[key]["free_running_agrees"] = free_running(model, params, row, task)
        except ValueError as error:
          results[key] = {"blank": str(error)}
      common.write_json(path, results)
  table = summary(results, rows, tasks)
  print(f"exact match in percent, mean over {len(tasks)} tasks +- standard error over seeds, {common.device()}\n")
  print(table)
  (folder / "table.md").write_text(table + "\n")


def summary(results: dict[str, Any], rows: list[Row], tasks: list[Task]) -> str:
  """The Markdown table: one line per row and checkpoint, the mean over tasks and every task."""
  lines = []
  for row in rows:
    for checkpoint in CHECKPOINTS.value:
      start = f"{checkpoint}|{PROMPT_END.value}|{LENGTH.value}|{COUNT.value}|{row.label}|"
      cells = [results[start + task.name] for task in tasks]
      if any("blank" in one for one in cells):
        lines.append([row.label, pathlib.Path(checkpoint).name, "", *("" for _ in tasks)])
        continue
      values = np.array([one["accuracy"] for one in cells])  # [tasks, seeds]
      seeds = values.mean(axis=0)
      error = seeds.std(ddof=1) / math.sqrt(len(seeds)) if len(seeds) > 1 else float("nan")
      lines.append([row.label, pathlib.Path(checkpoint).name, f"{seeds.mean():.1f} +- {error:.1f}",
                    *(f"{mean:.1f}" for mean in values.mean(axis=1))])
  return common.markdown_table(["mode", "checkpoint", "mean", *(task.name for task in tasks)], lines)


if __name__ == "__main__":
  common.run(main)
