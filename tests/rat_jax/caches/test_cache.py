"""The compact cache holds what `visible` says, for any dilation, window, sinks, length and way of writing."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

import rat_jax
from conftest import examples, first_quick
from experiments.aot.chips import programs_for
from rat_jax import (
    Dense,
    Dilated,
    MoBA,
    PerLayer,
    Quest,
    RATPlusConfig,
    RATPlusLM,
    SnapKV,
    StreamingLLM,
    visible,
)
from rat_jax.caches import compressed, full
from rat_jax.caches.cache import empty_cache
from rat_jax.caches.slots import Slots, fill, write

patterns = st.builds(Dilated, st.one_of(st.none(), st.integers(1, 9)), st.integers(0, 9), st.integers(0, 7))


@given(patterns, st.integers(1, 40), st.data())
@examples(20)
def test_readable_slots_are_what_the_next_query_sees(mode, max_length, data):
  length = data.draw(st.integers(0, max_length))
  slots = Slots.of(mode.pattern, max_length)
  assert slots.rows <= min(max_length, mode.sinks + mode.window + 1 + max_length // (mode.dilation or max_length + 1))
  positions = np.asarray(jax.jit(Slots.readable, static_argnums=0)(slots, np.array([length])))[0]
  present = positions[positions >= 0]
  assert len(set(present.tolist())) == len(present), "a position is read twice"
  query = np.array([length])
  seen = np.asarray(jax.jit(visible, static_argnums=0)(mode, query, np.arange(max_length + 1)))[0]
  assert set(present[seen[present]].tolist()) == set(np.flatnonzero(seen[:length]).tolist())


@given(patterns, st.integers(1, 24), st.data())
@examples(12)
def test_filled_and_appended_caches_hold_the_same(mode, max_length, data):
  lengths = np.array(data.draw(st.lists(st.integers(0, max_length), min_size=2, max_size=2)))
  chunks = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
  slots = Slots.of(mode.pattern, max_length)
  # The key of position p in row b: the number 100 b + p + 1.
  values = (np.arange(max_length) + 1 + 100 * np.arange(2)[:, None]).astype(np.float32)[:, :, None, None]
  whole = jax.jit(fill, static_argnums=0)(slots, values, lengths)
  held = np.asarray(jax.jit(Slots.held, static_argnums=0)(slots, lengths))
  expected = np.where(held >= 0, held + 1 + 100 * np.arange(2)[:, None], 0)
  np.testing.assert_array_equal(whole[:, 0, :, 0], expected)

  rows = jnp.zeros((1, 2, 1, slots.rows, 1))
  done = np.zeros(2, int)
  while (done < lengths).any():
    size = chunks[int(done.max()) % len(chunks)]
    at = done[:, None] + np.arange(size)
    real = at < lengths[:, None]
    new = np.take_along_axis(values, np.minimum(at, max_length - 1)[:, :, None, None], axis=1)[None]
    done = np.minimum(done + size, lengths)
    rows = jax.jit(write, static_argnums=0)(slots, rows, new, np.where(real, at, -1), done)
  np.testing.assert_array_equal(rows[0], whole)


MODES = [Dilated(4, window=2, sinks=3), Dense(), Quest(9, block=4), MoBA(3, block=4), SnapKV(9, obs_window=4)]


@pytest.mark.parametrize("mode", first_quick(1, MODES))
@pytest.mark.parametrize("pieces", [pytest.param(True, marks=pytest.mark.slow), False])
def test_rows_that_fill_tiles_change_nothing(mode, pieces, monkeypatch):
  """As a TPU's caches have them; a prompt at once, or in pieces, and then token by token."""
  model = RATPlusLM(RATPlusConfig(31, 2, 16, 2, num_kv_heads=1))
  tokens = np.random.default_rng(0).integers(0, 31, (2, 27))
  params = model.init(jax.random.key(0), tokens[:, :4])["params"]
  lengths = np.array([21, 17])

  def run():
    how = dict(chunk=8) if pieces else {}
    logits, cache = rat_jax.prefill(model, params, tokens[:, :21], lengths, mode=mode, max_length=27, **how)
    found, shapes = [logits], {x.shape[3] for x in jax.tree.leaves(cache.runs) if x.ndim == 5}
    step = jax.jit(functools.partial(rat_jax.decode_step, model))
    for t in range(21, 27):
      logits, cache = step(params, tokens[:, t], cache)
      found.append(logits)
    return np.stack(found), shapes

  expected, _ = run()
  for module in (full, compressed):
    monkeypatch.setattr(module, "aligned", lambda rows, *arrays: rows + -rows % 16)
  jax.clear_caches()
  logits, shapes = run()
  jax.clear_caches()
  assert 16 in shapes or 32 in shapes
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_caches_of_a_tpu_have_whole_tiles_of_rows(mode):
  config = RATPlusConfig(31, 2, 16, 2, num_kv_heads=1)
  with programs_for("TPU v5", "tpu"):
    cache = jax.eval_shape(lambda: empty_cache(config, mode, 2, 37, prompt_width=30))
  rows = {x.shape[3] % 16 for x in jax.tree.leaves(cache.runs) if x.ndim == 5 and x.shape[3] > 10}
  assert rows == {0}


