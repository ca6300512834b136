"""What `sft_niah` trains on: stages of the curriculum, from short sequences to long ones, and the batches of each."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared import inputs
from rat_jax.data import BYTES, TokenFile
from rat_jax.evaluate import mini_niah
from rat_jax.evaluate.mini_niah import TASKS, Rows
from rat_jax.train import IGNORED

DEFAULT_STAGES = "128x128,256x64,512x48,1024x32"
_DEFAULT_SHARES = ("0.6", "0.7", "0.75")
MIXTURE = {"single_1": 3, "single_2": 3, "single_3": 5, "multikey_1": 4, "multikey_2": 10, "multikey_3": 16,
           "multivalue": 14, "multiquery": 9}  # rows of 64
_COUNT = 32  # questions per task and evaluation


@dataclasses.dataclass(frozen=True)
class Stage:
  """A part of the curriculum, at `length` tokens and `rows` sequences a batch."""
  length: int
  rows: int
  until: int  # the batch by which it ends
  tasks: tuple[str, ...]

  @property
  def mixture(self) -> tuple[Rows, ...]:
    """The mixture scaled to the stage's rows, two of every task at least: some questions packed, and a single one."""
    chosen = {name: MIXTURE[name] for name in self.tasks}
    if self.rows < 2 * len(chosen):
      raise ValueError(f"--stages={self.length}x{self.rows} has less than two rows for each of {len(chosen)} tasks; use"
                       " more rows, or fewer --tasks.")
    exact = {name: n * self.rows / sum(chosen.values()) for name, n in chosen.items()}
    counts = {name: max(2, int(x)) for name, x in exact.items()}
    while sum(counts.values()) > self.rows:
      counts[max((name for name, n in counts.items() if n > 2), key=lambda name: counts[name] - exact[name])] -= 1
    while sum(counts.values()) < self.rows:
      counts[max(exact, key=lambda name: exact[name] - counts[name])] += 1
    return mini_niah.training_rows(counts, self.length)

  @property
  def questions(self) -> tuple[Rows, ...]:
    """What is asked meanwhile: of every task so many single questions."""
    return tuple(Rows(TASKS[name], _COUNT) for name in self.tasks)

  def check_room(self) -> None:
    """Raises ValueError for a stage with too few tokens or rows."""
    rows = (*self.mixture, *self.questions)
    try:
      mini_niah.check_room(rows, self.length)
    except ValueError as error:
      raise ValueError(f"--stages={self.length}x{self.rows}: {error}") from error


def sizes(given: Sequence[str], default: str = DEFAULT_STAGES) -> list[tuple[int, int]]:
  """(length, rows) of every stage of --stages; of the default where none is given."""
  try:
    found = [(int(length), int(rows)) for length, rows in (x.split("x") for x in given or default.split(","))]
    if min(map(min, found)) < 1:
      raise ValueError("a stage of nothing")
  except ValueError as error:
    raise ValueError(f"--stages={','.join(given)}; write each as length x rows, such as 256x64.") from error
  return found


def stages(given: Sequence[str], shares: Sequence[str] | None, tasks: Sequence[str], steps: int) -> list[Stage]:
  """The curriculum of --stages and --shares over `steps` batches. Raises ValueError where they or tasks do not fit."""
  of_stage = sizes(given)
  if shares is None:
    shares = () if given else _DEFAULT_SHARES
  if len(shares) != len(of_stage) - 1:
    raise ValueError(f"--shares={','.join(shares)} for {len(of_stage)} stages; give one share less than stages.")
  try:
    parts = [float(share) for share in shares]
  except ValueError as error:
    raise ValueError(f"--shares={','.join(shares)}; write each as a number, such as 0.6.") from error
  if parts != sorted(parts) or not all(0 < part < 1 for part in parts):
    raise ValueError(f"--shares={','.join(shares)}; they must rise from above 0 to below 1.")
  ends = [round(part * steps) for part in parts] + [steps]
  plan = [Stage(length, rows, end, tuple(tasks)) for (length, rows), end in zip(of_stage, ends, strict=True)]
  for stage in plan:
    stage.check_room()
  return plan


def text_beside(lm_data: pathlib.Path, longest: int, folder: pathlib.Path) -> TokenFile:
  """The text of --lm_data, prepared in `folder` if it is not yet; for rows of up to `longest` tokens.

  Raises ValueError for text that is not bytes, or too short.
  """
  file = inputs.corpus(lm_data, folder)["train"]
  if file.sidecar.tokenizer != BYTES.name:
    raise ValueError(f"--lm_data={lm_data} has the tokenizer {file.sidecar.tokenizer}; use {BYTES.name}.")
  if len(file.tokens) <= longest + 1:
    raise ValueError(f"--lm_data={lm_data} has {len(file.tokens)} tokens; a row takes {longest + 1}, use more.")
  return file


def batch_of(stage: Stage, seed: jax.Array | int, step: jax.Array | int, *text: jax.Array | np.ndarray,
             lm_weight: float, lm_rows: int) -> dict[str, jax.Array]:
  """The batch [B, T] of a step and a seed; answers weigh as much as they are rare, rows of `text` as much again.

  Args:
    text: tokens, of which windows are read; none of it without.
    lm_weight: of the loss over all tokens beside that over answers.
    lm_rows: of text.
  """
  made = mini_niah.batch(stage.mixture, stage.length, seed, step)
  answers, counted = made["answers"], made["targets"] != IGNORED
  weights = answers / jnp.maximum(jnp.sum(answers), 1) + lm_weight * counted / jnp.sum(counted)
  batch = {"tokens": made["tokens"], "targets": made["targets"], "weights": weights}
  if text:
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), step)  # `mini_niah.batch` folds `step` alone
    starts = jax.random.randint(key, (lm_rows,), 0, len(text[0]) - stage.length - 1)
    rows = jax.vmap(lambda at: jax.lax.dynamic_slice(text[0], (at,), (stage.length + 1,)))(starts).astype(jnp.int32)
    targets = jnp.where(rows[:, :-1] == BYTES.eod_id, IGNORED, rows[:, 1:])
    counted = targets != IGNORED
    read = {"tokens": rows[:, :-1], "targets": targets, "weights": counted / jnp.sum(counted)}
    batch = {name: jnp.concatenate([batch[name], read[name]]) for name in batch}
  return batch
