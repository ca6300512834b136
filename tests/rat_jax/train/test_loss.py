"""What a batch counts: types of targets, weights, micro-batches; and updates too small for bfloat16."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rat_jax
from conftest import GRADIENT, assert_close
from rat_jax import Dense, Dilated, RATPlusConfig, RATPlusLM
from rat_jax.evaluate import loss_by_mode
from rat_jax.train.loss import cross_entropy, sequence_loss

CONFIG = RATPlusConfig(31, 2, 16, 2, init_std=0.2)
MODEL = RATPlusLM(CONFIG)
MODES = (Dilated(4), Dense())
OPTIMIZER = rat_jax.make_optimizer(1e-2, total_steps=10)


def batch_at(step):
  rows = np.random.default_rng(step).integers(0, 31, (4, 13))
  return {"tokens": rows[:, :-1], "targets": rows[:, 1:]}


def fresh():
  """(a state before training, a batch)."""
  batch = batch_at(0)
  params = MODEL.init(jax.random.key(0), batch["tokens"])["params"]
  return rat_jax.init_train_state(MODEL, params, OPTIMIZER), batch


@pytest.mark.parametrize("combine", ["sequential", "sum"])
@pytest.mark.slow
def test_accumulation_by_target_weighs_every_target_alike(combine):
  state, batch = fresh()
  batch = batch | {"targets": np.where(np.arange(4)[:, None] < 1, batch["targets"], -100)}  # the second half has none
  step = functools.partial(rat_jax.train_step, MODEL, OPTIMIZER, state, batch, modes=MODES, combine=combine)
  whole, halves, means = (step(**how)[1] for how in (
      {}, dict(accumulation=2, accumulate_by="target"), dict(accumulation=2)))
  for name in ("loss", "grad_norm"):
    np.testing.assert_allclose(halves[name], whole[name], rtol=1e-5)
  np.testing.assert_allclose(means["loss"], whole["loss"] / 2, rtol=1e-5)


@pytest.mark.slow
def test_targets_of_an_unsigned_type_keep_all_their_numbers():
  model = RATPlusLM(dataclasses.replace(CONFIG, vocab_size=256))
  batch = {"tokens": np.array([[1, 2]], np.uint8), "targets": np.array([[156, 7]], np.uint8)}  # -100 as uint8 is 156
  params = model.init(jax.random.key(0), batch["tokens"])["params"]
  state = rat_jax.init_train_state(model, params, OPTIMIZER)
  _, metrics = rat_jax.train_step(model, OPTIMIZER, state, batch, modes=(Dense(),))
  log_p = jax.nn.log_softmax(model.apply({"params": params}, batch["tokens"])[0])
  assert metrics["tokens"] == 2
  np.testing.assert_allclose(metrics["loss"], [-(log_p[0, 156] + log_p[1, 7]) / 2], rtol=1e-5)
  np.testing.assert_allclose(loss_by_mode(model, params, [batch], [Dense()])[Dense()], metrics["loss"][0], rtol=1e-5)


def test_weights_may_be_fractions():
  state, batch = fresh()
  batch["weights"] = np.where(np.arange(12) == 3, [[0.3], [0.5], [0.9], [0.0]], 0.0)
  _, metrics = rat_jax.train_step(MODEL, OPTIMIZER, state, batch, modes=(Dense(),))
  lists = {name: x.tolist() for name, x in batch.items()}
  for given in (batch, lists):
    np.testing.assert_allclose(loss_by_mode(MODEL, state.params, [given], [Dense()])[Dense()], metrics["loss"][0],
                               rtol=1e-5)


def test_targets_of_padding_do_not_count():
  state, batch = fresh()
  segments = np.where(np.arange(12) < 7, 1, 0) * np.ones((4, 1), int)
  marked = {**batch, "targets": np.where(segments == 0, -100, batch["targets"]), "segment_ids": segments}
  step = functools.partial(rat_jax.train_step, MODEL, OPTIMIZER, state, modes=(Dense(),))
  (_, ours), (_, expected) = step({**batch, "segment_ids": segments}), step(marked)
  assert ours["tokens"] == expected["tokens"] == 4 * 7
  np.testing.assert_array_equal(ours["loss"], expected["loss"])


@pytest.mark.parametrize(("change", "message"), [
    (dict(labels=[[1]]), "'labels', which is not read here; give targets"),
    (dict(attention_mask=[[1]]), "give segment_ids, 0 for padding"),
    (dict(weights=np.full((4, 12), np.nan)), "weights'] run from nan to nan"),
    (dict(weights=np.full((4, 12), -1.0)), "use finite numbers of 0 or more"),
    (dict(targets=np.full((4, 12), 2**32 + 1)), "use numbers that int32 holds"),
])
def test_what_a_batch_may_not_hold(change, message):
  state, batch = fresh()
  with pytest.raises(ValueError, match=message):
    rat_jax.train_step(MODEL, OPTIMIZER, state, batch | change)


def test_rates_for_parameters_that_are_not_there():
  state, _ = fresh()
  optimizer = rat_jax.make_optimizer(1e-2, total_steps=10, rates=[("layers/typo*", 0.0)])
  with pytest.raises(ValueError, match=r"rates: 'layers/typo\*' fits no parameter; they are embedding, "):
    rat_jax.init_train_state(MODEL, state.params, optimizer)


@pytest.mark.slow
def test_bfloat16_parameters_move_by_less_than_they_can_hold():
  model = RATPlusLM(dataclasses.replace(CONFIG, param_dtype="bfloat16"))
  params = model.init(jax.random.key(0), batch_at(0)["tokens"])["params"]
  optimizer = rat_jax.make_optimizer(3e-4, total_steps=10, min_learning_rate=3e-4)
  state = rat_jax.init_train_state(model, params, optimizer)
  for step in range(10):  # a step is at most 3e-4 of a norm of 1, whose neighbours are 2^-8 and 2^-7 away
    state, _ = rat_jax.train_step(model, optimizer, state, batch_at(step), modes=(Dense(),))
  assert state.params["final_norm"].dtype == jnp.bfloat16
  assert np.abs(np.asarray(state.params["final_norm"], np.float32) - 1).max() > 2**-9
  chex.assert_trees_all_equal(state.params, jax.tree.map(lambda p: p.astype(jnp.bfloat16), state.opt_state.params))


@pytest.mark.slow
def test_the_loss_in_chunks_is_the_loss(monkeypatch):
  """Values and gradients, whatever the chunks; also with weights and ignored targets."""
  state, batch = fresh()
  params = state.params
  batch["targets"] = np.where(np.random.default_rng(0).random((4, 12)) < 0.2, -100, batch["targets"])
  batch["weights"] = np.random.default_rng(1).random(batch["targets"].shape).astype(np.float32)

  def plain(p):
    total, count = cross_entropy(MODEL.apply({"params": p}, batch["tokens"], mode=MODES[0]), batch["targets"],
                                 batch["weights"])
    return total / count

  expected = jax.jit(jax.value_and_grad(plain))(params)
  for chunk in (1 << 27, 31 * 48, 31 * 17, 31):  # all 48 tokens at once, also counted; 17; one
    monkeypatch.setattr("rat_jax.train.loss._LOGITS", chunk)

    def chunked(p):
      total, count = sequence_loss(MODEL, p, batch, mode=MODES[0])
      return total / count

    found = jax.jit(jax.value_and_grad(chunked))(params)
    for ours, known in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
      assert_close(ours, known, GRADIENT)