def test_cache_bytes_are_what_is_allocated():
  for config in (RATPlusConfig(31, 3, 32, 4, num_kv_heads=2), RATPlusConfig(31, 3, 32, 4, dtype="bfloat16"),
                 RATPlusConfig(31, 3, 32, 4, memory=False)):
    for mode in (Dense(), Dilated(8, 3, 2), StreamingLLM(5), PerLayer((Dense(), Dilated(4), Dilated(4)))):
      leaves = jax.tree.leaves(empty_cache(config, mode, 2, 64))
      assert rat_jax.cache_bytes(config, mode, 2, 64) == sum(leaf.nbytes for leaf in leaves)


def test_a_dilated_cache_holds_sinks_ring_representatives_and_state_alone():
  config = RATPlusConfig(31, 2, 32, 4)
  row = 2 * 2 * 32 * 4  # layers, keys and values, N * H, float32
  rows = 3 + (5 + 1) + 1000 // 16
  assert rat_jax.cache_bytes(config, Dilated(16, 5, 3), 1, 1000) == row * (rows + 1) + 4  # 1: the state; 4: the length
  no_dilation = dict(batch=1, max_length=1000)
  assert rat_jax.cache_bytes(config, StreamingLLM(5, 3), **no_dilation) == row * (3 + 6 + 1) + 4


def test_a_long_dilated_cache_is_a_sixtieth_of_the_dense_one():
  config = RATPlusConfig.preset("ratplus-7b")
  ratio = rat_jax.cache_bytes(config, Dense(), 1, 16384) / rat_jax.cache_bytes(config, Dilated(64), 1, 16384)
  assert 60 < ratio < 64


def test_tokens_read():
  config = RATPlusConfig(31, 2, 32, 4)
  assert rat_jax.tokens_read(config, Dense(), 100) == (100, 100)
  assert rat_jax.tokens_read(config, Dilated(16), 100) == (7, 7)  # 6 representatives and the query's own token
  assert rat_jax.tokens_read(config, PerLayer((StreamingLLM(8, 2), Dilated(50))), 100) == (11, 2)


def test_cache_bytes_of_a_prompt_that_is_no_count_are_refused():
  config = RATPlusConfig(31, 2, 16, 2)
  for mode in (Dense(), SnapKV(5, obs_window=2)):
    for wrong in (4.0, "4", True, -5):
      with pytest.raises(ValueError, match=f"^prompt_length={wrong!r}; use an integer of at least 0\\.$"):
        rat_jax.cache_bytes(config, mode, 1, 8, wrong)
    with pytest.raises(ValueError, match=r"^prompt_length=9 with max_length=8; "):
      rat_jax.cache_bytes(config, mode, 1, 8, 9)
