"""Needle tasks in words, for `sft_niah --text` and `eval_niah --text`: a model's fine-tuning and its answers.

The RAT+ authors' protocol: all tasks together, a loss on the answer alone, lr 1e-5, 4 epochs, batches of 32, prompts of
up to T - 128 tokens. Examples are RULER's files or our own, which give no RULER score. RULER's other tasks (vt, cwe,
fwe, qa_1, qa_2) are read from its files, and asked as it does. A fine-tuned model's notes know
the files that it was trained on; it is not asked what is in them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import rat_jax
from experiments.needles.rows import Row, blank
from experiments.needles.seeds import check_seeds
from experiments.shared import command, device, inputs, output, over_mesh, training
from rat_jax import RATPlusLM, evaluate, parallel
from rat_jax.data import Tokenizer, load_tokenizer
from rat_jax.evaluate import Example, text_niah
from rat_jax.modes import Mode
from rat_jax.parallel import processes
from rat_jax.paths import local_path, read_text
from rat_jax.plan import check_modes
from rat_jax.train import Checkpoints, train
from rat_jax.train.loss import IGNORED

# RULER's tasks of which there are none of our own, each with the tokens that RULER lets a model answer with. Source:
# github.com/NVIDIA/RULER, scripts/data/synthetic/constants.py.
RULER_ONLY = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
Score = Callable[[Sequence[str], Sequence[Sequence[str]]], float]  # of answers and what was asked for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(over_mesh.Settings):
  """Of the commands that may ask in words."""

  text: bool
  tokenizer: Tokenizer
  ruler: str | None
  essay: str | None
  epochs: float
  answer_room: int

  def __getstate__(self) -> dict[str, Any]:
    return vars(self) | {"tokenizer": self.tokenizer.source}  # whose functions do not pickle

  def __setstate__(self, state: dict[str, Any]) -> None:
    vars(self).update(state, tokenizer=load_tokenizer(state["tokenizer"]))


def define_flags() -> None:
  """All of `Settings`."""
  over_mesh.define_flags()
  flags.DEFINE_bool("text", False, "Tasks in words, for a language model (experiments.pretrain), not mini-NIAH.")
  command.define_tokenizer()
  flags.DEFINE_string("ruler", None, "Folder of RULER's files, such as niah_single_1/validation.jsonl or"
                      " single_1.jsonl. Default: tasks of our own.")
  flags.DEFINE_string("essay", None, "Text file that surrounds needles of our own. Default: made-up sentences.")
  flags.DEFINE_float("epochs", 4.0, "Times that fine-tuning sees every example.", lower_bound=0.01)
  flags.DEFINE_integer("answer_room", 128, "Tokens kept for an answer.", lower_bound=2)


def load(settings: Settings, names: Sequence[str], count: int, length: int, seed: int) -> dict[str, list[Example]]:
  """{task: examples}, at most `count` of a file, as many of our own.

  Raises ValueError for unknown tasks, and for a prompt or an answer that is empty or too long.
  """
  check(settings, names)
  room = settings.answer_room
  if room >= length:
    raise ValueError(f"--answer_room={room} leaves nothing of length={length}; use less, or a larger length.")
  if settings.ruler:
    found = {name: evaluate.load_ruler(_file_of(settings.ruler, name))[:count] for name in names}
  else:
    essay = text_niah.pseudo_essay(0, length) if settings.essay is None else _essay(settings.essay)
    draw = functools.partial(text_niah.examples, count=count, length=length, tokenizer=settings.tokenizer, essay=essay,
                             seed=seed, answer_room=room)
    found = {name: [Example(one["input"] + one["answer_prefix"], tuple(one["outputs"]), one["length"])
                    for one in draw(text_niah.TEXT_TASKS[name])] for name in names}
  for name, examples in found.items():
    where = str(_file_of(settings.ruler, name)) if settings.ruler else name
    for i, example in enumerate(examples, 1):
      try:
        prompt, answer = _encoded(settings.tokenizer, _taught(name, example))
      except ValueError as error:
        raise ValueError(f"{where}, example {i}: {error}") from error
      if not prompt:
        raise ValueError(f"{where}, example {i}: input={example.prompt!r} leaves no token before the answer; give a"
                         " longer one.")
      if len(prompt) > length - room or len(answer) > room:
        raise ValueError(f"{where}, example {i}: a prompt of {len(prompt)} tokens and an answer of {len(answer)}; there"
                         f" is room for {length - room} and {room} of length={length}; use a larger length or another"
                         " --answer_room.")
  return found


def check(settings: Settings, names: Sequence[str]) -> None:
  """Raises ValueError for --tasks that are neither of our own nor, with --ruler, RULER's, and for an unused --essay."""
  known = [*text_niah.TEXT_TASKS, *(RULER_ONLY if settings.ruler else ())]
  unknown = sorted(set(names) - set(known))
  if unknown or not names:
    more = "" if settings.ruler else f"; {', '.join(RULER_ONLY)} need RULER's files, as --ruler"
    raise ValueError(f"--tasks={unknown} are unknown; use some of {known}{more}.")
  if settings.ruler:
    settings.refuse(("essay",), f"--ruler={settings.ruler} has texts of its own; leave one of them out.")


