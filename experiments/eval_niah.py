"""Accuracy on mini-NIAH under many modes and budgets: the table that the claim stands on.

Claim: the same sparse methods at the same budgets lose far less on a backbone with the memory than on one without.
Expected: both at 99 or more under Dense; RAT+ ahead under Quest, MoBA and question-aware SnapKV, most at 1/16 on
multikey_2, multikey_3 and multivalue.  Cost: not measured yet.
Command: python -m experiments.eval_niah --checkpoint=runs/niah/ratplus --checkpoint=runs/niah/attention
A checkpoint is a folder of seed-* (experiments.sft_niah). All see the same sequences; finished cells are kept.
"""

from __future__ import annotations

import concurrent.futures
import functools
import json
import math
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

import rat_jax
from experiments import common, niah, niah_report, niah_table
from experiments.niah_table import Row
from rat_jax import RATPlusLM
from rat_jax.evaluate import mini_niah
from rat_jax.evaluate.mini_niah import TASKS, Rows, Task
from rat_jax.evaluate.needles import answered
from rat_jax.modes import Mode

CHECKPOINTS = flags.DEFINE_multi_string("checkpoint", None, "Folder of seed-* checkpoints; repeat it for several.",
                                        required=True)
LENGTH = flags.DEFINE_integer("length", 1024, "Tokens of a sequence.", lower_bound=16)
COUNT = flags.DEFINE_integer("count", 512, "Sequences per task, shared by all checkpoints and seeds.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Sequences at a time.", lower_bound=1)
ONLY = flags.DEFINE_list("only", [], "Rows of the table to compute, by their start, such as Quest,dense.")
TASK_NAMES = flags.DEFINE_list("tasks", list(TASKS), "Tasks.")
PROMPT_END = flags.DEFINE_enum("prompt_end", "main", ["main", "answer"], "main: the prompt ends at the question (MoBA"
                               " in the paper's form and aware SnapKV: at the answer); answer: there for all.")
FREE_RUNNING = flags.DEFINE_integer("free_running", 32, "Sequences that are also decoded greedily, in one task of every"
                                    " fourth row of the table.", lower_bound=0)
WORKERS = flags.DEFINE_integer("workers", 8, "Rows that are compiled at a time.", lower_bound=1)
DATA_SEED = 20_000_003  # of the sequences; training seeds are small numbers
_DEVICE = threading.Lock()  # programs compile side by side and run one by one


@functools.cache
def sequences(length: int, count: int) -> dict[str, dict[str, jax.Array]]:
  """The sequences of every task, the same for all rows of the table and all checkpoints."""
  rows = tuple(Rows(task, count) for task in TASKS.values())
  made = jax.jit(lambda: mini_niah.batch(rows, length, DATA_SEED, 0))()
  return {name: jax.tree.map(lambda x, i=i: x[i * count:(i + 1) * count], made) for i, name in enumerate(TASKS)}


def prompt_length(row: Row, task: Task) -> int:
  at_answer = row.at_answer or PROMPT_END.value == "answer"
  return LENGTH.value - task.answer_length - (0 if at_answer else task.query_length)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _right(model: RATPlusLM, mode: Mode, prefill_mode: Mode | None, prompts: tuple[int, ...], params, batch, row_ids):
  return jax.vmap(lambda p: answered(model, p, batch, mode=mode, prefill_mode=prefill_mode,
                                     prompt_lengths=np.array(prompts), row_ids=row_ids))(params)


