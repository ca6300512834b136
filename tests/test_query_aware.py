"""Modes that choose by the query: every way of running them gives the same numbers, and budgets mean what they say."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

import rat_jax
from conftest import WHOLE_MODEL, assert_close
from rat_jax import (
  Dense,
  Dilated,
  DilatedTopK,
  MoBA,
  PerHead,
  PerLayer,
  Quest,
  RATPlusConfig,
  RATPlusLM,
  SnapKV,
  StreamingLLM,
)
from rat_jax.modes import BlockMode

VOCAB, LAYERS, LENGTH = 61, 3, 24
PROMPT = np.array([9, 16, 1, 0])
ROW_IDS = np.array([5, 0, 9, 2])

CHOOSING = [
    Quest(8, block=4), Quest(0.4, block=3, keep_first=False, group="kv"), Quest.upstream(8, page=4),
    Quest.upstream(12, page=4, path="eval"), MoBA(2, block=4), MoBA(0.3, block=4, keep_first=False, group="kv"),
    MoBA(1, block=5, keep_first=False), DilatedTopK(4, 2), DilatedTopK(5, 1, window=2, sinks=1, score="minmax"),
    DilatedTopK(3, 0.2, score="mean", group="kv"), StreamingLLM(2, 1) | Quest(4, block=4, keep_first=False),
    SnapKV(6, obs_window=3, kernel=3), SnapKV(0.5, obs_window=2, pool="max", group="kv"),
    SnapKV(5, obs_window=3, kernel=1, dense_layers=(-1,)), Quest(8, block=4, dense_layers=(0,)),
    Quest(8, block=4, selector="random", seed=3), MoBA(2, block=4, selector="oracle"),
    MoBA(2, block=4, selector="random", group="kv"), SnapKV(6, obs_window=3, selector="random"),
    SnapKV(6, obs_window=3, selector="oracle"), DilatedTopK(4, 2, selector="oracle", window=1),
    PerLayer((Quest(8, block=4), Dilated(4), SnapKV(6, obs_window=3))),
]
# (mode, prefill_mode)
OVERRIDDEN = [
    (Dense(), MoBA(2, block=4)), (Dilated(4, 1), Dense()), (Dilated(4, 1), Dilated(8)), (Quest(8, block=4), Dilated(4)),
    (Quest(8, block=4), Quest(8, block=4)), (SnapKV(6, obs_window=3), MoBA(2, block=4)),
    (MoBA(2, block=4), PerLayer((Dense(), Quest(8, block=4), StreamingLLM(3)))),
]


@functools.cache
def setup(memory, kv_heads):
  config = RATPlusConfig(VOCAB, LAYERS, 32, 4, num_kv_heads=kv_heads, memory=memory, init_std=None)
  model = RATPlusLM(config)
  tokens = np.asarray(jax.random.randint(jax.random.key(1), (len(PROMPT), LENGTH), 0, VOCAB))
  return model, jax.jit(model.init)(jax.random.key(0), tokens)["params"], tokens


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("mode", "prefill_mode"))
def apply(model, params, tokens, **arguments):
  return model.apply({"params": params}, tokens, **arguments)


def rows_from(tokens, start, width):
  padded = np.pad(tokens, ((0, 0), (0, width)))
  return np.stack([padded[b, s:s + width] for b, s in enumerate(start)])


def check_every_way(mode, prefill_mode, memory, kv_heads, chunks=(None, 5)):
  model, params, tokens = setup(memory, kv_heads)
  expected = np.asarray(apply(model, params, tokens, mode=mode, prefill_mode=prefill_mode, prompt_lengths=PROMPT,
                              row_ids=ROW_IDS))
  prompts = np.where(np.arange(LENGTH) < PROMPT[:, None], tokens, 7)[:, :PROMPT.max()]  # padded with a real token
  rows, room = np.flatnonzero(PROMPT), PROMPT.max() + LENGTH  # SnapKV counts from the padded prompt
  for chunk in chunks:
    logits, cache = rat_jax.prefill(model, params, prompts, PROMPT, mode=mode, prefill_mode=prefill_mode,
                                    max_length=room, chunk=chunk, row_ids=ROW_IDS)
    assert_close(logits[rows], expected[rows, PROMPT[rows] - 1], WHOLE_MODEL, f"prefill, chunk {chunk}")
    # Extension by a ragged chunk, then steps to the end of the fullest row.
    count = np.array([6, 3, 0, 5])
    logits, cache = rat_jax.extend(model, params, rows_from(tokens, PROMPT, 6), cache, count)
    at = PROMPT + count
    for b, (start, n) in enumerate(zip(PROMPT, count, strict=True)):
      if n:
        assert_close(logits[b, :n], expected[b, start:start + n], WHOLE_MODEL, f"extend, chunk {chunk}")
    for _ in range(LENGTH - at.max()):
      logits, cache = rat_jax.decode_step(model, params, rows_from(tokens, at, 1)[:, 0], cache)
      assert_close(logits, expected[np.arange(len(at)), at], WHOLE_MODEL, f"step, chunk {chunk}")
      at = at + 1
  if prefill_mode is None:
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) == rat_jax.cache_bytes(
        model.config, mode, len(PROMPT), room, prompt_length=PROMPT.max())
  # One row alone, without padding.
  alone, _ = rat_jax.prefill(model, params, tokens[:1, :9], mode=mode, prefill_mode=prefill_mode, max_length=LENGTH,
                             row_ids=ROW_IDS[:1])
  assert_close(alone[0], expected[0, 8], WHOLE_MODEL, "alone")


@pytest.mark.parametrize("mode", CHOOSING, ids=str)
def test_every_way_gives_the_same_logits(mode):
  check_every_way(mode, None, True, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("memory", "kv_heads"), [(True, 4), (False, 4), (False, 2)])
@pytest.mark.parametrize("mode", CHOOSING, ids=str)
def test_every_way_gives_the_same_logits_on_every_backbone(mode, memory, kv_heads):
  check_every_way(mode, None, memory, kv_heads)


@pytest.mark.parametrize(("mode", "prefill_mode"), OVERRIDDEN, ids=str)
def test_other_forms_of_the_prompt(mode, prefill_mode):
  check_every_way(mode, prefill_mode, True, 2)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_per_head(kv_heads):
  mode = PerHead(tuple([Dilated(4), StreamingLLM(3), Dense(), Dilated(3, 1)][:kv_heads]))
  check_every_way(mode, None, True, kv_heads)
  check_every_way(PerLayer((mode, Dense(), mode)), None, False, kv_heads, chunks=(5,))


@pytest.mark.parametrize("mode", [mode for mode in CHOOSING if isinstance(mode, BlockMode)], ids=str)
def test_the_prompt_under_the_mode_itself_is_the_plain_call(mode):
  model, params, tokens = setup(True, 2)
  plain = apply(model, params, tokens, mode=mode, row_ids=ROW_IDS)
  same = apply(model, params, tokens, mode=mode, prefill_mode=mode, prompt_lengths=PROMPT, row_ids=ROW_IDS)
  assert_close(same, plain, WHOLE_MODEL)
