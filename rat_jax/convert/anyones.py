"""Anyone's model by its own header: a folder of the Hugging Face form, or a GGUF file."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from typing import Literal

from rat_jax.axes import Params
from rat_jax.config import RATPlusConfig
from rat_jax.convert import mapping
from rat_jax.convert.added_memory import GATE_BIAS
from rat_jax.convert.folders import Leaves, read_folder
from rat_jax.convert.gguf import gguf_config, opened, read_gguf
from rat_jax.convert.mapping import Place
from rat_jax.convert.tensors import read_json
from rat_jax.convert.their_configs import read_config
from rat_jax.paths import local_path
from rat_jax.rope import RopeScaling


def load(path: str | os.PathLike[str], memory: bool = False, gate_bias: float = GATE_BIAS, *,
         dtype: Literal["float32", "bfloat16"] = "float32", place: Place | None = None
         ) -> tuple[RATPlusConfig, Params]:
  """(config, parameters) of a model of a family that is served (`convert.families`).

  Args:
    path: a folder with config.json and safetensors, or a GGUF file; which family it is of its header says.
    memory: adds a memory with zero gate weights and this bias, which has to be trained.
    dtype: of matrix products and attention. Parameters have the type of the files, or float32 where these hold what is
      neither float32 nor bfloat16.
    place: (our leaf's name, the numpy leaf) -> what takes its place in the tree, such as an array that is sharded
      over devices. Leaves come one at a time, so that no more than one is in the host's memory.

  Raises:
    FileNotFoundError, ValueError: no such file, a family or setting that is not served, missing or unfit tensors.
    ImportError: a GGUF file without the package `gguf`.
  """
  config, named = read(path, memory, gate_bias)
  return dataclasses.replace(config, dtype=dtype), mapping.tree(named, place or mapping.as_is)


def context_length(path: str | os.PathLike[str]) -> int | None:
  """The tokens that a model is for by its header, with the scaling of RoPE that is there; None where it is silent.

  Raises ValueError and FileNotFoundError as `load`.
  """
  return _length(local_path(path, "path"))[0]


def check_length(path: str | os.PathLike[str], tokens: int, asked: str) -> None:
  """Raises ValueError for more tokens than the model in a file or folder is for; `asked` says where they come from."""
  most, scaling = _length(local_path(path, "path"))
  if most is None or tokens <= most:
    return
  if scaling is None or scaling.original_length is None:
    kind, factor, original = "yarn", tokens / most, most
  else:
    kind, factor, original = scaling.kind, tokens / scaling.original_length, scaling.original_length
  raise ValueError(f"{asked} takes {tokens} tokens, and the model of {path} is for {most}; take fewer. For more it"
                   f" would need rope_scaling=RopeScaling({kind!r}, {math.ceil(factor)}, {original}), and mostly some"
                   " training under it.")


def _length(path: pathlib.Path) -> tuple[int | None, RopeScaling | None]:
  """(the tokens that a model is for, the scaling of its RoPE)."""
  if path.is_file():
    file = opened(path)
    said, scaling = file.said(f"{file.said('general.architecture')}.context_length"), gguf_config(path).rope_scaling
  else:
    beside = path / "config.json"
    said = read_json(beside, "a model comes as a folder with a config.json").get("max_position_embeddings")
    scaling = read_config(beside)[1].rope_scaling
  if isinstance(said, bool) or not isinstance(said, int):
    return None, scaling
  if scaling is None or scaling.original_length is None:
    return said, scaling
  return max(said, int(scaling.factor * scaling.original_length)), scaling


def read(path: str | os.PathLike[str], memory: bool, gate_bias: float = GATE_BIAS) -> tuple[RATPlusConfig, Leaves]:
  """As `load`, but the parameters come as pairs (name, leaf), one after another."""
  path = local_path(path, "path")
  return read_gguf(path, memory, gate_bias) if path.is_file() else read_folder(path, memory, gate_bias)
