"""With 64-bit types enabled every number and every type is what it is without them."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import rat_jax
from conftest import WHOLE_MODEL, assert_close
from rat_jax import Dense, Dilated, MoBA, Quest, RATPlusConfig, RATPlusLM, SnapKV, TopK

MODEL = RATPlusLM(RATPlusConfig(31, 2, 16, 2, num_kv_heads=1, init_std=0.3))
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 10))  # int64
LENGTHS = np.array([6, 4])


def drawn():
  return MODEL.init(jax.random.key(0), TOKENS)["params"]


def served(mode):
  """What prefill in pieces, a step and generation give; the cache has the bytes that are promised."""
  params = drawn()
  logits, cache = rat_jax.prefill(MODEL, params, TOKENS[:, :6], LENGTHS, mode=mode, max_length=16, chunk=4)
  step, after = rat_jax.decode_step(MODEL, params, TOKENS[:, 6], cache)
  new = rat_jax.generate(MODEL, params, TOKENS[:, :6], LENGTHS, mode=mode, max_new_tokens=3, temperature=0.7, top_p=0.9,
                         key=jax.random.key(1), eos_id=[3, 4])
  held = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
  assert held == rat_jax.cache_bytes(MODEL.config, mode, 2, 16, 6)
  return params, logits, cache, step, after, new


def trained():
  optimizer = rat_jax.make_optimizer(1e-2, total_steps=5)
  state = rat_jax.init_train_state(MODEL, drawn(), optimizer)
  batch = {"tokens": TOKENS[:, :-1], "targets": TOKENS[:, 1:], "weights": np.ones((2, 9))}
  return rat_jax.train_step(MODEL, optimizer, state, batch, modes=(Dilated(4), Dense()), combine="sum", accumulation=2)


def same(call):
  plain = jax.tree_util.tree_leaves_with_path(call())
  with jax.enable_x64(True):
    wide = jax.tree.leaves(call())
  for (path, x), y in zip(plain, wide, strict=True):
    assert (x.dtype, x.shape) == (y.dtype, y.shape), path
    assert_close(np.nan_to_num(np.asarray(y, np.float64)), np.nan_to_num(np.asarray(x, np.float64)), WHOLE_MODEL)


@pytest.mark.parametrize("mode", [Dilated(4, 2, 1), *(pytest.param(mode, marks=pytest.mark.slow) for mode in (
    Dense(), Quest(6, block=2, selector="random"), Quest(6, block=2), MoBA(2, block=2), SnapKV(5, obs_window=2),
    TopK(0.3, selector="random")))], ids=str)
@pytest.mark.slow
def test_serving(mode):
  same(lambda: served(mode))


@pytest.mark.slow
def test_training():
  same(trained)
