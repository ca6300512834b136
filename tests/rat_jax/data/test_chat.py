"""Chat templates: what they make of a conversation, and that turns go on where the last one ended."""

from __future__ import annotations

import json

import pytest
import tokenizers

from rat_jax.data import load_tokenizer
from rat_jax.data.chat import ChatTemplate, load_chat_template

TEMPLATE = ("{% for message in messages %}{% if loop.first and message['role'] != 'system' %}{{ '<|start|>system\n"
            "Be kind.<|end|>\n' }}{% endif %}{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>\n'"
            " }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}")
ASKED = [{"role": "user", "content": "Who are you?"}]
GOES_ON = [*ASKED, {"role": "assistant", "content": "A <|end|> model."}, {"role": "user", "content": "<|start|>Why?"}]


def write_tokenizer(folder):
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = tokenizers.decoders.ByteLevel()
  made.train_from_iterator(["Who are you? A model. Be kind. system user assistant"], tokenizers.trainers.BpeTrainer(
      vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
      special_tokens=["<|end|>", "<|start|>"]))
  made.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "chat_template": TEMPLATE}))


@pytest.fixture
def folder(tmp_path):
  write_tokenizer(tmp_path)
  return tmp_path


def test_a_conversation(folder):
  tokenizer = load_tokenizer(folder)
  assert tokenizer.controls == {"<|end|>": 0, "<|start|>": 1}
  template = load_chat_template(folder, tokenizer)
  text = "\n".join(["|system", "Be kind.#", "|user", "Who are you?#", "|assistant", ""])
  expected = []
  for part in text.replace("|", "\0|\0").replace("#", "\0#\0").split("\0"):
    expected += {"|": [1], "#": [0]}.get(part) or tokenizer.encode(part)
  assert template.ids(ASKED) == expected


def test_the_next_turn_is_what_came_since(folder):
  """Names of control tokens in what people write are characters, so no content begins or ends a turn."""
  tokenizer = load_tokenizer(folder)
  template = load_chat_template(folder, tokenizer)
  whole = template.ids(GOES_ON)
  answer, since = tokenizer.encode(GOES_ON[1]["content"]), template.following(GOES_ON)
  assert whole == [*template.ids(ASKED), *answer, *since]
  assert (since[0], whole.count(0), whole.count(1)) == (0, 4, 5)


def test_a_template_in_a_file_of_its_own(folder):
  (folder / "chat_template.jinja").write_text("{{ eos_token }}{{ messages[0]['content'] }}")
  tokenizer = load_tokenizer(folder)
  assert load_chat_template(folder, tokenizer).ids(ASKED) == [0, *tokenizer.encode("Who are you?")]


@pytest.mark.parametrize(("text", "message"), [
    ("{{ raise_exception('roles must alternate') }}", "asks for what is not here: roles must alternate; give the"),
    ("{{ messages[0].tool_calls[0] }}", "asks for what is not here: .*no attribute 'tool_calls'"),
    ("{% for %}", "asks for what is not here: Expected"), ("{{ strftime_now('%d') }}", "'strftime_now' is undefined")])
def test_templates_that_ask_for_more_are_refused(folder, text, message):
  with pytest.raises(ValueError, match=message):
    ChatTemplate("a model", text, load_tokenizer(folder)).ids(ASKED)


def test_a_folder_without_a_template_is_refused(folder):
  (folder / "tokenizer_config.json").write_text("{}")
  with pytest.raises(ValueError, match="has no chat template; give the conversation as text"):
    load_chat_template(folder, load_tokenizer(folder, "<|end|>"))
  template = ChatTemplate("a model", "{{ messages[-1]['content'] }}", load_tokenizer(folder, "<|end|>"))
  with pytest.raises(ValueError, match="leaves answers out that came before"):
    template.following(GOES_ON)
