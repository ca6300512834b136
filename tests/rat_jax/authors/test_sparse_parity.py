"""Quest, MoBA and SnapKV against the public code of their authors: scores, sets, outputs."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

import rat_jax
from conftest import FIXTURES
from rat_jax import MoBA, Quest, SnapKV

select = jax.jit(rat_jax.select, static_argnums=2)
attend = jax.jit(rat_jax.attend, static_argnums=3)
compress = jax.jit(rat_jax.compress, static_argnums=3)
SCORES, OUTPUTS = 2e-4, 2e-5  # absolute


@functools.cache
def fixture(name):
  return dict(np.load(FIXTURES / "sparse" / f"{name}.npz", allow_pickle=False))


def cases(name):
  return [str(case) for case in fixture(name)["case_names"]]


def heads_last(x):
  return np.moveaxis(x, 1, 2)  # [B, N, T, H] -> [B, T, N, H]


def assert_within(actual, expected, tolerance):
  assert np.shape(actual) == np.shape(expected)
  np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case == "t70_p8" else pytest.mark.slow)
                                  for case in cases("quest")])
def test_quest(case):
  data = fixture("quest")
  q, k, v = (heads_last(data[f"{case}/{name}"]) for name in "qkv")
  page, checked = int(data[f"{case}/page_size"]), 0
  for budget in data[f"{case}/budgets"]:
    for path in ("eval", "kernel"):
      key = f"{case}/{path}/b{budget}"
      if f"{key}/pages" not in data:
        continue
      mode = Quest.upstream(budget, page=page, path=path)
      selection = select(q, k, mode)
      pages, scores = data[f"{key}/pages"], data[f"{key}/scores"]
      assert np.asarray(selection.valid).sum(-1).tolist() == np.full(q.shape[:3], pages.shape[2])[:, :1].tolist()
      np.testing.assert_array_equal(selection.blocks[:, 0, :, :pages.shape[2]], pages)
      assert_within(selection.scores[:, 0, :, :scores.shape[2]], scores, SCORES)
      assert_within(attend(q, k, v, mode), heads_last(data[f"{key}/out"]), OUTPUTS)
      checked += 1
  assert checked >= len(data[f"{case}/budgets"])


@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case == "gqa_t48_b16" else pytest.mark.slow)
                                  for case in cases("moba")])
def test_moba(case):
  data = fixture("moba")
  q, k, v = (data[f"{case}/{name}"] for name in "qkv")
  block, gate = int(data[f"{case}/block_size"]), np.moveaxis(data[f"{case}/gate"], 1, 2)
  for top_k in data[f"{case}/topks"]:
    mode = MoBA.upstream(top_k, block=block)
    selection = select(q, k, mode)
    chosen = (np.asarray(selection.blocks)[..., None] == np.arange(gate.shape[-1])).any(-2)
    np.testing.assert_array_equal(chosen, np.moveaxis(data[f"{case}/top{top_k}/block_mask"], 1, 2))
    np.testing.assert_array_equal(np.isneginf(selection.scores), np.isneginf(gate))
    earlier = np.isfinite(gate)
    assert_within(np.asarray(selection.scores)[earlier], gate[earlier], SCORES)
    assert_within(attend(q, k, v, mode), data[f"{case}/top{top_k}/out"], OUTPUTS)
    # A row is a decode step on the keys before it.
    t = q.shape[1] // 2
    step = attend(q[:, t:t + 1], k[:, :t + 1], v[:, :t + 1], mode)
    assert_within(step[:, 0], data[f"{case}/top{top_k}/out"][:, t], OUTPUTS)


def snapkv_mode(config):
  window, capacity, pooling = config.split("_")
  return SnapKV(int(capacity[1:]), obs_window=int(window[1:]), kernel=int(pooling[3:]), pool=pooling[:3])


@pytest.mark.parametrize("case", cases("snapkv"))
def test_snapkv(case):
  data = fixture("snapkv")
  q, k, v = (heads_last(data[f"{case}/{name}"]) for name in "qkv")
  for config in map(str, data[f"{case}/configs"]):
    mode, key = snapkv_mode(config), f"{case}/{config}"
    kept = compress(q[:, q.shape[1] - mode.obs_window:], k, v, mode)
    if f"{key}/pooled" in data:
      assert_within(kept.scores, data[f"{key}/pooled"], SCORES)
    expected = data[f"{key}/kept"]
    count = expected.shape[2]
    np.testing.assert_array_equal(kept.positions[:, :, :count], expected)
    assert (np.asarray(kept.positions)[:, :, count:] == -1).all()
    order = np.argsort(data[f"{key}/kept_order"], axis=2)[..., None]
    for name, ours in (("k", kept.k), ("v", kept.v)):
      theirs = np.take_along_axis(data[f"{key}/{name}"], order, axis=2)
      if theirs.shape[1] != ours.shape[2]:  # unchanged, so not repeated to N heads
        theirs = np.repeat(theirs, ours.shape[2] // theirs.shape[1], axis=1)
      np.testing.assert_array_equal(np.moveaxis(np.asarray(ours)[:, :count], 1, 2), theirs)
      np.testing.assert_array_equal(np.asarray(ours)[:, count:], 0)
