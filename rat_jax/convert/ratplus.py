"""The RAT+ authors' weights (github.com/wimh966/rat-plus): their names and layouts to our parameter tree and back.

Their matrices are [out, in]. `in_proj` stacks output gate, query, key, value and, with memory, the recurrence gate;
older files keep the gate apart as `fgate_proj`. A compiled model's names start with `_orig_mod.`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rat_jax.axes import Params
from rat_jax.config import RATPlusConfig
from rat_jax.convert import mapping
from rat_jax.convert.mapping import Piece, heads_of_columns, heads_of_rows, transposed
from rat_jax.convert.tensors import InMemory

_PREFIX = "_orig_mod."
_EMBEDDING, _HEAD = "embedding.wte.weight", "head.lm_head.weight"
_LAYER = "backbone.layers.{i}."


def from_ratplus_state_dict(state_dict: Mapping[str, np.ndarray], config: RATPlusConfig) -> Params:
  """Our parameters (numpy, `config.param_dtype`) from the authors' state dict of numpy arrays.

  Raises ValueError for a config that their layer cannot be, and for missing, unknown or misshapen entries.
  """
  _check_config(config)
  entries = InMemory({name.removeprefix(_PREFIX): value for name, value in state_dict.items()})
  apart = any(name.endswith("fgate_proj.weight") for name in entries.specs())
  pieces = _pieces(config, apart)
  mapping.check(pieces, entries, config.num_layers, ignored=frozenset({_HEAD} if config.tie_embeddings else ()))
  tied = config.tie_embeddings and _HEAD in entries.specs()
  if tied and not np.array_equal(entries.read(_HEAD), entries.read(_EMBEDDING)):
    raise ValueError(f"{_HEAD!r} differs from the embedding; set tie_embeddings=False to keep it.")
  return mapping.tree(dict(mapping.leaves(pieces, entries, config)))


def to_ratplus_state_dict(params: Params, config: RATPlusConfig) -> dict[str, np.ndarray]:
  """The inverse: float32 numpy arrays under the authors' names, the gate fused, both tied matrices written out."""
  _check_config(config)
  state_dict = dict(mapping.foreign(_pieces(config, gate_apart=False), params, config.num_layers))
  state_dict.setdefault(_HEAD, state_dict[_EMBEDDING])
  return {name: np.ascontiguousarray(value, np.float32) for name, value in state_dict.items()}


def _pieces(config: RATPlusConfig, gate_apart: bool) -> list[Piece]:
  e, h, f, v = config.embed_dim, config.head_dim, config.mlp_dim, config.vocab_size
  pieces = [Piece("embedding", _EMBEDDING, (v, e)), Piece("final_norm", "backbone.ln.weight", (e,))]
  if not config.tie_embeddings:
    pieces.append(Piece("head", _HEAD, (v, e)))
  heads = {"output_gate": config.num_heads, "query": config.num_heads, "key": config.num_kv_heads,
           "value": config.num_kv_heads} | ({"memory_gate": config.num_kv_heads} if config.memory else {})
  row = 0
  for leaf, count in heads.items():
    alone = leaf == "memory_gate" and gate_apart
    name = _LAYER + f"seq_layer.{'fgate' if alone else 'in'}_proj.weight"
    pieces.append(heads_of_rows(f"layers/{leaf}", name, count, h, e, first_row=0 if alone else row))
    row += count * h
  return [*pieces,
          heads_of_columns("layers/out", _LAYER + "seq_layer.out_proj.weight", config.num_heads, h, e),
          transposed("layers/mlp_in", _LAYER + "hidden_layer.fc1.weight", f, e),
          transposed("layers/mlp_out", _LAYER + "hidden_layer.fc2.weight", e, f),
          Piece("layers/attention_norm", _LAYER + "seq_layer.input_norm.weight", (e,)),
          Piece("layers/mlp_norm", _LAYER + "hidden_layer.ln.weight", (e,))]


def _check_config(config: RATPlusConfig) -> None:
  needs = {"mlp": "gelu", "output_gate": True, "norm_placement": "pre", "qk_norm": False, "gate_bias": None,
           "norm_eps": 1e-6, "rope_base": 10000.0}
  for name, value in needs.items():
    if getattr(config, name) != value:
      raise ValueError(f"{name}={getattr(config, name)!r} does not fit the authors' layer, which has {name}={value!r}.")
