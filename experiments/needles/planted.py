"""Needles in words, planted among the tokens of a text: RULER's eight kinds of task, for models with a tokenizer.

A needle is the line "The special magic number for KEY is: VALUE.", a question is that line without its value. Tokens of
needles stand between tokens of the text, at places that are drawn; a row is a pure function of its draw. Needles of a
task are equally long, so that questions and answers of all rows begin at one place and can share a program.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

from rat_jax.data import Tokenizer
from rat_jax.train.loss import IGNORED

ADJECTIVES = ("able big black blue bold bright broad brown calm clean clear cold cool dark dry early fair fine free fresh"
              " full great green hard high hot kind large late light long loud low new old open plain poor proud quick"
              " quiet rare red rich ripe safe sharp short slow small soft strong sweet tall thick thin warm wet wide"
              " wild wise young").split()
NOUNS = ("apple ball bank bear bell bird boat book box bridge cake cat chair child city cloud coat corn cup day dog door"
         " dream farm field fire fish flower garden gate glass gold hill horse house island key king lake lamp leaf"
         " map moon mouse music night ocean paper park pen plant queen rain river road rock room school sea ship snow"
         " song star stone storm street sun table tower tree wall water wind window winter wolf").split()
_OF_EACH = 30  # adjectives and nouns, as many as keys are made of
_NOISE = "\nThe grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclasses.dataclass(frozen=True)
class Task:
  """One of the eight tasks.

  Attributes:
    filler: what lies between needles: a line over and over, a text, or nothing.
    keys: different keys of a row; needles alone fill it.
    values: needles that share a key, all of which are asked for.
    queries: keys that a question asks for.
    key_digits: of a key that is a number; 0 for two words.
    value_digits: of a value.
  """

  name: str
  filler: Literal["noise", "text", "needles"]
  keys: int = 1
  values: int = 1
  queries: int = 1
  key_digits: int = 0
  value_digits: int = 7


TASKS = {task.name: task for task in (
    Task("single_1", "noise"),
    Task("single_2", "text"),
    Task("single_3", "text", value_digits=24),
    Task("multikey_1", "text", keys=8),
    Task("multikey_2", "needles"),
    Task("multikey_3", "needles", key_digits=12, value_digits=24),
    Task("multivalue", "text", values=4),
    Task("multiquery", "text", keys=8, queries=4),
)}

Ids = np.ndarray  # int32 [n]


@dataclasses.dataclass(frozen=True)
class Words:
  """The tokens of the parts of needles. `spell` gives those of texts, all of them of one length."""

  spell: Callable[[Sequence[str]], np.ndarray]
  adjectives: tuple[str, ...]
  nouns: tuple[str, ...]

  def line(self, task: Task, plural: bool = False) -> tuple[Ids, Ids]:
    """What stands before a line's key, and between key and value."""
    numbers, are = ("numbers", " are:") if plural else ("number", " is:")
    return self.spell([f"\nThe special magic {numbers} for"])[0], self.spell([are])[0]

  def keys(self, task: Task, count: int, draw: np.random.Generator) -> np.ndarray:
    """Different keys, int32 [count, n]."""
    if task.key_digits:
      return self.spell([f" {x}" for x in _numbers(task.key_digits, count, draw)])
    pairs = draw.choice(len(self.adjectives) * len(self.nouns), count, replace=False)
    chosen = [divmod(int(pair), len(self.nouns)) for pair in pairs]
    return self.spell([f" {self.adjectives[i]} {self.nouns[j]}" for i, j in chosen])

  def values(self, task: Task, count: int, draw: np.random.Generator) -> np.ndarray:
    """Different values, int32 [count, n]."""
    return self.spell([f" {x}" for x in _numbers(task.value_digits, count, draw)])


def _numbers(digits: int, count: int, draw: np.random.Generator) -> list[str]:
  """Different numbers of so many digits, the first of which is not 0."""
  made: dict[str, None] = {}
  while len(made) < count:
    first, *rest = draw.integers(0, 10, digits)
    made.setdefault("".join(map(str, (1 + int(first) % 9, *rest))))
  return list(made)


