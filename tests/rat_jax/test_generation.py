"""Generation against a loop by hand, ragged prompts, sampling, and the end of a sequence."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import rat_jax
from conftest import compilations
from rat_jax import Dense, Dilated, RATPlusConfig, RATPlusLM
from rat_jax.generation import keep_nucleus

CONFIG = RATPlusConfig(23, 2, 16, 2, init_std=0.5)
MODEL = RATPlusLM(CONFIG)
TOKENS = np.asarray(jax.random.randint(jax.random.key(1), (3, 9), 0, 23))
PARAMS = MODEL.init(jax.random.key(0), TOKENS)["params"]
LENGTHS = np.array([9, 4, 1])


@pytest.mark.parametrize("mode", [Dense(), Dilated(4, 1, 1)], ids=str)
def test_greedy_equals_a_loop_over_whole_sequences(mode):
  ours = np.asarray(rat_jax.generate(MODEL, PARAMS, TOKENS, LENGTHS, mode=mode, max_new_tokens=6))
  rows = np.pad(TOKENS, ((0, 0), (0, 6)))
  lengths = LENGTHS.copy()
  apply = jax.jit(lambda rows, lengths: MODEL.apply({"params": PARAMS}, rows, mode=mode, lengths=lengths))
  for step in range(6):
    logits = np.asarray(apply(rows, lengths))
    for b in range(3):
      token = logits[b, lengths[b] - 1].argmax()
      assert ours[b, step] == token
      rows[b, lengths[b]] = token
    lengths += 1


def test_after_the_end_comes_only_the_end():
  free = np.asarray(rat_jax.generate(MODEL, PARAMS, TOKENS, LENGTHS, max_new_tokens=8))
  eos = int(free[0, 2])
  stopped = np.asarray(rat_jax.generate(MODEL, PARAMS, TOKENS, LENGTHS, max_new_tokens=8, eos_id=eos))
  for row, before in zip(stopped, free, strict=True):
    end = list(before).index(eos) if eos in before else len(before)
    np.testing.assert_array_equal(row[:end + 1], before[:end + 1])
    np.testing.assert_array_equal(row[end + 1:], eos)


@pytest.mark.slow
def test_sampling_is_seeded_per_row_and_follows_the_distribution():
  key = jax.random.key(7)
  many = np.repeat(TOKENS[:1], 4000, axis=0)
  drawn = np.asarray(rat_jax.generate(MODEL, PARAMS, many, max_new_tokens=1, temperature=1.3, key=key))[:, 0]
  logits = np.asarray(MODEL.apply({"params": PARAMS}, TOKENS[:1]))[0, -1] / 1.3
  expected = np.exp(logits - logits.max())
  expected /= expected.sum()
  counts = np.bincount(drawn, minlength=23) / 4000
  assert np.abs(counts - expected).max() < 5 * np.sqrt(0.25 / 4000)
  few = np.asarray(rat_jax.generate(MODEL, PARAMS, many[:5], max_new_tokens=1, temperature=1.3, key=key))[:, 0]
  np.testing.assert_array_equal(few, drawn[:5])
  other = rat_jax.generate(MODEL, PARAMS, many, max_new_tokens=1, temperature=1.3, key=jax.random.key(8))
  assert (np.asarray(other)[:, 0] != drawn).any()


def test_the_nucleus():
  logits = np.log(np.array([[0.5, 0.1, 0.3, 0.1], [0.1, 0.2, 0.3, 0.4]]))
  kept = np.isfinite(np.asarray(keep_nucleus(logits, np.float32(0.75))))
  np.testing.assert_array_equal(kept, [[1, 0, 1, 0], [0, 1, 1, 1]])
  assert np.isfinite(np.asarray(keep_nucleus(logits, np.float32(1e-6)))).sum() == 2


def test_a_tiny_nucleus_is_greedy():
  greedy = rat_jax.generate(MODEL, PARAMS, TOKENS, LENGTHS, max_new_tokens=5)
  nucleus = rat_jax.generate(MODEL, PARAMS, TOKENS, LENGTHS, max_new_tokens=5, temperature=1.0, top_p=1e-6,
                             key=jax.random.key(0))
  np.testing.assert_array_equal(greedy, nucleus)


@pytest.mark.parametrize("arguments", [dict(temperature=1e-38), dict(temperature=1.0, top_p=1e-46)], ids=str)
def test_what_rounds_to_zero_is_greedy(arguments):
  greedy = rat_jax.generate(MODEL, PARAMS, TOKENS, LENGTHS, max_new_tokens=5)
  sampled = rat_jax.generate(MODEL, PARAMS, TOKENS, LENGTHS, max_new_tokens=5, key=jax.random.key(0), **arguments)
  np.testing.assert_array_equal(greedy, sampled)


def test_a_row_ends_at_any_of_several_tokens():
  free = np.asarray(rat_jax.generate(MODEL, PARAMS, TOKENS, LENGTHS, max_new_tokens=8))
  ends = [int(free[0, 2]), int(free[1, 4])]
  stopped = np.asarray(rat_jax.generate(MODEL, PARAMS, TOKENS, LENGTHS, max_new_tokens=8, eos_id=ends))
  for row, before in zip(stopped, free, strict=True):
    end = next((i for i, token in enumerate(before) if token in ends), 7)
    np.testing.assert_array_equal(row[:end + 1], before[:end + 1])
    np.testing.assert_array_equal(row[end:], before[end])


def test_logits_that_are_not_finite_name_their_step_and_row():
  free = np.asarray(rat_jax.generate(MODEL, PARAMS, TOKENS, LENGTHS, max_new_tokens=3))
  bad = next(token for token in free[1] if token not in free[[0, 2]] and token not in TOKENS)
  params = PARAMS | {"embedding": PARAMS["embedding"].at[bad, 0].set(np.nan)}
  model = RATPlusLM(dataclasses.replace(CONFIG, tie_embeddings=False))
  step = list(free[1]).index(bad) + 1
  with pytest.raises(FloatingPointError, match=f"logits of row 1 are not finite at step {step} of max_new_tokens=8"):
    rat_jax.generate(model, params | {"head": PARAMS["embedding"]}, TOKENS, LENGTHS, max_new_tokens=8)


def test_padding_may_be_anything():
  padded = np.where(np.arange(9) < LENGTHS[:, None], TOKENS, [[256], [-100], [2**31 - 1]])
  np.testing.assert_array_equal(rat_jax.generate(MODEL, PARAMS, padded, LENGTHS, max_new_tokens=3),
                                rat_jax.generate(MODEL, PARAMS, TOKENS, LENGTHS, max_new_tokens=3))


def test_left_padding_becomes_right_padding():
  left = np.stack([np.roll(row, 9 - n) for row, n in zip(TOKENS, LENGTHS, strict=True)])
  mask = np.arange(9) >= 9 - LENGTHS[:, None]
  for given in (mask, mask.astype(np.int64)):
    tokens, lengths = rat_jax.to_right_padding(np.where(mask, left, -1), given)
    np.testing.assert_array_equal(lengths, LENGTHS)
    np.testing.assert_array_equal(tokens, np.where(np.arange(9) < LENGTHS[:, None], TOKENS, 0))


@pytest.mark.parametrize(("tokens", "mask", "message"), [
    ([[1, 2]], [[1, 2]], "mask holds"),
    ([[1, 2]], [1, 1], "mask has shape"),
    ([[1.0, 2.0]], [[1, 1]], "tokens has shape"),
])
def test_a_mask_that_is_none(tokens, mask, message):
  with pytest.raises(ValueError, match=message):
    rat_jax.to_right_padding(tokens, mask)


def test_one_program_for_all_tokens_and_temperatures():
  counts = []
  for seed, temperature in enumerate((0.5, 0.9)):
    key = jax.random.key(seed)
    with compilations() as compiled:
      rat_jax.generate(MODEL, PARAMS, TOKENS, max_new_tokens=7, temperature=temperature, key=key)
    counts.append(len(compiled))
  assert counts[0] >= 1
  assert counts[1] == 0


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(temperature=1.0), "needs a random key"),
    (dict(temperature=1.0, key=7), "key=7 is no single random key"),
    (dict(temperature=1.0, key="seed"), "key='seed' is no single random key"),
    (dict(temperature=1.0, key=jax.random.split(jax.random.key(0))), "no single random key"),
    (dict(temperature=-1.0), "temperature=-1.0"),
    (dict(temperature=float("nan")), "temperature=nan"),
    (dict(top_p=0.0), "top_p=0.0"),
    (dict(max_new_tokens=0), "max_new_tokens=0"),
    (dict(eos_id=23), "eos_id=23"),
    (dict(temperature="1"), "temperature='1'; use a finite number"),
    (dict(top_p=None), "top_p=None; use a finite number"),
    (dict(eos_id=True), "eos_id=True"),
    (dict(eos_id=[1, 4.0]), r"eos_id=\[1, 4.0\]"),
    (dict(lengths=np.array([9, 4, 0])), "prompt of row 2 is empty"),
    (dict(lengths=np.ones((3, 9), int)), "rat_jax.to_right_padding"),
    (dict(tokens=[[1, 2], [3]]), "tokens is no array with one length for all rows"),
    (dict(tokens=np.zeros((0, 4), int)), "B is at least 1"),
    (dict(params={"params": PARAMS}), "give the tree inside"),
    (dict(params=jax.tree.map(lambda x: x.astype(np.int8), PARAMS)), "parameters are floating numbers"),
    (dict(row_ids=[2**32 + 5, 0, 0]), "row_ids run from 0 to 4294967301"),
    (dict(model=RATPlusLM(dataclasses.replace(CONFIG, memory=False))), "memory_gate"),
    (dict(model=RATPlusLM(dataclasses.replace(CONFIG, vocab_size=24))), r"embedding is \(23, 16\), .* wants \(24"),
])
def test_bad_arguments(arguments, message):
  with pytest.raises(ValueError, match=message):
    rat_jax.generate(**{"model": MODEL, "params": PARAMS, "tokens": TOKENS, "max_new_tokens": 3, **arguments})


@pytest.mark.parametrize("how", [dict(mode=Dilated(4, 1, 1)), dict(temperature=0.9, top_p=0.8, key=jax.random.key(2))],
                         ids=["greedy", "sampled"])
def test_a_stream_is_what_generate_makes(how):
  whole = np.asarray(rat_jax.generate(MODEL, PARAMS, TOKENS, LENGTHS, max_new_tokens=7, **how))
  tokens = list(rat_jax.stream(MODEL, PARAMS, TOKENS, LENGTHS, max_new_tokens=7, **how))
  np.testing.assert_array_equal(np.stack(tokens, axis=1), whole)
  eos = int(whole[0, 1])
  alone = list(rat_jax.stream(MODEL, PARAMS, TOKENS[:1], max_new_tokens=7, eos_id=eos, **how))
  end = list(whole[0]).index(eos) + 1
  np.testing.assert_array_equal(np.stack(alone, axis=1), whole[:1, :end])  # and no token after it


def test_a_stream_compiles_one_step():
  def run():
    return list(rat_jax.stream(MODEL, PARAMS, TOKENS, LENGTHS, max_new_tokens=11))

  run()
  with compilations() as made:
    run()
  assert not made


def test_a_stream_says_at_once_what_is_wrong():
  with pytest.raises(ValueError, match=r"temperature=1\.0 samples and needs a random key"):
    rat_jax.stream(MODEL, PARAMS, TOKENS, max_new_tokens=3, temperature=1.0)
  lost = PARAMS | {"final_norm": PARAMS["final_norm"] * np.nan}
  with pytest.raises(FloatingPointError, match="the logits of row 0 are not finite at step 0"):
    next(rat_jax.stream(MODEL, lost, TOKENS, max_new_tokens=3))
