"""Turns of a conversation: the cache that is kept gives what the whole conversation gives."""

from __future__ import annotations

import io

import numpy as np
import pytest
import released_model
from command_line import settings

import rat_jax
from experiments import chat
from rat_jax import RATPlusLM
from rat_jax.data import load_tokenizer
from rat_jax.data.chat import load_chat_template


@pytest.fixture
def released(tmp_path):
  return released_model.write(tmp_path / "model")


@pytest.mark.parametrize("mode", ["dense", "quest:8,block=4"])
def test_two_turns(released, monkeypatch, capsys, mode):
  flags = settings(chat, f"--checkpoint={released}", f"--mode={mode}", "--temperature=0", "--max_new_tokens=9",
                   "--max_length=256")
  monkeypatch.setattr("sys.stdin", io.StringIO("Who are you?\n\nA model?\n"))
  chat.main(flags)
  printed = capsys.readouterr().out
  said = [line for line in printed.splitlines() if line.startswith("[")]
  assert len(said) == 2
  assert said[0].startswith(f"[{mode}: 9 tokens, ")
  tokenizer = load_tokenizer(released)
  template = load_chat_template(released, tokenizer)
  config, params = rat_jax.convert.load(released)
  first = template.ids([{"role": "user", "content": "Who are you?"}])
  new = rat_jax.generate(RATPlusLM(config), params, np.array([first]), mode=rat_jax.parse_mode(mode), max_new_tokens=9,
                         eos_id=tokenizer.eod_id)
  answer = tokenizer.decode_after(first, np.asarray(new)[0].tolist())
  assert printed.startswith(f"> {answer}\n[")


def test_a_conversation_that_is_too_long_stays_as_it_was(released):
  flags = settings(chat, f"--checkpoint={released}", "--temperature=0", "--max_new_tokens=4", "--max_length=64")
  tokenizer = load_tokenizer(released)
  config, params = rat_jax.convert.load(released)
  talk = chat.Conversation(flags, RATPlusLM(config), params, tokenizer, load_chat_template(released, tokenizer))
  list(talk.answer("Who are you?"))
  with pytest.raises(ValueError, match=r"has \d+ tokens, and --max_length=64 leaves no room for an answer"):
    list(talk.answer("A model? " * 20))
  assert list(talk.answer("?"))
