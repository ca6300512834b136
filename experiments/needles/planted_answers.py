"""What a model answers to planted needles: a prompt up to the answer, then the answer's steps under the mode."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rat_jax
from experiments.needles import planted, rows, seeds
from experiments.needles.planted import Words
from experiments.needles.rows import Row
from rat_jax import Dense, RATPlusLM
from rat_jax.axes import Params
from rat_jax.data import TokenFile
from rat_jax.evaluate.text_niah import TextTask
from rat_jax.modes import Mode


@dataclasses.dataclass(frozen=True)
class Asked:
  """The rows that all models are asked, with one question each.

  Attributes:
    text: of which windows of `length` tokens hold the needles.
    count: rows of a task.
    batch_size: rows at a time.
    seed: of the rows.
  """

  words: Words
  text: TokenFile
  length: int
  count: int
  batch_size: int
  seed: int

  def sequences(self, task: TextTask) -> dict[str, np.ndarray]:
    """The rows of a task, the same for every model and mode: `planted.rows`."""
    return _sequences(self, task)


@functools.cache
def _sequences(asked: Asked, task: TextTask) -> dict[str, np.ndarray]:
  number = list(planted.TASKS).index(task.name)
  texts = asked.text.batch(number, batch_size=asked.count, length=asked.length, seed=asked.seed)["tokens"]
  return planted.rows(asked.words, [task] * asked.count, texts, asked.seed, number, asked.length, questions=1)


def cells(asked: Asked, model: RATPlusLM, params: Params, row: Row, tasks: Sequence[TextTask]
          ) -> dict[str, dict[str, Any]]:
  """The cells of a row: {task: what the model scored}; {"blank": why} where no such mode can be."""
  found: dict[str, dict[str, Any]] = {}
  most = max(planted.lengths(asked.words, task).answer for task in planted.TASKS.values())
  for task in tasks:
    size = planted.lengths(asked.words, task)
    try:
      mode, prefill_mode = row.build(size.question)
    except ValueError as error:
      found[task.name] = rows.blank(error, asked.length)
      continue
    right = which_right(asked, model, params, task, mode, prefill_mode, most)[None]
    prompt = asked.length - size.answer
    sparse = prefill_mode if mode == Dense() and prefill_mode else mode
    read = rat_jax.tokens_read(model.config, sparse, asked.length, prompt)
    found[task.name] = seeds.cell_of(right, float(np.mean(read)))
  return found


def which_right(asked: Asked, model: RATPlusLM, params: Params, task: TextTask, mode: Mode, prefill_mode: Mode | None,
                most: int) -> np.ndarray:
  """Which rows are answered wholly right, bool [count], teacher forced, in a program for answers of `most` tokens."""
  made, found = asked.sequences(task), []
  for first in range(0, asked.count, asked.batch_size):
    part = {name: one[first:first + asked.batch_size] for name, one in made.items()}
    size = len(part["tokens"])
    part = {name: np.pad(one, [(0, asked.batch_size - size)] + [(0, 0)] * (one.ndim - 1), "edge")
            for name, one in part.items()}
    answer = jnp.int32(asked.length - part["start"][0])
    ids = first + np.arange(asked.batch_size, dtype=np.int32)
    found.append(np.asarray(_right(model, mode, prefill_mode, most, params, part["tokens"], part["targets"],
                                   part["answers"], answer, ids))[:size])
  return np.concatenate(found)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _right(model: RATPlusLM, mode: Mode, prefill_mode: Mode | None, most: int, params: Params, tokens: jax.Array,
           targets: jax.Array, answers: jax.Array, answer: jax.Array, row_ids: jax.Array) -> jax.Array:
  """Which rows [B] are right whose last `answer` tokens are an answer, `most` at most."""
  count, length = tokens.shape
  start = length - answer
  # Prompts of all tasks are an array of one width, which is filled up after a prompt's end.
  width = length - 1
  prompt = jnp.where(jnp.arange(width) < start, tokens[:, :-1], 0)
  logits, cache = rat_jax.prefill(model, params, prompt, jnp.full(count, start), mode=mode, prefill_mode=prefill_mode,
                                  max_length=length + most, row_ids=row_ids)

  def following(x: jax.Array, first: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(jnp.pad(x, ((0, 0), (0, most))), first, size, axis=1)

  of_steps, _ = rat_jax.extend(model, params, following(tokens, start, most), cache, jnp.full(count, answer - 1))
  predicted = jnp.concatenate([jnp.argmax(logits, axis=-1)[:, None], jnp.argmax(of_steps, axis=-1)], axis=1)
  expected, counted = (following(x, start - 1, most + 1) for x in (targets, answers))
  return jnp.all((predicted == expected) | ~counted, axis=1)
