"""One matrix: every mode x backbone x heads x type gives the same numbers however the tokens come in."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rat_jax
from conftest import WHOLE_MODEL, assert_close, assert_logits_close, first_quick
from pallas_kernels import devices
from rat_jax import Dense, Dilated, PerLayer, RATPlusConfig, RATPlusLM, StreamingLLM

VOCAB, LAYERS, LENGTH = 61, 3, 24
MODES = [Dense(), Dilated(4), Dilated(5, window=3, sinks=2), Dilated(None, 2, 3), Dilated(64), StreamingLLM(6, 2),
         PerLayer((Dilated(4), Dilated(4), Dense()))]
QUICK = [MODES[i] for i in (2, 6)]
PROMPT = np.array([9, 16, 1, 0])  # the rows' prompt lengths; the rest of each row is decoded


@functools.cache
def setup(memory, kv_heads, dtype="float32"):
  config = RATPlusConfig(VOCAB, LAYERS, 32, 4, num_kv_heads=kv_heads, memory=memory, init_std=None, dtype=dtype)
  model = RATPlusLM(config)
  tokens = np.asarray(jax.random.randint(jax.random.key(1), (len(PROMPT), LENGTH), 0, VOCAB))
  return model, model.init(jax.random.key(0), tokens)["params"], tokens


@functools.partial(jax.jit, static_argnums=(0, 3))
def apply(model, params, tokens, mode=Dense(), **kwargs):
  return model.apply({"params": params}, tokens, mode=mode, **kwargs)


def rows_from(tokens, start, width):
  """tokens[b, start[b]:start[b]+width] of every row, filled up with zeros."""
  padded = np.pad(tokens, ((0, 0), (0, width)))
  return np.stack([padded[b, s:s + width] for b, s in enumerate(start)])


def matrix():
  """Every mode in every setting: some quickly, all of grouped RAT+ and a sixth of the others in the slow run."""
  settings = itertools.product(MODES, (True, False), (4, 2), ("float32", "bfloat16"))
  for i, (mode, memory, kv_heads, dtype) in enumerate(settings):
    grouped = memory and kv_heads == 2 and dtype == "float32"
    name = f"{mode}-{'ratplus' if memory else 'attention'}-{'grouped' if kv_heads == 2 else 'N=K'}-{dtype}"
    yield pytest.param(mode, memory, kv_heads, dtype, id=name, marks=() if grouped and mode in QUICK else (
        [pytest.mark.slow] if grouped or i % 6 == 0 else [pytest.mark.slow, pytest.mark.matrix]))


@pytest.mark.parametrize(("mode", "memory", "kv_heads", "dtype"), list(matrix()))
def test_every_way_gives_the_same_logits(mode, memory, kv_heads, dtype):
  model, params, tokens = setup(memory, kv_heads, dtype)
  expected = np.asarray(apply(model, params, tokens, mode))
  prompts = np.where(np.arange(LENGTH) < PROMPT[:, None], tokens, 7)[:, :PROMPT.max()]  # padded with a real token
  rows = np.flatnonzero(PROMPT)

  padded = apply(model, params, np.pad(prompts, ((0, 0), (0, LENGTH - PROMPT.max()))), mode, lengths=PROMPT)
  for b in rows:
    assert_logits_close(padded[b, :PROMPT[b]], expected[b, :PROMPT[b]], dtype, "padding")

  for chunk in (None, 5):
    logits, cache = rat_jax.prefill(model, params, prompts, PROMPT, mode=mode, max_length=LENGTH, chunk=chunk)
    assert_logits_close(logits[rows], expected[rows, PROMPT[rows] - 1], dtype, f"prefill, chunk {chunk}")
    np.testing.assert_array_equal(cache.lengths, PROMPT)

  # Extension by a ragged chunk, then steps to the end of the fullest row.
  count = np.array([6, 3, 0, 5])
  logits, cache = rat_jax.extend(model, params, rows_from(tokens, PROMPT, 6), cache, count)
  at = PROMPT + count
  for b, (start, n) in enumerate(zip(PROMPT, count, strict=True)):
    if n:
      assert_logits_close(logits[b, :n], expected[b, start:start + n], dtype, "extend")
  for _ in range(LENGTH - at.max()):
    logits, cache = rat_jax.decode_step(model, params, rows_from(tokens, at, 1)[:, 0], cache)
    assert_logits_close(logits, expected[np.arange(len(at)), at], dtype, "step")
    at = at + 1
  assert rat_jax.cache_bytes(model.config, mode, len(PROMPT), LENGTH) == sum(
      leaf.nbytes for leaf in jax.tree.leaves(cache))


@pytest.mark.parametrize("memory", first_quick(1, [True, False]), ids=["ratplus", "attention"])
def test_a_row_does_not_depend_on_its_batch(memory):
  model, params, tokens = setup(memory, 2)
  mode = Dilated(5, window=3, sinks=2)
  expected = apply(model, params, tokens, mode)
  alone = apply(model, params, tokens[1:2, :16], mode)
  assert_close(alone[0], expected[1, :16], WHOLE_MODEL)
  logits, _ = rat_jax.prefill(model, params, tokens[1:2, :16], mode=mode, max_length=16)
  assert_close(logits[0], expected[1, 15], WHOLE_MODEL)


@pytest.mark.parametrize("memory", [True, False], ids=["ratplus", "attention"])
@pytest.mark.parametrize("mode", [Dilated(1), Dilated(7, window=LENGTH), Dilated(None, LENGTH),
                                  Dilated(5, sinks=LENGTH), StreamingLLM(LENGTH - 1, 0)], ids=str)
def test_modes_that_see_everything_are_dense(mode, memory):
  model, params, tokens = setup(memory, 2)
  assert_close(apply(model, params, tokens, mode), apply(model, params, tokens), WHOLE_MODEL)


@pytest.mark.parametrize("mode", [pytest.param(mode, marks=() if mode in QUICK else pytest.mark.slow)
                                  for mode in MODES], ids=str)
def test_packed_documents_equal_separate_ones(mode):
  model, params, tokens = setup(True, 2)
  # Documents of 7, 1 and 9 tokens, padding between and at the end; the third has the first one's id.
  ids = np.array([3] * 7 + [5] + [0] * 2 + [3] * 9 + [0] * 5)
  packed = np.asarray(apply(model, params, tokens[:1], mode, segment_ids=ids[None]))[0]
  for start, stop in ((0, 7), (7, 8), (10, 19)):
    alone = apply(model, params, tokens[:1, start:stop], mode)[0]
    assert_close(packed[start:stop], alone, WHOLE_MODEL, f"document at {start}")
  assert np.isfinite(packed).all()


def test_left_padding_by_positions():
  model, params, tokens = setup(True, 2)
  positions = np.arange(LENGTH)[None] - 5
  padded = apply(model, params, np.pad(tokens[:1, :LENGTH - 5], ((0, 0), (5, 0))), Dilated(4), positions=positions)
  assert_close(padded[0, 5:], apply(model, params, tokens[:1, :LENGTH - 5], Dilated(4))[0], WHOLE_MODEL)


def test_a_gate_of_zero_is_plain_attention():
  config = RATPlusConfig(VOCAB, LAYERS, 32, 4, init_std=0.25, gate_bias=-200.0)
  model, tokens = RATPlusLM(config), setup(True, 4)[2]
  params = model.init(jax.random.key(0), tokens)["params"]
  plain = RATPlusLM(RATPlusConfig(VOCAB, LAYERS, 32, 4, init_std=0.25, memory=False))
  without = {k: v for k, v in params["layers"].items() if not k.startswith("memory_gate")}
  for mode in (Dense(), Dilated(4, 2, 1)):
    expected = apply(plain, {**params, "layers": without}, tokens, mode)
    assert_close(apply(model, params, tokens, mode), expected, WHOLE_MODEL)


@pytest.mark.parametrize("changes", first_quick(2, [
    dict(head_dim=16, num_kv_heads=1),
    dict(mlp="swiglu", norm_placement="post", qk_norm=True, tie_embeddings=False, output_gate=False, memory=False),
    dict(mlp="swiglu"), dict(norm_placement="post"), dict(qk_norm=True), dict(tie_embeddings=False),
    dict(output_gate=False), dict(gate_bias=-4.0)]))
def test_every_option_decodes_as_it_runs(changes):
  config = RATPlusConfig(VOCAB, 2, 32, 4, **{"init_std": 0.25, **changes})
  model, tokens = RATPlusLM(config), setup(True, 4)[2]
  params = model.init(jax.random.key(0), tokens)["params"]
  expected = apply(model, params, tokens, Dilated(4, 2, 1))
  logits, cache = rat_jax.prefill(model, params, tokens[:, :10], mode=Dilated(4, 2, 1), max_length=LENGTH)
  assert_close(logits, expected[:, 9], WHOLE_MODEL)
  logits, _ = rat_jax.extend(model, params, tokens[:, 10:], cache)
  assert_close(logits, expected[:, 10:], WHOLE_MODEL)


def test_one_prompt_for_several_modes():
  """The caches are those of `prefill` under each mode."""
  model, params, tokens = setup(True, 2)
  modes = (Dense(), rat_jax.Quest(8, block=4), rat_jax.TopK(6, selector="random"), rat_jax.SnapKV(8, obs_window=2))
  lengths, ids = np.array([9, 16, 3, 12]), np.array([4, 3, 2, 1])
  logits, caches = rat_jax.prefill_many(model, params, tokens[:, :16], lengths, modes=modes, max_length=LENGTH,
                                        row_ids=ids)
  for mode, cache in zip(modes, caches, strict=True):
    expected, one = rat_jax.prefill(model, params, tokens[:, :16], lengths, mode=mode, max_length=LENGTH, row_ids=ids)
    assert_close(logits, expected, WHOLE_MODEL)
    assert jax.tree.structure(cache) == jax.tree.structure(one)
    jax.tree.map(lambda a, b: assert_close(a, b, WHOLE_MODEL), cache, one)
    steps, _ = rat_jax.extend(model, params, tokens[:, 16:19], cache)
    assert_close(steps, rat_jax.extend(model, params, tokens[:, 16:19], one)[0], WHOLE_MODEL)
  for modes, message in (((), r"modes=\(\) is empty"), ((Dense(), Dilated(4)), "dense and dilated:4 run the prompt in"),
                         ((Dense(), rat_jax.Quest(8, block=4, dense_layers=(0,))), "runs of different layers"),
                         ((Dense(), "quest:8"), "is no mode")):
    with pytest.raises(ValueError, match=message):
      rat_jax.prefill_many(model, params, tokens[:, :16], modes=modes, max_length=LENGTH)


def test_an_overflowing_cache_is_refused_or_marked():
  model, params, tokens = setup(True, 4)
  _, cache = rat_jax.prefill(model, params, tokens[:, :8], np.array([8, 5, 8, 0]), mode=Dilated(4), max_length=8)
  with pytest.raises(ValueError, match=r"max_length=8 and rows would grow to \[9, 6, 9, 1\]"):
    rat_jax.extend(model, params, tokens[:, :1], cache)
  logits, after = rat_jax.decode_step(model, params, tokens[:, 8], cache)
  np.testing.assert_array_equal(np.isnan(np.asarray(logits)).all(-1), [True, False, True, False])
  np.testing.assert_array_equal(np.isnan(np.asarray(logits)).any(-1), [True, False, True, False])
  np.testing.assert_array_equal(after.lengths, [8, 6, 8, 1])
  leaves = (jax.tree.leaves((c.runs, c.state)) for c in (cache, after))
  for old, new in zip(*leaves, strict=True):
    np.testing.assert_array_equal(old[:, [0, 2]], new[:, [0, 2]])


def test_bad_input_is_refused():
  model, params, tokens = setup(True, 4)
  other = RATPlusLM(RATPlusConfig(VOCAB, LAYERS, 64, 4))
  _, cache = rat_jax.prefill(model, params, tokens[:, :4], max_length=8)
  with pytest.raises(ValueError, match="max_length=8 is below the prompt's 24 tokens"):
    rat_jax.prefill(model, params, tokens, max_length=8)
  with pytest.raises(ValueError, match="embed_dim: 32, 64"):
    rat_jax.decode_step(other, params, tokens[:, 0], cache)
  with pytest.raises(ValueError, match="embed_dim: 32, 64"):
    rat_jax.extend(other, params, tokens, cache)
  with pytest.raises(ValueError, match=r"vocabulary of this model is 0\.\.60"):
    rat_jax.prefill(model, params, tokens + VOCAB)
  with pytest.raises(ValueError, match=r"vocabulary of this model is 0\.\.60"):
    model.apply({"params": params}, tokens - 1 - tokens.min())
  with pytest.raises(ValueError, match=r"use 0\.\.24"):
    rat_jax.prefill(model, params, tokens, np.array([3, 25, 1, 1]))
  with pytest.raises(ValueError, match="chunk=0"):
    rat_jax.prefill(model, params, tokens, chunk=0)
  with pytest.raises(ValueError, match="T is at least 1"):
    rat_jax.prefill(model, params, tokens[:, :0])
  with pytest.raises(ValueError, match=r"mode='dense' is no mode; .*parse_mode"):
    model.apply({"params": params}, tokens, mode="dense")
  with pytest.raises(ValueError, match="modes has 2 entries and the model num_layers=3"):
    model.apply({"params": params}, tokens, mode=PerLayer((Dense(), Dense())))
  with pytest.raises(ValueError, match="do not grow by 1"):
    model.apply({"params": params}, tokens, positions=np.zeros_like(tokens))
  with pytest.raises(ValueError, match="do not grow by 1"):  # padding does not end a document
    model.apply({"params": params}, tokens[:1, :4], positions=np.array([[0, -1, 2, 3]]))
  with pytest.raises(ValueError, match="segment_ids has shape"):
    model.apply({"params": params}, tokens, segment_ids=tokens[:, 1:])
  with pytest.raises(ValueError, match=r"next_tokens has shape \(3,\)"):
    rat_jax.decode_step(model, params, tokens[:3, 0], cache)
  with pytest.raises(ValueError, match="next_tokens run from"):
    rat_jax.decode_step(model, params, tokens[:, 0] + VOCAB, cache)
  with pytest.raises(ValueError, match=r"next_tokens has shape \(4,\) and type float32"):
    rat_jax.decode_step(model, params, np.zeros(4, np.float32), cache)
  with pytest.raises(ValueError, match="tokens has 3 rows and the cache 4"):
    rat_jax.extend(model, params, tokens[:3, :2], cache)


def test_lists_serve_as_arrays():
  model, params, tokens = setup(True, 4)
  expected, cache = rat_jax.prefill(model, params, tokens[:, :8], np.array([8, 5, 1, 0]), max_length=12)
  logits, same = rat_jax.prefill(model, params, tokens[:, :8].tolist(), [8, 5, 1, 0], max_length=12)
  np.testing.assert_array_equal(logits, expected)
  next_tokens = tokens[:, 8]
  np.testing.assert_array_equal(rat_jax.decode_step(model, params, next_tokens.tolist(), same)[0],
                                rat_jax.decode_step(model, params, next_tokens, cache)[0])
  np.testing.assert_array_equal(model.apply({"params": params}, tokens.tolist(), lengths=[5, 6, 7, 8]),
                                model.apply({"params": params}, tokens, lengths=np.array([5, 6, 7, 8])))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [2, 1])
def test_the_steps_of_a_gpu_give_the_same_logits(rows, monkeypatch):
  """There layers are compiled one by one and single rows are doubled; the results do not depend on it."""
  model, params, tokens = setup(True, 2)
  tokens, mode = tokens[:rows], Dilated(5, window=3, sinks=2)
  expected = np.asarray(apply(model, params, tokens, mode))
  _, cache = rat_jax.prefill(model, params, tokens[:, :9], mode=mode, max_length=LENGTH)
  monkeypatch.setattr(devices, "platform_of", lambda *arrays: "gpu")
  jax.clear_caches()
  for t in range(9, LENGTH):
    logits, cache = rat_jax.decode_step(model, params, tokens[:, t], cache)
    assert_logits_close(logits, expected[:, t], "float32")
  jax.clear_caches()


def test_equal_layers_share_one_compiled_body():
  model, params, tokens = setup(True, 4)

  def bodies(mode):
    text = jax.jit(functools.partial(model.apply, mode=mode)).lower({"params": params}, tokens).as_text()
    return text.count("stablehlo.while")

  assert bodies(Dense()) == 1
  assert bodies(PerLayer((Dilated(4), Dilated(4), Dense()))) == 2
  assert bodies(PerLayer((Dense(), Dilated(4), Dense()))) == 3


def test_the_cache_is_a_pytree_that_jit_and_loops_carry():
  model, params, tokens = setup(True, 4)
  _, cache = rat_jax.prefill(model, params, tokens[:, :8], mode=Dilated(4), max_length=LENGTH)

  def step(cache, token):
    logits, cache = rat_jax.decode_step(model, params, token, cache)
    return cache, logits

  _, logits = jax.lax.scan(step, cache, jnp.asarray(tokens[:, 8:]).T)
  assert_close(jnp.moveaxis(logits, 0, 1), apply(model, params, tokens, Dilated(4))[:, 8:], WHOLE_MODEL)
