"""A model's chat template: messages to the ids that it was trained to see, and turns that go on where one ended."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rat_jax.convert.gguf import opened
from rat_jax.convert.tensors import read_json
from rat_jax.data.tokenizer import Tokenizer
from rat_jax.paths import local_path, read_text

Message = Mapping[str, str]  # {"role": "user", "content": "..."}
_MARK, _MARKS = "\ue000{}\ue001", re.compile("\ue000(\\d+)\ue001")  # what a content stands for in a rendered text


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
  """A template (Jinja, as huggingface/transformers has them) with the tokenizer whose control tokens it names.

  What people write is text: a control token's name in it is its characters.

  Attributes:
    source: where it is from, for errors; text: of the template.
    names: what the template may ask for by name, such as "bos_token".
  """

  source: str
  text: str
  tokenizer: Tokenizer
  names: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)

  def ids(self, messages: Sequence[Message]) -> list[int]:
    """The ids of a conversation, up to where an answer begins.

    Raises ValueError for a template that asks for what we do not have, ImportError without the package jinja2.
    """
    return self._ids(self._rendered(messages), messages)

  def following(self, messages: Sequence[Message]) -> list[int]:
    """The ids after the last answer among the messages, up to where the next one begins. Errors as of `ids`."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    _, found, rest = self._rendered(messages).partition(_MARK.format(answers[-1]))
    if not found:
      raise ValueError(f"the chat template of {self.source} leaves answers out that came before, so that a cache of"
                       " them cannot be used; begin a conversation for every question.")
    return self._ids(rest, messages)

  def _rendered(self, messages: Sequence[Message]) -> str:
    """The conversation with a mark for every content."""
    try:
      import jinja2
      from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
      raise ImportError("chat templates need jinja2; run pip install -e '.[hf]'.") from error
    marked = [{**message, "content": _MARK.format(i)} for i, message in enumerate(messages)]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    try:
      rendered: str = environment.from_string(self.text).render(messages=marked, add_generation_prompt=True,
                                                                **self.names)
    except (jinja2.TemplateError, ValueError, TypeError) as error:
      raise ValueError(f"the chat template of {self.source} asks for what is not here: {error}; give the conversation"
                       " as text.") from error
    return rendered

  def _ids(self, rendered: str, messages: Sequence[Message]) -> list[int]:
    ids: list[int] = []
    for i, part in enumerate(_MARKS.split(rendered)):  # texts, and numbers of contents between them
      ids += self.tokenizer.encode(messages[int(part)]["content"]) if i % 2 else self._with_controls(part)
    return ids

  def _with_controls(self, text: str) -> list[int]:
    controls = self.tokenizer.controls
    names = "|".join(re.escape(name) for name in sorted(controls, key=len, reverse=True))
    ids: list[int] = []
    for i, part in enumerate(re.split(f"({names})", text) if names else [text]):
      ids += [controls[part]] if i % 2 else self.tokenizer.encode(part)
    return ids


def load_chat_template(path: str | os.PathLike[str], tokenizer: Tokenizer) -> ChatTemplate:
  """The template of a GGUF file, or of a folder with chat_template.jinja or tokenizer_config.json.

  Raises ValueError where there is none, or several by name.
  """
  where = local_path(path, "path")
  names: dict[str, str] = {}
  if where.is_file():
    file = opened(where)
    text, tokens = file.said("tokenizer.chat_template"), file.needed("tokenizer.ggml.tokens")
    for name in ("bos", "eos"):
      number = file.said(f"tokenizer.ggml.{name}_token_id")
      names |= {} if number is None else {f"{name}_token": tokens[number]}
  else:
    text = _of_folder(where, names)
  if not isinstance(text, str):
    raise ValueError(f"{path} has {'several chat templates' if text else 'no chat template'}; give the conversation as"
                     " text, to experiments.generate.")
  return ChatTemplate(str(path), text, tokenizer, names)


def _of_folder(folder: pathlib.Path, names: dict[str, str]) -> Any:
  """The template of a folder; `names` gains its tokens."""
  said = {}
  if (folder / "tokenizer_config.json").is_file():
    said = read_json(folder / "tokenizer_config.json", "a tokenizer's settings are an object")
    for name in ("bos_token", "eos_token"):
      token = said.get(name)
      token = token.get("content") if isinstance(token, dict) else token
      names |= {name: token} if isinstance(token, str) else {}
  beside = folder / "chat_template.jinja"
  return read_text(beside) if beside.is_file() else said.get("chat_template")


def _refuse(message: str) -> Any:
  raise ValueError(message)
