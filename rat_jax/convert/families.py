"""The families of language models that we read and write: a table of what is so of each, and where its weights lie.

Their code is huggingface/transformers, models/{llama,mistral,smollm3,qwen2,qwen3,olmo2}. Linear weights are [out, in].
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import numpy as np

from rat_jax.config import RATPlusConfig
from rat_jax.convert.mapping import Piece, heads_of_columns, heads_of_rows, transposed

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LAYER = "model.layers.{i}."
UNREAD = "rotary_emb.inv_freq"  # how names of tensors end that older files have, and that follow from the config


# Of our configuration, what is so of all families unless one says otherwise.
_OF_ALL: Mapping[str, Any] = {"mlp": "swiglu", "output_gate": False, "norm_placement": "pre", "qk_norm": False,
                              "attention_bias": False}


@dataclasses.dataclass(frozen=True)
class Family:
  """What is so of every model of a family.

  Attributes:
    name: the model_type of its config.json; architecture: the class that runs it.
    shown: what people call it.
    fields: of our configuration, where they differ from those of most families.
    needs: of its config.json, values that an entry must have where it is there.
    norms: where the weights of the norms of attention and MLP lie in a layer.
    tied: whether embedding and head are one, where its config.json does not say it.
    head_dim: of heads, where its config.json does not say it; None: embed_dim / heads.
    width_of_heads: whether heads together are as wide as the stream, so that their width is not written.
    rope_base: where its config.json does not say it; None: it must.
  """

  name: str
  architecture: str
  shown: str
  fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  needs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
  tied: bool = False
  head_dim: int | None = None
  width_of_heads: bool = False
  rope_base: float | None = 10000.0

  @property
  def ours(self) -> dict[str, Any]:
    """The fields of our configuration that all its models share."""
    return {**_OF_ALL, **self.fields}


_NO_BIAS = {"attention_bias": False, "mlp_bias": False}
_NO_WINDOW = {"use_sliding_window": False}
FAMILIES: Mapping[str, Family] = {family.name: family for family in (
    Family("llama", "LlamaForCausalLM", "Llama", needs=_NO_BIAS),
    Family("mistral", "MistralForCausalLM", "Mistral", needs={"sliding_window": None}),
    Family("smollm3", "SmolLM3ForCausalLM", "SmolLM3", needs=_NO_BIAS | _NO_WINDOW, tied=True, rope_base=2000000.0),
    Family("qwen2", "Qwen2ForCausalLM", "Qwen 2", {"attention_bias": True}, needs=_NO_WINDOW),
    Family("qwen3", "Qwen3ForCausalLM", "Qwen 3", {"qk_norm": "head"}, needs=_NO_WINDOW | {"attention_bias": False},
           head_dim=128),
    Family("olmo2", "Olmo2ForCausalLM", "OLMo 2", {"qk_norm": True, "norm_placement": "post"},
           needs={"attention_bias": False}, norms=("post_attention_layernorm", "post_feedforward_layernorm"),
           width_of_heads=True, rope_base=None),
)}

def family_of(name: object, where: str) -> Family:
  """The family of this name. Raises ValueError for one that is not supported, with the nearest that is."""
  if isinstance(name, str) and name in FAMILIES:
    return FAMILIES[name]
  near = difflib.get_close_matches(str(name), FAMILIES, n=1, cutoff=0.0)
  raise ValueError(f"{where}: model_type={name!r} is not supported; {', '.join(FAMILIES)} are, of which {near[0]!r} has"
                   " the nearest name.")


def check_family(config: RATPlusConfig, family: Family) -> None:
  """Raises ValueError for a configuration that no model of the family has; its memory may be left out."""
  for name, value in family.ours.items():
    if getattr(config, name) != value:
      raise ValueError(f"{name}={getattr(config, name)!r} is not {family.shown}, which has {name}={value!r}.")
  if family.width_of_heads and config.head_dim * config.num_heads != config.embed_dim:
    raise ValueError(f"head_dim={config.head_dim} is not {family.shown}, which has embed_dim / num_heads.")
  if config.no_rope_layers and family.name != "smollm3":
    raise ValueError(f"no_rope_layers={config.no_rope_layers} is not {family.shown}; SmolLM3 has such layers.")


def pieces_of(config: RATPlusConfig, family: Family) -> list[Piece]:
  """Where models of a family keep our leaves; a memory's leaves, which they do not have, are left out."""
  e, h, f, v = config.embed_dim, config.head_dim, config.mlp_dim, config.vocab_size
  n, kv, attention, mlp = config.num_heads, config.num_kv_heads, _LAYER + "self_attn.", _LAYER + "mlp."
  pieces = [
      Piece("embedding", EMBEDDING, (v, e)),
      heads_of_rows("layers/query", attention + "q_proj.weight", n, h, e),
      heads_of_rows("layers/key", attention + "k_proj.weight", kv, h, e),
      heads_of_rows("layers/value", attention + "v_proj.weight", kv, h, e),
      heads_of_columns("layers/out", attention + "o_proj.weight", n, h, e),
      transposed("layers/mlp_gate", mlp + "gate_proj.weight", f, e),
      transposed("layers/mlp_in", mlp + "up_proj.weight", f, e),
      transposed("layers/mlp_out", mlp + "down_proj.weight", e, f),
      *(Piece(f"layers/{leaf}", f"{_LAYER}{name}.weight", (e,))
        for leaf, name in zip(("attention_norm", "mlp_norm"), family.norms, strict=True)),
      Piece("final_norm", "model.norm.weight", (e,)),
  ]
  if config.attention_bias:
    pieces += [_of_heads(f"layers/{leaf}_bias", f"{attention}{name}_proj.bias", heads, h)
               for leaf, name, heads in (("query", "q", n), ("key", "k", kv), ("value", "v", kv))]
  if config.qk_norm == "head":
    pieces += [Piece(f"layers/{leaf}_norm", f"{attention}{name}_norm.weight", (h,))
               for leaf, name in (("query", "q"), ("key", "k"))]
  elif config.qk_norm:
    pieces += [_of_heads(f"layers/{leaf}_norm", f"{attention}{name}_norm.weight", heads, h)
               for leaf, name, heads in (("query", "q", n), ("key", "k", kv))]
  return pieces if config.tie_embeddings else [*pieces, Piece("head", HEAD, (v, e))]


def _of_heads(leaf: str, name: str, heads: int, head_dim: int) -> Piece:
  """The piece of a vector of all heads: [heads * H] there, [heads, H] here."""
  return Piece(leaf, name, (heads * head_dim,), lambda x: x.reshape(heads, head_dim), np.ravel)
