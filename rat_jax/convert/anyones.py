"""Anyone's model by its own header: a folder of the Hugging Face form, or a GGUF file."""

from __future__ import annotations

import dataclasses
import os
from typing import Literal

from rat_jax.axes import Params
from rat_jax.config import RATPlusConfig
from rat_jax.convert import mapping
from rat_jax.convert.added_memory import GATE_BIAS
from rat_jax.convert.folders import Leaves, read_folder
from rat_jax.convert.gguf import read_gguf
from rat_jax.convert.mapping import Place
from rat_jax.paths import local_path


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


def read(path: str | os.PathLike[str], memory: bool, gate_bias: float = GATE_BIAS) -> tuple[RATPlusConfig, Leaves]:
  """As `load`, but the parameters come as pairs (name, leaf), one after another."""
  path = local_path(path, "path")
  return read_gguf(path, memory, gate_bias) if path.is_file() else read_folder(path, memory, gate_bias)
