"""What version 0.1 saved is read, computes what it computed there, and trains on."""

from __future__ import annotations

import pathlib
import shutil

import jax
import numpy as np
import pytest

import rat_jax
from conftest import WHOLE_MODEL, assert_close
from rat_jax import Quest, RATPlusConfig, RATPlusLM
from rat_jax.train import Checkpoints

SAVED = pathlib.Path(__file__).parents[2] / "fixtures" / "version_0_1"
CONFIG = RATPlusConfig(13, 2, 8, 2, num_kv_heads=1, init_std=0.3)


@pytest.mark.slow
def test_a_checkpoint_is_read_and_trains_on(tmp_path):
  folder = shutil.copytree(SAVED / "checkpoints", tmp_path / "checkpoints")
  expected = np.load(SAVED / "expected.npz")
  config, params, notes = Checkpoints(folder).load_params()
  assert (config, notes) == (CONFIG, {"seed": 5})
  model, tokens = RATPlusLM(config), expected["tokens"]
  logits = model.apply({"params": params}, tokens[:, :-1], mode=Quest(4, block=2, keep_first=False))
  assert_close(logits, expected["logits"], WHOLE_MODEL)

  optimizer = rat_jax.make_optimizer(1e-2, total_steps=20, warmup_steps=2)
  fresh = rat_jax.init_train_state(model, jax.tree.map(np.zeros_like, params), optimizer)
  state, _ = Checkpoints(folder).restore(fresh, config)
  _, metrics = rat_jax.train_step(model, optimizer, state, {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]})
  assert_close(metrics["loss"], expected["losses"], WHOLE_MODEL)
