"""GGUF files that the package `gguf` writes: their numbers, their order of queries and keys, and their tokenizer."""

from __future__ import annotations

import dataclasses

import gguf
import numpy as np
import pytest
from gguf_model import KINDS, model_of, tokenizer_of, write

import rat_jax
from rat_jax import RATPlusLM, RopeScaling, convert
from rat_jax.convert.gguf import GGUFFile
from rat_jax.data import load_tokenizer


@pytest.mark.usefixtures("true_float32")
@pytest.mark.parametrize(("name", "changes"), [
    ("llama", {}), ("llama", {"tie_embeddings": False}), ("qwen2", {}), ("qwen3", {"head_dim": 64}), ("olmo2", {}),
    ("smollm3", {"num_layers": 4, "no_rope_layers": (3,)})])
def test_a_file_gives_its_models_logits(tmp_path, name, changes):
  config, params = model_of(name, **changes)
  more = [lambda w: w.add_key_length(config.head_dim), lambda w: w.add_value_length(config.head_dim)]
  write(tmp_path / "model.gguf", name, config, params, more=more)
  found, read = rat_jax.convert.load(tmp_path / "model.gguf")
  assert found == dataclasses.replace(config, init_std=0.02, norm_eps=found.norm_eps)
  tokens = np.random.default_rng(0).integers(0, 64, (2, 20))
  expected = RATPlusLM(config).apply({"params": params}, tokens)
  np.testing.assert_allclose(RATPlusLM(found).apply({"params": read}, tokens), expected, atol=1e-4)


@pytest.mark.parametrize("kind", [KINDS.F16, KINDS.BF16, KINDS.Q8_0, KINDS.Q4_0, KINDS.Q4_1])
def test_tensors_are_what_the_package_dequantizes(tmp_path, kind):
  config, params = model_of("llama")
  written = write(tmp_path / "model.gguf", "llama", config, params, kind)
  file = GGUFFile(tmp_path / "model.gguf")
  for name, x in written.items():
    expected = x if x.ndim == 1 else gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)
    np.testing.assert_array_equal(file.read(name), expected)
    np.testing.assert_array_equal(file.read(name, slice(3, 7)), expected[3:7])


@pytest.mark.parametrize(("more", "expected"), [
    ([lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR), lambda w: w.add_rope_scaling_factor(4.0)],
     RopeScaling("linear", 4.0)),
    ([lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), lambda w: w.add_rope_scaling_factor(4.0),
      lambda w: w.add_rope_scaling_orig_ctx_len(4096)], RopeScaling("yarn", 4.0, 4096))])
def test_scalings(tmp_path, more, expected):
  config, params = model_of("llama")
  write(tmp_path / "model.gguf", "llama", config, params, more=more)
  assert rat_jax.convert.load(tmp_path / "model.gguf")[0].rope_scaling == expected


def test_frequencies_of_llama3(tmp_path):
  config, params = model_of("llama", rope_base=500000.0)
  scaling, half = RopeScaling("llama3", 8.0, 8192), config.head_dim // 2
  frequencies = config.rope_base ** (-np.arange(half) / half)
  divisors = (frequencies / scaling.scaled(frequencies, config.rope_base)).astype(np.float32)
  write(tmp_path / "model.gguf", "llama", config, params, tensors=[("rope_freqs.weight", divisors)])
  assert rat_jax.convert.load(tmp_path / "model.gguf")[0].rope_scaling == scaling
  write(tmp_path / "other.gguf", "llama", config, params, tensors=[("rope_freqs.weight", divisors**2)])
  with pytest.raises(ValueError, match="is not that of Llama 3's scaling"):
    rat_jax.convert.load(tmp_path / "other.gguf")


def test_what_is_not_served_is_named(tmp_path):
  config, params = model_of("llama")
  path = tmp_path / "model.gguf"
  for more, message in (([lambda w: w.add_sliding_window(128)], "attention.sliding_window=128 is not supported"),
                        ([lambda w: w.add_rope_dimension_count(32)], "rope.dimension_count=32 is not supported"),
                        ([lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)], "'longrope' is not supp")):
    write(path, "llama", config, params, more=more)
    with pytest.raises(ValueError, match=message):
      rat_jax.convert.load(path)
  write(path, "llama", config, params)
  whole = path.read_bytes()
  for cut in (10, 300, len(whole) - 5000):
    path.write_bytes(whole[:cut])
    with pytest.raises(ValueError, match="is no whole GGUF file"):
      rat_jax.convert.load(path)
  path.write_bytes(b"something else entirely")
  with pytest.raises(ValueError, match="is no whole GGUF file"):
    rat_jax.convert.load(path)


TEXTS = ["The capital of France is", "  two  spaces 1234 5", "caf\u00e9 e\u0301 \U0001f600!", "", "don't DON'T",
         "def f(x):\n\treturn x**2\n\n", "<|end|>"]


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_a_tokenizer_is_read(tmp_path, name):
  made, more = tokenizer_of(TEXTS * 3, name)
  config, params = model_of("llama")
  write(tmp_path / "model.gguf", "llama", config, params, more=more)
  read = load_tokenizer(tmp_path / "model.gguf")
  assert (read.vocab_size, read.eod_id) == (made.get_vocab_size(), 0)
  for text in TEXTS:
    ids = read.encode(text)
    assert 0 not in ids
    assert read.decode(ids) == (text if name != "qwen2" else text.replace("e\u0301", "\u00e9"))
  if name == "gpt-2":
    assert [read.encode(text) for text in TEXTS[:-1]] == [made.encode(text).ids for text in TEXTS[:-1]]


def test_other_tokenizers_are_refused(tmp_path):
  config, params = model_of("llama")
  for model, pre, message in (("llama", "default", "tokenizer.ggml.model='llama' is not supported"),
                              ("gpt2", "deepseek-llm", "tokenizer.ggml.pre='deepseek-llm' is not supported; gpt-2, ")):
    write(tmp_path / "model.gguf", "llama", config, params, more=[
        lambda w, model=model: w.add_tokenizer_model(model), lambda w, pre=pre: w.add_tokenizer_pre(pre)])
    with pytest.raises(ValueError, match=message):
      load_tokenizer(tmp_path / "model.gguf")


@pytest.mark.parametrize(("more", "length", "message"), [
    ([], None, ""),
    ([lambda w: w.add_context_length(64)], 64, "rope_scaling=RopeScaling('yarn', 4, 64)"),
    ([lambda w: w.add_context_length(64), lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
      lambda w: w.add_rope_scaling_factor(2.0), lambda w: w.add_rope_scaling_orig_ctx_len(64)], 128,
     "rope_scaling=RopeScaling('yarn', 4, 64)")])
def test_the_length_that_a_model_is_for(tmp_path, more, length, message):
  path = tmp_path / "model.gguf"
  write(path, "llama", *model_of("llama"), more=more)
  assert convert.context_length(path) == length
  convert.check_length(path, length or 10**6, "--length")
  if length:
    with pytest.raises(ValueError, match=f"^--length=200 takes 200 tokens, and .* is for {length}; take") as error:
      convert.check_length(path, 200, "--length=200")
    assert message in str(error.value)


def test_a_file_that_changes_is_read_again(tmp_path):
  path = tmp_path / "model.gguf"
  for length in (64, 32, 128):
    write(path, "llama", *model_of("llama"), more=[lambda w, n=length: w.add_context_length(n)])
    assert convert.context_length(path) == length
  path.unlink()
  with pytest.raises(FileNotFoundError, match=r"give a GGUF file|config\.json"):
    convert.context_length(path)
