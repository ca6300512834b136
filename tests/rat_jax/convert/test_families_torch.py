"""Every family that is read and written, as `transformers` writes and runs a small model of it."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

import rat_jax
from rat_jax import RATPlusLM
from rat_jax.convert import families

torch = pytest.importorskip("torch", reason="make test-torch installs torch")
transformers = pytest.importorskip("transformers", reason="make test-torch installs transformers")
LENGTH, ORIGINAL = 70, 32  # of sequences; what RoPE is scaled beyond
SCALINGS = {
    "none": {"rope_type": "default"}, "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": ORIGINAL},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "yarn with its own numbers": {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": ORIGINAL,
                                  "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3}}
OF_FAMILY = {"smollm3": {"no_rope_layers": [1, 0, 1], "pad_token_id": 2}, "mistral": {"sliding_window": None}}
CASES = [(name, kv_heads, tied, "none") for name in families.FAMILIES for kv_heads, tied in ((4, True), (2, False))] + [
    (name, 2, True, scaling) for name in ("llama", "qwen2", "smollm3") for scaling in SCALINGS if scaling != "none"]


def written(folder, name, kv_heads, tied, scaling, shard="1GB", dtype="float32"):
  """A random model of a family: its folder, and the model."""
  theirs = getattr(transformers, families.FAMILIES[name].architecture)
  torch.manual_seed(kv_heads)
  model = theirs(theirs.config_class(
      vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
      num_key_value_heads=kv_heads, rms_norm_eps=1e-5, tie_word_embeddings=tied, max_position_embeddings=128,
      rope_parameters={"rope_theta": 500.0, **SCALINGS[scaling]}, attn_implementation="eager", bos_token_id=None,
      eos_token_id=60, **{} if name == "olmo2" else {"head_dim": 12}, **OF_FAMILY.get(name, {})))
  with torch.no_grad():
    for of, parameter in model.named_parameters():  # as drawn, norms are ones, biases zeros and logits all alike
      parameter.copy_(torch.rand(parameter.shape) + 0.5 if "norm" in of else torch.randn(parameter.shape) * 0.15)
  model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
  return folder


def run(folder, tokens):
  """(logits, hidden states of every layer) by transformers."""
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
  with torch.no_grad():
    found = model(torch.from_numpy(tokens), output_hidden_states=True)
  return found.logits.numpy(), [x.numpy() for x in found.hidden_states]


def exact(config, params):
  """The model and its parameters in float32."""
  ours = dataclasses.replace(config, dtype="float32", param_dtype="float32")
  return RATPlusLM(ours), jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)


@pytest.mark.usefixtures("true_float32")
@pytest.mark.parametrize(("name", "kv_heads", "tied", "scaling"), CASES)
def test_logits_and_tokens(tmp_path, name, kv_heads, tied, scaling):
  folder = written(tmp_path / "theirs", name, kv_heads, tied, scaling, shard="1GB" if tied else "15KB")
  assert (len(list(folder.glob("*.safetensors"))) > 1) != tied
  tokens = np.random.default_rng(0).integers(3, 60, (2, LENGTH))  # 2 is padding to their `generate`
  expected, hidden = run(folder, tokens)
  config, params = rat_jax.convert.load(folder)
  assert (config.num_kv_heads, config.tie_embeddings, config.memory) == (kv_heads, tied, False)
  model, params = exact(config, params)
  np.testing.assert_allclose(model.apply({"params": params}, tokens), expected, atol=1e-4)
  stream = model.apply({"params": params}, tokens, method="stream")
  norm = np.asarray(params["final_norm"])
  normed = stream / np.sqrt(np.mean(np.square(stream), -1, keepdims=True) + config.norm_eps) * norm
  np.testing.assert_allclose(normed, hidden[-1], atol=1e-4)
  for i in range(1, config.num_layers):  # the streams before the last layer
    part = dataclasses.replace(model.config, num_layers=i, no_rope_layers=[
        layer for layer in config.no_rope_layers if layer < i])
    of_part = params | {"layers": jax.tree.map(lambda leaf, i=i: leaf[:i], params["layers"])}
    np.testing.assert_allclose(RATPlusLM(part).apply({"params": of_part}, tokens, method="stream"), hidden[i],
                               atol=1e-4)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
  answer = theirs.generate(torch.from_numpy(tokens[:, :40]), max_new_tokens=20, do_sample=False, eos_token_id=None,
                           pad_token_id=2)
  ours = rat_jax.generate(model, params, tokens[:, :40], max_new_tokens=20)
  np.testing.assert_array_equal(ours, answer[:, 40:].numpy())


@pytest.mark.parametrize(("name", "scaling"), [*((name, "none") for name in families.FAMILIES), ("llama", "llama3"),
                                               ("qwen3", "yarn with its own numbers"), ("mistral", "linear")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_out_and_in_again(tmp_path, name, scaling, dtype):
  folder = written(tmp_path / "theirs", name, 2, name == "smollm3", scaling, dtype=dtype)
  config, params = rat_jax.convert.load(folder)
  assert config.param_dtype == dtype
  rat_jax.convert.export(tmp_path / "ours", config, params, family=name, source=folder, max_file_bytes=20_000)
  again, back = rat_jax.convert.load(tmp_path / "ours")
  assert again == config
  jax.tree.map(np.testing.assert_array_equal, back, params)
  tokens = np.random.default_rng(1).integers(0, 60, (1, 50))
  np.testing.assert_array_equal(run(tmp_path / "ours", tokens)[0], run(folder, tokens)[0])
  theirs = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
  assert (theirs.eos_token_id, theirs.max_position_embeddings) == (60, 128)


@pytest.mark.parametrize(("name", "change", "message"), [
    ("llama", {"model_type": "gemma2"}, r"model_type='gemma2' is not supported; llama, mistral, .* has the nearest"),
    ("llama", {"model_type": "qwen2_moe"}, "of which 'qwen2' has the nearest name"),
    ("llama", {"attention_bias": True}, "attention_bias=True is not supported; Llama here has attention_bias=False"),
    ("mistral", {"sliding_window": 4096}, "sliding_window=4096 is not supported; Mistral here has sliding_window=None"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window=True is not supported"),
    ("smollm3", {"no_rope_layers": [1, 2]}, r"no_rope_layers=\[1, 2\]; give 3 numbers"),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "longrope"}}, "rope_type='longrope' is not supp"),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "llama3", "factor": 8.0}},
     "rope_parameters: rope_scaling: original_length=None with kind='llama3'")])
def test_what_is_not_served_is_named(tmp_path, name, change, message):
  folder = written(tmp_path / "theirs", name, 2, True, "none")
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(ValueError, match=message):
    rat_jax.convert.load(folder)


def test_another_family_is_not_written(tmp_path):
  config, params = rat_jax.convert.load(written(tmp_path / "theirs", "qwen3", 2, True, "none"))
  with pytest.raises(ValueError, match="qk_norm='head' is not Llama, which has qk_norm=False"):
    rat_jax.convert.export(tmp_path / "ours", config, params, family="llama")
  with pytest.raises(ValueError, match="family: model_type='bert' is not supported"):
    rat_jax.convert.export(tmp_path / "ours", config, params, family="bert")
