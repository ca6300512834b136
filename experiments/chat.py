"""Talks with a trained model: a line in, its answer as it is made, under any mode; the cache is kept over turns.

Claim: an answer takes as long as what its mode reads, however long the conversation is.
Command: python -m experiments.chat --checkpoint=MODEL.gguf --mode=quest:0.125
Result: the answers, each with the keys that a token read, the bytes of the cache and tokens per second.
Cost: not timed; the first answer waits for programs to be compiled.
The model is a folder of the Hugging Face form or a GGUF file, with its chat template inside. Ends with the input.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any, cast

import jax
import numpy as np
from absl import flags

import rat_jax
from experiments.shared import command, inputs
from rat_jax import RATPlusLM, generation
from rat_jax.caches.cache import Cache
from rat_jax.data import Tokenizer, load_tokenizer
from rat_jax.data.chat import ChatTemplate, load_chat_template
from rat_jax.modes import Mode

_MULTIPLE = 64  # to which new tokens are filled up, so that few programs are compiled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(command.Settings):
  checkpoint: pathlib.Path
  dtype: str | None
  mode: tuple[Mode, ...]
  max_length: int
  max_new_tokens: int
  temperature: float
  top_p: float


def define_flags() -> None:
  command.define_common_flags("chat")
  command.define_path("checkpoint", "A released model with its tokenizer: a folder, or a GGUF file.", required=True)
  command.define_dtype()
  command.define_modes(["dense"], "The mode of the answers.")
  flags.DEFINE_integer("max_length", 4096, "Tokens of a conversation at most.", lower_bound=1)
  flags.DEFINE_integer("max_new_tokens", 512, "Tokens of an answer at most.", lower_bound=1)
  flags.DEFINE_float("temperature", 0.7, "0 takes the likeliest token.", lower_bound=0.0)
  flags.DEFINE_float("top_p", 0.95, "Sample among the likeliest tokens of this total probability.")


def main(settings: Settings) -> None:
  if len(settings.mode) != 1:
    raise ValueError(f"--mode is given {len(settings.mode)} times; give one.")
  if settings.temperature == 0 and settings.top_p != 1:
    settings.refuse(("top_p",), "--temperature=0 takes the likeliest token and samples none; leave one of them out.")
  inputs.check_length(settings.checkpoint, settings.max_length, f"--max_length={settings.max_length}")
  tokenizer = load_tokenizer(settings.checkpoint)
  template = load_chat_template(settings.checkpoint, tokenizer)
  config, params, _ = inputs.load_model(settings.checkpoint)
  tokenizer.check(config)
  config = dataclasses.replace(config, dtype=cast(Any, settings.dtype or config.dtype))
  conversation = Conversation(settings, RATPlusLM(config), params, tokenizer, template)
  while True:
    print("> ", end="", flush=True)
    line = sys.stdin.readline()
    if not line:
      print()
      return
    if line.strip():
      for piece in conversation.answer(line.strip()):
        print(piece, end="", flush=True)
      print(f"\n[{conversation.said_of_last}]", flush=True)


class Conversation:
  """A conversation so far, with the cache of it.

  Attributes:
    said_of_last: what the last answer took.
  """

  def __init__(self, settings: Settings, model: RATPlusLM, params: Any, tokenizer: Tokenizer, template: ChatTemplate):
    self._settings, self._model, self._params = settings, model, params
    self._tokenizer, self._template = tokenizer, template
    self._messages: list[dict[str, str]] = []
    self._cache: Cache | None = None
    self._prompt_length = 0
    self._ended = False  # whether the last answer ended by itself
    self.said_of_last = ""

  def answer(self, text: str) -> Iterator[str]:
    """The answer to what is said, in pieces as they are made.

    Raises ValueError where the conversation would be longer than --max_length; it stays as it was then.
    """
    settings, end = self._settings, self._tokenizer.eod_id
    asked = [*self._messages, {"role": "user", "content": text}]
    new = self._template.following(asked) if self._cache else self._template.ids(asked)
    if self._ended and new[:1] == [end]:  # it is in the cache
      new = new[1:]
    length = int(self._cache.lengths[0]) if self._cache else 0
    most = min(settings.max_new_tokens, settings.max_length - length - len(new))
    if most < 1:
      raise ValueError(f"the conversation has {length + len(new)} tokens, and --max_length={settings.max_length} leaves"
                       " no room for an answer; give more, or begin anew.")
    self._messages = asked
    begin = self._read(new)
    choice, draws = generation.choice_of(
        self._model.config.vocab_size, 1, temperature=settings.temperature, top_p=settings.top_p, eos_id=end,
        key=jax.random.fold_in(jax.random.key(settings.seed), len(asked)))
    ids: list[int] = []
    shown, begun = "", time.perf_counter()
    for state in generation.steps(self._params, begin, choice, draws, most):
      ids.append(int(state.token[0]))
      said = self._tokenizer.decode_after(new, [i for i in ids if i != end])
      if not said.endswith("\ufffd"):  # the beginning of a character
        yield said.removeprefix(shown)
        shown = said
    yield said.removeprefix(shown)
    self._cache, self._ended = state.cache, ids[-1] == end
    self._messages.append({"role": "assistant", "content": said})
    self.said_of_last = self._said(len(ids), time.perf_counter() - begun)

  def _read(self, new: list[int]) -> generation.State:
    """The model has read new tokens."""
    tokens = np.zeros((1, len(new) + -len(new) % _MULTIPLE), np.int32)
    tokens[0, :len(new)] = new
    lengths = np.array([len(new)], np.int32)
    if self._cache is None:
      self._prompt_length = tokens.shape[1]
      logits, cache = rat_jax.prefill(self._model, self._params, tokens, lengths, mode=self._settings.mode[0],
                                      max_length=self._settings.max_length + _MULTIPLE)
    else:
      every, cache = rat_jax.extend(self._model, self._params, tokens, self._cache, lengths)
      logits = every[:, len(new) - 1]
    return generation.State.after(logits, cache)

  def _said(self, count: int, seconds: float) -> str:
    cache = self._cache
    assert cache is not None
    length = int(cache.lengths[0])
    read = np.mean(rat_jax.tokens_read(self._model.config, self._settings.mode[0], length, self._prompt_length))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    return (f"{self._settings.mode[0]}: {count} tokens, {count / seconds:.1f} a second; the last one read {read:.0f} of"
            f" {length} keys; the cache has {size / 1e6:.1f} MB")


if __name__ == "__main__":
  command.run(main, Settings, define_flags)