def which_right(model: RATPlusLM, params: Any, row: Row, tasks: Sequence[Task]) -> dict[str, np.ndarray]:
  """Which sequences of tasks that share a mode every seed answers: {task: bool [seeds, count]}."""
  mode, prefill_mode = row.build(tasks[0])
  room = max(1, BATCH_SIZE.value // len(tasks))
  every = max(n for n in range(1, room + 1) if COUNT.value % n == 0)  # sequences of each task in a batch
  made = sequences(LENGTH.value, COUNT.value)
  prompts = tuple(prompt_length(row, task) for task in tasks for _ in range(every))
  program, right = None, []
  for first in range(0, COUNT.value, every):
    with _DEVICE:
      parts = [jax.tree.map(lambda x, first=first: x[first:first + every], made[task.name]) for task in tasks]
      batch = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
      ids = jnp.tile(jnp.arange(first, first + every, dtype=jnp.int32), len(tasks))
    if program is None:
      program = _right.lower(model, mode, prefill_mode, prompts, params, batch, ids).compile()
    with _DEVICE:
      right.append(np.asarray(program(params, batch, ids)))
  by_task = np.concatenate([x.reshape(len(x), len(tasks), every) for x in right], axis=2)
  return {task.name: by_task[:, i] for i, task in enumerate(tasks)}


def cells(model: RATPlusLM, params: Any, row: Row, tasks: Sequence[Task], free: Sequence[Task] = ()
          ) -> dict[str, dict[str, Any]]:
  """The cells of a row: {task: what every seed scored}; {"blank": why} where no such mode can be."""
  groups: dict[tuple[Mode, Mode | None], list[Task]] = {}
  found: dict[str, dict[str, Any]] = {}
  for task in tasks:
    try:
      groups.setdefault(row.build(task), []).append(task)
    except ValueError as error:
      found[task.name] = {"blank": str(error)}
  for (mode, _), of_mode in groups.items():
    for name, right in which_right(model, params, row, of_mode).items():
      found[name] = {"accuracy": (100 * right.mean(axis=1)).tolist(), "count": COUNT.value,
                     "error_over_examples": (100 * right.std(axis=1) / math.sqrt(COUNT.value)).tolist(),
                     "tokens_read": float(np.mean(rat_jax.tokens_read(model.config, mode, LENGTH.value,
                                                                      prompt_length(row, TASKS[name])))),
                     "right": niah.to_hex(right)}
  for task in free:
    if "blank" not in found[task.name]:
      found[task.name]["free_running_agrees"] = free_running(model, params, row, task, found[task.name])
  return found


def free_running(model: RATPlusLM, params: Any, row: Row, task: Task, cell: dict[str, Any]) -> float:
  """The share of sequences on which greedy decoding and the teacher-forced pass agree (first seed)."""
  (mode, prefill_mode), one = row.build(task), jax.tree.map(lambda x: x[0], params)
  made = jax.tree.map(lambda x: x[:FREE_RUNNING.value], sequences(LENGTH.value, COUNT.value)[task.name])
  start, answer = prompt_length(row, task), LENGTH.value - task.answer_length
  ids, right = jnp.arange(len(made["tokens"]), dtype=jnp.int32), np.ones(len(made["tokens"]), bool)
  logits, cache = rat_jax.prefill(model, one, made["tokens"][:, :start], mode=mode, prefill_mode=prefill_mode,
                                  max_length=LENGTH.value, row_ids=ids)
  if start < answer:
    every, cache = rat_jax.extend(model, one, made["tokens"][:, start:answer], cache)
    logits = every[:, -1]
  for at in range(answer, LENGTH.value):
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    right &= np.asarray(token == made["tokens"][:, at])
    if at + 1 < LENGTH.value:
      logits, cache = rat_jax.decode_step(model, one, token, cache)
  return float(np.mean(niah.from_hex(cell)[0, :len(right)] == right))


def key_of(checkpoint: str, row: Row, task: str) -> str:
  return f"{checkpoint}|{PROMPT_END.value}|{LENGTH.value}|{COUNT.value}|{row.label}|{task}"


def main() -> None:
  folder = common.workdir("eval_niah")
  path = folder / "results.json"
  results = json.loads(path.read_text()) if path.exists() else {}
  unknown = set(TASK_NAMES.value) - TASKS.keys()
  if unknown:
    raise ValueError(f"--tasks={sorted(unknown)} are unknown; use some of {list(TASKS)}.")
  rows = [row for row in niah_table.main_rows(LENGTH.value)
          if not ONLY.value or row.label.startswith(tuple(ONLY.value))]

  def compute(checkpoint, model, params, i, row):
    tasks = [TASKS[name] for name in TASK_NAMES.value if key_of(checkpoint, row, name) not in results]
    checked = list(TASKS.values())[i // 4 % len(TASKS)] if FREE_RUNNING.value and i % 4 == 0 else None
    return row, cells(model, params, row, tasks, [task for task in tasks if task == checked])

  loaded = {checkpoint: niah.load(checkpoint) for checkpoint in CHECKPOINTS.value}
  for checkpoint, (config, params) in loaded.items():
    with concurrent.futures.ThreadPoolExecutor(WORKERS.value) as pool:
      futures = [pool.submit(compute, checkpoint, RATPlusLM(config), params, i, row) for i, row in enumerate(rows)]
      try:
        for future in tqdm(concurrent.futures.as_completed(futures), total=len(rows), desc=checkpoint, unit="row",
                           disable=None):
          row, found = future.result()
          results |= {key_of(checkpoint, row, name): one for name, one in found.items()}
          common.write_json(path, results)
      finally:
        pool.shutdown(cancel_futures=True)
  found = {checkpoint: {row.label: {name: results[key_of(checkpoint, row, name)] for name in TASK_NAMES.value}
                        for row in rows} for checkpoint in CHECKPOINTS.value}
  parts = [niah_report.table(found)]
  if len(found) > 1:
    parts.append(f"differences\n\n{niah_report.differences(found)}")
  if niah_report.blanks(found):
    parts.append(f"blank\n\n{niah_report.blanks(found)}")
  text = "\n\n".join(parts)
  print(f"exact match in percent, mean over {len(TASK_NAMES.value)} tasks +- standard error over seeds,"
        f" {common.device()}\n\n{text}")
  (folder / "table.md").write_text(text + "\n")
  niah_report.draw_budgets(found, folder / "budgets.png")


if __name__ == "__main__":
  common.run(main)
