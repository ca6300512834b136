"""The questions of mini-NIAH that all models are asked, and who answers them, for `eval_niah` and `hypotheses`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import rat_jax
from experiments.needles import rows, seeds
from experiments.needles.rows import Row
from experiments.shared import command
from rat_jax import Dense, RATPlusLM, evaluate
from rat_jax.evaluate import mini_niah
from rat_jax.evaluate.mini_niah import TASKS, Task, evaluation_rows
from rat_jax.modes import Mode


@dataclasses.dataclass(frozen=True, kw_only=True)
class Questions:
  """What is asked, and how; the fields are named as flags, whose help says what they are.

  Attributes:
    seed: --seed; `data_seed` is that of the sequences.
    free_running: sequences of a cell that are also decoded greedily, where that is asked for.
  """

  length: int
  count: int
  batch_size: int
  seed: int = 0
  spacing: int = 0
  near_miss: float = 0.0
  prompt_end: str = "main"
  free_running: int = 0

  @property
  def data_seed(self) -> int:
    """The seed of all sequences that are asked."""
    return seeds.DATA_SEED + self.seed

  def sequences(self, name: str) -> dict[str, jax.Array]:
    """The sequences of a task, the same for all rows of the table and all checkpoints."""
    return _sequences(*self._of_task(name))

  def check_room(self, names: Sequence[str]) -> None:
    """Raises ValueError for a task that --length has no room for, before anything is computed."""
    for name in names:
      try:
        jax.eval_shape(functools.partial(_batch, *self._of_task(name)))
      except ValueError as error:
        raise ValueError(f"--length={self.length} --spacing={self.spacing}: {name} has no room; {error}") from error

  def _of_task(self, name: str) -> tuple[str, int, int, int, float, int]:
    """What the sequences of a task are made from."""
    return name, self.length, self.count, self.spacing, self.near_miss, self.data_seed

  def prompt_length(self, row: Row, task: Task) -> int:
    """Where the prompt of --length tokens ends: p, the index of QRY or that of ANS plus one."""
    at_answer = row.at_answer or self.prompt_end == "answer"
    return self.length - task.answer_length - (0 if at_answer else task.query_length)

  def options(self, row: Row | None = None) -> str:
    """What besides length and count decides about the sequences of a task and their prompts."""
    end = "answer" if row is not None and row.at_answer else self.prompt_end
    return f"{end}, spacing {self.spacing}, near misses {self.near_miss}{of_seed(self.seed)}"


def of_seed(seed: int) -> str:
  """--seed, where it tells cells apart."""
  return f", seed {seed}" if seed else ""


@functools.cache
def _sequences(*of_task: Any) -> dict[str, jax.Array]:
  return jax.jit(functools.partial(_batch, *of_task))()


def _batch(name: str, length: int, count: int, spacing: int, near_miss: float, seed: int) -> dict[str, jax.Array]:
  asked = evaluation_rows(TASKS[name], count, spacing=spacing, near_miss=near_miss)
  first_row = list(TASKS).index(name) * count  # as in a batch of all tasks, whichever are asked for
  return mini_niah.batch(asked, length, seed, 0, first_row)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(command.Settings):
  """Of the commands that ask trained models."""

  checkpoint: tuple[str, ...]
  length: int
  count: int
  batch_size: int
  match: bool
  workers: int | None

  @property
  def asked(self) -> Questions:
    return Questions(length=self.length, count=self.count, batch_size=self.batch_size, seed=self.seed)


def define_flags() -> None:
  """All of `Settings`."""
  flags.DEFINE_multi_string("checkpoint", None, "Folder of seed-* checkpoints, or several of one arm with commas"
                            " between; repeat it for other arms.", required=True)
  flags.DEFINE_integer("length", 1024, "Tokens of a sequence.", lower_bound=16)
  flags.DEFINE_integer("count", 512, "Sequences per task, shared by all checkpoints and seeds.", lower_bound=1)
  flags.DEFINE_integer("batch_size", 16, "Sequences at a time.", lower_bound=1)
  flags.DEFINE_bool("match", True, "Leave seeds out that are below 95 in a task under Dense.")
  flags.DEFINE_integer("workers", None, "Processes that compute rows. Default: 8 on a GPU, else 1.", lower_bound=1)


def which_right(asked: Questions, model: RATPlusLM, params: Any, row: Row, tasks: Sequence[Task], draw: int = 0
                ) -> dict[str, np.ndarray]:
  """Which sequences of tasks that share a mode every seed answers: {task: bool [seeds, count]}."""
  mode, prefill_mode = row.build(tasks[0].query_length)
  right = seeds.which_right(model, params, [asked.sequences(task.name) for task in tasks],
                            [asked.prompt_length(row, task) for task in tasks], batch_size=asked.batch_size, draw=draw,
                            mode=mode, prefill_mode=prefill_mode)
  return {task.name: one for task, one in zip(tasks, right, strict=True)}


def cells(asked: Questions, model: RATPlusLM, params: Any, row: Row, tasks: Sequence[Task], free: Sequence[Task] = (),
          draw: int = 0) -> dict[str, dict[str, Any]]:
  """The cells of a row: {task: what every seed scored}; {"blank": why} where no such mode can be.

  The tasks `free` are also decoded greedily.
  """
  groups: dict[tuple[Mode, Mode | None], list[Task]] = {}
  found: dict[str, dict[str, Any]] = {}
  for task in tasks:
    try:
      groups.setdefault(row.build(task.query_length), []).append(task)
    except ValueError as error:
      found[task.name] = rows.blank(error, asked.length)
  for (mode, prefill_mode), of_mode in groups.items():
    sparse = prefill_mode if mode == Dense() and prefill_mode else mode
    for name, right in which_right(asked, model, params, row, of_mode, draw).items():
      read = rat_jax.tokens_read(model.config, sparse, asked.length, asked.prompt_length(row, TASKS[name]))
      found[name] = seeds.cell_of(right, float(np.mean(read)))
  for task in free:
    if "blank" not in found[task.name]:
      found[task.name]["free_running"] = free_running(asked, model, params, row, task, found[task.name])
  return found


def free_running(asked: Questions, model: RATPlusLM, params: Any, row: Row, task: Task, cell: dict[str, Any]
                 ) -> dict[str, float]:
  """What the first seed scores decoding greedily, and the share of sequences on which `cell` agrees with that.

  The scores are those of text: of an answer as its values' numbers, between commas.
  """
  (mode, prefill_mode), one = row.build(task.query_length), jax.tree.map(lambda x: x[0], params)
  made = jax.tree.map(lambda x: x[:asked.free_running], asked.sequences(task.name))
  start, answer = asked.prompt_length(row, task), asked.length - task.answer_length
  ids, answers = jnp.arange(len(made["tokens"]), dtype=jnp.int32), list[np.ndarray]()
  logits, cache = rat_jax.prefill(model, one, made["tokens"][:, :start], mode=mode, prefill_mode=prefill_mode,
                                  max_length=asked.length, row_ids=ids)
  if start < answer:
    every, cache = rat_jax.extend(model, one, made["tokens"][:, start:answer], cache)
    logits = every[:, -1]
  for at in range(answer, asked.length):
    token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    answers.append(np.asarray(token))
    if at + 1 < asked.length:
      logits, cache = rat_jax.decode_step(model, one, token, cache)
  said, right = np.stack(answers, axis=1), np.asarray(made["tokens"])[:, answer:]
  agrees = seeds.from_hex(cell)[0, :len(said)] == (said == right).all(axis=1)
  predictions = [mini_niah.answer_text(tokens) for tokens in said]
  references = [mini_niah.answer_text(tokens).split(",") for tokens in right]
  return {"agrees": float(agrees.mean()), "exact_match": evaluate.exact_match(predictions, references),
          "string_match_all": evaluate.string_match_all(predictions, references),
          "comma_recall": evaluate.comma_recall(predictions, references)}
