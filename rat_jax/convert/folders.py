"""A folder of config.json and safetensors, as huggingface/transformers has it, to our model and back.

With memory, a gate is added that starts at sigmoid(gate_bias) everywhere, which at -12 changes next to nothing (arXiv
2605.28640).
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
from rat_jax.convert.families import EMBEDDING, HEAD, UNREAD, family_of, pieces_of
from rat_jax.convert.mapping import Place
from rat_jax.convert.tensors import SafetensorsFolder, new_folder, read_json, write_safetensors
from rat_jax.convert.their_configs import TOKENS, read_config, their_config
from rat_jax.leaves import check_params
from rat_jax.paths import local_path
from rat_jax.version import __version__

Leaves = Iterator[tuple[str, np.ndarray]]
_BESIDE = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
           "merges.txt", "added_tokens.json", "chat_template.jinja")
_OLMO2 = "olmo2"


def load_olmo2(folder: str | os.PathLike[str], memory: bool = True, gate_bias: float = GATE_BIAS, *,
               place: Place = mapping.as_is) -> tuple[RATPlusConfig, Params]:
  """(config, parameters) of a downloaded OLMo 2, in the type of its files.

  Args:
    memory: adds the memory, with zero gate weights and this bias; False is the model as released.
    place: (our leaf's name, the numpy leaf) -> what takes its place in the tree, such as an array that is sharded
      over devices. Leaves come one at a time, so that no more than one is in the host's memory.

  Raises:
    FileNotFoundError, ValueError: no config.json, another architecture, missing files, tensors that do not fit.
  """
  config, named = read_folder(folder, memory, gate_bias, only=_OLMO2)
  return config, mapping.tree(named, place)


def read_folder(folder: str | os.PathLike[str], memory: bool, gate_bias: float = GATE_BIAS, *, only: str | None = None
                ) -> tuple[RATPlusConfig, Leaves]:
  """(config, pairs (name, leaf), one after another) of a folder of any family that is served.

  `only`: the family that it must be of. Otherwise as `load_olmo2`.
  """
  folder = local_path(folder, "folder")
  path = folder / "config.json"
  family, config = read_config(path, only)
  tensors, pieces = SafetensorsFolder(folder), pieces_of(config, family)
  specs = tensors.specs()
  ignored = {name for name in specs if name.endswith(UNREAD)} | ({HEAD} if config.tie_embeddings else set())
  mapping.check(pieces, tensors, config.num_layers, frozenset(ignored))
  for name, spec in specs.items():
    if name not in ignored and not np.can_cast(jnp.dtype(spec.dtype), jnp.dtype(config.param_dtype)):
      raise ValueError(f"{path} says {config.param_dtype}, but {name!r} is {spec.dtype}, which would be rounded; set"
                       " its dtype to what the files hold.")
  if config.tie_embeddings and HEAD in specs and not np.array_equal(tensors.read(HEAD), tensors.read(EMBEDDING)):
    raise ValueError(f"{path} has tie_word_embeddings=True, but {HEAD!r} differs from the embedding; set it to false"
                     " to keep both.")
  return with_memory(config, mapping.leaves(pieces, tensors, config), memory, gate_bias)


def with_memory(config: RATPlusConfig, leaves: Leaves, memory: bool, gate_bias: float) -> tuple[RATPlusConfig, Leaves]:
  """The same, with the leaves of a memory after the others where one is asked for."""
  if not memory:
    return config, leaves
  config = dataclasses.replace(config, memory=True, gate_bias=gate_bias)
  return config, itertools.chain(leaves, ((f"layers/{name}", leaf) for name, leaf in memory_leaves(config)))


def export_olmo2(folder: str | os.PathLike[str], config: RATPlusConfig, params: Params, *,
                 source: str | os.PathLike[str] | None = None, max_file_bytes: int = 5 * 10**9) -> None:
  """As `export`, of OLMo 2."""
  export(folder, config, params, family=_OLMO2, source=source, max_file_bytes=max_file_bytes)


def export(folder: str | os.PathLike[str], config: RATPlusConfig, params: Params, *, family: str,
           source: str | os.PathLike[str] | None = None, max_file_bytes: int = 5 * 10**9) -> None:
  """Writes the model as one of a family, its memory left out: `transformers` and `load` read it.

  Args:
    family: "llama", "mistral", "smollm3", "qwen2", "qwen3" or "olmo2".
    source: the folder of the released model that this one comes from, whose token ids, length, generation_config.json
      and tokenizer go along. Without it no token ends an answer.
    max_file_bytes: a new file begins where a tensor would take the last beyond this.

  Raises:
    FileNotFoundError: no config.json in `source`.
    ValueError: an unknown family, a config that it does not have, parameters that do not fit the config, a source of
      other sizes, a folder that is not empty.
  """
  of = family_of(family, "family")
  theirs = their_config(config, of)
  check_params(params, config)
  beside: list[pathlib.Path] = []
  if source is not None:
    source = local_path(source, "source")
    theirs |= _of_source(source / "config.json", config, family)
    beside = [path for path in (source / name for name in _BESIDE) if path.is_file()]
  pieces = pieces_of(config, of)
  with new_folder(folder) as made:
    for path in beside:
      shutil.copyfile(path, made / path.name)
    (made / "config.json").write_text(json.dumps(theirs, indent=2) + "\n", "utf-8")
    write_safetensors(made, mapping.foreign(pieces, params, config.num_layers), count=len(pieces) * config.num_layers,
                      metadata={"format": "pt", "rat_jax": __version__}, max_file_bytes=max_file_bytes)


def _of_source(path: pathlib.Path, config: RATPlusConfig, family: str) -> dict[str, Any]:
  """The entries of the released config.json that no field of ours has. Raises ValueError for another model's file."""
  _, released = read_config(path, family)
  kept = ("init_std", "dtype", "param_dtype")
  ours = dataclasses.replace(config, memory=False, gate_bias=None, **{name: getattr(released, name) for name in kept})
  if ours != released:
    raise ValueError(f"{path} is of another model than the parameters: {released.difference(ours)}; give the folder"
                     " that they come from.")
  theirs = read_json(path, "a model comes as a folder with a config.json")
  return {name: theirs[name] for name in (*TOKENS, "max_position_embeddings") if name in theirs}