def words_of(tokenizer: Tokenizer) -> Words:
  """The parts of needles as the tokenizer has them.

  Raises ValueError for a tokenizer that has too few short words as single tokens, or joins parts of a line.
  """
  def single(words: Sequence[str]) -> tuple[str, ...]:
    ids = tokenizer.encode_batch([f" {word}" for word in words])
    found = tuple(word for word, one in zip(words, ids, strict=True) if len(one) == 1)[:_OF_EACH]
    if len(found) < _OF_EACH:
      raise ValueError(f"--tokenizer={tokenizer}: of {len(words)} short words {len(found)} are single tokens, and"
                       f" {_OF_EACH} are needed; use a tokenizer of words.")
    return found

  words = Words(functools.partial(_spelled, tokenizer), single(ADJECTIVES), single(NOUNS))
  for task in TASKS.values():
    draw = np.random.default_rng(0)
    parts, key, value = words.line(task), words.keys(task, 1, draw)[0], words.values(task, 1, draw)[0]
    joined = [*parts[0], *key, *parts[1], *value, *words.spell(["."])[0]]
    if tokenizer.encode(tokenizer.decode(joined)) != joined:
      raise ValueError(f"--tokenizer={tokenizer} joins parts of {tokenizer.decode(joined)!r} into one token; needles"
                       " cannot be planted with it.")
  return words


