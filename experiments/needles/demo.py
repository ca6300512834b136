"""Two small trained models, of equal size, find needles under sparse attention that neither was trained for.

The models lie in experiments/checkpoints, whose README says how they were trained and chosen.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rat_jax
from experiments.needles.questions import Questions, which_right
from experiments.needles.rows import Row
from experiments.shared.chosen import chosen_keys
from rat_jax import Dense, Dilated, MoBA, Quest, RATPlusLM, SnapKV, visible
from rat_jax.evaluate.mini_niah import TASKS
from rat_jax.modes import Mode

FOLDER = pathlib.Path(__file__).parents[1] / "checkpoints"
MODELS = {"RAT+": "ratplus", "attention": "attention"}
TASKS_ASKED = ("multikey_1", "multikey_2", "multikey_3", "multiquery")
LENGTH = 512
_TOGETHER = 8  # questions of each task that are answered at a time
_COMPILERS = 2  # threads: most of the time is compiling, of which XLA does little in parallel


@dataclasses.dataclass(frozen=True)
class Shipped:
  """A trained model: `params` with an axis of one seed in front, as the needle programs take them."""

  model: RATPlusLM
  params: Any

  @property
  def size(self) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(self.params))


def shipped() -> dict[str, Shipped]:
  """{name: the model}, computing in float32."""
  found = {}
  for name, folder in MODELS.items():
    config, params = rat_jax.load_pretrained(FOLDER / folder)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32)[None], params)
    found[name] = Shipped(RATPlusLM(dataclasses.replace(config, dtype="float32", param_dtype="float32")), params)
  return found


def rows() -> dict[str, Row]:
  """{label: what is asked}: every method at 1/8 and 1/16 of the keys; prompts are dense, but for Dilated."""
  found = {"Dense": _row("Dense", Dense)}
  for share in (8, 16):
    budget = LENGTH // share
    for name, build in (("Quest", functools.partial(Quest, budget, block=8)),
                        ("MoBA", functools.partial(MoBA, budget // 8, block=8)),
                        ("SnapKV", functools.partial(SnapKV, budget, obs_window=8)),
                        ("Dilated", functools.partial(Dilated, share))):
      label = f"{name}, 1/{share}"
      found[label] = _row(label, build, prompt=Dense() if name == "MoBA" else None, at_answer=name == "SnapKV")
  return found


def _row(label: str, build: Callable[[], Mode], prompt: Mode | None = None, at_answer: bool = False) -> Row:
  return Row(label, lambda question: (build(), prompt), at_answer)


@dataclasses.dataclass(frozen=True)
class Answered:
  """What a model scored under a mode.

  Attributes:
    keys: that the query of the first answered token reads, the mean over layers.
    accuracy: {task: percent}.
  """

  row: str
  model: str
  mode: Mode
  keys: float
  accuracy: dict[str, float]

  @property
  def mean(self) -> float:
    return float(np.mean(list(self.accuracy.values())))


def answers(models: dict[str, Shipped], count: int, seed: int = 0) -> Iterator[Answered]:
  """What every model answers to `count` questions of each task, mode by mode."""
  asked = Questions(length=LENGTH, count=count, batch_size=min(count, _TOGETHER) * len(TASKS_ASKED), seed=seed)
  tasks = [TASKS[name] for name in TASKS_ASKED]

  def answered(job: tuple[tuple[str, Row], tuple[str, Shipped]]) -> Answered:
    (label, row), (name, one) = job
    mode, _ = row.build(tasks[0].query_length)
    right = which_right(asked, one.model, one.params, row, tasks)
    keys = rat_jax.tokens_read(one.model.config, mode, LENGTH, asked.prompt_length(row, tasks[0]))
    return Answered(label, name, mode, float(np.mean(keys)),
                    {task: 100 * float(found.mean()) for task, found in right.items()})

  with ThreadPoolExecutor(_COMPILERS) as pool:
    list(pool.map(asked.sequences, TASKS_ASKED))  # once, before several threads ask for the same
    yield from pool.map(answered, itertools.product(rows().items(), models.items()))


@dataclasses.dataclass(frozen=True)
class Reads:
  """What the query of the first answered symbol reads in one head, under every mode.

  Attributes:
    needle: the positions of the asked needle's value, as (first, last).
    layer, head: of which it is.
    seen: {label: bool [LENGTH]}.
  """

  needle: tuple[int, int]
  layer: int
  head: int
  query: int
  seen: dict[str, np.ndarray]


def reads(one: Shipped, seed: int = 0) -> Reads:
  """The first question of multikey_2 at 1/16, in the head whose Quest chooses the needle's block, the first if none."""
  asked, task = Questions(length=LENGTH, count=1, batch_size=1, seed=seed), TASKS["multikey_2"]
  made = asked.sequences(task.name)
  query = int(made["answer"][0]) - 1  # the index of ANS, whose next token is the answer's first symbol
  golden = np.asarray(made["golden"])[0]
  golden = golden[golden >= 0]
  params = jax.tree.map(lambda leaf: leaf[0], one.params)
  shown = {label: row for label, row in rows().items() if label == "Dense" or label.endswith("1/16")}
  with ThreadPoolExecutor(_COMPILERS) as pool:
    chosen = dict(zip(shown, pool.map(
        lambda row: _read_by(one, params, made["tokens"], row, asked, query), shown.values()), strict=True))
  hits = chosen["Quest, 1/16"][:, :, golden[0]]
  layer, head = divmod(int(hits.argmax()), hits.shape[1])
  seen = {label: of_heads[min(layer, len(of_heads) - 1), min(head, of_heads.shape[1] - 1)]
          for label, of_heads in chosen.items()}
  return Reads((int(golden.min()), int(golden.max())), layer, head, query, seen)


def _read_by(one: Shipped, params: Any, tokens: jax.Array, row: Row, asked: Questions, query: int) -> np.ndarray:
  """Which keys the query reads in every layer and head, bool [layers, heads, LENGTH]; one of each where all agree."""
  task = TASKS["multikey_2"]
  mode, prefill_mode = row.build(task.query_length)
  if not mode.chooses:
    return np.asarray(visible(mode, np.array([query]), np.arange(LENGTH)))[None]
  chosen = chosen_keys(one.model, params, tokens, mode, asked.prompt_length(row, task), prefill_mode)
  return chosen[:, :, query]
