"""Parity with the RAT+ authors' code (github.com/wimh966/rat-plus), at the tolerances of its float32 results."""

from __future__ import annotations

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rat_jax
from conftest import FIXTURES, first_quick
from rat_jax import batch as batches, transformer
from rat_jax.attention.terms import Origin, Placement
from rat_jax.convert import from_ratplus_state_dict, to_ratplus_state_dict
from rat_jax.plan import layer_modes
from rat_jax.train import cross_entropy

LOGITS, INTERMEDIATE, LOSS, GRADIENT, WEIGHT, NORM, RATE = 3e-5, 2e-5, 2e-6, 2e-6, 5e-6, 1e-5, 1e-9
MEMORY = 3e-6  # relative to the channel's largest entry
BACKBONES = ["ratplus", "attention"]
BOTH = pytest.mark.parametrize("backbone", BACKBONES)
FIRST = pytest.mark.parametrize("backbone", first_quick(1, BACKBONES))


def assert_within(actual, expected, tolerance, message=""):
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  assert actual.shape == expected.shape, (actual.shape, expected.shape, message)
  error = np.abs(actual - expected).max()
  assert error <= tolerance, f"{message}: {error:.3g} > {tolerance:.3g}"


@BOTH
def test_logits_of_every_configuration(authors, backbone):
  fixture = authors(f"model_{backbone}")
  modes = fixture.modes()
  assert len(modes) >= 4
  for suffix, tokens, names in (("", "tokens", modes), ("_odd", "tokens_odd", fixture.names("odd_names"))):
    for name in names:
      apply = jax.jit(functools.partial(fixture.model.apply, mode=modes[name]))
      logits = apply({"params": fixture.params()}, fixture[tokens])
      assert_within(logits, fixture[f"logits{suffix}/{name}"], LOGITS, name)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_intermediates(authors, backbone):
  fixture = authors(f"model_{backbone}")
  config, params, modes = fixture.config, fixture.params(), fixture.modes()
  tokens = fixture["tokens"][:1]
  batch = batches.of_call(tokens)
  compared = 0
  for name in fixture.names("inter_names"):
    x = transformer.embed(params, tokens)
    for i, mode in enumerate(layer_modes(modes[name], config.num_layers)):
      p = jax.tree.map(lambda a, i=i: a[i], params["layers"])
      before = transformer.project(config, p, x)
      after, _ = transformer.remember(config, before, batch, None, i)
      y = mode.attend(after, Placement.of(batch), Origin(batch.row_ids, i))
      between = transformer.attention_branch(config, p, x, y, before.output_gate)
      x = transformer.mlp_branch(config, p, between)
      ours = {"q_rot": after.q, "k_rot": after.k, "attn": y, "attn_block": between, "block": x}
      if config.memory:
        k_mem, v_mem, _ = rat_jax.memory(before.gate_logits, before.k, before.v)
        ours |= {"gate": jax.nn.sigmoid(before.gate_logits), "k_mem": k_mem, "v_mem": v_mem}
      else:
        ours |= {"k": before.k, "v": before.v}
      for key, value in ours.items():
        at = f"inter/{name}/layer{i}/{key}"
        if at in fixture.arrays:
          assert_within(value, fixture[at], INTERMEDIATE, at)
          compared += 1
  assert compared == sum(key.startswith("inter/") for key in fixture.arrays)


@FIRST
def test_gradients(authors, backbone):
  fixture = authors(f"grads_{backbone}")
  model, params, tokens, labels = fixture.model, fixture.params(), fixture["tokens"], fixture["labels"]
  for name, mode in fixture.modes().items():

    def mean_loss(params, mode=mode):
      total, count = cross_entropy(model.apply({"params": params}, tokens, mode=mode), labels)
      return total / count

    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(params)
    assert_within(loss, fixture[f"loss/{name}"], LOSS, name)
    theirs = fixture.state_dict(f"grad/{name}")
    ours = to_ratplus_state_dict(grads, fixture.config)
    for key, value in theirs.items():
      assert_within(ours[key], value, GRADIENT, f"{name} {key}")


