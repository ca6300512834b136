"""Mini-NIAH: RULER's eight needle tasks over a small alphabet, for models of a few million parameters.

A needle is `NDL key IS value END`, a sequence `BOS context (QRY key (SEP key)* ANS value (SEP value)* EOS)+`. The
context fills the length exactly; needles stand anywhere in it, not aligned to blocks; keys are distinct. Values of one
key are answered in document order, several keys in the order of the query.

Batches are made on the device and are a pure function of (seed, step): every row has random numbers of its own, so
that neither the size of a batch nor the number of devices changes a row. The generator ranks by comparison rather
than sort, and draws one array of numbers per row, which keeps it quick to compile.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rat_jax.axes import Array
from rat_jax.train.loss import IGNORED

PAD, BOS, EOS, NDL, IS, END, QRY, ANS, SEP = range(9)
KEYS, VALUES, FILLERS = (16, 96), (112, 96), (208, 48)  # (first id, how many); ids 9..15 are reserved
VOCAB_SIZE = 256
_PARAGRAPH = 12  # tokens of the paragraph that "repeated" filler repeats


@dataclasses.dataclass(frozen=True)
class Task:
  """One of the eight tasks: symbols in a key and a value, what lies between needles, and how many of everything.

  Attributes:
    keys: different keys in the context when it is evaluated; needles-only tasks fill the context.
    values: needles that share a key, all of which are asked for.
    queries: keys that a question asks for.
  """

  name: str
  key_length: int
  value_length: int
  filler: Literal["repeated", "markov", "needles"]
  keys: int = 1
  values: int = 1
  queries: int = 1

  @property
  def needle_length(self) -> int:
    """Tokens of a needle: NDL, key, IS, value, END."""
    return self.key_length + self.value_length + 3

  @property
  def query_length(self) -> int:
    """Tokens from QRY to ANS, both included."""
    return self.queries * (self.key_length + 1) + 1

  @property
  def answer_length(self) -> int:
    """Tokens after ANS, EOS included."""
    return self.queries * self.values * (self.value_length + 1)


TASKS = {task.name: task for task in (
    Task("single_1", 1, 2, "repeated"),
    Task("single_2", 1, 2, "markov"),
    Task("single_3", 1, 6, "markov"),
    Task("multikey_1", 1, 2, "markov", keys=4),
    Task("multikey_2", 2, 2, "needles"),
    Task("multikey_3", 4, 6, "needles"),
    Task("multivalue", 1, 2, "markov", values=4),
    Task("multiquery", 1, 2, "markov", keys=4, queries=4),
)}


@dataclasses.dataclass(frozen=True)
class Rows:
  """So many rows of one kind in a batch.

  Attributes:
    questions: asked one after another at the end of a row, about fresh keys as far as there are any.
    keys: (least, most) different keys of a row, drawn uniformly; None: the task's own number. In needles-only tasks
      `full` is the share of rows that are filled with needles, and the others draw from 1 to that many.
    spacing: a needle and the filler after it take at least so many tokens: 2 * D leaves at most half a needle per
      window of D.
    near_miss: the share of needles whose key differs from the first question's in its last symbol alone; of the 96
      such keys there are, half at most.
  """

  task: Task
  count: int
  questions: int = 1
  keys: tuple[int, int] | None = None
  full: float = 1.0
  spacing: int = 0
  near_miss: float = 0.0

  def __post_init__(self) -> None:
    for name, least in (("count", 1), ("questions", 1), ("spacing", 0)):
      if getattr(self, name) < least:
        raise ValueError(f"Rows: {name}={getattr(self, name)}; use {least} or more.")
    for name in ("full", "near_miss"):
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(f"Rows: {name}={getattr(self, name)}; use a share from 0 to 1.")
    if self.keys is not None and not self.task.queries <= self.keys[0] <= self.keys[1]:
      raise ValueError(f"Rows: keys={self.keys}; give (least, most), {self.task.queries} at least, as {self.task.name}"
                       " asks for so many.")


def evaluation_rows(task: Task, count: int, **options: Any) -> tuple[Rows, ...]:
  """A batch of one task as it is evaluated: one question, the task's own number of needles."""
  return (Rows(task, count, **options),)


