"""Choosing by the query on plain arrays: against a loop in numpy, budgets, what is read, and what is refused."""

from __future__ import annotations

import math
from fractions import Fraction

import jax
import numpy as np
import pytest
from hypothesis import given, strategies as st

import rat_jax
from conftest import OPERATION, assert_close, examples, first_quick
from rat_jax import (
  Dense,
  Dilated,
  DilatedTopK,
  MoBA,
  PerHead,
  PerLayer,
  Quest,
  RATPlusConfig,
  SnapKV,
  StreamingLLM,
  TopK,
  parse_mode,
  visible,
)

select = jax.jit(rat_jax.select, static_argnums=2, static_argnames="layer")
attend = jax.jit(rat_jax.attend, static_argnums=3, static_argnames="layer")
compress = jax.jit(rat_jax.compress, static_argnums=3, static_argnames="layer")


def draw(batch, length, heads, kv_heads, width=8, seed=0):
  rng = np.random.default_rng(seed)
  q = rng.standard_normal((batch, length, heads, width)).astype(np.float32)
  k, v = rng.standard_normal((2, batch, length, kv_heads, width)).astype(np.float32)
  return q, k, v


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def block_score(mode, q, keys):
  """The score of a block from its keys [n, H] up to the query, in float64."""
  if isinstance(mode, DilatedTopK) and mode.score == "representative":
    return q @ keys[-1]
  if isinstance(mode, Quest) or getattr(mode, "score", None) == "minmax":
    return np.maximum(q * keys.min(0), q * keys.max(0)).sum()
  return q @ keys.mean(0)


def expected_blocks(mode, q, k, t):
  """What one query [G, H] chooses among keys [S, H]: a set, by a plain reading of the rules."""
  blocks = t // mode.block + 1
  edges = [range(p * mode.block, min((p + 1) * mode.block, t + 1)) for p in range(blocks)]
  scores = [np.mean([block_score(mode, one, k[at]) for one in q]) for at in edges]
  budget = mode.budget if isinstance(mode, Quest) else mode.top_k
  if isinstance(budget, float):
    count = math.ceil(Fraction(str(budget)) * (t + 1) / mode.block)
  else:
    count = math.ceil(budget / mode.block) if isinstance(mode, Quest) else budget
  forced = {blocks - 1} | ({0} if mode.keep_first else set())
  best = sorted(set(range(blocks)) - forced, key=lambda p: (-scores[p], p))
  return forced | set(best[:max(count - len(forced), 0)]), scores


@st.composite
def block_modes(draw):
  block, group = draw(st.integers(1, 12)), draw(st.sampled_from(["head", "kv"]))
  share = draw(st.sampled_from([0.1, 0.25, 0.3, 0.5, 1.0]))
  keep_first, count = draw(st.booleans()), draw(st.integers(2, 30))
  return draw(st.sampled_from([
      Quest(count * block, block, keep_first, group=group), Quest(share, block, keep_first, group=group),
      MoBA(count, block, keep_first, group=group), MoBA(share, block, keep_first, group=group),
      DilatedTopK(block, count, draw(st.integers(0, 5)), draw(st.integers(0, 3)), group=group,
                  score=draw(st.sampled_from(["representative", "minmax", "mean"]))),
      DilatedTopK(block, share, group=group)]))