def score_of(task: str) -> Score:
  """RULER's score of a task: references of its qa tasks each are right, of all others they are all asked for."""
  return evaluate.string_match_part if task.startswith("qa_") else evaluate.string_match_all


def _essay(path: str) -> str:
  """The text of --essay."""
  try:
    return read_text(path)
  except OSError as error:
    raise ValueError(f"--essay={path}: {error.strerror}; give a file of UTF-8 text.") from error


def _file_of(ruler: str, name: str) -> pathlib.Path:
  """RULER's file of a task, such as niah_<task>/validation.jsonl where its own scripts leave it, or <task>.jsonl.

  Raises FileNotFoundError where there is none.
  """
  folder = local_path(ruler, "--ruler")
  names = [path for full in (f"niah_{name}", name) for path in (f"{full}/validation.jsonl", f"{full}.jsonl")]
  for one in names:
    if (folder / one).exists():
      return folder / one
  raise FileNotFoundError(f"--ruler={ruler} holds none of {', '.join(names)}; give the folder around RULER's files.")


def _taught(name: str, example: Example) -> Example:
  """The example with what a model should say: the first of references that each are right."""
  return dataclasses.replace(example, answers=example.answers[:1]) if name.startswith("qa_") else example


def _encoded(tokenizer: Tokenizer, example: Example) -> tuple[list[int], list[int]]:
  """The prompt's tokens, and the answer's with the token that ends it; what holds something of both is the answer's."""
  space = "" if example.prompt[-1:].isspace() else " "
  prompt, answer = tokenizer.encode_after(example.prompt, space + ",".join(example.answers))
  return prompt, [*answer, tokenizer.eod_id]


def source(settings: Settings) -> str:
  """Where examples come from, for the results."""
  return settings.ruler or f"our own tasks, essay: {settings.essay or 'made-up sentences'}; no RULER score"


def origin(settings: Settings, name: str) -> str:
  """What tells the examples of a task from others, for the cells that are kept."""
  parts = [source(settings), *digests(settings.ruler, [name]).values(), f"answer room {settings.answer_room}"]
  if not settings.ruler and settings.essay is not None:
    parts.append(_digest(_essay(settings.essay).encode()))
  return ", ".join(parts)


def digests(ruler: str | None, names: Sequence[str]) -> dict[str, str]:
  """What tells RULER's file of a task from others, wherever it lies; {} for tasks of our own, which have seeds."""
  return {name: _digest(_file_of(ruler, name).read_bytes()) for name in names} if ruler else {}


