"""The quickstart with all its arms, modes and pictures; `.ci/run` runs the short one."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from conftest import run_python
from experiments import quickstart
from rat_jax.data.token_file import write_token_file
from tests.experiments.command_line import settings

PICTURES = {"needles", "reads", "masks", "caches", "quality", "quality-after-prompt", "choices"}


@pytest.mark.slow
@pytest.mark.scripts
def test_all_arms_and_modes_are_told_and_drawn(tmp_path):
  run_python("-m", "experiments.quickstart", "--full", "--steps=2", "--eval_windows=2", "--length=64", "--count=1",
             f"--workdir={tmp_path}")
  assert {path.stem for path in tmp_path.glob("*.png")} == PICTURES
  result = json.loads((tmp_path / "results.json").read_text())
  assert list(result["bits_per_byte"]) == ["RAT+", "attention", "attention, sparse branch"]
  assert len(set(result["parameters"].values())) == 1
  assert result["needles"]["Dense"]["RAT+"]["keys"] == 512
  assert result["keys_per_query"]["dense"] == 64 == 16 * result["keys_per_query"]["dilated:16"]
  after = result["after_prompt"]
  assert after["keys_per_query"]["quest:0.25,block=4"] == 16
  for told in (result, after):
    for by_mode in told["bits_per_byte"].values():
      assert list(by_mode) == list(told["keys_per_query"])
      assert all(math.isfinite(bits) and 0 < bits < 9 for bits in by_mode.values())


@pytest.mark.parametrize("given, message", [
    (["--width=66"], "num_heads=4 does not divide embed_dim=66"),
    (["--width=12"], "head_dim=3 is odd"),
    ([], "has the tokenizer other, and the quickstart is of bytes; give the text itself."),
    (["--length=64"], "heldout.bin holds 10 tokens, too few for one window of length=64")])
def test_what_cannot_be_trained_is_said_before_needles_are_asked(given, message, tmp_path, monkeypatch):
  def never(*_):
    raise AssertionError("needles were asked")

  monkeypatch.setattr(quickstart, "find_needles", never)
  monkeypatch.setattr(quickstart.device, "compile_quickly", lambda: None)
  for name, size in (("train", 1000), ("heldout", 9)):
    write_token_file(tmp_path / f"{name}.bin", [np.ones(size, np.int32)], vocab_size=256, eod_id=0, source="x",
                     tokenizer="bytes" if given else "other")
  with pytest.raises(ValueError, match=message):
    quickstart.main(settings(quickstart, f"--data={tmp_path}", f"--workdir={tmp_path}/run", *given))
  assert not (tmp_path / "run").exists()
