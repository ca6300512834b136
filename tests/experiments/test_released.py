"""What commands do with a released model: its tokenizer, its length, a folder of our own."""

from __future__ import annotations

import json

import chex
import pytest
import released_model
from command_line import settings

import rat_jax
from experiments import chat, convert, eval_lm, generate
from experiments.shared import inputs
from rat_jax.data import BYTES, load_tokenizer


@pytest.fixture
def released(tmp_path):
  return released_model.write(tmp_path / "model")


def test_its_tokenizer_is_the_default(released, tmp_path):
  own = load_tokenizer(released)
  of = lambda *given: inputs.tokenizer_of(settings(generate, f"--checkpoint={released}", *given), released)
  assert of().name == own.name
  assert of("--tokenizer=bytes") == BYTES
  assert inputs.tokenizer_of(settings(generate, f"--checkpoint={tmp_path}"), tmp_path) == BYTES


def test_a_text_longer_than_it_is_for(released):
  path = released / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 100}))
  most = r"and the model of .* is for 100; take fewer\. For more .* rope_scaling=RopeScaling\('yarn', 2, 100\)"
  for module, given, asked in (
      (generate, ["--prompt=Who", "--max_new_tokens=150"], "a prompt of [0-9]+ tokens with --max_new_tokens=150 "),
      (chat, ["--max_length=150"], "--max_length=150 takes 150 tokens, "),
      (eval_lm, ["--length=150"], "--length=150 takes 150 tokens, ")):
    with pytest.raises(ValueError, match=f"^{asked}.*{most}"):
      module.main(settings(module, f"--checkpoint={released}", *given))


def test_a_folder_of_our_own(released, tmp_path):
  expected, params = rat_jax.convert.load(released)
  convert.main(settings(convert, "--from=released", f"--source={released}", f"--output={tmp_path}/plain"))
  config, found = rat_jax.load_pretrained(tmp_path / "plain")
  assert config == expected
  chex.assert_trees_all_equal(found, params)
  convert.main(settings(convert, "--from=released", f"--source={released}", f"--output={tmp_path}/memory", "--memory",
                        "--gate_bias=-1"))
  config, found = rat_jax.load_pretrained(tmp_path / "memory")
  assert (config.memory, config.gate_bias) == (True, -1.0)
  chex.assert_trees_all_equal(found, rat_jax.convert.load(released, memory=True, gate_bias=-1.0)[1])
  with pytest.raises(ValueError, match=r"^--gate_bias: it changes nothing under --from=released --nomemory; leave"):
    convert.main(settings(convert, "--from=released", f"--source={released}", f"--output={tmp_path}/x",
                          "--gate_bias=-1"))
