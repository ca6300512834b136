"""Small models in GGUF files, as the package `gguf` writes them."""

from __future__ import annotations

import json

import gguf
import jax
import numpy as np
import tokenizers

from rat_jax import RATPlusConfig, RATPlusLM
from rat_jax.convert import families, mapping

KINDS = gguf.GGMLQuantizationType
SIZES = dict(vocab_size=64, num_layers=2, embed_dim=256, num_heads=4, num_kv_heads=2, mlp_dim=256, memory=False,
             rope_base=500.0, norm_eps=1e-5, init_std=0.15)
NAMES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
         "up_proj": "ffn_up", "down_proj": "ffn_down", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm"}
NORMS = {"llama": {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
         "olmo2": {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}}
OUTSIDE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
           "lm_head.weight": "output.weight"}


def model_of(name, **changes):
  """A random model of a family, its norms and biases too."""
  config = RATPlusConfig(**SIZES | families.FAMILIES[name].ours | changes)
  params = RATPlusLM(config).init(jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
  rng = np.random.default_rng(1)
  layers = {leaf: x * rng.uniform(0.5, 1.5, x.shape).astype(np.float32) if leaf.endswith("_norm")
            else x + rng.normal(size=x.shape).astype(np.float32) * 0.1 if leaf.endswith("_bias") else x
            for leaf, x in params["layers"].items()}
  return config, params | {"layers": layers}


def their_name(name, family):
  if name in OUTSIDE:
    return OUTSIDE[name]
  _, _, layer, *_, last, end = name.split(".")
  inside = NAMES.get(last) or NORMS.get(family, NORMS["llama"])[last]
  return f"blk.{layer}.{inside}.{end}"


def interleaved(x, heads):
  """Rows of queries or keys in the order in which llama.cpp has those of Llama."""
  return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def write(path, name, config, params, kind=KINDS.F32, more=(), tensors=()):
  """The file; returns {their name: tensor} as it was before quantization."""
  writer, family = gguf.GGUFWriter(path, name), families.FAMILIES[name]
  writer.add_block_count(config.num_layers)
  writer.add_embedding_length(config.embed_dim)
  writer.add_feed_forward_length(config.mlp_dim)
  writer.add_head_count(config.num_heads)
  writer.add_head_count_kv(config.num_kv_heads)
  writer.add_rope_freq_base(config.rope_base)
  writer.add_layer_norm_rms_eps(config.norm_eps)
  for add in more:
    add(writer)
  written = {}
  for theirs, x in (*mapping.foreign(families.pieces_of(config, family), params, config.num_layers), *tensors):
    if name in ("llama", "smollm3") and ("q_proj" in theirs or "k_proj" in theirs):
      x = interleaved(x, config.num_heads if "q_proj" in theirs else config.num_kv_heads)
    named = theirs if theirs == "rope_freqs.weight" else their_name(theirs, name)
    x = np.ascontiguousarray(x, np.float32)
    written[named] = x
    if kind == KINDS.F32 or x.ndim == 1:
      writer.add_tensor(named, x)
    else:
      writer.add_tensor(named, gguf.quants.quantize(x, kind), raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return written


def tokenizer_of(texts, pre):
  """(a byte-level BPE of few tokens, what adds it to a file)."""
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
      vocab_size=330, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>"]))
  vocabulary = sorted(made.get_vocab(), key=made.get_vocab().get)
  merges = [" ".join(pair) for pair in json.loads(made.to_str())["model"]["merges"]]
  return made, [lambda w: w.add_tokenizer_model("gpt2"), lambda w: w.add_tokenizer_pre(pre),
                lambda w: w.add_token_list(vocabulary), lambda w: w.add_eos_token_id(0),
                lambda w: w.add_token_types([3] + [1] * (len(vocabulary) - 1)), lambda w: w.add_token_merges(merges)]
