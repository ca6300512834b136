"""The config.json of the families that we read and write, to our configuration and back."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from rat_jax.config import RATPlusConfig
from rat_jax.convert.families import Family, check_family, family_of
from rat_jax.convert.tensors import read_json
from rat_jax.rope import RopeScaling

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NAMES = {"vocab_size": "vocab_size", "num_layers": "num_hidden_layers", "embed_dim": "hidden_size",
          "num_heads": "num_attention_heads", "mlp_dim": "intermediate_size", "norm_eps": "rms_norm_eps"}
_DTYPES = ("float32", "bfloat16", "float16")
_OF_SCALING = {"factor": "factor", "original_length": "original_max_position_embeddings",
               "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor", "beta_fast": "beta_fast",
               "beta_slow": "beta_slow", "attention_factor": "attention_factor", "truncate": "truncate"}
_OF_KIND = {"linear": ("factor",), "llama3": ("factor", "original_length", "low_freq_factor", "high_freq_factor"),
            "yarn": ("factor", "original_length", "beta_fast", "beta_slow", "attention_factor", "truncate")}


def read_config(path: pathlib.Path, only: str | None = None) -> tuple[Family, RATPlusConfig]:
  """(the family, the configuration without a memory) of a config.json.

  Args:
    only: the one family that is asked for.

  Raises:
    FileNotFoundError, ValueError: no such file; what is missing or not served in it, by its name.
  """
  theirs = read_json(path, "a model comes as a folder with a config.json")
  family = family_of(theirs.get("model_type"), str(path))
  if only is not None and family.name != only:
    raise ValueError(f"{path}: model_type={family.name!r} is not {only!r}; rat_jax.convert.load reads it.")
  needs = {"hidden_act": "silu", "architectures": [family.architecture], "quantization_config": None, **family.needs}
  for name, value in needs.items():
    said = theirs.get(name)
    if said != value and said is not None:
      raise ValueError(f"{path}: {name}={said!r} is not supported; {family.shown} here has {name}={value!r}.")
  missing = sorted(set(_NAMES.values()) - theirs.keys())
  if missing:
    raise ValueError(f"{path} lacks {missing}.")
  dtype = theirs.get("dtype") or theirs.get("torch_dtype") or "float32"
  if dtype not in _DTYPES:
    raise ValueError(f"{path}: dtype={dtype!r} is not supported; use what the files hold, one of {_DTYPES}.")
  fields: dict[str, Any] = {ours: theirs[name] for ours, name in _NAMES.items()}
  fields |= {"num_kv_heads": theirs.get("num_key_value_heads"), "head_dim": theirs.get("head_dim") or family.head_dim,
             "tie_embeddings": theirs.get("tie_word_embeddings", family.tied),
             "no_rope_layers": _no_rope_layers(path, theirs) if family.name == "smollm3" else ()}
  fields |= dict.fromkeys(("dtype", "param_dtype"), "bfloat16" if dtype == "bfloat16" else "float32")
  fields["rope_base"], fields["rope_scaling"] = _rope(path, theirs, family)
  try:
    return family, RATPlusConfig(**(family.ours | fields), memory=False)
  except ValueError as error:
    raise ValueError(f"{path} makes no model: {error}") from error


def _no_rope_layers(path: pathlib.Path, theirs: Mapping[str, Any]) -> tuple[int, ...]:
  """The layers whose entry is 0; every fourth, or as the interval says, where there are no entries."""
  layers, turned = theirs["num_hidden_layers"], theirs.get("no_rope_layers")
  if turned is None:
    interval = theirs.get("no_rope_layer_interval", 4)
    return tuple(i for i in range(layers) if (i + 1) % interval == 0)
  if not isinstance(turned, list) or len(turned) != layers or not set(turned) <= {0, 1}:
    raise ValueError(f"{path}: no_rope_layers={turned!r}; give {layers} numbers, 1 for layers with RoPE and 0 for those"
                     " without.")
  return tuple(i for i, one in enumerate(turned) if not one)


def _rope(path: pathlib.Path, theirs: Mapping[str, Any], family: Family) -> tuple[float, RopeScaling | None]:
  """(the rotary base, the scaling), which older and newer files keep in different places."""
  outside = {name: theirs[name] for name in ("rope_theta", "partial_rotary_factor") if theirs.get(name) is not None}
  places, said = {"": outside}, ""
  for key in ("rope_parameters", "rope_scaling"):
    found = {} if theirs.get(key) is None else theirs[key]
    if not isinstance(found, dict):
      raise ValueError(f"{path}: {key}={found!r}; give {{\"rope_theta\": base}}, or none.")
    places[f"{key}: "] = {name: value for name, value in found.items() if value is not None}
    said += f" and {key}={found!r}" if found else ""
  bases: list[Any] = [place["rope_theta"] for place in places.values() if "rope_theta" in place]
  if family.rope_base is not None and not bases:
    bases = [family.rope_base]
  if any(isinstance(base, bool) or not isinstance(base, int | float) for base in bases) or len(set(bases)) != 1:
    raise ValueError(f"{path}: rope_theta={theirs.get('rope_theta')!r}{said}; one rotary base is needed, a number.")
  scalings = []
  for where, place in places.items():
    if place.get("partial_rotary_factor", 1.0) != 1.0:
      raise ValueError(f"{path}: {where}partial_rotary_factor={place['partial_rotary_factor']!r} is not supported; here"
                       " all of a head turns.")
    scaling = _scaling(f"{path}: {where}", place, theirs)
    scalings += [scaling] if scaling and scaling not in scalings else []
  if len(scalings) > 1:
    raise ValueError(f"{path}: rope_parameters and rope_scaling differ:{said.removeprefix(' and')}; keep one of them.")
  return bases[0], scalings[0] if scalings else None


def _scaling(where: str, place: Mapping[str, Any], theirs: Mapping[str, Any]) -> RopeScaling | None:
  kind = place.get("rope_type", place.get("type", "default"))
  if kind == "default":
    unknown = sorted(place.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"})
    if unknown:
      raise ValueError(f"{where}{unknown[0]}={place[unknown[0]]!r} without a rope_type is not supported; give the kind"
                       f" of scaling, one of {tuple(_OF_KIND)}.")
    return None
  if kind not in _OF_KIND:
    raise ValueError(f"{where}rope_type={kind!r} is not supported; {', '.join(_OF_KIND)} are.")
  unknown = sorted(place.keys() - {_OF_SCALING[name] for name in _OF_KIND[kind]} - {
      "rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"})
  if unknown:
    raise ValueError(f"{where}{unknown[0]}={place[unknown[0]]!r} of rope_type={kind!r} is not supported; it has"
                     f" {[_OF_SCALING[name] for name in _OF_KIND[kind]]}.")
  fields = {name: place[_OF_SCALING[name]] for name in _OF_KIND[kind] if _OF_SCALING[name] in place}
  if kind == "yarn" and "original_length" not in fields:
    fields["original_length"] = theirs.get("max_position_embeddings")
  try:
    return RopeScaling.from_fields({"kind": kind, **fields})
  except ValueError as error:
    raise ValueError(f"{where}{error}") from error


def their_config(config: RATPlusConfig, family: Family) -> dict[str, Any]:
  """The config.json of a model without its memory. Raises ValueError for a config that the family does not have."""
  check_family(config, family)
  rope = {"rope_theta": config.rope_base, "rope_type": "default"}
  if scaling := config.rope_scaling:
    said = {_OF_SCALING[name]: getattr(scaling, name) for name in _OF_KIND[scaling.kind]}
    rope |= {"rope_type": scaling.kind} | {name: value for name, value in said.items() if value is not None}
  found = {"architectures": [family.architecture], "model_type": family.name, "hidden_act": "silu", **family.needs,
           **{theirs: getattr(config, ours) for ours, theirs in _NAMES.items()},
           "num_key_value_heads": config.num_kv_heads, "rope_theta": config.rope_base, "rope_parameters": rope,
           "rope_scaling": None if config.rope_scaling is None else {**rope, "type": rope["rope_type"]},
           "tie_word_embeddings": config.tie_embeddings, "dtype": config.param_dtype, "torch_dtype": config.param_dtype,
           "max_position_embeddings": 4096,  # no size of the model depends on it
           **dict.fromkeys(TOKENS)}  # where they are absent, transformers takes those of another tokenizer
  if not family.width_of_heads:
    found["head_dim"] = config.head_dim
  if family.name == "smollm3":
    found["no_rope_layers"] = [int(i not in config.no_rope_layers) for i in range(config.num_layers)]
  return found
