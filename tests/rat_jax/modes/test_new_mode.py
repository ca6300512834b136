"""Modes that the library does not have, added as docs/modes.md says, work everywhere at once."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rat_jax
from conftest import WHOLE_MODEL, assert_close
from rat_jax import Dense, PerLayer, RATPlusConfig, RATPlusLM
from rat_jax.modes import MODES, BlockMode, Mode, text
from rat_jax.modes.moba import Mean


@dataclasses.dataclass(frozen=True, eq=False)
class Vertical(Mode):
  """Every query reads the columns given, and itself."""

  name: ClassVar[str] = "vertical"
  columns: tuple[int, ...]

  def sees(self, t, s):
    return (t == s) | jnp.isin(s, jnp.array(self.columns))


@dataclasses.dataclass(frozen=True, eq=False)
class LogBlocks(BlockMode):
  """Reads 1 block, and one more with every doubling of the length, the best by their mean key."""

  name: ClassVar[str] = "log_blocks"
  summary = Mean()
  block: int = 64

  def __post_init__(self):
    self._settle_int("block", least=1, fix="use at least 1 token")
    self._settle_options()

  def blocks_at(self, length):
    return 1 + (length // self.block).bit_length()


@pytest.mark.slow
def test_a_new_mode_that_chooses_blocks():
  mode = LogBlocks(2)
  assert text.parse(str(mode), MODES | {"log_blocks": LogBlocks}) == mode
  model = RATPlusLM(RATPlusConfig(31, 2, 16, 2, init_std=0.3))
  tokens = np.asarray(jax.random.randint(jax.random.key(0), (2, 14), 0, 31))
  params = model.init(jax.random.key(1), tokens)["params"]
  expected = jax.jit(functools.partial(model.apply, mode=mode))({"params": params}, tokens, prompt_lengths=[9, 5])
  logits, cache = rat_jax.prefill(model, params, tokens[:, :9], [9, 5], mode=mode, max_length=14, chunk=4)
  assert_close(logits, expected[np.arange(2), [8, 4]], WHOLE_MODEL)
  for step in range(5):
    logits, cache = rat_jax.decode_step(model, params, tokens[np.arange(2), [9 + step, 5 + step]], cache)
    assert_close(logits, expected[np.arange(2), [9 + step, 5 + step]], WHOLE_MODEL)
  (first, _) = rat_jax.inspect(model, params, tokens, mode)
  for length, blocks in ((1, 1), (2, 1), (4, 2), (8, 4), (14, 4)):
    assert (np.asarray(first.valid)[:, length - 1].sum(-1) == blocks).all()
    assert (np.asarray(first.tokens)[:, length - 1] <= rat_jax.tokens_read(model.config, mode, length)[0]).all()


def test_a_new_mode_runs_decodes_trains_and_reads_as_text():
  mode = Vertical((0, 3))
  assert text.parse(str(mode), MODES | {"vertical": Vertical}) == mode
  np.testing.assert_array_equal(rat_jax.visible(mode, np.arange(5), np.arange(5)), [
      [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1]])
  model = RATPlusLM(RATPlusConfig(31, 2, 16, 2, init_std=0.3))
  tokens = np.asarray(jax.random.randint(jax.random.key(0), (2, 14), 0, 31))
  params = model.init(jax.random.key(1), tokens)["params"]
  for whole in (mode, PerLayer((Dense(), mode))):
    expected = jax.jit(functools.partial(model.apply, mode=whole))({"params": params}, tokens)
    for chunk in (None, 3):
      logits, cache = rat_jax.prefill(model, params, tokens, np.array([9, 5]), mode=whole, max_length=14, chunk=chunk)
      assert_close(logits, expected[np.arange(2), [8, 4]], WHOLE_MODEL)
    logits, _ = rat_jax.decode_step(model, params, tokens[np.arange(2), [9, 5]], cache)
    assert_close(logits, expected[np.arange(2), [9, 5]], WHOLE_MODEL)
  assert rat_jax.tokens_read(model.config, mode, 10) == (3, 3)
  optimizer = rat_jax.make_optimizer(1e-2, total_steps=5)
  state = rat_jax.init_train_state(model, params, optimizer)
  batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
  losses = []
  for _ in range(5):
    state, metrics = rat_jax.train_step(model, optimizer, state, batch, modes=(mode,))
    losses.append(float(metrics["loss"][0]))
  assert losses[-1] < losses[0] - 0.1
