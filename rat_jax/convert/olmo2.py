"""OLMo 2 (huggingface/transformers, Olmo2ForCausalLM): a folder of config.json and safetensors to our model and back.

Linear weights are [out, in]; norms of queries and keys run over all heads; each branch is normed after it. With memory,
a gate is added that starts at sigmoid(gate_bias) everywhere, which at -12 changes next to nothing (arXiv 2605.28640).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from rat_jax.axes import Params
from rat_jax.config import RATPlusConfig
from rat_jax.convert import mapping
from rat_jax.convert.added_memory import GATE_BIAS, memory_leaves
from rat_jax.convert.mapping import Piece, Place, heads_of_columns, heads_of_rows, transposed
from rat_jax.convert.tensors import SafetensorsFolder, new_folder, read_json, write_safetensors
from rat_jax.leaves import check_params
from rat_jax.paths import local_path
from rat_jax.version import __version__

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LAYER = "model.layers.{i}."
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_BESIDE = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
           "merges.txt", "added_tokens.json", "chat_template.jinja")


def load_olmo2(folder: str | os.PathLike[str], memory: bool = True, gate_bias: float = GATE_BIAS, *,
               place: Place = mapping.as_is) -> tuple[RATPlusConfig, Params]:
  """(config, parameters) of a downloaded OLMo 2.

  Args:
    memory: adds the memory, with zero gate weights and this bias; False is the model as released.
    place: (our leaf's name, the numpy leaf) -> what takes its place in the tree, such as an array that is sharded
      over devices. Leaves come one at a time, so that no more than one is in the host's memory.

  Raises:
    FileNotFoundError, ValueError: no config.json, another architecture, missing files, tensors that do not fit.
  """
  config, named = read_olmo2(folder, memory, gate_bias)
  return config, mapping.tree(named, place)


def read_olmo2(folder: str | os.PathLike[str], memory: bool = True, gate_bias: float = GATE_BIAS
               ) -> tuple[RATPlusConfig, Iterator[tuple[str, np.ndarray]]]:
  """As `load_olmo2`, but the parameters come as pairs (name, leaf), one after another."""
  folder = local_path(folder, "folder")
  path = folder / "config.json"
  config = _config(path, memory, gate_bias)
  tensors, pieces = SafetensorsFolder(folder), pieces_of(config)
  ignored = frozenset({_HEAD} if config.tie_embeddings else ())
  mapping.check(pieces, tensors, config.num_layers, ignored)
  specs = tensors.specs()
  for name, spec in specs.items():
    if not np.can_cast(jnp.dtype(spec.dtype), jnp.dtype(config.param_dtype)):
      raise ValueError(f"{path} says {config.param_dtype}, but {name!r} is {spec.dtype}, which would be rounded; set"
                       " its dtype to what the files hold.")
  if config.tie_embeddings and _HEAD in specs and not np.array_equal(tensors.read(_HEAD), tensors.read(_EMBEDDING)):
    raise ValueError(f"{path} has tie_word_embeddings=True, but {_HEAD!r} differs from the embedding; set it to false"
                     " to keep both.")
  added = ((f"layers/{name}", leaf) for name, leaf in memory_leaves(config)) if memory else ()
  return config, itertools.chain(mapping.leaves(pieces, tensors, config), added)


def export_olmo2(folder: str | os.PathLike[str], config: RATPlusConfig, params: Params, *,
                 source: str | os.PathLike[str] | None = None, max_file_bytes: int = 5 * 10**9) -> None:
  """Writes the model as OLMo 2, its memory left out: `transformers` and `load_olmo2` read it.

  Args:
    source: the folder of the released model that this one comes from, whose token ids, length, generation_config.json
      and tokenizer go along. Without it no token ends an answer.
    max_file_bytes: a new file begins where a tensor would take the last beyond this.

  Raises:
    FileNotFoundError: no config.json in `source`.
    ValueError: a config that is no OLMo 2, parameters that do not fit it, a source of other sizes, a folder that is
      not empty.
  """
  theirs = their_config(config)
  check_params(params, config)
  beside: list[pathlib.Path] = []
  if source is not None:
    source = local_path(source, "source")
    theirs |= _of_source(source / "config.json", config)
    beside = [path for path in (source / name for name in _BESIDE) if path.is_file()]
  pieces = pieces_of(config)
  with new_folder(folder) as made:
    for path in beside:
      shutil.copyfile(path, made / path.name)
    (made / "config.json").write_text(json.dumps(theirs, indent=2) + "\n", "utf-8")
    write_safetensors(made, mapping.foreign(pieces, params, config.num_layers), count=len(pieces) * config.num_layers,
                      metadata={"format": "pt", "rat_jax": __version__}, max_file_bytes=max_file_bytes)


def pieces_of(config: RATPlusConfig) -> list[Piece]:
  """Where `Olmo2ForCausalLM` keeps our leaves; a memory's leaves, which it does not have, are left out."""
  e, h, f, v = config.embed_dim, config.head_dim, config.mlp_dim, config.vocab_size
  n, kv, attention, mlp = config.num_heads, config.num_kv_heads, _LAYER + "self_attn.", _LAYER + "mlp."
  head = [] if config.tie_embeddings else [Piece("head", _HEAD, (v, e))]
  return [
      Piece("embedding", _EMBEDDING, (v, e)),
      heads_of_rows("layers/query", attention + "q_proj.weight", n, h, e),
      heads_of_rows("layers/key", attention + "k_proj.weight", kv, h, e),
      heads_of_rows("layers/value", attention + "v_proj.weight", kv, h, e),
      heads_of_columns("layers/out", attention + "o_proj.weight", n, h, e),
      Piece("layers/query_norm", attention + "q_norm.weight", (n * h,), lambda x: x.reshape(n, h), np.ravel),
      Piece("layers/key_norm", attention + "k_norm.weight", (kv * h,), lambda x: x.reshape(kv, h), np.ravel),
      transposed("layers/mlp_gate", mlp + "gate_proj.weight", f, e),
      transposed("layers/mlp_in", mlp + "up_proj.weight", f, e),
      transposed("layers/mlp_out", mlp + "down_proj.weight", e, f),
      Piece("layers/attention_norm", _LAYER + "post_attention_layernorm.weight", (e,)),
      Piece("layers/mlp_norm", _LAYER + "post_feedforward_layernorm.weight", (e,)),
      Piece("final_norm", "model.norm.weight", (e,)),
      *head,
  ]


def _config(path: pathlib.Path, memory: bool, gate_bias: float) -> RATPlusConfig:
  theirs = read_json(path, "OLMo 2 comes as a folder with a config.json")
  needs = {"model_type": "olmo2", "hidden_act": "silu", "attention_bias": False,
           "architectures": ["Olmo2ForCausalLM"], "quantization_config": None}
  for name, value in needs.items():
    said = theirs.get(name)
    if said != value and (said is not None or name == "model_type"):
      raise ValueError(f"{path}: {name}={said!r} is not supported; OLMo 2 has {name}={value!r}.")
  names = {"vocab_size": "vocab_size", "num_layers": "num_hidden_layers", "embed_dim": "hidden_size",
           "num_heads": "num_attention_heads", "mlp_dim": "intermediate_size", "norm_eps": "rms_norm_eps"}
  missing = sorted(set(names.values()) - theirs.keys())
  if missing:
    raise ValueError(f"{path} lacks {missing}.")
  dtype = theirs.get("dtype") or theirs.get("torch_dtype") or "float32"
  if dtype not in ("float32", "bfloat16", "float16"):
    raise ValueError(f"{path}: dtype={dtype!r} is not supported; use what the files hold: float32, bfloat16 or"
                     " float16.")
  dtype = "bfloat16" if dtype == "bfloat16" else "float32"
  fields: dict[str, Any] = {ours: theirs[name] for ours, name in names.items()}
  fields |= {"num_kv_heads": theirs.get("num_key_value_heads"), "head_dim": theirs.get("head_dim"), "dtype": dtype,
             "param_dtype": dtype}
  fields |= {"rope_base": _rope_base(path, theirs), "tie_embeddings": theirs.get("tie_word_embeddings", False)}
  try:
    return RATPlusConfig(**fields, mlp="swiglu", memory=memory, gate_bias=gate_bias if memory else None,
                         output_gate=False, norm_placement="post", qk_norm=True)
  except ValueError as error:
    raise ValueError(f"{path} makes no model: {error}") from error


def _rope_base(path: pathlib.Path, theirs: dict[str, Any]) -> float:
  """The rotary base, which older and newer files keep in different places; "default" scaling is none."""
  allowed: dict[str, Any] = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
  places, said = {"": {name: theirs.get(name) for name in ("rope_theta", "partial_rotary_factor")}}, ""
  for key in ("rope_parameters", "rope_scaling"):
    found = {} if theirs.get(key) is None else theirs[key]
    if not isinstance(found, dict):
      raise ValueError(f"{path}: {key}={found!r}; give {{\"rope_theta\": base}}, or none.")
    places[f"{key}: "] = found
    said += f" and {key}={found!r}" if found else ""
  for where, found in places.items():
    for name in sorted(found, key=lambda name: "type" not in name):  # the kind first, for it says most
      value = found[name]
      if name != "rope_theta" and value is not None and value != allowed.get(name):
        raise ValueError(f"{path}: {where}{name}={value!r} is not supported; OLMo 2 turns all of a head, and has"
                         " rope_theta alone.")
  bases: list[Any] = [found["rope_theta"] for found in places.values() if found.get("rope_theta") is not None]
  if any(isinstance(base, bool) or not isinstance(base, int | float) for base in bases) or len(set(bases)) != 1:
    raise ValueError(f"{path}: rope_theta={theirs.get('rope_theta')!r}{said}; one rotary base is needed, a number.")
  base: float = bases[0]
  return base


def _of_source(path: pathlib.Path, config: RATPlusConfig) -> dict[str, Any]:
  """The entries of the released config.json that no field of ours has. Raises ValueError for another model's file."""
  released = _config(path, memory=False, gate_bias=0.0)
  kept = ("init_std", "dtype", "param_dtype")
  ours = dataclasses.replace(config, memory=False, gate_bias=None, **{name: getattr(released, name) for name in kept})
  if ours != released:
    raise ValueError(f"{path} is of another model than the parameters: {released.difference(ours)}; give the folder"
                     " that they come from.")
  theirs = read_json(path, "OLMo 2 comes as a folder with a config.json")
  return {name: theirs[name] for name in (*_TOKENS, "max_position_embeddings") if name in theirs}


def their_config(config: RATPlusConfig) -> dict[str, Any]:
  """The config.json of a model without its memory. Raises ValueError for a config that is no OLMo 2."""
  needs = {"mlp": "swiglu", "output_gate": False, "norm_placement": "post", "qk_norm": True}
  for name, value in needs.items():
    if getattr(config, name) != value:
      raise ValueError(f"{name}={getattr(config, name)!r} is not OLMo 2, which has {name}={value!r}.")
  if config.head_dim * config.num_heads != config.embed_dim:
    raise ValueError(f"head_dim={config.head_dim} is not OLMo 2, which has embed_dim / num_heads.")
  return {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "attention_bias": False, "hidden_act": "silu",
          "vocab_size": config.vocab_size, "num_hidden_layers": config.num_layers, "hidden_size": config.embed_dim,
          "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
          "intermediate_size": config.mlp_dim, "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_base,
          "rope_parameters": {"rope_theta": config.rope_base, "rope_type": "default"}, "rope_scaling": None,
          "tie_word_embeddings": config.tie_embeddings, "dtype": config.param_dtype, "torch_dtype": config.param_dtype,
          "max_position_embeddings": 4096,  # as released; no size of the model depends on it
          **dict.fromkeys(_TOKENS)}  # where they are absent, transformers takes those of another tokenizer