@given(block_modes(), st.integers(1, 40), st.sampled_from([(4, 4), (4, 2)]), st.integers(0, 50))
@examples(4)
def test_choices_and_outputs_equal_a_plain_reading_of_the_rules(mode, length, heads, seed):
  q, k, v = draw(1, length, *heads, seed=seed)
  selection, out = select(q, k, mode), np.asarray(attend(q, k, v, mode))
  group, count = heads[0] // heads[1], -(-length // mode.block)
  blocks, valid = np.asarray(selection.blocks)[0], np.asarray(selection.valid)[0]
  assert selection.scores.shape == (1, length, heads[0] if mode.group == "head" else heads[1], count)
  assert (blocks[~valid] == count).all()
  assert (np.diff(blocks) >= 0).all()
  largest = rat_jax.tokens_read(RATPlusConfig(8, 1, 16, 2), mode, length)[0]
  for t in range(length):
    for n in range(heads[0]):
      at = n if mode.group == "head" else n // group
      queries = q[0, t, n:n + 1] if mode.group == "head" else q[0, t, at * group:(at + 1) * group]
      wanted, scores = expected_blocks(mode, queries.astype(np.float64), k[0, :, n // group].astype(np.float64), t)
      np.testing.assert_allclose(selection.scores[0, t, at, :len(scores)], scores, rtol=0, atol=2e-4)
      assert np.isneginf(np.asarray(selection.scores)[0, t, at, len(scores):]).all()
      assert set(blocks[t, at][valid[t, at]].tolist()) == wanted
      reads = np.isin(np.arange(t + 1) // mode.block, list(wanted))
      if mode.rule is not None:
        reads |= np.asarray(visible(mode.rule, np.array([t]), np.arange(t + 1)))[0]
      assert selection.tokens[0, t, at] == reads.sum()
      keys = k[0, :t + 1, n // group][reads]
      read = softmax(keys @ q[0, t, n] / np.sqrt(8)) @ v[0, :t + 1, n // group][reads]
      assert_close(out[0, t, n], read, OPERATION * 2)
  assert (np.asarray(selection.tokens)[0, -1] <= largest).all()


@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 20), st.sampled_from([1, 3, 5]),
       st.sampled_from(["avg", "max"]), st.sampled_from(["head", "kv"]), st.integers(0, 20))
@examples(8)
def test_what_snapkv_keeps(length, window, extra, kernel, pool, group, seed):
  mode = SnapKV(window + extra, obs_window=window, kernel=kernel, pool=pool, group=group)
  q, k, v = draw(2, length, 4, 2, seed=seed)
  lengths = np.array([length, max(length - 3, 0)])
  q_window = np.stack([np.stack([q[b, max(n - window + j, 0)] for j in range(window)]) for b, n in enumerate(lengths)])
  kept = compress(q_window, k, v, mode, lengths=lengths)
  for b, n in enumerate(lengths):
    for head in range(4 if group == "head" else 2):
      positions = np.asarray(kept.positions)[b, head]
      present = positions[positions >= 0]
      assert (positions[len(present):] == -1).all()
      if n <= window + extra:
        np.testing.assert_array_equal(present, np.arange(n))
      else:
        heads = [head] if group == "head" else [2 * head, 2 * head + 1]
        pooled = np.mean([pooled_mass(mode, q[b, :n, i], k[b, :n, i // 2]) for i in heads], axis=0)
        np.testing.assert_allclose(kept.scores[b, head, :n - window], pooled, rtol=0, atol=1e-5)
        best = np.sort(np.argsort(-pooled, kind="stable")[:extra])
        margin = np.sort(pooled)[::-1]
        if margin[extra - 1] - margin[extra] > 1e-5:
          np.testing.assert_array_equal(present, [*best, *range(n - window, n)])
      rows = np.asarray(kept.k)[b, :, head]
      np.testing.assert_array_equal(rows[:len(present)], k[b, present, head // 2 if group == "head" else head])
      np.testing.assert_array_equal(rows[len(present):], 0)


def pooled_mass(mode, q, k):
  n, window, half = len(q), mode.obs_window, mode.kernel // 2
  scores = q[n - window:].astype(np.float64) @ k.T.astype(np.float64) / np.sqrt(q.shape[-1])
  scores[np.arange(n)[None] > np.arange(n - window, n)[:, None]] = -np.inf
  mass = np.pad(softmax(scores).sum(0)[:n - window], half)
  windows = np.lib.stride_tricks.sliding_window_view(mass, mode.kernel)
  return windows.max(-1) if mode.pool == "max" else windows.sum(-1) / mode.kernel


@pytest.mark.parametrize("mode", [Quest(1.0, 4), Quest(40, 4), MoBA(1.0, 5), MoBA(9, 5), DilatedTopK(4, 1.0),
                                  MoBA(2, 64), DilatedTopK(1, 1), StreamingLLM(40, 0) | MoBA(2, 4)], ids=str)
def test_a_budget_for_everything_is_dense(mode):
  q, k, v = draw(2, 37, 4, 2)
  assert_close(attend(q, k, v, mode), attend(q, k, v, Dense()), OPERATION)
  assert rat_jax.tokens_read(RATPlusConfig(8, 1, 16, 2), mode, 37) == (37,)


def test_one_block_is_local():
  q, k, v = draw(1, 22, 2, 2)
  out = attend(q, k, v, MoBA(1, 5, keep_first=False))
  for start in range(0, 22, 5):
    at = slice(start, min(start + 5, 22))
    assert_close(out[:, at], attend(q[:, at], k[:, at], v[:, at], Dense()), OPERATION)


def test_dilation_with_top_k_is_the_union_of_a_rule_and_a_selection():
  q, k, v = draw(2, 33, 4, 2)
  for score, selector in (("mean", MoBA(3, 4, keep_first=False)), ("minmax", Quest(12, 4, keep_first=False))):
    union = Dilated(4, 2, 1) | selector
    assert parse_mode(str(union)) == union
    assert_close(attend(q, k, v, DilatedTopK(4, 3, 2, 1, score=score)), attend(q, k, v, union), OPERATION)


@pytest.mark.parametrize("build", first_quick(1, [lambda **o: DilatedTopK(4, 3, 2, **o), lambda **o: Quest(12, 4, **o),
                                                  lambda **o: MoBA(3, 4, **o)]))
@pytest.mark.parametrize("group", ["head", "kv"])
def test_the_oracle_chooses_the_most_mass(build, group):
  q, k, _ = draw(2, 48, 4, 2)
  oracle = select(q, k, build(selector="oracle", group=group))
  masses = {"oracle": oracle}
  for selector in ("score", "random"):
    masses[selector] = select(q, k, build(selector=selector, group=group))
  mass = np.where(np.isfinite(oracle.scores), oracle.scores, 0.0)
  taken = {name: np.take_along_axis(np.pad(mass, ((0, 0),) * 3 + ((0, 1),)), np.asarray(s.blocks), axis=-1).sum(-1)
           for name, s in masses.items()}
  for name in ("score", "random"):
    assert (taken["oracle"] >= taken[name] - 1e-5).all()
    assert taken["oracle"].mean() > taken[name].mean() + 1e-3
  if not isinstance(build(), DilatedTopK):
    np.testing.assert_allclose(mass.sum(-1), 1.0, rtol=1e-5)


def test_random_choices_depend_on_row_ids_and_not_on_the_batch():
  q, k, _ = draw(3, 30, 4, 2)
  mode = MoBA(2, 3, selector="random", seed=1)
  ids = np.array([4, 7, 4])
  chosen = select(q, k, mode, row_ids=ids)
  np.testing.assert_array_equal(chosen.scores[0], chosen.scores[2])
  assert (np.asarray(chosen.scores[0]) != np.asarray(chosen.scores[1])).any()
  alone = select(q[1:2, 20:21], k[1:2, :25], mode, row_ids=ids[1:2], q_positions=np.array([[20]]))
  np.testing.assert_array_equal(alone.scores[0, 0, :, :7], chosen.scores[1, 20, :, :7])
  for other in (dict(layer=1), dict(row_ids=ids + 1)):
    assert (np.asarray(select(q, k, mode, **(dict(row_ids=ids) | other)).scores) != np.asarray(chosen.scores)).any()
  draws = np.asarray(chosen.scores)[np.isfinite(chosen.scores)]
  assert 0.45 < draws.mean() < 0.55
  kept = [compress(q[:, 20:], k, k, SnapKV(14, obs_window=10, selector="random"), row_ids=r) for r in (ids, ids + 1)]
  assert (np.asarray(kept[0].positions) != np.asarray(kept[1].positions)).any()
  np.testing.assert_array_equal(kept[0].positions[0], kept[0].positions[2])


def test_a_per_layer_mode_gives_its_layer():
  q, k, v = draw(1, 20, 2, 2)
  modes = PerLayer((Quest(8, 4), MoBA(2, 4), SnapKV(6, obs_window=2)))
  np.testing.assert_array_equal(select(q, k, modes, layer=1).blocks, select(q, k, MoBA(2, 4)).blocks)
  np.testing.assert_array_equal(attend(q, k, v, modes, layer=0), attend(q, k, v, Quest(8, 4)))
  np.testing.assert_array_equal(compress(q[:, 18:], k, v, modes, layer=2).positions,
                                compress(q[:, 18:], k, v, modes.modes[2]).positions)


def test_budgets_of_equal_value_are_different_modes():
  assert MoBA(1, 4, keep_first=False) != MoBA(1.0, 4, keep_first=False)
  assert len({MoBA(n, 4, keep_first=False) for n in (1, 1.0, np.int64(1))}) == 2
  assert PerLayer((MoBA(1, 4, keep_first=False),)) != PerLayer((MoBA(1.0, 4, keep_first=False),))
  q, k, v = draw(1, 20, 2, 2)
  local, everything = (attend(q, k, v, MoBA(n, 4, keep_first=False)) for n in (1, 1.0))
  assert np.abs(np.asarray(local) - np.asarray(everything)).max() > 0.1
  assert Quest(np.float32(0.1)) == Quest(0.1)
  assert Quest(256, dense_layers=[1, 0, 1]) == Quest(256, dense_layers=(0, 1))
  assert Quest(256, dense_layers=iter((1, 0))) == Quest(256, dense_layers=(0, 1))
  assert MoBA(2, group=np.str_("kv")) == MoBA(2, group="kv")
  assert type(Quest(np.float64(0.5)).budget) is float


@pytest.mark.parametrize("share", [0.1, 0.3, 1 / 3, 0.0625, 0.7])
def test_shares_are_exact(share):
  mode = Quest(share, 7, keep_first=False)
  for t in (0, 6, 7, 69, 99, 100_000):
    assert mode.blocks_at(t + 1) == math.ceil(Fraction(str(share)) * (t + 1) / 7)
  assert SnapKV(share, obs_window=2).capacity_at(100) == max(math.ceil(Fraction(str(share)) * 100), 3)


@pytest.mark.parametrize("mode", [
    Quest(256), Quest(0.25, 16, False, (0, -1), group="kv", selector="random", seed=4), Quest.upstream(1024),
    Quest.upstream(512, path="eval"), MoBA(3), MoBA.upstream(3), SnapKV(0.25), SnapKV.upstream(), DilatedTopK(64, 8),
    DilatedTopK(16, 0.5, 3, 2, "mean"), PerHead((Dense(), Dilated(3, sinks=1))),
    PerLayer((Quest(256), SnapKV(100), PerHead((Dense(), Dilated(2))))), Dilated(16, 2) | Quest(0.1)], ids=str)
def test_text_round_trip(mode):
  read = parse_mode(str(mode))
  assert read == mode
  assert hash(read) == hash(mode)


@pytest.mark.parametrize(("build", "message"), [
    (lambda: Quest(64), r"budget=64; use at least 65 \(the forced blocks take 2 blocks of 64\)"),
    (lambda: Quest(0, keep_first=False), "budget=0"),
    (lambda: Quest.upstream(15), "budget=15"),
    (lambda: Quest(0.5, rounding="eval", keep_first=False), "takes tokens"),
    (lambda: Quest(1.5), r"budget=1.5; use an integer of at least 65 .* or a share in \(0, 1\]"),
    (lambda: Quest(0.0), "budget=0.0"),
    (lambda: Quest(True), "budget=True"),
    (lambda: Quest(256, block=0), "block=0"),
    (lambda: Quest(256, keep_first=1), "keep_first=1; use True or False"),
    (lambda: Quest(256, group="all"), r"group='all' is unknown; use one of \('head', 'kv'\)"),
    (lambda: Quest(256, selector="best"), "selector='best'"),
    (lambda: Quest(256, seed=-1), "seed=-1"),
    (lambda: Quest(256, dense_layers=0), "dense_layers=0; give a tuple"),
    (lambda: Quest(256, dense_layers=(3,)).of_layer(0, 3), r"dense_layers=\(3,\) with num_layers=3; use -3..2"),
    (lambda: MoBA(1), "top_k=1; use at least 2"),
    (lambda: MoBA(float("nan")), "top_k=nan"),
    (lambda: DilatedTopK(0, 1), "dilation=0"),
    (lambda: DilatedTopK(4, 0), "top_k=0"),
    (lambda: DilatedTopK(4, 1, score="max"), "score='max'"),
    (lambda: Dense() | DilatedTopK(4, 1), "its own rule"),
    (lambda: SnapKV(10, obs_window=4) | Quest(256), "give a position-only mode"),
    (lambda: Dilated(4) | (StreamingLLM(8) | Quest(256)), "it has also=streaming_llm:8 already"),
    (lambda: Quest(256, dense_layers=None), "dense_layers=None; give a tuple"),
    (lambda: MoBA(Fraction(1, 4)), r"top_k=Fraction\(1, 4\); use an integer"),
    (lambda: MoBA(2, group=np.arange(2)), "is unknown; use one of"),
    (lambda: PerLayer(Dense()), "modes=.*give a tuple with one mode for each layer"),
    (lambda: PerHead(Dense()), "give a tuple with one mode for each key/value head"),
    (lambda: visible("dense", np.arange(2), np.arange(2)), "is no mode"),
    (lambda: SnapKV(64), "capacity=64; use at least 65"),
    (lambda: SnapKV(100, kernel=4), "kernel=4; use an odd number"),
    (lambda: SnapKV(100, pool="min"), "pool='min'"),
    (lambda: SnapKV(1.01), "capacity=1.01"),
    (lambda: PerHead(()), "empty"),
    (lambda: PerHead((Quest(256),)), "give a position-only mode"),
    (lambda: PerLayer((Quest(256, dense_layers=(0,)),)), r"modes\[0\] has dense_layers=\(0,\); put Dense"),
    (lambda: visible(Quest(256), np.arange(2), np.arange(2)), "use `select`"),
])
def test_bad_modes(build, message):
  with pytest.raises(ValueError, match=message):
    build()


def test_a_key_that_is_no_number_is_chosen_and_shows():
  q, k, v = draw(1, 12, 2, 1)
  bad = k.copy()
  bad[0, 1, 0, 0] = np.nan
  for mode in (MoBA(2, 4, keep_first=False), Quest(8, block=4), TopK(3), DilatedTopK(4, 2)):
    assert np.isnan(attend(q[:, -1:], bad, v, mode)).all(), mode
  own = select(q[:, -1:], bad, MoBA(1, 4, keep_first=False))
  np.testing.assert_array_equal(own.blocks.ravel(), [2, 2])  # the query's own block is not displaced
  assert own.valid.all()
  two = np.concatenate([bad, k], axis=2)
  kept = compress(q[:, -2:], two, two, SnapKV(5, obs_window=2))
  np.testing.assert_array_equal(kept.lengths, [5])
  assert (np.asarray(kept.positions) >= 0).all()


def test_a_step_after_compression_reads_what_was_kept_and_no_empty_slot():
  q, k, v = draw(2, 12, 4, 2)
  lengths, mode = np.array([12, 3]), SnapKV(5, obs_window=2)
  last = np.stack([q[b, n - 2:n] for b, n in enumerate(lengths)])
  kept = compress(last, k, v, mode, lengths=lengths)
  np.testing.assert_array_equal(kept.lengths, [5, 3])
  step = attend(last[:, 1:], kept.k, kept.v, Dense(), lengths=kept.lengths)
  for b, n in enumerate(lengths):  # a head at a time, over the positions that it kept
    for head in range(4):
      at = np.asarray(kept.positions[b, head])[:min(n, 5)]
      assert (at >= 0).all()
      scores = k[b, at, head // 2] @ last[b, 1, head] / np.sqrt(q.shape[-1])
      weights = np.exp(scores - scores.max())
      assert_close(step[b, 0, head], (weights / weights.sum()) @ v[b, at, head // 2], OPERATION)


def test_bad_calls():
  q, k, v = draw(1, 12, 4, 2)
  for call, message in (
      (lambda: rat_jax.select(q, k, Dense()), "chooses no blocks"),
      (lambda: rat_jax.select(q[:, :, :3], k, MoBA(2, 4)), "N a multiple of K"),
      (lambda: rat_jax.select(q, k, MoBA(2, 4), lengths=[13]), r"use 0\.\.12"),
      (lambda: rat_jax.select(q, k, MoBA(2, 4), layer=-1), "layer=-1"),
      (lambda: rat_jax.attend(q, k[:, :0], v[:, :0], Dense()), "at least one of everything"),
      (lambda: rat_jax.tokens_read(RATPlusConfig(8, 1, 8, 1), Dense(), 20.5), "length=20.5"),
      (lambda: rat_jax.attend(q, k, v, SnapKV(5, obs_window=2)), "use rat_jax.compress"),
      (lambda: rat_jax.attend(q, k, v, PerHead((Dense(),) * 3)), "modes has 3 entries and there are num_kv_heads=2"),
      (lambda: rat_jax.compress(q[:, 9:], k, v, SnapKV(5, obs_window=2)), "obs_window=2, N, H"),
      (lambda: rat_jax.compress(q[:, 10:], k, v, Dense()), "give a SnapKV"),
      (lambda: rat_jax.tokens_read(RATPlusConfig(8, 1, 8, 1), SnapKV(5, obs_window=2), 9), "needs prompt_length")):
    with pytest.raises(ValueError, match=message):
      call()
  with pytest.raises(NotImplementedError, match="packed rows"):
    rat_jax.attend(q, k, v, MoBA(2, 4), segment_ids=np.ones((1, 12), int))


def test_padding_decides_nothing_whatever_the_positions():
  q, k, v = draw(1, 12, 2, 2)
  lengths, at = np.array([5]), np.array([[7, 4, 2]])
  for mode in (MoBA(2, 3, keep_first=False), Quest.upstream(9, page=3, path="eval"), DilatedTopK(3, 1, 2)):
    out = attend(q[:, :3], k, v, mode, lengths=lengths, q_positions=at)
    loud = [np.where(np.arange(12)[:, None, None] < 5, x, 50 * x) for x in (k, v)]
    np.testing.assert_array_equal(attend(q[:, :3], *loud, mode, lengths=lengths, q_positions=at), out)
    blocks = np.asarray(select(q[:, :3], k, mode, lengths=lengths, q_positions=at).blocks)
    assert (blocks[blocks < 4] <= 1).all()


def test_scores_are_not_differentiated():
  q, k, _ = draw(1, 12, 2, 2)
  for gradient in jax.grad(lambda q, k: jax.numpy.where(np.tri(12, 4, -8)[None, :, None], select(
      q, k, MoBA(2, 3)).scores, 0.0).sum(), (0, 1))(q, k):
    np.testing.assert_array_equal(gradient, 0)


def test_the_last_query_of_a_prompt_reads_in_its_form():
  config = RATPlusConfig(8, 1, 16, 2)
  assert rat_jax.tokens_read(config, Quest(8, 4), 24, 24) == (24,)
  assert rat_jax.tokens_read(config, Quest(8, 4), 24, 23) == rat_jax.tokens_read(config, Quest(8, 4), 24) == (8,)
  assert rat_jax.tokens_read(config, MoBA(2, 4), 24, 24) == (8,)
  assert rat_jax.tokens_read(config, SnapKV(6, 3), 24, 24) == (24,)
  assert rat_jax.tokens_read(config, SnapKV(6, 3), 24, 23) == (7,)
  assert rat_jax.tokens_read(config, SnapKV(6, 3), 24, 0) == (24,)