@pytest.mark.parametrize("name", first_quick(1, ["train_arl", "train_plain"]))
def test_training_weights(authors, name):
  fixture = authors(name)
  model, params = fixture.model, fixture.params()
  optimizer = rat_jax.make_optimizer(
      float(fixture["base_lr"]), total_steps=int(fixture["total_steps"]), warmup_steps=int(fixture["warmup_steps"]),
      min_learning_rate=float(fixture["eta_min"]), b1=float(fixture["betas"][0]), b2=float(fixture["betas"][1]),
      weight_decay=float(fixture["weight_decay"]), clip_norm=float(fixture["clip"]))
  mode = rat_jax.Dilated(*(int(x) for x in fixture["config"]))
  modes = (mode, rat_jax.Dense()) if fixture["joint"] else (mode,)
  accumulation = int(fixture["accumulation"])
  state = rat_jax.init_train_state(model, params, optimizer)
  last = max(int(key[5:key.index("/")]) for key in fixture.arrays if key.startswith("after"))
  for step in range(last):
    batch = {"tokens": fixture["inputs"][step].reshape(-1, fixture["inputs"].shape[-1]),
             "targets": fixture["labels"][step].reshape(-1, fixture["labels"].shape[-1])}
    state, metrics = rat_jax.train_step(model, optimizer, state, batch, modes=modes, accumulation=accumulation)
    assert_within(metrics["loss"], fixture["loss"][step].mean(-1), LOSS, f"loss {step}")
    assert_within(metrics["grad_norm"], fixture["grad_norm"][step], NORM, f"norm {step}")
    assert_within(metrics["learning_rate"], fixture["lr"][step].ravel()[0], RATE, f"rate {step}")
    if f"after{step + 1}/backbone.ln.weight" in fixture.arrays:
      ours = to_ratplus_state_dict(state.params, fixture.config)
      for key, value in fixture.state_dict(f"after{step + 1}").items():
        assert_within(ours[key], value, WEIGHT, f"after {step + 1} {key}")
  assert int(state.step) == last


def test_schedule():
  for case in json.loads((FIXTURES / "ratplus/schedule.json").read_text()):
    optimizer = rat_jax.make_optimizer(case["lr"], total_steps=case["total_steps"], warmup_steps=case["warmup_steps"],
                                       min_learning_rate=case["eta_min"])
    rates = [optimizer.schedule(step) for step in range(case["total_steps"])]
    assert_within(rates, case["lr_per_step"], RATE, case)


@pytest.mark.parametrize("name", first_quick(1, ["decode", "decode_attention"]))
def test_decoding(authors, name):
  fixture = authors(name)
  weights = authors(str(fixture["model"]).removesuffix(".npz"))
  model, params = weights.model, weights.params()
  tokens, prompt = fixture["tokens"], int(fixture["prompt_length"])
  for config_name, mode in fixture.modes().items():
    logits, cache = rat_jax.prefill(model, params, tokens[:, :prompt], mode=mode, max_length=tokens.shape[1])
    assert_within(logits, fixture[f"prefill/{config_name}"], LOGITS, config_name)
    for step in range(tokens.shape[1] - prompt):
      logits, cache = rat_jax.decode_step(model, params, tokens[:, prompt + step], cache)
      assert_within(logits, fixture[f"steps/{config_name}"][:, step], LOGITS, f"{config_name} step {step}")
      position = prompt + step
      for i, layer_mode in enumerate(layer_modes(mode, model.config.num_layers)):
        seen = rat_jax.visible(layer_mode, np.array([position]), np.arange(position + 1)).sum()
        assert seen == fixture[f"attended/{config_name}"][step, i]
    if model.config.memory:
      for i in range(model.config.num_layers):
        for ours, key in zip(cache.state, "kv", strict=True):
          assert_within(ours[i], fixture[f"state/{config_name}/layer{i}/{key}"], INTERMEDIATE, config_name)


