"""What models of other families need of a layer: scaled RoPE, biases, norms per head, layers without RoPE."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rat_jax
from rat_jax import RATPlusConfig, RATPlusLM, RopeScaling
from rat_jax.rope import rotate

SCALINGS = {"linear": RopeScaling("linear", 4.0), "llama3": RopeScaling("llama3", 8.0, 32),
            "yarn": RopeScaling("yarn", 4.0, 32), "yarn of its own": RopeScaling("yarn", 3.0, 32, beta_fast=16.0,
                                                                               attention_factor=1.3, truncate=False)}
CONFIG = RATPlusConfig(61, 3, 32, 4, 2, mlp="swiglu", output_gate=False, qk_norm="head", attention_bias=True,
                       rope_base=500.0, rope_scaling=SCALINGS["yarn"], no_rope_layers=(1,), init_std=0.2)


def random_params(config):
  params = RATPlusLM(config).init(jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
  rng = np.random.default_rng(0)
  layers = {name: x + 0.3 * rng.standard_normal(x.shape).astype(np.float32) for name, x in params["layers"].items()}
  return params | {"layers": layers}


@pytest.mark.usefixtures("true_float32")
@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("mode", ["dense", "dilated:4,window=3,sinks=1", "quest:8,block=4"])
def test_decoding_is_whole_sequences(memory, mode):
  config, mode = dataclasses.replace(CONFIG, memory=memory), rat_jax.parse_mode(mode)
  model, params = RATPlusLM(config), random_params(config)
  tokens = np.random.default_rng(1).integers(0, 61, (2, 50))
  whole = model.apply({"params": params}, tokens, mode=mode, prompt_lengths=np.array([40, 40]))
  logits, cache = rat_jax.prefill(model, params, tokens[:, :40], mode=mode, max_length=64)
  np.testing.assert_allclose(logits, whole[:, 39], atol=1e-4)
  for t in range(40, 50):
    logits, cache = rat_jax.decode_step(model, params, tokens[:, t], cache)
    np.testing.assert_allclose(logits, whole[:, t], atol=1e-4)


def test_a_layer_without_rope_has_no_positions():
  """Of the only layer, which then knows what comes before alone: two tokens before the last in any order."""
  config = dataclasses.replace(CONFIG, num_layers=1, no_rope_layers=(0,), memory=False)
  model, params = RATPlusLM(config), random_params(config)
  one, other = (np.array([tokens]) for tokens in ([3, 5, 9, 7], [5, 9, 3, 7]))
  np.testing.assert_allclose(*(model.apply({"params": params}, x)[:, -1] for x in (one, other)), atol=1e-5)
  turned = RATPlusLM(dataclasses.replace(config, no_rope_layers=()))
  assert np.abs(np.subtract(*(turned.apply({"params": params}, x)[:, -1] for x in (one, other)))).max() > 1e-2


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
def test_products_depend_on_distance_alone(scaling):
  q, k = (jax.random.normal(jax.random.key(i), (1, 1, 1, 32)) for i in range(2))

  def product(at, other):
    turned = [rotate(x, jnp.array([[p]]), 500.0, scaling) for x, p in ((q, at), (k, other))]
    return float(jnp.sum(turned[0] * turned[1]))

  assert product(90, 60) == pytest.approx(product(30, 0), abs=1e-3)
  lengthened = jnp.linalg.norm(rotate(q, jnp.array([[77]]), 500.0, scaling)) / jnp.linalg.norm(q)
  assert float(lengthened) == pytest.approx(scaling.length_factor, abs=1e-5)


def test_frequencies_by_hand():
  """Of llama3 with 4 frequencies: 100, 16, 2.5 and .4 turns in the original length, of which 1 to 4 are between."""
  turns = np.array([100, 16, 2.5, 0.4])
  frequencies = turns * 2 * np.pi / 1000
  found = RopeScaling("llama3", 8.0, 1000).scaled(frequencies, 1e4) / frequencies
  np.testing.assert_allclose(found, [1, 1, 0.5 + 0.5 / 8, 1 / 8])


def test_a_configuration_goes_through_json():
  assert RATPlusConfig.from_json(CONFIG.to_json()) == CONFIG


@pytest.mark.parametrize(("change", "message"), [
    (dict(qk_norm="heads"), "qk_norm='heads' is unknown; use False, True .* or \"head\""),
    (dict(attention_bias=1), "attention_bias=1 is not a bool"),
    (dict(no_rope_layers=(3,)), r"no_rope_layers=\(3,\); use different numbers of layers, 0 to 2"),
    (dict(no_rope_layers=(1, 1)), r"no_rope_layers=\(1, 1\); use different numbers"),
    (dict(rope_scaling={"kind": "linear"}), "is no RopeScaling; use rat_jax.RopeScaling")])
def test_fields_that_are_none(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize(("fields", "message"), [
    (dict(kind="dynamic", factor=2.0), "kind='dynamic' is unknown; use one of"),
    (dict(kind="linear", factor=0.5), "factor=0.5; use a finite number above 0, and a factor of at least 1"),
    (dict(kind="linear", factor=2.0, original_length=8), "original_length=8 with kind='linear'"),
    (dict(kind="yarn", factor=2.0), "original_length=None with kind='yarn'; use the tokens that the model was trained"),
    (dict(kind="llama3", factor=2.0, original_length=8, low_freq_factor=4.0), "low_freq_factor=4.0 is not below"),
    (dict(kind="yarn", factor=2.0, original_length=8, attention_factor=0.0), "attention_factor=0.0; use a finite"),
    (dict(kind="yarn", factor=2.0, original_length=8, truncate=1), "truncate=1; use True or False")])
def test_scalings_that_are_none(fields, message):
  with pytest.raises(ValueError, match=message):
    RopeScaling(**fields)
