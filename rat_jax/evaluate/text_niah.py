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
import random
import re
import uuid
from collections.abc import Callable, Iterable
from typing import Any, Literal, Protocol

from rat_jax.paths import local_path

_NOISE = ("The lamp is lit.", "Rain falls on the roof.", "Somebody walks up the stairs.", "A door closes.",
          "Then all is quiet again.")
_SYLLABLES = tuple(a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "el", "or"))


class Tokenizer(Protocol):
  """Anything that turns text into numbers."""

  def encode(self, text: str) -> list[int]: ...


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
  """Examples of a task whose prompts fill `length - answer_room` tokens as far as whole words go, or whole needles.

  Every example is drawn from (seed, task, its number), however many there are; needles stand at uniform places between
  sentences.

  Args:
    length: tokens of prompt and answer.
    essay: the text around needles, for the tasks that want one; it is read from a random sentence on, to its end and
      again from its start, each sentence at most once.

  Raises:
    ValueError: an essay too short for the haystack, or without words; an answer longer than `answer_room`, no room for
      the needles.
    ImportError: `wonderwords` is missing.
  """
  sentences = [part for sentence in re.split(r"(?<=[.!?])\s+", " ".join(essay.split())) for part in _parts(sentence)]
  return [_example(task, index, length - answer_room, tokenizer, sentences, answer_room,
                   random.Random(f"{seed}/{task.name}/{index}")) for index in range(count)]


def _parts(sentence: str, most: int = 40) -> list[str]:
  """A sentence in parts of at most so many words: a text without stops fills a haystack too."""
  words = sentence.split()
  return [" ".join(words[i:i + most]) for i in range(0, len(words), most)]


def write_jsonl(path: str | os.PathLike[str], made: Iterable[dict[str, Any]]) -> None:
  """Writes examples as RULER does, one JSON object a line."""
  local_path(path, "path").write_text("".join(json.dumps(one) + "\n" for one in made), "utf-8")


@functools.cache
def _words() -> tuple[list[str], list[str]]:
  try:
    import wonderwords
  except ImportError as error:
    raise ImportError("keys of text needles come from wonderwords; pip install -e '.[needles]'.") from error
  lists = wonderwords.RandomWord()
  adjectives, nouns = (lists.filter(include_categories=[kind]) for kind in ("adjective", "noun"))

  def plain(words: Iterable[str]) -> list[str]:
    return sorted({word.lower() for word in words if word.isalpha() and word.isascii()})

  return plain(adjectives), plain(nouns)


def _key(task: TextTask, draw: random.Random) -> str:
  if task.key == "uuid":
    return _uuid(draw)
  adjectives, nouns = _words()
  return f"{draw.choice(adjectives)}-{draw.choice(nouns)}"


def _value(task: TextTask, draw: random.Random) -> str:
  return _uuid(draw) if task.value == "uuid" else str(draw.randint(10**6, 10**7 - 1))


def _uuid(draw: random.Random) -> str:
  return str(uuid.UUID(int=draw.getrandbits(128), version=4))


def _distinct(make: Callable[[], str], count: int) -> list[str]:
  made: dict[str, None] = {}
  while len(made) < count:
    made.setdefault(make())
  return list(made)


def _noun(task: TextTask, count: int) -> str:
  return ("number" if task.value == "number" else "code") + "s" * (count > 1)


def _example(task: TextTask, index: int, room: int, tokenizer: Tokenizer, sentences: list[str], answer_room: int,
             draw: random.Random) -> dict[str, Any]:
  """The largest prompt of this draw that takes at most `room` tokens, as an example."""
  keys = task.keys if task.haystack != "needles" else max(room // 6, 1)  # a needle takes seven words
  pool = _distinct(lambda: _key(task, draw), keys)
  values = _distinct(lambda: _value(task, draw), keys * task.values)
  needles = [(key, values[i * task.values + j]) for i, key in enumerate(pool) for j in range(task.values)]
  if task.haystack == "essay":
    first = draw.randrange(max(len(sentences), 1))
    filler = sentences[first:] + sentences[:first]
  else:
    filler = [_NOISE[i % len(_NOISE)] for i in range(room if task.haystack == "noise" else 0)]
  places = draw.getrandbits(64)

  def made(size: int, end: str = "") -> tuple[str, str, list[str]]:
    return _assemble(task, needles, filler, size, random.Random(f"{places}/{size}"), end)

  def tokens(size: int, end: str = "") -> int:
    text, prefix, _ = made(size, end)
    return len(tokenizer.encode(text + prefix))

  least, most = (task.queries, len(needles)) if task.haystack == "needles" else (0, len(filler))
  if tokens(least) > room:
    raise ValueError(f"{task.name}: needles and question take {tokens(least)} tokens, and there is room for {room}; use"
                     " a larger length.")
  size = bisect.bisect_right(range(least, most + 1), room, key=tokens) - 1 + least
  if task.haystack == "essay" and size == 0 and most:
    raise ValueError(f"{task.name}: no part of the essay fits into {room} tokens; give a text with words, or a larger"
                     " length.")
  if task.haystack == "essay" and size == most:
    raise ValueError(f"{task.name}: the essay of {most} sentences fills {tokens(most)} of {room} tokens; give a longer"
                     " text.")
  words = " ".join(filler[size:size + 1]).split()
  ends = [" ".join(words[:n]) for n in range(max(len(words), 1))]  # what may still fit of the next sentence
  end = ends[bisect.bisect_right(ends, room, lo=1, key=lambda end: tokens(size, end)) - 1]
  text, prefix, answers = made(size, end)
  prompt = text + prefix  # with which an answer is encoded, for alone it may have other tokens
  answer = len(tokenizer.encode(f"{prompt} {', '.join(answers)}")) - len(tokenizer.encode(prompt))
  if answer > answer_room:
    raise ValueError(f"{task.name}: an answer takes {answer} tokens, more than answer_room={answer_room}.")
  length = tokens(size, end) + answer_room
  return {"index": index, "input": text, "outputs": answers, "length": length, "length_w_model_temp": length,
          "answer_prefix": prefix, "token_position_answer": len(tokenizer.encode(text[:text.index(answers[0])]))}


def _assemble(task: TextTask, needles: list[tuple[str, str]], filler: list[str], size: int, draw: random.Random,
              end: str) -> tuple[str, str, list[str]]:
  """(prompt, the start of its answer, the answers): `size` sentences of filler and `end`, or `size` needles alone."""
  used = draw.sample(needles, size if task.haystack == "needles" else len(needles))
  body = filler[:size]
  at = sorted(draw.randint(0, len(body)) for _ in used)  # places between sentences
  for place, (key, value) in zip(reversed(at), reversed(used), strict=True):
    body.insert(place, f"The {_noun(task, 1)} kept for {key} is {value}.")
  body += [end] if end else []
  keys = draw.sample(sorted({key for key, _ in used}), task.queries)
  answers = [value for wanted in keys for key, value in used if key == wanted]
  noun, verb = _noun(task, len(answers)), "are" if len(answers) > 1 else "is"
  of = " and ".join([", ".join(keys[:-1]), keys[-1]]) if len(keys) > 1 else keys[0]
  start = f"Some {_noun(task, 2)} are hidden in the text below. Keep them in mind: you will be asked for them."
  question = f"Which {noun} {verb} kept for {of} in the text?"
  return f"{start}\n{' '.join(body)}\n{question}", f" The {noun} kept for {of} in the text {verb}", answers
