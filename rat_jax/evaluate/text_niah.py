"""Needle tasks in words, shaped like RULER's eight: its kinds of keys, values and haystacks, in our own sentences.

A prompt is an introduction, a haystack with needles in it, and a question; its answer is the values that belong to
the asked keys. Examples are dicts with the fields of RULER's files, so `load_ruler` reads what `write_jsonl` writes.
What is measured on them is no RULER score. Word lists come from the `wonderwords` package.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import json
import os
import pathlib
import random
import uuid
from collections.abc import Iterable
from typing import Any, Literal, Protocol

_NOISE = ("The lamp is lit.", "Rain falls on the roof.", "Somebody walks up the stairs.", "A door closes.",
          "Then all is quiet again.")
_SYLLABLES = tuple(a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "el", "or"))


class Tokenizer(Protocol):
  """Anything that turns text into numbers and back."""

  def encode(self, text: str) -> list[int]: ...

  def decode(self, ids: list[int]) -> str: ...


@dataclasses.dataclass(frozen=True)
class TextTask:
  """One of the eight tasks: what lies between needles, what keys and values are, and how many of everything."""

  name: str
  haystack: Literal["noise", "essay", "needles"]
  key: Literal["words", "uuid"] = "words"
  value: Literal["number", "uuid"] = "number"
  keys: int = 1
  values: int = 1
  queries: int = 1


TEXT_TASKS = {task.name: task for task in (
    TextTask("single_1", "noise"),
    TextTask("single_2", "essay"),
    TextTask("single_3", "essay", value="uuid"),
    TextTask("multikey_1", "essay", keys=4),
    TextTask("multikey_2", "needles"),
    TextTask("multikey_3", "needles", key="uuid", value="uuid"),
    TextTask("multivalue", "essay", values=4),
    TextTask("multiquery", "essay", keys=4, queries=4),
)}


def pseudo_essay(seed: int, words: int) -> str:
  """Sentences of made-up words, for want of an essay: a pure function of the seed."""
  draw = random.Random(seed)
  vocabulary = ["".join(draw.choices(_SYLLABLES, k=draw.randint(1, 3))) for _ in range(2000)]
  text, count = [], 0
  while count < words:
    sentence = [vocabulary[min(int(draw.expovariate(0.005)), 1999)] for _ in range(draw.randint(5, 16))]
    count += len(sentence)
    text.append(" ".join(sentence).capitalize() + ".")
  return " ".join(text)


def examples(task: TextTask, count: int, length: int, tokenizer: Tokenizer, *, essay: str = "", seed: int = 0,
             answer_room: int = 128) -> list[dict[str, Any]]:
  """Examples of a task whose prompts fill `length - answer_room` tokens as far as whole words or sentences go.

  Every example is a function of (seed, task, its number) alone; needles stand at uniform places between sentences.

  Args:
    length: tokens of prompt and answer.
    essay: the text around needles, for the tasks that want one; it is read from a random sentence on, to its end and
      again from its start, each sentence at most once.

  Raises:
    ValueError: an essay too short for the haystack, an answer longer than `answer_room`, no room for the needles.
    ImportError: `wonderwords` is missing.
  """
  sentences = [part.strip() + "." for part in essay.replace("\n", " ").split(".") if part.strip()]
  return [_example(task, index, length - answer_room, tokenizer, sentences, answer_room,
                   random.Random(f"{seed}/{task.name}/{index}")) for index in range(count)]


def write_jsonl(path: str | os.PathLike, made: Iterable[dict[str, Any]]) -> None:
  """Writes examples as RULER does, one JSON object a line."""
  pathlib.Path(path).write_text("".join(json.dumps(one) + "\n" for one in made))


@functools.cache
def _words() -> tuple[list[str], list[str]]:
  try:
    import wonderwords
  except ImportError as error:
    raise ImportError("keys of text needles come from wonderwords; run `pip install 'rat_jax[needles]'`.") from error
  lists = wonderwords.RandomWord()
  adjectives, nouns = (lists.filter(include_categories=[kind]) for kind in ("adjective", "noun"))
  plain = lambda words: sorted({word.lower() for word in words if word.isalpha() and word.isascii()})
  return plain(adjectives), plain(nouns)


def _key(kind: str, draw: random.Random) -> str:
  if kind == "uuid":
    return _uuid(draw)
  adjectives, nouns = _words()
  return f"{draw.choice(adjectives)}-{draw.choice(nouns)}"


def _uuid(draw: random.Random) -> str:
  return str(uuid.UUID(int=draw.getrandbits(128), version=4))


def _distinct(make, count: int) -> list[str]:
  made: dict[str, None] = {}
  while len(made) < count:
    made.setdefault(make())
  return list(made)


def _needle(task: TextTask, key: str, value: str) -> str:
  return f"The {_noun(task, 1)} kept for {key} is {value}."


def _noun(task: TextTask, count: int) -> str:
  return ("number" if task.value == "number" else "code") + "s" * (count > 1)


def _example(task: TextTask, index: int, room: int, tokenizer: Tokenizer, sentences: list[str], answer_room: int,
             draw: random.Random) -> dict[str, Any]:
  value_of = (lambda: str(draw.randint(10**6, 10**7 - 1))) if task.value == "number" else (lambda: _uuid(draw))
  asked_count = task.queries * task.values
  pool = _distinct(lambda: _key(task.key, draw), task.keys if task.haystack != "needles" else max(room // 8, 1))
  values = _distinct(value_of, len(pool) * task.values)
  needles = [(key, values[i * task.values + j]) for i, key in enumerate(pool) for j in range(task.values)]
  noun = _noun(task, asked_count)
  start = "Some " + _noun(task, 2) + " are hidden in the text below. Keep them in mind: you will be asked for them."

  def question(keys: list[str]) -> tuple[str, str]:
    of = " and ".join([", ".join(keys[:-1]), keys[-1]]) if len(keys) > 1 else keys[0]
    ask = f"Which {noun} {'are' if asked_count > 1 else 'is'} kept for {of} in the text?"
    return ask, f" The {noun} kept for {of} in the text {'are' if asked_count > 1 else 'is'}"

  def assembled(size: int) -> tuple[str, str, list[tuple[str, str]]]:
    """The prompt with `size` sentences (needles-only: needles), its answer's start, and the needles in it."""
    local = random.Random(f"{places}/{size}")
    if task.haystack == "needles":
      used = local.sample(needles[:size], size)
      body = [_needle(task, *one) for one in used]
    else:
      used = list(needles)
      body = [_NOISE[i % len(_NOISE)] for i in range(size)] if task.haystack == "noise" else [
          sentences[(offset + i) % len(sentences)] for i in range(size)]
      at = sorted(local.randint(0, size) for _ in used)
      local.shuffle(used)
      for place, one in zip(reversed(at), reversed(used), strict=True):
        body.insert(place, _needle(task, *one))
    keys = list(dict.fromkeys(key for key, _ in sorted(used)))
    local.shuffle(keys)
    ask, prefix = question(keys[:task.queries])
    chosen = [(key, value) for wanted in keys[:task.queries] for key, value in used if key == wanted]
    return f"{start}\n{' '.join(body)}\n{ask}", prefix, chosen

  places, offset = draw.getrandbits(64), draw.randrange(max(len(sentences), 1))
  most = len(needles) if task.haystack == "needles" else room if task.haystack == "noise" else len(sentences)
  tokens_at = lambda size: len(tokenizer.encode("".join(assembled(size)[:2])))
  least = task.queries if task.haystack == "needles" else 0
  if tokens_at(least) > room:
    raise ValueError(f"{task.name}: needles and question take {tokens_at(least)} tokens, and there is room for {room};"
                     " use a larger length.")
  size = bisect.bisect_right(range(least, most + 1), room, key=tokens_at) - 1 + least
  if task.haystack == "essay" and size == most:
    raise ValueError(f"{task.name}: the essay of {len(sentences)} sentences fills {tokens_at(most)} of {room} tokens;"
                     " give a longer text.")
  text, prefix, chosen = assembled(size)
  answers = [value for _, value in chosen]
  answer = len(tokenizer.encode(", ".join(answers)))
  if answer > answer_room:
    raise ValueError(f"{task.name}: an answer takes {answer} tokens, more than answer_room={answer_room}.")
  used = len(tokenizer.encode(text + prefix))
  before = text[:text.index(answers[0])]
  return {"index": index, "input": text, "outputs": answers, "length": used + answer_room,
          "length_w_model_temp": used + answer_room, "answer_prefix": prefix,
          "token_position_answer": len(tokenizer.encode(before))}
