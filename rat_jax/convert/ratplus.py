"""The RAT+ authors' weights (github.com/wimh966/rat-plus): their names and layouts to our parameter tree and back.

Their matrices are [out, in]. `in_proj` stacks output gate, query, key, value and, with memory, the recurrence gate;
older files keep the gate apart as `fgate_proj`. A compiled model's names start with `_orig_mod.`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rat_jax.axes import Params
from rat_jax.config import RATPlusConfig

_PREFIX = "_orig_mod."
_NORMS = {"seq_layer.input_norm.weight": "attention_norm", "hidden_layer.ln.weight": "mlp_norm"}


def from_ratplus_state_dict(state_dict: Mapping[str, np.ndarray], config: RATPlusConfig) -> Params:
  """Our parameters (numpy, `config.param_dtype`) from the authors' state dict of numpy arrays.

  Raises ValueError for a config that their layer cannot be, and for missing, unknown or misshapen entries.
  """
  _check_config(config)
  entries = {name.removeprefix(_PREFIX): np.asarray(value) for name, value in state_dict.items()}
  e, n, h, f = config.embed_dim, config.num_heads, config.head_dim, config.mlp_dim
  taken = set()

  def take(name: str, *shape: int) -> np.ndarray:
    if name not in entries:
      raise ValueError(f"the state dict lacks {name!r}; it has {len(entries)} entries, for instance"
                       f" {sorted(entries)[:3]}.")
    if entries[name].shape != shape:
      raise ValueError(f"{name!r} has shape {entries[name].shape}; this config needs {shape}.")
    taken.add(name)
    return entries[name]

  def layer(i: int) -> dict[str, np.ndarray]:
    prefix = f"backbone.layers.{i}."
    heads = _fused_heads(config)
    apart = prefix + "seq_layer.fgate_proj.weight" in entries
    fused = list(heads)[:-1] if apart else list(heads)
    rows = take(prefix + "seq_layer.in_proj.weight", h * sum(heads[name] for name in fused), e)
    if apart:
      rows = np.concatenate([rows, take(prefix + "seq_layer.fgate_proj.weight", h * heads["memory_gate"], e)])
    cuts = np.cumsum([h * count for count in heads.values()])[:-1]
    p = {name: block.reshape(heads[name], h, e).transpose(2, 0, 1)
         for name, block in zip(heads, np.split(rows, cuts), strict=True)}
    p["out"] = take(prefix + "seq_layer.out_proj.weight", e, n * h).T.reshape(n, h, e)
    p["mlp_in"] = take(prefix + "hidden_layer.fc1.weight", f, e).T
    p["mlp_out"] = take(prefix + "hidden_layer.fc2.weight", e, f).T
    return p | {ours: take(prefix + theirs, e) for theirs, ours in _NORMS.items()}

  layers = [layer(i) for i in range(config.num_layers)]
  embedding = take("embedding.wte.weight", config.vocab_size, e)
  params: Params = {
      "embedding": embedding,
      "layers": {name: np.stack([p[name] for p in layers]) for name in layers[0]},
      "final_norm": take("backbone.ln.weight", e),
  }
  if not config.tie_embeddings:
    params["head"] = take("head.lm_head.weight", config.vocab_size, e)
  elif "head.lm_head.weight" in entries and not np.array_equal(entries["head.lm_head.weight"], embedding):
    raise ValueError("'head.lm_head.weight' differs from the embedding; set tie_embeddings=False to keep it.")
  unknown = entries.keys() - taken - {"head.lm_head.weight"}
  if unknown:
    raise ValueError(f"the state dict has entries that this config has no place for: {sorted(unknown)[:5]}; check"
                     f" num_layers={config.num_layers} and memory={config.memory}.")
  return _cast(params, config)


def to_ratplus_state_dict(params: Params, config: RATPlusConfig) -> dict[str, np.ndarray]:
  """The inverse: float32 numpy arrays under the authors' names, the gate fused, both tied matrices written out."""
  _check_config(config)
  e = config.embed_dim
  state_dict = {"embedding.wte.weight": params["embedding"],
                "head.lm_head.weight": params["embedding" if config.tie_embeddings else "head"],
                "backbone.ln.weight": params["final_norm"]}
  for i in range(config.num_layers):
    prefix = f"backbone.layers.{i}."
    p = {name: np.asarray(value[i]) for name, value in params["layers"].items()}
    state_dict[prefix + "seq_layer.in_proj.weight"] = np.concatenate(
        [p[name].transpose(1, 2, 0).reshape(-1, e) for name in _fused_heads(config)])
    state_dict[prefix + "seq_layer.out_proj.weight"] = p["out"].reshape(-1, e).T
    state_dict[prefix + "hidden_layer.fc1.weight"] = p["mlp_in"].T
    state_dict[prefix + "hidden_layer.fc2.weight"] = p["mlp_out"].T
    state_dict |= {prefix + theirs: p[ours] for theirs, ours in _NORMS.items()}
  return {name: np.ascontiguousarray(np.asarray(value), np.float32) for name, value in state_dict.items()}


def _fused_heads(config: RATPlusConfig) -> dict[str, int]:
  """The blocks of `in_proj` in their order, with the number of heads of each."""
  heads = {"output_gate": config.num_heads, "query": config.num_heads, "key": config.num_kv_heads,
           "value": config.num_kv_heads}
  return heads | ({"memory_gate": config.num_kv_heads} if config.memory else {})


def _check_config(config: RATPlusConfig) -> None:
  needs = {"mlp": "gelu", "output_gate": True, "norm_placement": "pre", "qk_norm": False, "gate_bias": None,
           "norm_eps": 1e-6, "rope_base": 10000.0}
  for name, value in needs.items():
    if getattr(config, name) != value:
      raise ValueError(f"{name}={getattr(config, name)!r} does not fit the authors' layer, which has {name}={value!r}.")


def _cast(params: Params, config: RATPlusConfig) -> Params:
  return {name: _cast(value, config) if isinstance(value, dict) else value.astype(config.param_dtype)
          for name, value in params.items()}