def _digest(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()[:16]


def check_unseen(ruler: str | None, names: Sequence[str], folder: str, notes: dict[str, Any]) -> None:
  """Raises ValueError where --ruler has a file that the model of `folder` was fine-tuned on."""
  seen = [str(_file_of(ruler or "", name)) for name, digest in digests(ruler, names).items()
          if digest in notes.get("files", [])]
  if seen:
    raise ValueError(f"--ruler={ruler}: --checkpoint={folder} was fine-tuned on {seen}; give files with other"
                     " examples, made with another seed.")


def load_model(folder: str, tokenizer: Tokenizer, mesh: jax.sharding.Mesh | None
               ) -> tuple[RATPlusLM, Any, dict[str, Any]]:
  """(model, parameters, notes of its training). Raises ValueError for a model that --tokenizer does not fit."""
  config, params, notes = inputs.load_model(folder, mesh)
  inputs.check_tokenizer(tokenizer, config, notes)
  return RATPlusLM(config), params, notes


def fine_tune(settings: Settings, start: str | None, names: Sequence[str], count: int, length: int, rows: int,
              modes: Sequence[Mode], learning_rate: float, resume: str = "auto") -> None:
  """Fine-tunes the checkpoint `start` on `count` examples of every task; resumes from the newest in --workdir."""
  if start is None:
    raise ValueError("--text fine-tunes a language model; give its folder of checkpoints as --init.")
  command.check_trained(modes)
  seed, tokenizer = settings.seed, settings.tokenizer
  check_seeds(seed, range(seed, seed + 1))
  mesh = settings.made_mesh()
  model, params, before = load_model(start, tokenizer, mesh)
  for mode in modes:
    check_modes(mode, None, model.config)
  loaded = load(settings, names, count, length, seed)
  examples = [_taught(name, one) for name, of_task in loaded.items() for one in of_task]
  steps = max(1, round(settings.epochs * len(examples) / rows))
  draw = np.random.default_rng(seed)
  order = np.concatenate([draw.permutation(len(examples)) for _ in range(-(-steps * rows // len(examples)))])

  def batch_at(step):
    batch = answer_batch(tokenizer, [examples[i] for i in order[step * rows:(step + 1) * rows]], length)
    return batch if mesh is None else parallel.shard(batch, mesh)

  folder = output.made(settings.workdir)
  checkpoints, optimizer = Checkpoints(folder), rat_jax.make_optimizer(learning_rate, total_steps=steps)
  state = training.first_state(model, optimizer, params, seed, mesh)
  notes = {"init": str(pathlib.Path(start).absolute()), "tasks": list(names), "examples": len(examples),
           "length": length, "rows": rows, "modes": [str(mode) for mode in modes], "learning_rate": learning_rate,
           "epochs": settings.epochs, "seed": seed, "answer_room": settings.answer_room, "source": source(settings),
           "files": [*before.get("files", []), *digests(settings.ruler, names).values()], "tokenizer": tokenizer.name}
  parallel.check_agreement(notes)
  if output.resumes(resume, checkpoints):
    state, saved = checkpoints.restore(state, model.config)
    output.check_same_run(checkpoints.folder, saved, notes)
  output.say(f"{steps} batches of {rows} x {length} tokens from {len(examples)} examples ({source(settings)}), under"
             f" {', then '.join(map(str, modes))}, on {device.name()}")
  train(model, optimizer, state, batch_at, steps=steps, modes=tuple(modes), notes=notes, checkpoints=checkpoints,
        save_every=200, metrics_path=folder / "metrics.jsonl", label="needles in words")
  output.say(f"checkpoint: {folder}")


def answer_batch(tokenizer: Tokenizer, examples: Sequence[Example], length: int) -> dict[str, np.ndarray]:
  """Prompts, answers and padding, int32 [B, T]; only an answer's tokens, its end with them, are targets."""
  tokens, targets = np.zeros((len(examples), length), np.int32), np.full((len(examples), length), IGNORED, np.int32)
  for i, example in enumerate(examples):
    prompt, answer = _encoded(tokenizer, example)
    tokens[i, :len(prompt) + len(answer)] = prompt + answer
    targets[i, len(prompt) - 1:len(prompt) + len(answer) - 1] = answer
  return {"tokens": tokens, "targets": targets}


def cells(settings: Settings, model: RATPlusLM, params: Any, row: Row, examples: Mapping[str, Sequence[Example]],
          length: int, batch_size: int) -> dict[str, dict[str, Any]]:
  """The cells of a row: {task: the scores of greedy answers}; {"blank": why} where no such mode can be."""
  found: dict[str, dict[str, Any]] = {}
  for name, of_task in examples.items():
    try:
      mode, prefill_mode = row.build(max(_question_length(settings.tokenizer, example) for example in of_task))
    except ValueError as error:
      found[name] = blank(error, length)
      continue
    most = min(RULER_ONLY.get(name, settings.answer_room), settings.answer_room)
    said = [text for first in range(0, len(of_task), batch_size) for text in _answers(
        settings.tokenizer, model, params, [_taught(name, one) for one in of_task[first:first + batch_size]], first,
        prompt_room=length - settings.answer_room, mode=mode, prefill_mode=prefill_mode, max_new_tokens=most)]
    asked, score = [example.answers for example in of_task], score_of(name)
    by_example = _of_each(score, said, asked)
    found[name] = {"accuracy": [score(said, asked)], "count": len(said),
                   "error_over_examples": [float(np.std(by_example) / len(said)**0.5)], "by_example": by_example,
                   "comma_recall": evaluate.comma_recall(said, asked),
                   "comma_recall_by_example": _of_each(evaluate.comma_recall, said, asked),
                   "exact_match": evaluate.exact_match(said, asked)}
  return found


def _of_each(score: Score, said: Sequence[str], asked: Sequence[Sequence[str]]) -> list[float]:
  """What every answer scores alone."""
  return [score([one], [answers]) for one, answers in zip(said, asked, strict=True)]


def _question_length(tokenizer: Tokenizer, example: Example) -> int:
  """The tokens of the prompt's last line, which is the question and the start of its answer."""
  start = example.prompt.rstrip("\n").rfind("\n") + 1
  return len(tokenizer.encode_after(example.prompt[:start], example.prompt[start:])[1])


def _answers(tokenizer: Tokenizer, model: RATPlusLM, params: Any, examples: Sequence[Example], first: int,
             prompt_room: int, **how: Any) -> list[str]:
  """What the model says; `first` is the number of the first row, and `how` are arguments of `rat_jax.generate`."""
  prompts, end = [_encoded(tokenizer, example)[0] for example in examples], tokenizer.eod_id
  tokens = np.zeros((len(prompts), prompt_room), np.int32)
  for i, prompt in enumerate(prompts):
    tokens[i, :len(prompt)] = prompt
  new = rat_jax.generate(model, params, tokens, np.array([len(prompt) for prompt in prompts]), eos_id=end,
                         row_ids=jnp.arange(first, first + len(prompts)), **how)
  ids = [row[:row.index(end)] if end in row else row for row in processes.on_host(new).tolist()]
  return [_said(tokenizer, example, prompt, row) for example, prompt, row in zip(examples, prompts, ids, strict=True)]


def _said(tokenizer: Tokenizer, example: Example, prompt: Sequence[int], new: Sequence[int]) -> str:
  """The text of new tokens, without what of it is still the prompt's where one token holds something of both."""
  rest = tokenizer.decode(tokenizer.encode(example.prompt))[len(tokenizer.decode(prompt)):]
  return tokenizer.decode_after(prompt, new).removeprefix(rest).strip()
