"""The quickstart with all its arms, modes and pictures; `.ci/run` runs the short one."""

from __future__ import annotations

import json
import math

import pytest

from conftest import run_python

PICTURES = {"needles", "reads", "masks", "caches", "quality", "quality-after-prompt", "choices"}


@pytest.mark.slow
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
