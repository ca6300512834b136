"""Needles in words, planted among the tokens of a text: RULER's eight kinds of task, for models with a tokenizer.

A needle is the line "The special magic number for KEY is: VALUE.", a question is that line without its value. Tokens of
needles stand between tokens of the text, at places that are drawn; a row is a pure function of its draw. Needles of a
task are equally long, so that questions and answers of all rows begin at one place and can share a program.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rat_jax.data import Tokenizer
from rat_jax.evaluate.text_niah import TEXT_TASKS, TextTask
from rat_jax.train.loss import IGNORED

ADJECTIVES = ("able", "big", "black", "blue", "bold", "bright", "broad", "brown", "calm", "clean", "clear", "cold",
              "cool", "dark", "dry", "early", "fair", "fine", "free", "fresh", "full", "great", "green", "hard",
              "high", "hot", "kind", "large", "late", "light", "long", "loud", "low", "new", "old", "open", "plain",
              "poor", "proud", "quick", "quiet", "rare", "red", "rich")
NOUNS = ("apple", "ball", "bank", "bear", "bell", "bird", "boat", "book", "box", "bridge", "cake", "cat", "chair",
         "child", "city", "cloud", "coat", "corn", "cup", "day", "dog", "door", "dream", "farm", "field", "fire",
         "fish", "flower", "garden", "gate", "glass", "gold", "hill", "horse", "house", "island", "key", "king",
         "lake", "lamp", "leaf", "map", "moon", "mouse")
_OF_EACH = 30  # adjectives and nouns, as many as keys are made of
_NOISE = "\nThe grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

# The tasks are those of `text_niah` in other words, with eight keys where these have four. What is a UUID there is a
# longer number here, as those of one length are equally many tokens.
_KEYS, _KEY_DIGITS, _DIGITS = 8, 12, {"number": 7, "uuid": 24}  # keys of a row; digits of a key, of a value
TASKS = {name: task if task.keys == 1 else dataclasses.replace(task, keys=_KEYS) for name, task in TEXT_TASKS.items()}

Ids = np.ndarray  # int32 [n]


@dataclasses.dataclass(frozen=True)
class Words:
  """The tokens of the parts of needles. `spell` gives those of texts, which all have equally many: int32 [texts, n]."""

  spell: Callable[[Sequence[str]], np.ndarray]
  adjectives: tuple[str, ...]
  nouns: tuple[str, ...]

  def mark(self, text: str) -> Ids:
    """The tokens of a part that all needles have."""
    return self.spell([text])[0]

  def keys(self, task: TextTask, count: int, draw: np.random.Generator) -> np.ndarray:
    """Different keys, int32 [count, n]."""
    if task.key == "uuid":
      return self.spell(_numbers(_KEY_DIGITS, count, draw))
    pairs = draw.choice(len(self.adjectives) * len(self.nouns), count, replace=False)
    chosen = [divmod(int(pair), len(self.nouns)) for pair in pairs]
    return self.spell([f" {self.adjectives[i]} {self.nouns[j]}" for i, j in chosen])

  def values(self, task: TextTask, count: int, draw: np.random.Generator) -> np.ndarray:
    """Different values, int32 [count, n]."""
    return self.spell(_numbers(_DIGITS[task.value], count, draw))


@dataclasses.dataclass(frozen=True)
class Lengths:
  """How many tokens there are in each needle, question without its answer, and answer of a task."""

  needle: int
  question: int
  answer: int


@functools.cache
def lengths(words: Words, task: TextTask) -> Lengths:
  """Those of all rows of a task."""
  draw = np.random.default_rng(0)
  key, value, comma = words.keys(task, 1, draw).size, words.values(task, 1, draw).size, words.mark(",").size
  before, between = _line(task)
  needle = words.mark(_BEFORE).size + key + words.mark(_BETWEEN).size + value + words.mark(".").size
  question = words.mark(before).size + task.queries * (key + comma) - comma + words.mark(between).size
  return Lengths(needle, question, task.queries * task.values * (value + comma) - comma)


_BEFORE, _BETWEEN = "\nThe special magic number for", " is:"


def _line(task: TextTask) -> tuple[str, str]:
  """What stands before the keys of a question, and after them."""
  return (_BEFORE.replace("number", "numbers"), " are:") if task.queries * task.values > 1 else (_BEFORE, _BETWEEN)


def _numbers(digits: int, count: int, draw: np.random.Generator) -> list[str]:
  """Different numbers of so many digits, the first of which is not 0, each after a space."""
  made: dict[str, None] = {}
  while len(made) < count:
    first, *rest = draw.integers(0, 10, digits)
    made.setdefault("".join(map(str, (" ", 1 + int(first) % 9, *rest))))
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
    parts = [words.mark(_BEFORE), words.keys(task, 1, draw)[0], words.mark(_BETWEEN), words.values(task, 1, draw)[0],
             words.mark(".")]
    joined = np.concatenate(parts).tolist()
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


def row(words: Words, task: TextTask, text: Ids, length: int, questions: int, draw: np.random.Generator
        ) -> dict[str, np.ndarray]:
  """A row of a task: the text with needles, then questions with their answers, about other keys as far as there are.

  Args:
    text: at least `length` tokens, of which the first are taken.
    questions: asked one after another.

  Returns:
    "tokens" and "targets" int32 [length], the next tokens; "answers" bool [length], the targets that are digits of an
    answer; "golden" int32 [length], where the target stands in the context if it is such a digit, -1 elsewhere; "start"
    int32 [], the index of the last answer's first token.

  Raises ValueError for a length without room for questions and needles.
  """
  size, stop = lengths(words, task), words.mark(".")
  room = length - questions * (size.question + size.answer + stop.size) + stop.size
  keys = room // size.needle if task.haystack == "needles" else task.keys
  if keys < task.queries or room < keys * task.values * size.needle:
    raise ValueError(f"length={length} leaves {room} tokens to {task.name} with {questions} questions, too few for"
                     f" needles of {size.needle}; use a larger length.")
  key = words.keys(task, keys, draw)
  value = words.values(task, keys * task.values, draw).reshape(keys, task.values, -1)
  context, where = _planted(words, task, text, room, key, value, draw)
  before, between = map(words.mark, _line(task))
  order, parts = draw.permutation(keys), [(context, -1)]
  for i in range(questions):
    asked = [order[(i * task.queries + j) % keys] for j in range(task.queries)]
    said = [(value[j, n], where[j, n]) for j in asked for n in np.argsort(where[j])]
    parts += [(stop, -1)] * (i > 0) + [(before, -1)] + _listed(words, [(key[j], -1) for j in asked])
    parts += [(between, -1)] + _listed(words, said)
  tokens = np.concatenate([part for part, _ in parts])
  golden = np.concatenate([np.full(part.size, -1) if at < 0 else at + np.arange(part.size) for part, at in parts])
  return _with_targets(words, tokens, golden) | {"start": np.array(length - size.answer, np.int32)}


def _listed(words: Words, parts: Sequence[tuple[Ids, int]]) -> list[tuple[Ids, int]]:
  """The parts with commas between them."""
  return [one for part in parts for one in ((words.mark(","), -1), part)][1:]


def _planted(words: Words, task: TextTask, text: Ids, room: int, key: np.ndarray, value: np.ndarray,
             draw: np.random.Generator) -> tuple[Ids, np.ndarray]:
  """(the context [room], where in it each value stands [keys, values])."""
  keys, values = value.shape[:2]
  needles = [np.concatenate([words.mark(_BEFORE), key[i], words.mark(_BETWEEN), value[i, j], words.mark(".")])
             for i in range(keys) for j in range(values)]
  size = needles[0].size
  free = room - len(needles) * size
  filler = text[:free] if task.haystack == "essay" else np.resize(words.mark(_NOISE), free)
  places, order = np.sort(draw.integers(0, free + 1, len(needles))), draw.permutation(len(needles))
  pieces = np.split(filler, places)
  parts = [x for piece, one in zip(pieces, order, strict=False) for x in (piece, needles[one])]
  starts = np.empty(len(needles), np.int64)
  starts[order] = places + size * np.arange(len(needles))
  before_value = size - value.shape[2] - words.mark(".").size
  return np.concatenate([*parts, pieces[-1]]), (starts + before_value).reshape(keys, values)


def _with_targets(words: Words, tokens: Ids, golden: np.ndarray) -> dict[str, np.ndarray]:
  """What `row` returns of tokens; the space before a number, where it is a token of its own, is no digit of it."""
  one, two = words.spell([" 1", " 2"])
  golden = np.where((tokens == one[0]) & (one[0] == two[0]), -1, golden)
  golden = np.append(golden[1:], -1).astype(np.int32)
  return {"tokens": tokens, "targets": np.append(tokens[1:], IGNORED).astype(np.int32), "answers": golden >= 0,
          "golden": golden}


def rows(words: Words, tasks: Sequence[TextTask], texts: np.ndarray, seed: int, step: int, length: int,
         questions: int = 8) -> dict[str, np.ndarray]:
  """Rows of a batch, one for each of `tasks` and of the texts [rows, length]; questions of fresh keys, at most so many.
  """
  made = []
  for i, (task, text) in enumerate(zip(tasks, texts, strict=True)):
    asked = questions if task.haystack == "needles" else min(questions, task.keys // task.queries)
    made.append(row(words, task, text, length, asked, np.random.default_rng([seed, step, i])))
  return {name: np.stack([one[name] for one in made]) for name in made[0]}


def check_tasks(names: Sequence[str], flag: str) -> list[TextTask]:
  """The tasks of these names. Raises ValueError for unknown ones."""
  unknown = sorted(set(names) - TASKS.keys())
  if unknown or not names:
    raise ValueError(f"--{flag}={','.join(names)}: {unknown} are unknown; use some of {list(TASKS)}.")
  return [TASKS[name] for name in names]


def into_batch(words: Words, tasks: Sequence[TextTask], weight: float, seed: int, step: int,
               batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """A batch of text whose last rows, one for each task, are needles in their text; of these only digits of answers
  count, so much each."""
  tokens, targets = batch["tokens"], batch["targets"]
  made = rows(words, tasks, tokens[-len(tasks):], seed, step, tokens.shape[1])
  weights = np.ones(tokens.shape, np.float32)
  weights[-len(tasks):] = weight * made["answers"]
  return {"tokens": np.concatenate([tokens[:-len(tasks)], made["tokens"]]),
          "targets": np.concatenate([targets[:-len(tasks)], made["targets"]]), "weights": weights}
