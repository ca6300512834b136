"""Accuracy on mini-NIAH under many modes and budgets: the table that the claim stands on.

Claim: the same sparse methods at the same budgets lose far less on a backbone with the memory than on one without.
Expected: both at 98 or more under Dense; RAT+ ahead under Quest and MoBA, most at 1/16 on multikey_2, multikey_3
and multivalue.
Cost of three seeds of both: 594 seconds on one H200 with 16 processor cores.
Command: python -m experiments.eval_niah --checkpoint=runs/niah/ratplus --checkpoint=runs/niah/attention
A checkpoint is a folder of seed-* (experiments.sft_niah). All see the same sequences; finished cells are kept.
The paper's own budgets:  --table=paper --length=4096
Words:  --text --table=paper --length=4096 --checkpoint=runs/niah/text, a folder of one model (text_needles.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

import rat_jax
from experiments import common, niah, niah_report, niah_table, text_needles
from experiments.niah_table import Row
from rat_jax import Dense, RATPlusLM, evaluate
from rat_jax.evaluate import mini_niah
from rat_jax.evaluate.mini_niah import TASKS, Task, evaluation_rows
from rat_jax.modes import Mode

CHECKPOINTS = flags.DEFINE_multi_string("checkpoint", None, "Folder of seed-* checkpoints, or several of one arm with"
                                        " commas between; repeat it for other arms.",
                                        required=True)
LENGTH = flags.DEFINE_integer("length", 1024, "Tokens of a sequence.", lower_bound=16)
COUNT = flags.DEFINE_integer("count", 512, "Sequences per task, shared by all checkpoints and seeds.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Sequences at a time.", lower_bound=1)
ONLY = flags.DEFINE_multi_string("only", [], "Rows of the table to compute, by their start, such as \"Quest 16, 1/8\";"
                                 " repeat it for several.")
SKIP = flags.DEFINE_multi_string("skip", [], "Rows to leave out, by any part of their name, such as \"first\";"
                                 " repeat it for several.")
TASK_NAMES = flags.DEFINE_list("tasks", list(TASKS), "Tasks.")
TABLE = flags.DEFINE_enum("table", "main", ["main", "paper"], "Rows: blocks of 8 to 32 tokens, or the paper's of 64.")
PROMPT_END = flags.DEFINE_enum("prompt_end", "main", ["main", "answer"], "main: the prompt ends at the question (MoBA"
                               " in the paper's form and aware SnapKV: at the answer); answer: there for all.")
FREE_RUNNING = flags.DEFINE_integer("free_running", 32, "Sequences that are also decoded greedily, in one or two tasks"
                                    " of some rows.", lower_bound=0)
SPACING = flags.DEFINE_integer("spacing", 0, "Tokens that a needle and the filler after it take at least: 2 D leaves"
                               " half a needle per window of D at most.", lower_bound=0)
NEAR_MISS = flags.DEFINE_float("near_miss", 0.0, "Share of needles whose key differs from the asked one in its last"
                               " symbol alone; of the 96 such keys a row takes about 48 at most.", 0.0, 1.0)
MATCH = flags.DEFINE_bool("match", True, "Leave seeds out that are below 95 in a task under Dense.")
WORKERS = flags.DEFINE_integer("workers", None, "Processes that compute rows. Default: 8 on a GPU, else 1.",
                               lower_bound=1)


def sequences(name: str) -> dict[str, jax.Array]:
  """The sequences of a task, the same for all rows of the table and all checkpoints."""
  return _sequences(*_of_task(name))


def _of_task(name: str) -> tuple[str, int, int, int, float, int]:
  """What the sequences of a task are made from."""
  return name, LENGTH.value, COUNT.value, SPACING.value, NEAR_MISS.value, data_seed()


def data_seed() -> int:
  """The seed of all sequences that are asked."""
  return niah.DATA_SEED + common.SEED.value


@functools.cache
def _sequences(*of_task: Any) -> dict[str, jax.Array]:
  return jax.jit(functools.partial(_batch, *of_task))()


def _batch(name: str, length: int, count: int, spacing: int, near_miss: float, seed: int) -> dict[str, jax.Array]:
  rows = evaluation_rows(TASKS[name], count, spacing=spacing, near_miss=near_miss)
  first_row = list(TASKS).index(name) * count  # as in a batch of all tasks, whichever are asked for
  return mini_niah.batch(rows, length, seed, 0, first_row)


def check_room(names: Sequence[str]) -> None:
  """Raises ValueError for a task that --length has no room for, before anything is computed."""
  for name in names:
    try:
      jax.eval_shape(functools.partial(_batch, *_of_task(name)))
    except ValueError as error:
      raise ValueError(f"--length={LENGTH.value} --spacing={SPACING.value}: {name} has no room; {error}") from error


def prompt_length(row: Row, task: Task) -> int:
  """Where the prompt of --length tokens ends: p, the index of QRY or that of ANS plus one."""
  at_answer = row.at_answer or PROMPT_END.value == "answer"
  return LENGTH.value - task.answer_length - (0 if at_answer else task.query_length)


def which_right(model: RATPlusLM, params: Any, row: Row, tasks: Sequence[Task], draw: int = 0
                ) -> dict[str, np.ndarray]:
  """Which sequences of tasks that share a mode every seed answers: {task: bool [seeds, count]}."""
  mode, prefill_mode = row.build(tasks[0].query_length)
  right = niah.which_right(model, params, [sequences(task.name) for task in tasks],
                           [prompt_length(row, task) for task in tasks], batch_size=BATCH_SIZE.value, draw=draw,
                           mode=mode, prefill_mode=prefill_mode)
  return {task.name: one for task, one in zip(tasks, right, strict=True)}


def cells(model: RATPlusLM, params: Any, row: Row, tasks: Sequence[Task], free: Sequence[Task] = (), draw: int = 0
          ) -> dict[str, dict[str, Any]]:
  """The cells of a row: {task: what every seed scored}; {"blank": why} where no such mode can be."""
  groups: dict[tuple[Mode, Mode | None], list[Task]] = {}
  found: dict[str, dict[str, Any]] = {}
  for task in tasks:
    try:
      groups.setdefault(row.build(task.query_length), []).append(task)
    except ValueError as error:
      found[task.name] = niah_table.blank(error, LENGTH.value)
  for (mode, prefill_mode), of_mode in groups.items():
    sparse = prefill_mode if mode == Dense() and prefill_mode else mode
    for name, right in which_right(model, params, row, of_mode, draw).items():
      found[name] = {"accuracy": (100 * right.mean(axis=1)).tolist(), "count": COUNT.value,
                     "error_over_examples": (100 * right.std(axis=1) / math.sqrt(COUNT.value)).tolist(),
                     "tokens_read": float(np.mean(rat_jax.tokens_read(model.config, sparse, LENGTH.value,
                                                                      prompt_length(row, TASKS[name])))),
                     "right": niah.to_hex(right)}
  for task in free:
    if "blank" not in found[task.name]:
      found[task.name]["free_running"] = free_running(model, params, row, task, found[task.name])
  return found


def free_running(model: RATPlusLM, params: Any, row: Row, task: Task, cell: dict[str, Any]) -> dict[str, float]:
  """What the first seed scores decoding greedily, and the share of sequences on which `cell` agrees with that.

  The scores are those of text: of an answer as its values' numbers, between commas.
  """
  (mode, prefill_mode), one = row.build(task.query_length), jax.tree.map(lambda x: x[0], params)
  made = jax.tree.map(lambda x: x[:FREE_RUNNING.value], sequences(task.name))
  start, answer = prompt_length(row, task), LENGTH.value - task.answer_length
  ids, answers = jnp.arange(len(made["tokens"]), dtype=jnp.int32), list[np.ndarray]()
  logits, cache = rat_jax.prefill(model, one, made["tokens"][:, :start], mode=mode, prefill_mode=prefill_mode,
                                  max_length=LENGTH.value, row_ids=ids)
  if start < answer:
    every, cache = rat_jax.extend(model, one, made["tokens"][:, start:answer], cache)
    logits = every[:, -1]
  for at in range(answer, LENGTH.value):
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    answers.append(np.asarray(token))
    if at + 1 < LENGTH.value:
      logits, cache = rat_jax.decode_step(model, one, token, cache)
  said, asked = np.stack(answers, axis=1), np.asarray(made["tokens"])[:, answer:]
  agrees = niah.from_hex(cell)[0, :len(said)] == (said == asked).all(axis=1)
  predictions = [mini_niah.answer_text(tokens) for tokens in said]
  references = [mini_niah.answer_text(tokens).split(",") for tokens in asked]
  return {"agrees": float(agrees.mean()), "exact_match": evaluate.exact_match(predictions, references),
          "string_match_all": evaluate.string_match_all(predictions, references),
          "comma_recall": evaluate.comma_recall(predictions, references)}


Compute = Callable[[Row, list[str]], dict[str, dict[str, Any]]]


@functools.cache
def opened(checkpoint: str) -> tuple[str, Compute]:
  """(what tells the model and its sequences apart, what makes its cells)."""
  return (text_cells if text_needles.TEXT.value else mini_cells)(checkpoint)


def mini_cells(checkpoint: str) -> tuple[str, Compute]:
  """`opened` for mini-NIAH."""
  config, params = niah.load(checkpoint)

  def compute(row, names):
    free = [TASKS[name] for name in names if decoded(row.label, name)]
    return cells(RATPlusLM(config), params, row, [TASKS[name] for name in names], free)

  return f"{checkpoint} {niah.fingerprint(params)}", compute


def decoded(label: str, name: str) -> int:
  """How many sequences of a cell are also decoded greedily."""
  if text_needles.TEXT.value or label not in niah_table.CHECKED:
    return 0
  one = TASK_NAMES.value[niah_table.CHECKED.index(label) % len(TASK_NAMES.value)]
  return FREE_RUNNING.value if name in (one, "multikey_3") else 0  # multikey_3 is missed most


def options(row: Row | None = None, origin: str = "") -> str:
  """What besides length and count decides about the sequences of a task and their prompts: for words their `origin`."""
  seed = f", seed {common.SEED.value}" if common.SEED.value else ""
  if origin:
    return origin + seed
  end = "answer" if row is not None and row.at_answer else PROMPT_END.value
  return f"{end}, spacing {SPACING.value}, near misses {NEAR_MISS.value}{seed}"


def text_cells(checkpoint: str) -> tuple[str, Compute]:
  """`opened` for tasks in words."""
  model, params, notes = text_needles.load_model(checkpoint)
  examples = text_needles.load(TASK_NAMES.value, COUNT.value, LENGTH.value, data_seed())
  text_needles.check_unseen(TASK_NAMES.value, checkpoint, notes)
  return f"{checkpoint} {niah.fingerprint(params)}", lambda row, names: text_needles.cells(
      model, params, row, {name: examples[name] for name in names}, LENGTH.value, BATCH_SIZE.value)


def rows_to_compute() -> list[Row]:
  """The rows that flags ask for."""
  if text_needles.TEXT.value and (TABLE.value == "main" or PROMPT_END.value == "answer"):
    raise ValueError(f"--text with --table={TABLE.value} --prompt_end={PROMPT_END.value}; text has the paper's rows"
                     " alone (--table=paper), and their prompts end at the answer anyway.")
  every = (niah_table.main_rows if TABLE.value == "main" else niah_table.paper_rows)(LENGTH.value)
  if PROMPT_END.value == "answer":
    every = [row for row in every if not row.at_question]
  rows = [row for row in every if (not ONLY.value or row.label.startswith(tuple(ONLY.value)))
          and not any(part in row.label for part in SKIP.value)]
  if not rows:
    raise ValueError(f"--only={ONLY.value} is the start of no row that --skip={SKIP.value} leaves; the rows are"
                     f" {[row.label for row in every]}.")
  return rows


Job = tuple[str, str, list[str]]


def compute(job: Job) -> dict[str, dict[str, Any]]:
  """The cells of (checkpoint, row's label, tasks)."""
  checkpoint, label, names = job
  row = next(row for row in rows_to_compute() if row.label == label)
  return opened(checkpoint)[1](row, names)


def compute_if_room(job: Job) -> dict[str, dict[str, Any]] | None:
  """`compute`, or None where the device has too little memory for it beside the other processes."""
  try:
    return compute(job)
  except jax.errors.JaxRuntimeError as error:
    if not common.out_of_memory(error):
      raise
    return None


def main() -> None:
  niah.share_device()
  opened.cache_clear()
  if text_needles.TEXT.value:
    text_needles.check_tasks(TASK_NAMES.value)
    common.refuse(("spacing", "near_miss", "free_running"), "they are of mini-NIAH, and --text asks in words; leave it"
                  " out.")
  else:
    niah.check_tasks(TASK_NAMES.value)
    common.refuse(("answer_room", "ruler", "essay", "tokenizer"),
                  "without --text there are no words; give that too, or leave it out.")
  common.refuse(("epochs",), "it is of the training (experiments.sft_niah), and nothing is trained; leave it out.")
  niah.check_names(CHECKPOINTS.value)
  rows, names = rows_to_compute(), TASK_NAMES.value
  folder = common.workdir("eval_niah")
  path = folder / "results.json"
  results = common.read_json(path)
  for one, cell in results.items():
    if not isinstance(cell, dict) or not {"accuracy", "blank"} & cell.keys():
      raise ValueError(f"{path} has no accuracy of {one!r}; move it away to start anew.")
  origins = {name: text_needles.origin(name) if text_needles.TEXT.value else "" for name in names}
  if not text_needles.TEXT.value:
    check_room(names)
  by_label = {row.label: row for row in rows}

  def key(checkpoint, label, name):
    greedy = f"|{decoded(label, name)} decoded" if decoded(label, name) else ""
    about = f"{opened(checkpoint)[0]}, {options(by_label[label], origins[name])}"
    return f"{about}|{LENGTH.value}|{COUNT.value}|{label}|{name}{greedy}"

  every = [(checkpoint, row.label, [name for name in names if key(checkpoint, row.label, name) not in results])
           for checkpoint in CHECKPOINTS.value for row in rows]
  jobs, alone = [job for job in every if job[2]], list[Job]()

  def note(job, found):
    checkpoint, label, _ = job
    results.update({key(checkpoint, label, name): one for name, one in found.items()})
    common.write_json(path, results)
    bar.update()
    if bar.disable:
      print(f"{checkpoint}: {label}", flush=True)

  with tqdm(total=len(jobs), unit="row", disable=None) as bar:
    for i, found in niah.side_by_side(compute_if_room, jobs, WORKERS.value):
      if found is None:
        alone.append(jobs[i])
      else:
        note(jobs[i], found)
    for job in alone:  # by themselves
      note(job, compute(job))
  table = {checkpoint: {row.label: {name: results[key(checkpoint, row.label, name)] for name in names} for row in rows}
           for checkpoint in CHECKPOINTS.value}
  text = niah_report.report(table, MATCH.value)
  scores = sorted({text_needles.score_of(name).__name__ for name in names})
  measure = f"{' and '.join(scores)}, {text_needles.source()}" if text_needles.TEXT.value else "exact match"
  print(f"{measure}, in percent, on {common.device()}\n\n{text}")
  (folder / "table.md").write_text(text + "\n", encoding="utf-8")
  common.write_json(folder / "accuracies.json", niah_report.compact(table), indent=None)
  niah_report.draw_budgets(niah_report.matched(table) if MATCH.value else table, folder / "budgets.png")


if __name__ == "__main__":
  common.run(main)
