"""TopK reads exactly the keys with the largest scores, whatever the budget, forced keys, ties and groups."""

from __future__ import annotations

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

import rat_jax
from conftest import OPERATION, assert_close, examples
from rat_jax import Dense, RATPlusConfig, TopK, parse_mode

select = jax.jit(rat_jax.select, static_argnums=2, static_argnames="layer")
attend = jax.jit(rat_jax.attend, static_argnums=3)


def draw(length, heads=4, kv_heads=2, seed=0, whole=False):
  """Queries, keys and values of two rows; `whole` numbers make many ties, and scores without rounding."""
  rng = np.random.default_rng(seed)
  q = rng.standard_normal((2, length, heads, 8)).astype(np.float32)
  k, v = rng.standard_normal((2, 2, length, kv_heads, 8)).astype(np.float32)
  return (np.round(q), np.round(k), v) if whole else (q, k, v)


def budget_of(mode, length):
  """Keys that the query of a row of `length` tokens reads, by the contract's words."""
  asked = mode.budget if isinstance(mode.budget, int) else -(-Fraction(str(mode.budget)) * length // 1)
  return min(max(int(asked), mode.window + 1 + mode.sinks), length)


def best(mode, scores, t):
  """The keys of one query by sorting its scores [S] with NumPy."""
  forced = [s for s in range(t + 1) if t - s <= mode.window or s < mode.sinks]
  scores = scores[:t + 1].astype(np.float64).copy()
  scores[forced] = np.inf
  return sorted(np.argsort(-scores, kind="stable")[:budget_of(mode, t + 1)].tolist())


MODES = st.builds(
    lambda window, sinks, extra, share, group, selector: TopK(
        share or window + 1 + sinks + extra, window, sinks, group=group, selector=selector, seed=3),
    st.integers(0, 3), st.integers(0, 2), st.integers(0, 6), st.sampled_from([None, 0.1, 0.25, 0.3, 1.0]),
    st.sampled_from(["head", "kv"]), st.sampled_from(["score", "oracle", "random"]))


@given(MODES, st.integers(1, 17), st.integers(0, 99))
@examples(12)
def test_the_best_keys_are_read(mode, length, seed):
  q, k, _ = draw(length, seed=seed, whole=True)
  chosen = select(q, k, mode)
  scores = np.einsum("btkgh,bskh->btkgs", q.reshape(2, length, 2, 2, 8), k)
  scores = scores.mean(axis=3) if mode.group == "kv" else scores.reshape(2, length, 4, length)
  if mode.selector == "random":
    scores = np.asarray(chosen.scores)
  else:
    later = np.arange(length) > np.arange(length)[:, None]
    np.testing.assert_array_equal(chosen.scores, np.where(later[:, None], -np.inf, scores))
  blocks, valid = np.asarray(chosen.blocks), np.asarray(chosen.valid)
  for b, t, head in np.ndindex(scores.shape[:3]):
    assert blocks[b, t, head][valid[b, t, head]].tolist() == best(mode, scores[b, t, head], t)
  assert (blocks[~valid] == length).all()
  assert (np.asarray(chosen.tokens) == valid.sum(axis=-1)).all()


@pytest.mark.parametrize("mode", [TopK(5), TopK(0.4, 2, 1, group="kv"), TopK(4, selector="random")], ids=str)
def test_attention_is_a_softmax_over_the_chosen_keys(mode):
  q, k, v = draw(19)
  chosen = select(q, k, mode)
  seen = np.zeros((2, 19, 4, 20), bool)
  np.put_along_axis(seen, np.repeat(chosen.blocks, 4 // chosen.blocks.shape[2], axis=2), True, axis=3)
  scores = np.einsum("btkgh,bskh->btkgs", q.reshape(2, 19, 2, 2, 8).astype(np.float64), k) / np.sqrt(8)
  weights = np.where(seen[..., :19], np.exp(scores.reshape(2, 19, 4, 19)), 0)
  weights = (weights / weights.sum(-1, keepdims=True)).reshape(2, 19, 2, 2, 19)
  expected = np.einsum("btkgs,bskh->btkgh", weights, v).reshape(q.shape)
  assert_close(attend(q, k, v, mode), expected, OPERATION)
  assert_close(attend(q[:, 18:], k, v, mode), expected[:, 18:], OPERATION, "one query")


def test_a_draw_depends_on_seed_row_layer_head_position_and_key_alone():
  q, k, _ = draw(16)
  mode = TopK(4, selector="random", seed=1)
  both = select(q, k, mode, row_ids=np.array([7, 3]), layer=2)
  alone = select(q[1:, :9], k[1:, :9], mode, row_ids=np.array([3]), layer=2)
  np.testing.assert_array_equal(alone.scores[0], both.scores[1, :9, :, :9])
  other = select(q, k, mode, row_ids=np.array([7, 3]), layer=1)
  assert (np.asarray(other.scores) != np.asarray(both.scores))[np.isfinite(both.scores)].all()


@pytest.mark.slow
def test_everything_is_dense_and_gradients_are_finite():
  q, k, v = draw(12)
  assert_close(attend(q, k, v, TopK(1.0)), attend(q, k, v, Dense()), OPERATION)
  for d in jax.grad(lambda *a: jnp.sum(rat_jax.attend(*a, TopK(3)) ** 2), (0, 1, 2))(q, k, v):
    assert jnp.isfinite(d).all()


def test_memory_grows_with_the_length_and_not_its_square():
  """Not with queries x keys, nor with queries x budget: twice the length takes less than 2.6 times as much."""
  sizes = []
  for length in (1024, 2048):
    x = jax.ShapeDtypeStruct((1, length, 2, 32), jnp.float32)
    program = jax.jit(functools.partial(rat_jax.attend, mode=TopK(1 / 16))).lower(x, x, x).compile()
    sizes.append(program.memory_analysis().temp_size_in_bytes)
  assert sizes[1] < 2.6 * sizes[0], sizes


def test_fields_text_and_costs():
  mode = TopK(0.25, window=2, sinks=1, group="kv")
  assert str(mode) == "topk:0.25,window=2,sinks=1,group=kv"
  assert parse_mode(str(mode)) == mode
  config = RATPlusConfig(31, 2, 32, 4)
  assert rat_jax.tokens_read(config, mode, 100) == (25, 25)
  assert rat_jax.tokens_read(config, mode, 9) == (4, 4)
  assert rat_jax.tokens_read(config, mode, 50, prompt_length=60) == (50, 50)
  assert rat_jax.cache_bytes(config, mode, 2, 64) == rat_jax.cache_bytes(config, Dense(), 2, 64)


@pytest.mark.parametrize(("build", "text"), [
    (lambda: TopK(3, window=2, sinks=1), r"budget=3; use at least 4 \(window \+ 1 \+ sinks are always read and"),
    (lambda: TopK(0), "budget=0"), (lambda: TopK(1.5), "budget=1.5"), (lambda: TopK(4, window=-1), "window=-1"),
    (lambda: TopK(4, sinks=-1), "sinks=-1"), (lambda: TopK(4, group="all"), "group='all'")])
def test_bad_fields_are_named(build, text):
  with pytest.raises(ValueError, match=text):
    build()


def test_packed_rows_are_refused():
  q, k, v = draw(6)
  with pytest.raises(NotImplementedError, match="does not serve packed rows"):
    rat_jax.attend(q, k, v, TopK(2), segment_ids=np.ones((2, 6), int))