def _spelled(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
  ids = tokenizer.encode_batch(texts)
  if len({len(one) for one in ids}) != 1:
    raise ValueError(f"--tokenizer={tokenizer}: {texts[0]!r} and others like it are not equally many tokens; needles"
                     " cannot be planted with it.")
  return np.array(ids, np.int32)


def row(words: Words, task: Task, text: Ids, length: int, questions: int, draw: np.random.Generator
        ) -> dict[str, np.ndarray]:
  """A row of a task: the text with needles, then questions with their answers, about fresh keys.

  Args:
    text: at least `length` tokens, of which the first are taken.
    questions: asked one after another; at most as many as the task has keys for.

  Returns:
    "tokens" and "targets" int32 [length], the next tokens; "answers" bool [length], the targets that are digits of an
    answer; "golden" int32 [length], where the target stands in the context if it is such a digit, -1 elsewhere; "start"
    int32 [], the index of the last answer's first token.

  Raises ValueError for a length without room for questions and needles.
  """
  before, between = words.line(task)
  stop, comma = (words.spell([mark])[0] for mark in (".", ","))
  plural = task.values * task.queries > 1
  q_before, q_between = words.line(task, plural) if plural else (before, between)
  sample = words.keys(task, 1, np.random.default_rng(0)).shape[1], words.values(task, 1, np.random.default_rng(0)).shape[1]
  needle = len(before) + sample[0] + len(between) + sample[1] + len(stop)
  query = len(q_before) + task.queries * (sample[0] + len(comma)) - len(comma) + len(q_between)
  answer = task.queries * task.values * (sample[1] + len(comma)) - len(comma)
  room = length - questions * (query + answer + len(stop)) + len(stop)
  keys = room // needle if task.filler == "needles" else task.keys
  if keys < task.queries or room < keys * task.values * needle:
    raise ValueError(f"length={length} leaves {room} tokens to {task.name} with {questions} questions, too few for"
                     f" needles of {needle}; use a larger length.")
  key, value = words.keys(task, keys, draw), words.values(task, keys * task.values, draw)
  value = value.reshape(keys, task.values, -1)
  context, where = _planted(words, task, text, room, key, value, (before, between, stop), draw)
  tokens, golden = [context], [np.full(room, -1, np.int32)]
  order = draw.permutation(keys)
  for i in range(questions):
    asked = [order[(i * task.queries + j) % keys] for j in range(task.queries)]
    line = list(itertools.chain.from_iterable((key[j], comma) for j in asked))[:-1]
    said = [(value[j, n], where[j, n]) for j in asked for n in np.argsort(where[j])]
    parts = [(q_before, None), *((part, None) for part in line), (q_between, None)]
    for n, (one, at) in enumerate(said):
      parts += [(comma, None)] * bool(n) + [(one, at)]
    parts += [(stop, None)] * (i + 1 < questions)
    for part, at in parts:
      tokens.append(part)
      golden.append(np.full(len(part), -1, np.int32) if at is None else at + np.arange(len(part), dtype=np.int32))
  return _with_targets(np.concatenate(tokens), np.concatenate(golden), words, answer)


def _planted(words: Words, task: Task, text: Ids, room: int, key: np.ndarray, value: np.ndarray,
             marks: tuple[Ids, Ids, Ids], draw: np.random.Generator) -> tuple[Ids, np.ndarray]:
  """(the context [room], where in it each value stands [keys, values])."""
  before, between, stop = marks
  keys, values = value.shape[:2]
  needle = len(before) + key.shape[1] + len(between) + value.shape[2] + len(stop)
  if task.filler == "text":
    filler = text[:room - keys * values * needle]
  else:
    filler = np.resize(words.spell([_NOISE])[0], room - keys * values * needle)
  places, owner = np.sort(draw.integers(0, len(filler) + 1, keys * values)), draw.permutation(keys * values)
  parts, where, last, at = [], np.zeros((keys, values), np.int32), 0, 0
  for place, one in zip(places, owner, strict=True):
    i, j = divmod(int(one), values)
    parts += [filler[last:place], before, key[i], between, value[i, j], stop]
    at += int(place) - last
    where[i, j] = at + len(before) + key.shape[1] + len(between)
    at, last = at + needle, int(place)
  return np.concatenate([*parts, filler[last:]]).astype(np.int32), where


def _with_targets(tokens: Ids, golden: Ids, words: Words, answer: int) -> dict[str, np.ndarray]:
  """What `row` returns; the space before a number, if it is a token of its own, is no digit of it."""
  space = words.spell([" 1", " 2"])
  shared = space[0, 0] if space.shape[1] > 1 and space[0, 0] == space[1, 0] else -1
  golden = np.where(tokens == shared, -1, golden)
  following = np.append(tokens[1:], IGNORED).astype(np.int32)
  golden = np.append(golden[1:], -1).astype(np.int32)
  return {"tokens": tokens, "targets": following, "answers": golden >= 0, "golden": golden,
          "start": np.int32(len(tokens) - answer)}


def answer_length(words: Words, task: Task) -> int:
  """Tokens of an answer."""
  digits = words.values(task, 1, np.random.default_rng(0)).shape[1]
  comma = len(words.spell([","])[0])
  return task.queries * task.values * (digits + comma) - comma


def question_length(words: Words, task: Task) -> int:
  """Tokens of a question, without its answer."""
  before, between = words.line(task, task.values * task.queries > 1)
  key = words.keys(task, 1, np.random.default_rng(0)).shape[1]
  comma = len(words.spell([","])[0])
  return len(before) + task.queries * (key + comma) - comma + len(between)


def rows(words: Words, tasks: Sequence[Task], texts: np.ndarray, seed: int, step: int, length: int,
         questions: int = 8) -> dict[str, np.ndarray]:
  """Rows of a batch, one for each of `tasks` and of the texts [rows, length]; `questions` at most in each."""
  made = [row(words, task, text, length, max(1, min(questions, task.keys // task.queries if task.filler != "needles"
                                                    else questions)), np.random.default_rng([seed, step, i]))
          for i, (task, text) in enumerate(zip(tasks, texts, strict=True))]
  return {name: np.stack([one[name] for one in made]) for name in made[0]}


def check_tasks(names: Sequence[str], flag: str) -> list[Task]:
  """The tasks of these names. Raises ValueError for unknown ones."""
  unknown = sorted(set(names) - TASKS.keys())
  if unknown:
    raise ValueError(f"--{flag}={','.join(names)}: {unknown} are unknown; use some of {list(TASKS)}.")
  return [TASKS[name] for name in names]


def into_batch(words: Words, tasks: Sequence[Task], weight: float, seed: int, step: int,
               batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """A batch of text whose last rows, one for each task, are needles in their text; of these only digits of answers
  count, so much each."""
  tokens, targets = batch["tokens"], batch["targets"]
  made = rows(words, tasks, tokens[-len(tasks):], seed, step, tokens.shape[1])
  weights = np.ones(tokens.shape, np.float32)
  weights[-len(tasks):] = weight * made["answers"]
  return {"tokens": np.concatenate([tokens[:-len(tasks)], made["tokens"]]),
          "targets": np.concatenate([targets[:-len(tasks)], made["targets"]]), "weights": weights}