def training_rows(counts: Mapping[str, int], length: int) -> tuple[Rows, ...]:
  """A training mixture {task: rows} of `length` tokens. One third of the rows of a task hold a single question.

  The others hold up to 8 (4 where an answer has four values), which take a quarter of the row at most: what they take
  is lost to needles, and with few needles an answer is found without looking at the key.

  Needles vary: 1 to 8 keys among filler (4 to 16 where a question asks for four), and needles-only rows are full with
  a probability of 0.6.
  """
  rows = []
  for name, count in counts.items():
    task = TASKS[name]
    single = round(count / 3)
    keys = None if task.filler == "needles" else (4, 16) if task.queries > 1 else (1, 8)
    most = 4 if task.values * task.queries > 1 else 8
    questions = max(1, min(most, length // 4 // (task.query_length + task.answer_length)))
    rows += [Rows(task, n, q, keys, 0.6) for n, q in ((count - single, questions), (single, 1)) if n]
  return tuple(rows)


def check_room(rows: tuple[Rows, ...], length: int) -> None:
  """Raises ValueError for a length without room for the questions and one needle, and for more keys than there are."""
  for kind in rows:
    room = _room(kind, length)
    least = (kind.keys[0] if kind.keys else kind.task.keys) * kind.task.values
    if room < least * max(kind.task.needle_length, kind.spacing):
      raise ValueError(f"length={length} leaves {room} tokens of context to {kind.task.name} with {kind.questions}"
                       f" questions, too few for {least} needles; use a larger length or fewer questions.")
    if kind.task.key_length == 1 and max(kind.keys or (0, kind.task.keys)) > KEYS[1]:
      raise ValueError(f"keys={kind.keys}: {kind.task.name} has keys of one symbol, of which there are {KEYS[1]}.")


def _room(kind: Rows, length: int) -> int:
  """Tokens of context, needles and filler, of a row."""
  return length - 1 - kind.questions * (kind.task.query_length + kind.task.answer_length)


def batch(rows: tuple[Rows, ...], length: int, seed: Array | int, step: Array | int, first_row: int = 0
          ) -> dict[str, Array]:
  """The batch of a step; `rows` and `length` are static under `jit`.

  With `first_row` it is the part of a larger batch that begins with that row.

  Returns:
    "tokens", "targets" int32 [B, T]: the targets are the next tokens, -100 after a row's end;
    "answers" bool [B, T]: the targets that are symbols of an answer to a fresh question, SEP and EOS included;
    "golden" int32 [B, T]: where in the context the target stands, if it is a symbol of an asked value; -1 elsewhere;
    "question", "answer" int32 [B]: the index of the last question's QRY, and of its ANS plus 1;
    "task" int32 [B]: the task's number in TASKS.

  Raises:
    ValueError: no rows; rows that `check_room` refuses.
  """
  if not rows:
    raise ValueError("rows is empty; give at least one Rows.")
  check_room(rows, length)
  key = jax.random.fold_in(jax.random.key(seed), step)
  places = first_row + jnp.arange(sum(kind.count for kind in rows), dtype=jnp.int32)
  keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(places)
  enough = (2 * length + KEYS[1] + 3,)  # for every task
  uniform = jax.vmap(lambda k: jax.random.uniform(k, enough, jnp.float32))(keys)
  repeated = np.repeat([kind.task.filler == "repeated" for kind in rows], [kind.count for kind in rows])
  filler = jnp.where(repeated[:, None], _repeated(uniform[:, :length]), _markov(uniform[:, :length]))
  parts, first = [], 0
  for kind in rows:
    of_kind = slice(first, first + kind.count)
    of_row = functools.partial(_row, kind, _room(kind, length))
    parts.append(jax.vmap(of_row)(filler[of_kind], uniform[of_kind, length:]))
    first += kind.count
  made = {name: jnp.concatenate([part[name] for part in parts]) for name in parts[0]}
  tokens = made["tokens"]
  targets = jnp.concatenate([tokens[:, 1:], jnp.full_like(tokens[:, :1], IGNORED)], axis=1)
  order = list(TASKS)
  made["task"] = jnp.asarray(np.repeat([order.index(kind.task.name) for kind in rows], [kind.count for kind in rows]),
                             jnp.int32)
  return made | {"targets": targets}


def answer_text(tokens: Array) -> str:
  """The tokens [n] after ANS as text, for scores of text: symbols as three digits, values apart by commas, to EOS."""
  ids = np.asarray(tokens).tolist()
  return "".join("," if token == SEP else f"{token:03}" for token in ids[:ids.index(EOS) if EOS in ids else None])


def _repeated(uniform: Array) -> Array:
  """Filler of uniform numbers [B, T]: a random paragraph per row, over and over."""
  paragraph = FILLERS[0] + _integers(uniform[:, :_PARAGRAPH], FILLERS[1])
  return jnp.take(paragraph, jnp.arange(uniform.shape[1], dtype=jnp.int32) % _PARAGRAPH, axis=1)


def _markov(uniform: Array) -> Array:
  """Filler of uniform numbers [B, T]: a Markov chain of four successors each, x -> 5 x + (1, 2, 3 or 4), modulo 48.

  In closed form, x_t = 5^t (x_0 + sum of 5^-s step_s): the powers of 5 modulo 48 repeat after four.
  """
  power, inverse = np.resize([1, 5, 25, 29], uniform.shape[1]), np.resize([1, 29, 25, 5], uniform.shape[1])
  start = _integers(uniform[:, :1], FILLERS[1])
  steps = jnp.concatenate([start, (1 + _integers(uniform[:, 1:], 4)) * inverse[1:]], axis=1)
  return FILLERS[0] + (jnp.asarray(power) * (jnp.cumsum(steps, axis=1) % FILLERS[1])) % FILLERS[1]


def _row(kind: Rows, room: int, filler: Array, uniform: Array) -> dict[str, Array]:
  task, length = kind.task, filler.shape[0]
  unit = max(task.needle_length, kind.spacing)
  most = room // unit // task.values  # different keys that fit
  if kind.keys is not None:
    most = min(most, kind.keys[1])
  elif task.filler != "needles":
    most = min(most, task.keys)
  needles = most * task.values
  sizes = {"count": 2, "place": needles, "prefix": most * (task.key_length - 1), "last": KEYS[1], "offset": most,
           "value": needles * task.value_length, "ask": most, "near": most}
  cuts = np.cumsum([0, *sizes.values()])
  assert cuts[-1] <= uniform.shape[0]
  u = {name: uniform[start:stop] for name, start, stop in zip(sizes, cuts[:-1], cuts[1:], strict=True)}

  count = _key_count(kind, most, u["count"])
  keys = _keys(task, most, count, u, kind.near_miss)
  values = VALUES[0] + _integers(u["value"], VALUES[1]).reshape(most, task.values, task.value_length)
  starts = _starts(unit, room, task.values, count, u["place"].reshape(most, task.values))
  context = _write_needles(task, filler.astype(jnp.int32), keys, values, starts)
  tokens, answers, golden = _write_questions(kind, context, keys, values, starts, count, u["ask"], room)
  last = length - task.query_length - task.answer_length
  return {"tokens": tokens, "answers": answers, "golden": golden, "question": jnp.int32(last),
          "answer": jnp.int32(last + task.query_length)}


def _integers(uniform: Array, below: Array | int) -> Array:
  return jnp.minimum((uniform * below).astype(jnp.int32), below - 1)


def _ranks(x: Array, valid: Array | None = None) -> Array:
  """How many (valid) entries of x [n] come before each one, ties by index."""
  index = jnp.arange(x.shape[0], dtype=jnp.int32)
  before = (x[None] < x[:, None]) | ((x[None] == x[:, None]) & (index[None] < index[:, None]))
  return jnp.sum(before if valid is None else before & valid[None], axis=1, dtype=jnp.int32)


def _key_count(kind: Rows, most: int, uniform: Array) -> Array:
  """How many keys a row has."""
  least = min(kind.keys[0] if kind.keys else 1, most)
  drawn = least + _integers(uniform[0], most - least + 1)
  if kind.task.filler == "needles":
    return jnp.where(uniform[1] < kind.full, most, drawn)
  return drawn if kind.keys is not None else jnp.int32(most)


def _keys(task: Task, most: int, count: Array, u: dict[str, Array], near_miss: float) -> Array:
  """Distinct keys, int32 [most, key_length]: free symbols, and a last one that no key of equal symbols before has."""
  prefix = _integers(u["prefix"], KEYS[1]).reshape(most, task.key_length - 1)
  if task.key_length > 1 and near_miss:
    asked = jnp.argmin(jnp.where(jnp.arange(most, dtype=jnp.int32) < count, u["ask"], 2.0))  # the first question's
    near = u["near"] < near_miss
    near &= jnp.cumsum(near) <= KEYS[1] // 2  # the rest of this prefix's keys is for those that have it anyway
    prefix = jnp.where(near[:, None], prefix[asked], prefix)
  same = jnp.all(prefix[:, None] == prefix[None], axis=-1)
  number = jnp.arange(most, dtype=jnp.int32)
  earlier = jnp.sum(same & (number[None] < number[:, None]), axis=1)
  offset = _integers(u["offset"], KEYS[1])[jnp.argmax(same, axis=1)]  # one for all keys of a prefix
  last = _ranks(u["last"])[(offset + earlier) % KEYS[1]]
  return KEYS[0] + jnp.concatenate([prefix, last[:, None]], axis=1)


def _starts(unit: int, room: int, values: int, count: Array, uniform: Array) -> Array:
  """Where needles start, int32 [keys, values], sorted along values; those of absent keys lie outside the row."""
  valid = jnp.broadcast_to(jnp.arange(uniform.shape[0], dtype=jnp.int32)[:, None] < count, uniform.shape)
  free = room - count * values * unit  # filler tokens; a needle has a uniform number of them before it
  flat, valid = uniform.reshape(-1), valid.reshape(-1)
  starts = (_integers(flat, free + 1) + _ranks(flat, valid) * unit).reshape(uniform.shape)
  order = jax.vmap(_ranks)(starts)
  ordered = jnp.zeros_like(starts).at[jnp.arange(starts.shape[0], dtype=jnp.int32)[:, None], order].set(starts)
  return jnp.where(jnp.arange(uniform.shape[0], dtype=jnp.int32)[:, None] < count, 1 + ordered, 1 << 20)


def _write_needles(task: Task, context: Array, keys: Array, values: Array, starts: Array) -> Array:
  many, per_key = starts.shape

  def mark(token: int) -> Array:
    return jnp.full((many, per_key, 1), token, jnp.int32)

  key = jnp.broadcast_to(keys[:, None], (many, per_key, task.key_length))
  needle = jnp.concatenate([mark(NDL), key, mark(IS), values, mark(END)], axis=-1)
  at = starts[..., None] + jnp.arange(task.needle_length, dtype=jnp.int32)
  return context.at[jnp.minimum(at, context.shape[0])].set(needle, mode="drop").at[0].set(BOS)


def _write_questions(kind: Rows, context: Array, keys: Array, values: Array, starts: Array, count: Array,
                     uniform: Array, room: int) -> tuple[Array, Array, Array]:
  """Tokens with the questions in their place; which targets are fresh answers; where in the context each one stands."""
  task = kind.task
  many = keys.shape[0]
  present = jnp.arange(many, dtype=jnp.int32) < count
  rank = jnp.where(present, _ranks(uniform, present), many)
  asked = jnp.zeros(many, jnp.int32).at[rank].set(jnp.arange(many, dtype=jnp.int32), mode="drop")  # keys in their order
  turn = np.arange(kind.questions * task.queries).reshape(kind.questions, task.queries)
  chosen = asked[turn % count]

  def lines(symbols: Array, between: int, close: int) -> Array:  # [questions, n, m] -> [questions, n * (m + 1)]
    ends = jnp.full((*symbols.shape[:2], 1), between, jnp.int32).at[:, -1].set(close)
    return jnp.concatenate([symbols, ends], axis=2).reshape(symbols.shape[0], -1)

  def of_answers(x: Array) -> Array:  # [questions, queries, values, m] -> [questions, queries * values, m]
    return x.reshape(kind.questions, -1, task.value_length)

  def of_targets(of_answer: Array, fill: int) -> Array:  # the row before a symbol has it as its target
    at_question = jnp.full((kind.questions, task.query_length), fill, of_answer.dtype)
    at_tokens = jnp.concatenate([at_question, of_answer], axis=1).reshape(-1)
    return jnp.full(context.shape[0], fill, of_answer.dtype).at[room:-1].set(at_tokens)

  where = starts[chosen][..., None] + task.key_length + 2 + jnp.arange(task.value_length, dtype=jnp.int32)
  query, answer = lines(keys[chosen], SEP, ANS), lines(of_answers(values[chosen]), SEP, EOS)
  first = jnp.full((kind.questions, 1), QRY, jnp.int32)
  tokens = jnp.concatenate([context[:room + 1], jnp.concatenate([first, query, answer], axis=1).reshape(-1)])
  fresh = jnp.broadcast_to((turn[:, -1] < count)[:, None], answer.shape)
  return tokens, of_targets(fresh, False), of_targets(lines(of_answers(where), -1, -1), -1)
