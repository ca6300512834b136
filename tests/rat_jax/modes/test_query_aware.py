"""Modes that choose by the query: every way of running them gives the same numbers, and budgets mean what they say."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rat_jax
from conftest import WHOLE_MODEL, assert_close, first_quick
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
  TopK,
)
from rat_jax.modes import BlockMode

VOCAB, LAYERS, LENGTH = 61, 3, 24
PROMPT = np.array([9, 16, 1, 0])
ROW_IDS = np.array([5, 0, 9, 2])

CHOOSING = [
    Quest(8, block=3), Quest(0.4, block=3, keep_first=False, group="kv"), Quest.upstream(8, page=4),
    Quest.upstream(12, page=4, path="eval"), MoBA(3, block=4), MoBA(0.3, block=4, keep_first=False, group="kv"),
    MoBA(1, block=5, keep_first=False), DilatedTopK(4, 2), DilatedTopK(5, 1, window=2, sinks=1, score="minmax"),
    DilatedTopK(3, 0.2, score="mean", group="kv"), StreamingLLM(2, 1) | Quest(4, block=4, keep_first=False),
    SnapKV(6, obs_window=3, kernel=3), SnapKV(0.5, obs_window=2, pool="max", group="kv"),
    SnapKV(5, obs_window=3, kernel=1, dense_layers=(-1,)), Quest(8, block=3, dense_layers=(0,)),
    Quest(8, block=3, selector="random", seed=3), MoBA(3, block=4, selector="oracle"),
    MoBA(3, block=4, selector="random", group="kv"), SnapKV(6, obs_window=3, selector="random"),
    SnapKV(6, obs_window=3, selector="oracle"), DilatedTopK(4, 2, selector="oracle", window=1),
    PerLayer((Quest(8, block=3), Dilated(4), SnapKV(6, obs_window=3))),
    TopK(5), TopK(0.3, window=2, sinks=1, group="kv"), TopK(4, selector="random", seed=1, dense_layers=(0,)),
]
QUICK = [CHOOSING[i] for i in (0, 12)]
BACKBONES = [(True, 2), (True, 4), (False, 4), (False, 2)]  # (memory, kv_heads)
# (mode, prefill_mode)
OVERRIDDEN = [
    (Dense(), MoBA(3, block=4)), (Dilated(4, 1), Dense()), (Dilated(4, 1), Dilated(8)), (Quest(8, block=3), Dilated(4)),
    (Quest(8, block=3), Quest(8, block=3)), (SnapKV(6, obs_window=3), MoBA(3, block=4)),
    (MoBA(3, block=4), PerLayer((Dense(), Quest(8, block=3), StreamingLLM(3)))),
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


def matrix():
  """Every mode on every backbone: some quickly, all on grouped RAT+ and a sixth of the others in the slow run."""
  for i, (mode, (memory, kv_heads)) in enumerate(itertools.product(CHOOSING, BACKBONES)):
    grouped = memory and kv_heads == 2
    name = f"{'ratplus' if memory else 'attention'}-{'grouped' if kv_heads == 2 else 'N=K'}-{mode}"
    yield pytest.param(mode, memory, kv_heads, id=name, marks=() if grouped and mode in QUICK else (
        [pytest.mark.slow] if grouped or i % 6 == 0 else [pytest.mark.slow, pytest.mark.matrix]))


@pytest.mark.parametrize(("mode", "memory", "kv_heads"), list(matrix()))
def test_every_way_gives_the_same_logits(mode, memory, kv_heads):
  check_every_way(mode, None, memory, kv_heads, chunks=(None, 5) if memory and kv_heads == 2 else (5,))


@pytest.mark.parametrize("mode", [pytest.param(mode, marks=() if i in (1, 13) else pytest.mark.slow)
                                  for i, mode in enumerate((Dilated(4, 1), *CHOOSING))], ids=str)
def test_rows_of_a_cache_are_repeated_dropped_and_reordered(mode):
  model, params, tokens = setup(True, 2)
  width = PROMPT.max()
  _, cache = rat_jax.prefill(model, params, tokens[:, :width], PROMPT, mode=mode, max_length=width + LENGTH,
                             row_ids=ROW_IDS)
  expected, _ = rat_jax.decode_step(model, params, tokens[:, width], cache)
  index = np.array([2, 0, 0, 1, 1])
  logits, after = rat_jax.decode_step(model, params, tokens[index, width], cache.rows(index))
  assert_close(logits, expected[index], WHOLE_MODEL)
  np.testing.assert_array_equal(after.lengths, PROMPT[index] + 1)
  assert after.rows([3]).lengths.shape == (1,)
  for bad, message in (([5], r"the cache has the rows 0\.\.4"), ([-1], r"index=\[-1\]"), ([[0]], "index has shape"),
                       ([0.5], "type float64")):
    with pytest.raises(ValueError, match=message):
      after.rows(bad)


@pytest.mark.parametrize(("mode", "prefill_mode"), [
    pytest.param(*pair, marks=() if i == 1 else pytest.mark.slow) for i, pair in enumerate(OVERRIDDEN)],
    ids=str)
def test_other_forms_of_the_prompt(mode, prefill_mode):
  check_every_way(mode, prefill_mode, True, 2)


@pytest.mark.parametrize(("mode", "prefill_mode"), [
    pytest.param(mode, prefill_mode, marks=() if i % 18 == 0 else pytest.mark.slow)
    for i, (mode, prefill_mode) in enumerate([*((mode, None) for mode in CHOOSING), *OVERRIDDEN])], ids=str)
def test_prompts_known_when_compiling_save_work_and_change_no_number(mode, prefill_mode):
  model, params, tokens = setup(True, 2)
  prompts, lengths = np.array([9, 16, 7, 8]), np.array([24, 20, 6, 24])  # of the third row not even the prompt is there
  run = functools.partial(apply, model, params, tokens, mode=mode, prefill_mode=prefill_mode, row_ids=ROW_IDS)
  known = jax.jit(lambda p: model.apply({"params": p}, tokens, mode=mode, prefill_mode=prefill_mode, row_ids=ROW_IDS,
                                        prompt_lengths=prompts, lengths=lengths))(params)
  for b, n in enumerate(lengths):
    assert_close(known[b, :n], run(prompt_lengths=prompts, lengths=lengths)[b, :n], WHOLE_MODEL)


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_per_head(kv_heads):
  mode = PerHead(tuple([Dilated(4), StreamingLLM(3), Dense(), Dilated(3, 1)][:kv_heads]))
  check_every_way(PerLayer((mode, Dense(), mode)), None, kv_heads == 2, kv_heads, chunks=(5,))


@pytest.mark.parametrize("mode", [mode for mode in CHOOSING[1::5] if isinstance(mode, BlockMode)], ids=str)
def test_the_prompt_under_the_mode_itself_is_the_plain_call(mode):
  model, params, tokens = setup(True, 2)
  plain = apply(model, params, tokens, mode=mode, row_ids=ROW_IDS)
  same = apply(model, params, tokens, mode=mode, prefill_mode=mode, prompt_lengths=PROMPT, row_ids=ROW_IDS)
  assert_close(same, plain, WHOLE_MODEL)


@pytest.mark.parametrize("chunk", first_quick(1, [7, 1]))
@pytest.mark.parametrize("mode", first_quick(2, [Quest(8, block=3), SnapKV(6, obs_window=3), MoBA(0.5, block=5)]),
                         ids=str)
def test_prompt_chunks_of_any_size(mode, chunk):
  model, params, tokens = setup(True, 2)
  whole, cache = rat_jax.prefill(model, params, tokens[:, :16], PROMPT, mode=mode, max_length=40)
  pieces, same = rat_jax.prefill(model, params, tokens[:, :16], PROMPT, mode=mode, max_length=40, chunk=chunk)
  assert_close(pieces, whole, WHOLE_MODEL)
  for a, b in zip(jax.tree.leaves(same.runs), jax.tree.leaves(cache.runs), strict=True):
    if a.dtype == jnp.int32:
      np.testing.assert_array_equal(a, b)
    else:
      assert_close(a, b, WHOLE_MODEL)


@pytest.mark.parametrize("mode", first_quick(1, [Quest(8, block=3), DilatedTopK(4, 2, score="mean")]), ids=str)
def test_a_prompt_goes_on(mode):
  model, params, tokens = setup(True, 2)
  expected = apply(model, params, tokens, mode=mode, prompt_lengths=np.full(4, 20))
  _, cache = rat_jax.prefill(model, params, tokens[:, :9], mode=mode, max_length=LENGTH)
  logits, cache = rat_jax.extend(model, params, tokens[:, 9:20], cache, prompt=True)
  assert_close(logits, expected[:, 9:20], WHOLE_MODEL)
  logits, _ = rat_jax.decode_step(model, params, tokens[:, 20], cache)
  assert_close(logits, expected[:, 20], WHOLE_MODEL)


@pytest.mark.parametrize(("mode", "prefill_mode", "serves"), first_quick(1, [
    (Dilated(4, 2), MoBA(3, 4), False), (Dense(), MoBA(3, 4), True), (SnapKV(6, obs_window=3), None, False),
    (Dilated(4, 2), Dense(), False), (Dilated(4, 2, 1), Dilated(8, 1), True), (Dilated(4, 2), Dilated(4, 3), False)]))
def test_where_a_prompt_cannot_go_on(mode, prefill_mode, serves):
  model, params, tokens = setup(True, 2)
  expected = apply(model, params, tokens, mode=mode, prefill_mode=prefill_mode, prompt_lengths=np.full(4, LENGTH))
  _, cache = rat_jax.prefill(model, params, tokens[:, :9], mode=mode, prefill_mode=prefill_mode, max_length=LENGTH)
  if serves:
    logits, _ = rat_jax.extend(model, params, tokens[:, 9:], cache, prompt=True)
    assert_close(logits, expected[:, 9:], WHOLE_MODEL)
  else:
    with pytest.raises(ValueError, match=r"does not hold what .* reads, so the prompt cannot go on"):
      rat_jax.extend(model, params, tokens[:, 9:], cache, prompt=True)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "dtype"), [(Quest(8, block=3), "bfloat16"), (MoBA(3, block=5), "float32")], ids=str)
def test_summaries_kept_are_those_of_the_keys(mode, dtype):
  config = RATPlusConfig(VOCAB, 2, 32, 4, num_kv_heads=2, init_std=None, dtype=dtype)
  model, tokens = RATPlusLM(config), setup(True, 2)[2]
  params = model.init(jax.random.key(0), tokens)["params"]
  _, cache = rat_jax.prefill(model, params, tokens[:, :16], PROMPT, mode=mode, max_length=LENGTH, chunk=6)
  _, cache = rat_jax.extend(model, params, tokens[:, 16:21], cache, np.array([5, 2, 3, 0]))
  _, cache = rat_jax.decode_step(model, params, tokens[:, 21], cache)
  keys, lengths = np.asarray(cache.runs[0].keys.astype(jnp.float32)), np.asarray(cache.lengths)
  for b, n in enumerate(lengths):
    for p in range(-(-n // mode.block)):
      block = keys[:, b, :, p * mode.block:min((p + 1) * mode.block, n)]
      ours = [np.asarray(x.astype(jnp.float32))[:, b, :, p] for x in cache.runs[0].summaries]
      if isinstance(mode, Quest):
        np.testing.assert_array_equal(ours[0], block.min(2))
        np.testing.assert_array_equal(ours[1], block.max(2))
      else:
        assert cache.runs[0].summaries[0].dtype == jnp.float32
        np.testing.assert_allclose(ours[0], block.sum(2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", [Quest(8, block=3), SnapKV(6, obs_window=3)], ids=str)
def test_a_gate_of_zero_is_plain_attention(mode):
  config = RATPlusConfig(VOCAB, LAYERS, 32, 4, init_std=0.25, gate_bias=-200.0)
  model, tokens = RATPlusLM(config), setup(True, 4)[2]
  params = model.init(jax.random.key(0), tokens)["params"]
  plain = RATPlusLM(RATPlusConfig(VOCAB, LAYERS, 32, 4, init_std=0.25, memory=False))
  without = {k: v for k, v in params["layers"].items() if not k.startswith("memory_gate")}
  expected = apply(plain, {**params, "layers": without}, tokens, mode=mode, prompt_lengths=PROMPT)
  assert_close(apply(model, params, tokens, mode=mode, prompt_lengths=PROMPT), expected, WHOLE_MODEL)


@pytest.mark.parametrize("mode", first_quick(4, [
    Quest(1.0, 4), DilatedTopK(4, 1.0), SnapKV(30, 3), PerHead((Dense(), Dilated(1))), Quest(64, 4), MoBA(1.0, 4),
    TopK(1.0), SnapKV(1.0, 3), MoBA(2, block=64)]), ids=str)
def test_modes_that_see_everything_are_dense(mode):
  model, params, tokens = setup(True, 2)
  assert_close(apply(model, params, tokens, mode=mode, prompt_lengths=PROMPT), apply(model, params, tokens),
               WHOLE_MODEL)


def test_a_compressed_cache_is_smaller():
  config = RATPlusConfig.preset("ratplus-7b")
  size = {mode: rat_jax.cache_bytes(config, mode, 1, 16384 + 64, prompt_length=16384)
          for mode in (Dense(), SnapKV(1 / 16), SnapKV(1 / 16, group="kv"), Quest(1 / 16))}
  assert 14 < size[Dense()] / size[SnapKV(1 / 16)] < 16
  assert size[Quest(1 / 16)] / size[Dense()] == pytest.approx(1 + 1 / 64, rel=1e-3)
  grouped = RATPlusConfig(VOCAB, 2, 32, 4, num_kv_heads=2)
  head, kv = (rat_jax.cache_bytes(grouped, SnapKV(16, obs_window=4, group=group), 2, 80, prompt_length=64)
              for group in ("head", "kv"))
  assert head > 1.9 * kv


def test_a_snapkv_cache_overflows_by_what_is_generated():
  model, params, tokens = setup(True, 2)
  _, cache = rat_jax.prefill(model, params, tokens[:, :16], PROMPT, mode=SnapKV(6, obs_window=3), max_length=18)
  with pytest.raises(ValueError, match=r"room for \[2, 2, 2, 2\] more"):
    rat_jax.extend(model, params, tokens[:, :3], cache)
  logits, cache = rat_jax.extend(model, params, tokens[:, :2], cache, np.array([2, 1, 2, 0]))
  logits, after = rat_jax.decode_step(model, params, tokens[:, 2], cache)
  np.testing.assert_array_equal(np.isnan(np.asarray(logits)).all(-1), [True, False, True, False])
  np.testing.assert_array_equal(after.lengths, [11, 18, 3, 1])


@pytest.mark.parametrize(("mode", "prefill_mode"), first_quick(1, [
    (SnapKV(6, obs_window=3), None), (Quest(8, block=3), None), (MoBA(3, block=4, selector="random"), Dense())]),
    ids=str)
def test_generation_is_a_loop_over_whole_sequences(mode, prefill_mode):
  model, params, tokens = setup(True, 2)
  lengths = np.array([9, 16, 1, 4])
  new = np.asarray(rat_jax.generate(model, params, tokens[:, :16], lengths, mode=mode, prefill_mode=prefill_mode,
                                    max_new_tokens=5, row_ids=ROW_IDS))
  rows = np.pad(tokens[:, :16], ((0, 0), (0, 5)))
  for step in range(5):
    logits = apply(model, params, rows, mode=mode, prefill_mode=prefill_mode, prompt_lengths=lengths, row_ids=ROW_IDS)
    best = np.asarray(logits)[np.arange(4), lengths + step - 1].argmax(-1)
    np.testing.assert_array_equal(new[:, step], best)
    rows[np.arange(4), lengths + step] = best


@pytest.mark.slow
def test_inspect_shows_every_layer_that_chooses():
  model, params, tokens = setup(True, 2)
  mode = PerLayer((Quest(8, block=3), Dense(), MoBA(3, block=4)))
  quest, moba = rat_jax.inspect(model, params, tokens, mode, prompt_lengths=PROMPT)
  assert quest.blocks.shape == (4, LENGTH, 4, 3)
  prompt = np.arange(LENGTH) < PROMPT[:, None]
  assert not np.asarray(quest.valid)[prompt].any()  # a dense prompt
  assert np.asarray(quest.valid)[~prompt].any(-1).all()
  np.testing.assert_array_equal(np.asarray(quest.tokens)[prompt][:, 0], np.nonzero(prompt)[1] + 1)
  assert np.asarray(moba.valid).any(-1).all()
  for t in (0, 3, 11, 23):
    reads = rat_jax.tokens_read(model.config, mode, t + 1)
    assert (np.asarray(moba.tokens)[:, t] == reads[2]).all()
    assert (np.asarray(quest.tokens)[3, t] == reads[0]).all()  # the row without a prompt
  (kept, *_) = rat_jax.inspect(model, params, tokens, SnapKV(6, obs_window=3), prompt_lengths=PROMPT)
  np.testing.assert_array_equal((np.asarray(kept.positions) >= 0).sum(-1), np.tile(np.minimum(PROMPT, 6)[:, None], 4))
  lengths = np.array([5, 24, 1, 0])
  (clipped, *_) = rat_jax.inspect(model, params, tokens, SnapKV(6, obs_window=3), prompt_lengths=PROMPT,
                                  lengths=lengths)
  np.testing.assert_array_equal(clipped.positions[0, 0], [0, 1, 2, 3, 4, -1])
  (moba, *_) = rat_jax.inspect(model, params, tokens, MoBA(3, 4), prompt_lengths=PROMPT,
                               prefill_mode=PerHead((Dense(), StreamingLLM(1, 0))))
  np.testing.assert_array_equal(moba.tokens[1, 15], [16, 16, 2, 2])
  (moba, *_) = rat_jax.inspect(model, params, tokens, Dense(), prefill_mode=MoBA(3, 4), prompt_lengths=PROMPT)
  assert np.asarray(moba.valid)[prompt].any(-1).all()
  assert not np.asarray(moba.valid)[~prompt].any()
  assert rat_jax.inspect(model, params, tokens, Dilated(4)) == []


@pytest.mark.parametrize("mode", first_quick(1, [Quest(8, block=3), SnapKV(6, obs_window=3)]), ids=str)
def test_the_two_by_two(mode):
  model, params, tokens = setup(True, 2)

  def run(**choices):
    return np.asarray(model.apply({"params": params}, tokens, mode=mode, prompt_lengths=PROMPT, **choices))

  plain = RATPlusLM(RATPlusConfig(VOCAB, LAYERS, 32, 4, num_kv_heads=2, memory=False, init_std=None))
  without = {**params, "layers": {k: v for k, v in params["layers"].items() if k != "memory_gate"}}
  both = apply(model, params, tokens, mode=mode, prompt_lengths=PROMPT)
  neither = apply(plain, without, tokens, mode=mode, prompt_lengths=PROMPT)
  assert_close(run(select_from="memory", attend_to="memory"), both, WHOLE_MODEL)
  assert_close(run(select_from="plain", attend_to="plain"), neither, WHOLE_MODEL)
  assert np.abs(run(select_from="plain") - both).max() > 1e-3
  assert np.abs(run(attend_to="plain") - both).max() > 1e-3
  with pytest.raises(ValueError, match="select_from='k'"):
    run(select_from="k")
  with pytest.raises(ValueError, match="memory=False"):
    plain.apply({"params": without}, tokens, attend_to="plain")


def test_training_under_a_mode_that_chooses():
  model, params, tokens = setup(True, 2)
  optimizer = rat_jax.make_optimizer(1e-2, total_steps=4)
  state = rat_jax.init_train_state(model, params, optimizer)
  batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
  losses = []
  for _ in range(4):
    state, metrics = rat_jax.train_step(model, optimizer, state, batch, modes=(Quest(8, block=3),))
    losses.append(float(metrics["loss"][0]))
  assert losses[-1] < losses[0] - 0.1


def test_bad_calls():
  model, params, tokens = setup(True, 2)

  def run(**arguments):
    return model.apply({"params": params}, tokens, **arguments)

  for call, message in (
      (lambda: run(mode=SnapKV(6, obs_window=3)), "needs prompt_lengths"),
      (lambda: run(prefill_mode=MoBA(2)), "without prompt_lengths"),
      (lambda: run(mode=Dense(), prefill_mode=SnapKV(6, obs_window=3), prompt_lengths=PROMPT), "give it as mode"),
      (lambda: run(mode=MoBA(2), positions=np.arange(LENGTH)[None] + np.ones((4, 1), int)), "leave positions out"),
      (lambda: run(mode=MoBA(2), positions=np.arange(3)), r"positions has shape \(3,\)"),
      (lambda: rat_jax.cache_bytes(model.config, PerHead((Dense(),) * 3), 1, 20), "num_kv_heads=2"),
      (lambda: rat_jax.prefill(model, params, tokens, chunk=2.5), "chunk=2.5"),
      (lambda: run(prompt_lengths=PROMPT, segment_ids=np.ones_like(tokens)), "several prompts"),
      (lambda: run(prompt_lengths=PROMPT + 20), "prompt_lengths="),
      (lambda: run(mode=PerHead((Dense(),) * 3)), "num_kv_heads=2"),
      (lambda: run(mode=MoBA(2, dense_layers=(7,))), "num_layers=3"),
      (lambda: run(mode=MoBA(2), row_ids=[1, 2]), r"row_ids has shape \(2,\)"),
      (lambda: rat_jax.prefill(model, params, tokens, mode=Dense(), prefill_mode=SnapKV(6, 3)), "give it as mode"),
      (lambda: rat_jax.prefill(model, params, tokens, PROMPT, mode=SnapKV(6, 3), max_length=20), "padded length"),
      (lambda: rat_jax.cache_bytes(model.config, SnapKV(6, 3), 1, 20), "prompt_length=None")):
    with pytest.raises(ValueError, match=message):
      call()
  with pytest.raises(NotImplementedError, match="packed rows"):
    run(mode=MoBA(2), segment_ids=np.ones_like(tokens))
  assert_close(run(mode=MoBA(3, 4), positions=np.tile(np.arange(LENGTH), (4, 1))), run(mode=MoBA(3, 4)), WHOLE_MODEL)
