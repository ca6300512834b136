"""Calls of a model outside of `jit`: what is compiled, what is refused before anything is computed."""

from __future__ import annotations

import chex
import jax
import numpy as np
import pytest

from conftest import WHOLE_MODEL, assert_close, compilations
from rat_jax import Dense, MoBA, Quest, RATPlusConfig, RATPlusLM, SnapKV

CONFIG = RATPlusConfig(31, 2, 16, 2, init_std=0.3)
MODEL = RATPlusLM(CONFIG)


@pytest.fixture(scope="module")
def setting():
  tokens = np.asarray(jax.random.randint(jax.random.key(0), (2, 14), 0, 31))
  return MODEL.init(jax.random.key(1), tokens)["params"], tokens


@pytest.mark.parametrize(("mode", "arguments"), [
    (Dense(), {}), (Quest(8, block=4), {}), (MoBA(2, block=4), dict(prefill_mode=Dense(), prompt_lengths=[9, 5])),
    (SnapKV(5, obs_window=2), dict(prompt_lengths=[9, 5], lengths=[12, 14]))], ids=str)
def test_a_call_is_compiled_once(setting, mode, arguments):
  """For its configuration, mode and shapes; what arrays hold is no part of that."""
  params, tokens = setting
  first = MODEL.apply({"params": params}, tokens, mode=mode, **arguments)
  other = {name: [7, 6] if name == "prompt_lengths" else value for name, value in arguments.items()}
  with compilations() as compiled:
    again = MODEL.apply({"params": params}, tokens, mode=mode, **arguments)
    MODEL.apply({"params": params}, np.flip(tokens, 1), mode=mode, **other)
  assert not compiled
  np.testing.assert_array_equal(first, again)


def test_a_model_is_drawn_by_programs_that_are_compiled_once(setting):
  _, tokens = setting
  params = MODEL.init(jax.random.key(1), tokens)["params"]
  with compilations() as compiled:
    again = MODEL.init(jax.random.key(1), tokens)["params"]
    other = MODEL.init(jax.random.key(2), tokens)["params"]
  assert not compiled
  chex.assert_trees_all_equal(params, again)
  assert (np.asarray(other["embedding"]) != np.asarray(params["embedding"])).all()


@pytest.mark.slow
def test_prompts_that_are_known_when_compiling_give_the_same_logits(setting):
  """Then steps start at the shortest prompt, and nothing is computed twice."""
  params, tokens = setting
  for mode in (Quest(8, block=4), SnapKV(5, obs_window=2)):
    prompts = np.array([9, 5])
    known = jax.jit(lambda p, mode=mode, prompts=prompts: MODEL.apply(
        {"params": p}, tokens, mode=mode, prompt_lengths=prompts))(params)
    given = MODEL.apply({"params": params}, tokens, mode=mode, prompt_lengths=prompts)
    assert_close(known, given, WHOLE_MODEL, str(mode))


@pytest.mark.parametrize(("arguments", "text"), [
    (dict(remat="nonsense"), "remat='nonsense' is unknown; use one of"),
    (dict(remat=["products"]), r"remat=\['products'\] is unknown"),
    (dict(unroll="x"), "unroll='x'; use True or False"),
    (dict(remat="nonsense", select_from="plain"), "remat='nonsense' is unknown"),
    (dict(select_from="other"), "select_from='other' is unknown; use \"memory\" or \"plain\""),
    (dict(attend_to="other", unroll=True), "attend_to='other' is unknown")])
def test_unknown_choices_are_refused_whatever_else_is_asked(setting, arguments, text):
  params, tokens = setting
  with compilations() as compiled, pytest.raises(ValueError, match=text):
    MODEL.apply({"params": params}, tokens, **arguments)
  assert not compiled


@pytest.mark.slow
def test_the_experiment_honours_remat_and_unroll(setting):
  """The 2x2 is differentiated as everything else is, and gives the same gradients however it keeps what it needs."""
  params, tokens = setting

  def loss(p, **how):
    return (MODEL.apply({"params": p}, tokens, select_from="plain", mode=Quest(8, block=4), **how) ** 2).mean()

  expected = jax.jit(jax.grad(loss))(params)
  for how in (dict(remat="nothing"), dict(remat="everything", unroll=True)):
    found = jax.jit(jax.grad(lambda p, how=how: loss(p, **how)))(params)
    jax.tree.map(lambda ours, theirs: assert_close(ours, theirs, WHOLE_MODEL), found, expected)