def gate_logits(gate):
  with np.errstate(divide="ignore"):
    gate = gate.astype(np.float64)
    return (np.log(gate) - np.log1p(-gate)).astype(np.float32)


def assert_within_channel(actual, expected, tolerance):
  """Relative to the largest entry of every channel [B, T, N, H], which span several decades."""
  scale = np.abs(expected).max(axis=1, keepdims=True)
  assert (np.abs(np.asarray(actual, np.float64) - expected) <= tolerance * np.maximum(scale, 1e-30)).all()


@pytest.mark.slow
def test_memory_with_extreme_gates(authors):
  fixture = authors("memory_stress")
  k_mem, v_mem, state = rat_jax.memory(gate_logits(fixture["gate"]), fixture["k"], fixture["v"])
  for ours, theirs, last in ((k_mem, fixture["k_mem"], state[0]), (v_mem, fixture["v_mem"], state[1])):
    assert_within_channel(ours, theirs, MEMORY)
    np.testing.assert_array_equal(ours[:, -1], last)


def test_memory_gradients(authors):
  fixture = authors("memory_grad")
  gate = fixture["gate"].astype(np.float64)

  def total(logits, k, v):
    k_mem, v_mem, _ = rat_jax.memory(logits, k, v)
    return jnp.sum(k_mem * fixture["cot_k"]) + jnp.sum(v_mem * fixture["cot_v"])

  d_logits, d_k, d_v = jax.jit(jax.grad(total, (0, 1, 2)))(gate_logits(gate), fixture["k"], fixture["v"])
  assert_within_channel(d_logits, fixture["d_gate"] * gate * (1 - gate), MEMORY)
  assert_within_channel(d_k, fixture["d_k"], MEMORY)
  assert_within_channel(d_v, fixture["d_v"], MEMORY)


@BOTH
def test_state_dict_round_trip(authors, backbone):
  fixture = authors(f"model_{backbone}")
  theirs = fixture.state_dict()
  back = to_ratplus_state_dict(fixture.params(), fixture.config)
  assert back.keys() == theirs.keys() | {"head.lm_head.weight"}
  for name, value in theirs.items():
    np.testing.assert_array_equal(back[name], value)


def test_older_and_compiled_state_dicts_are_read(authors):
  fixture = authors("model_ratplus")
  old, width = {}, fixture.config.embed_dim
  for name, value in fixture.state_dict().items():
    if name.endswith("in_proj.weight"):
      value, gate = value[:4 * width], value[4 * width:]
      old["_orig_mod." + name.replace("in_proj", "fgate_proj")] = gate
    old["_orig_mod." + name] = value
  chex.assert_trees_all_equal(from_ratplus_state_dict(old, fixture.config), fixture.params())


def test_bad_state_dicts_are_refused(authors):
  fixture = authors("model_ratplus")
  good = fixture.state_dict()
  with pytest.raises(ValueError, match=r"lack 'backbone\.ln\.weight'"):
    from_ratplus_state_dict({k: v for k, v in good.items() if k != "backbone.ln.weight"}, fixture.config)
  with pytest.raises(ValueError, match="has no place for"):
    from_ratplus_state_dict(good | {"backbone.layers.7.extra": np.zeros(3)}, fixture.config)
  with pytest.raises(ValueError, match="set tie_embeddings=False"):
    from_ratplus_state_dict(good | {"head.lm_head.weight": good["embedding.wte.weight"] + 1}, fixture.config)
  with pytest.raises(ValueError, match=r"rope_base=500000\.0 does not fit"):
    from_ratplus_state_dict(good, dataclasses.replace(fixture.config, rope_base=500000.0))
  with pytest.raises(ValueError, match="has shape"):
    from_ratplus_state_dict(good | {"backbone.ln.weight": np.zeros(3)}, fixture.config)
