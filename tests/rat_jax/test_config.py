"""The configuration: defaults, presets, JSON, and what is refused."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from conftest import run_python
from rat_jax import RATPlusConfig, RATPlusLM

GOOD = dict(vocab_size=256, num_layers=4, embed_dim=256, num_heads=4)


def test_defaults_are_filled_in():
  config = RATPlusConfig(**GOOD)
  assert (config.num_kv_heads, config.head_dim, config.mlp_dim) == (4, 64, 1024)
  assert RATPlusConfig(**{**GOOD, "embed_dim": np.int64(256)}) == config
  assert RATPlusConfig.from_json(RATPlusConfig(**GOOD, rope_base=np.float32(500)).to_json()).rope_base == 500.0
  assert hash(config) == hash(RATPlusConfig(**GOOD, head_dim=64))


@pytest.mark.parametrize(("changes", "message"), [
    (dict(vocab_size=0), "vocab_size=0; use an integer of at least 1"),
    (dict(num_layers=2.5), r"num_layers=2\.5"),
    (dict(num_heads=3), "num_heads=3 does not divide embed_dim=256"),
    (dict(num_kv_heads=3), "num_kv_heads=3 does not divide num_heads=4"),
    (dict(head_dim=7), "head_dim=7 is odd"),
    (dict(mlp="relu"), r"mlp='relu' is unknown; use one of \('gelu', 'swiglu'\)"),
    (dict(norm_placement="both"), "norm_placement='both'"),
    (dict(dtype="float16"), "dtype='float16'"),
    (dict(memory=1), "memory=1 is not a bool"),
    (dict(gate_bias=-12.0, memory=False), r"gate_bias=-12\.0 with memory=False"),
    (dict(rope_base=0), "rope_base=0"),
    (dict(norm_eps=-1e-6), "norm_eps=-1e-06"),
    (dict(init_std=0.0), r"init_std=0\.0"),
    (dict(rope_base=float("inf")), "rope_base=inf; use a finite number"),
    (dict(gate_bias=float("nan")), "gate_bias=nan; use a finite number"),
    (dict(gate_bias=-1e39), r"gate_bias=-1e\+39; use a finite number that float32 can hold, or None for no bias\."),
    (dict(dtype=np.dtype("float32")), r"dtype=dtype\('float32'\) is unknown; use one of \('float32', 'bfloat16'\)\."),
    (dict(param_dtype=np.float32), "param_dtype=<class 'numpy.float32'> is unknown"),
    (dict(norm_eps=1e-60), r"norm_eps=1e-60; use a finite number above 0 that float32 can hold\."),
    (dict(norm_eps=1e-39), "norm_eps=1e-39; use"),  # subnormal: programs take it for 0
    (dict(init_std=1e39), r"init_std=1e\+39; use a finite number above 0 that float32 can hold, or None for"),
    (dict(rope_base=1e-300), r"rope_base=1e-300; use a finite number of at least 1 that float32 can hold\."),
    (dict(rope_base=0.5), r"rope_base=0\.5"),
    (dict(rope_base=1e39), r"rope_base=1e\+39"),
])
def test_bad_fields(changes, message):
  with pytest.raises(ValueError, match=message):
    RATPlusConfig(**{**GOOD, **changes})


def test_json():
  config = RATPlusConfig(**GOOD, gate_bias=-3.0, init_std=None, dtype="bfloat16")
  assert RATPlusConfig.from_json(config.to_json()) == config
  for text, message in (("{", "is not JSON"), (None, "is not JSON: the JSON object must be str"),
                        ("[" * 100_000, "is not JSON: maximum recursion depth"),
                        ('{"vocab_size": 3}', "lacks"), ("[]", "unknown fields list"),
                        ('{"colour": 1}', r"unknown fields \['colour'\]")):
    with pytest.raises(ValueError, match=message):
      RATPlusConfig.from_json(text)
  assert config.difference(RATPlusConfig(**GOOD, dtype="bfloat16")) == "gate_bias: -3.0, None; init_std: None, 0.02"


@pytest.mark.parametrize(("name", "parameters"), [
    ("tiny", None), ("ratplus-1b", 1.47e9), ("ratplus-3b", 2.65e9), ("ratplus-7b", 7.65e9), ("olmo2-1b", 1.48e9),
    ("olmo2-7b", 7.3e9), ("olmo2-13b", 13.7e9), ("olmo2-32b", 32.2e9)])
def test_presets_have_their_published_sizes(name, parameters):
  config = RATPlusConfig.preset(name)
  shapes = jax.eval_shape(RATPlusLM(config).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 8), np.int32))
  if parameters:
    assert sum(x.size for x in jax.tree.leaves(shapes)) == pytest.approx(parameters, rel=0.01)
  for unknown, quoted in (("huge", "'huge'"), (["tiny"], r"\['tiny'\]"), (None, "None")):
    with pytest.raises(ValueError, match=f"preset {quoted} is unknown; use one of"):
      RATPlusConfig.preset(unknown)


def test_initial_scales():
  config = RATPlusConfig(64, 3, 64, 4, init_std=None, gate_bias=-5.0)
  params = RATPlusLM(config).init(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
  layers = params["layers"]
  assert float(layers["query"].std()) == pytest.approx(64**-0.5, rel=0.05)
  assert float(layers["mlp_out"].std()) == pytest.approx((256 * 6) ** -0.5, rel=0.05)
  assert float(layers["out"].std()) == pytest.approx((64 * 6) ** -0.5, rel=0.05)
  assert not layers["memory_gate"].any()
  np.testing.assert_array_equal(layers["memory_gate_bias"], -5.0)
  assert RATPlusLM(RATPlusConfig(**GOOD)).init(
      jax.random.key(0), np.zeros((1, 4), np.int32))["params"]["embedding"].std() == pytest.approx(0.02, rel=0.05)


def test_the_library_needs_its_core_dependencies_alone():
  imported = run_python("tests/rat_jax/imported.py").split()
  assert {"rat_jax", "pallas_kernels", "jax"} <= set(imported)
  assert not {"torch", "transformers", "safetensors", "wandb", "chex", "orbax", "tqdm", "matplotlib",
              "tokenizers"} & set(imported)
