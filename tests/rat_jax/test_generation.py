"""Generation against a loop by hand, ragged prompts, sampling, and the end of a sequence."""

from __future__ import annotations

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
    (dict(temperature=-1.0), "temperature=-1.0"),
    (dict(temperature=float("nan")), "temperature=nan"),
    (dict(top_p=0.0), "top_p=0.0"),
    (dict(max_new_tokens=0), "max_new_tokens=0"),
    (dict(eos_id=23), "eos_id=23"),
    (dict(lengths=np.array([9, 4, 0])), "prompt of row 2 is empty"),
])
def test_bad_arguments(arguments, message):
  with pytest.raises(ValueError, match=message):
    rat_jax.generate(MODEL, PARAMS, TOKENS, **{"max_new_tokens": 3, **arguments})
