"""The RAT+ authors' files, which need torch to be read."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import rat_jax
from conftest import FIXTURES
from rat_jax import Dense, Dilated, RATPlusLM
from rat_jax.convert import load_ratplus, to_ratplus_state_dict

torch = pytest.importorskip("torch", reason="torch reads .pth files; make test-torch installs it")
FOLDER = FIXTURES / "ratplus"
NAMES = ["ckpt_ratplus_fused", "ckpt_ratplus_fgate", "ckpt_attention"]


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_their_files(name):
  config, params = load_ratplus(FOLDER / f"{name}.pth")
  assert config.memory == ("ratplus" in name)
  with np.load(FOLDER / f"{name}_expected.npz") as file:
    expected = dict(file)
  for label, ((d, w, s), *_) in zip(expected["config_names"], expected["configs"].tolist(), strict=True):
    mode = Dense() if d == 1 else Dilated(d, window=w, sinks=s)
    with jax.default_matmul_precision("highest"):
      logits = RATPlusLM(config).apply({"params": params}, expected["tokens"], mode=mode)
    np.testing.assert_allclose(logits, expected[f"logits/{label}"], atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_converted_by_the_script_and_back(name, tmp_path):
  run = subprocess.run([sys.executable, "-m", "experiments.convert", "--from=ratplus", f"--source={FOLDER / name}.pth",
                        f"--output={tmp_path}/model"], env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True,
                       text=True, check=False)
  assert run.returncode == 0, run.stderr
  config, params = rat_jax.load_pretrained(tmp_path / "model")
  read, expected = load_ratplus(FOLDER / f"{name}.pth")
  assert config == read
  jax.tree.map(np.testing.assert_array_equal, params, expected)
  digest = hashlib.sha256((FOLDER / f"{name}.pth").read_bytes()).hexdigest()
  assert digest in (tmp_path / "model" / "README.md").read_text()


class Runs:
  """What a hostile file holds."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
  good = (FOLDER / "ckpt_attention.pth").read_bytes()
  cases = {"cut.pth": (good[:len(good) // 2], "is it truncated, or no file that torch.save wrote"),
           "text.pth": (b"hello", "is it truncated, or no file that torch.save wrote"),
           "empty.pth": (b"", "is it truncated, or no file that torch.save wrote")}
  for name, (content, message) in cases.items():
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
      load_ratplus(tmp_path / name)
  torch.save({"task": {}, "more": Runs(tmp_path / "ran")}, tmp_path / "code.pth")
  with pytest.raises(ValueError, match="unpickling that would run its code"):
    load_ratplus(tmp_path / "code.pth")
  assert not (tmp_path / "ran").exists()
  with pytest.raises(FileNotFoundError, match=r"give a \.pth file"):
    load_ratplus(tmp_path / "none.pth")


def test_weights_that_do_not_fit_are_refused(tmp_path):
  config, params = load_ratplus(FOLDER / "ckpt_ratplus_fused.pth")
  weights = {name: torch.from_numpy(value) for name, value in to_ratplus_state_dict(params, config).items()}
  torch.save({"task": weights}, tmp_path / "bare.pth")
  with pytest.raises(ValueError, match="holds no config; give one"):
    load_ratplus(tmp_path / "bare.pth")
  jax.tree.map(np.testing.assert_array_equal, load_ratplus(tmp_path / "bare.pth", config)[1], params)
  torch.save({name: value.bfloat16() for name, value in weights.items()}, tmp_path / "bare.pth")  # weights alone
  halves = load_ratplus(tmp_path / "bare.pth", dataclasses.replace(config, param_dtype="bfloat16"))[1]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=1e-2), halves, params)
  with pytest.raises(ValueError, match=r"lack 'backbone\.layers\.2\."):
    load_ratplus(tmp_path / "bare.pth", dataclasses.replace(config, num_layers=3))
  torch.save({"task": weights | {"extra": torch.zeros(3)}}, tmp_path / "more.pth")
  with pytest.raises(ValueError, match=r"no place for: \['extra'\]"):
    load_ratplus(tmp_path / "more.pth", config)
  torch.save({"task": weights, "config": {"model": {}}}, tmp_path / "config.pth")
  with pytest.raises(ValueError, match="lacks 'backbone'"):
    load_ratplus(tmp_path / "config.pth")
