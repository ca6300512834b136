"""The RAT+ authors' weights (github.com/wimh966/rat-plus): their files, names and layouts to our parameters and back.

Their matrices are [out, in]. `in_proj` stacks output gate, query, key, value and, with memory, the recurrence gate;
older files keep the gate apart as `fgate_proj`. A compiled model's names start with `_orig_mod.`.
"""

from __future__ import annotations

import collections
import mmap
import os
import pathlib
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from rat_jax.axes import Params
from rat_jax.config import RATPlusConfig
from rat_jax.convert import mapping
from rat_jax.convert.leaves import check_params
from rat_jax.convert.mapping import Piece, Place, heads_of_columns, heads_of_rows, transposed
from rat_jax.convert.tensors import InMemory, Tensors, TorchTensors

_PREFIX = "_orig_mod."
_EMBEDDING, _HEAD = "embedding.wte.weight", "head.lm_head.weight"
_LAYER = "backbone.layers.{i}."


def from_ratplus_state_dict(state_dict: Mapping[str, np.ndarray], config: RATPlusConfig) -> Params:
  """Our parameters (numpy, `config.param_dtype`) from the authors' state dict of numpy arrays.

  Raises ValueError for a config that their layer cannot be, and for missing, unknown or misshapen entries.
  """
  entries = InMemory({name.removeprefix(_PREFIX): value for name, value in state_dict.items()})
  return mapping.tree(_leaves(entries, config), mapping.as_is)


def load_ratplus(path: str | os.PathLike, config: RATPlusConfig | None = None, *, place: Place = mapping.as_is
                 ) -> tuple[RATPlusConfig, Params]:
  """(config, parameters) of a checkpoint file of the authors, read without running what is pickled in it.

  The file stays on the disk and is read a tensor at a time. Its dilation is a setting of its training, which is not
  applied: the mode is chosen per call, Dense by default. Needs torch.

  Args:
    config: for a file that holds none, and instead of the file's own.
    place: (our leaf's name, the numpy leaf) -> what takes its place in the tree.

  Raises:
    FileNotFoundError, ValueError: no such file, a broken one, one that holds more than tensors and settings, no
      config, tensors that do not fit it.
    ImportError: torch is missing.
  """
  config, named = read_ratplus(path, config)
  return config, mapping.tree(named, place)


def read_ratplus(path: str | os.PathLike, config: RATPlusConfig | None = None
                 ) -> tuple[RATPlusConfig, Iterator[tuple[str, np.ndarray]]]:
  """The same, the leaves one after another."""
  found = _load_file(pathlib.Path(path))
  if config is None:
    config = _config(found.get("config"), path)
  state_dict = found.get("task", found)
  tensors = TorchTensors({str(name).removeprefix(_PREFIX): value for name, value in state_dict.items()}, str(path))
  return config, _leaves(tensors, config)


def _load_file(path: pathlib.Path) -> dict[str, Any]:
  if not path.is_file():
    raise FileNotFoundError(f"{path} does not exist; give a .pth file of the RAT+ authors.")
  try:
    import torch
  except ImportError as error:
    raise ImportError("reading .pth files needs torch; run `pip install torch`.") from error
  # Their settings are EasyDicts; read as what they are underneath, they need no code of that package.
  known: list[Any] = [(collections.OrderedDict, "easydict.EasyDict")]

  def load(sharing):
    with torch.serialization.safe_globals(known), torch.serialization.set_default_mmap_options(sharing):
      return torch.load(path, map_location="cpu", mmap=True, weights_only=True)

  try:
    try:
      found = load(mmap.MAP_PRIVATE)
    except RuntimeError as error:
      if "unable to mmap" not in str(error):
        raise
      found = load(mmap.MAP_SHARED)  # a private mapping must fit the memory; this one needs leave to write to the file
  except pickle.UnpicklingError as error:
    raise ValueError(f"{path} holds more than tensors and settings, and unpickling that would run its code: it was not"
                     " read.") from error
  except (RuntimeError, EOFError, ValueError, OSError) as error:
    reason = str(error).strip().split("\n")[0][:120]
    raise ValueError(f"{path} cannot be read; is it truncated, or no file that torch.save wrote? {reason}") from error
  if not isinstance(found, dict) or not isinstance(found.get("task", {}), dict):
    raise ValueError(f"{path} holds a {type(found).__name__}; a checkpoint is a dict with the weights as \"task\".")
  return found


def _config(theirs: Any, path: str | os.PathLike) -> RATPlusConfig:
  if theirs is None:
    raise ValueError(f"{path} holds no config; give one, as config.")
  try:
    model = theirs["model"]
    cell, ffn = model["backbone"]["seq_cell"], model["backbone"]["hidden_cell"]
    return RATPlusConfig(model["head"]["vocab_size"], model["backbone"]["num_layers"], model["backbone"]["d_model"],
                         cell["num_head"], head_dim=cell["d_head"], mlp_dim=ffn["d_ffn"], memory=cell["apply_re"],
                         rope_base=model["embedding"]["pe"]["base"], tie_embeddings=theirs["task"]["tie_embedding"])
  except (KeyError, TypeError) as error:
    raise ValueError(f"the config in {path} lacks {error}; give one, as config.") from error


def _leaves(entries: Tensors, config: RATPlusConfig) -> Iterator[tuple[str, np.ndarray]]:
  """Our leaves, after all names and shapes were found right."""
  _check_config(config)
  apart = any(name.endswith("fgate_proj.weight") for name in entries.specs())
  pieces = pieces_of(config, apart)
  mapping.check(pieces, entries, config.num_layers, ignored=frozenset({_HEAD} if config.tie_embeddings else ()))
  tied = config.tie_embeddings and _HEAD in entries.specs()
  if tied and not np.array_equal(entries.read(_HEAD), entries.read(_EMBEDDING)):
    raise ValueError(f"{_HEAD!r} differs from the embedding; set tie_embeddings=False to keep it.")
  return mapping.leaves(pieces, entries, config)


def to_ratplus_state_dict(params: Params, config: RATPlusConfig) -> dict[str, np.ndarray]:
  """The inverse: float32 numpy arrays under the authors' names, the gate fused, both tied matrices written out.

  Raises ValueError for a config that their layer cannot be, and for parameters that do not fit it.
  """
  _check_config(config)
  check_params(params, config, types=False)
  state_dict = dict(mapping.foreign(pieces_of(config, gate_apart=False), params, config.num_layers))
  state_dict.setdefault(_HEAD, state_dict[_EMBEDDING])
  return {name: np.ascontiguousarray(value, np.float32) for name, value in state_dict.items()}


def pieces_of(config: RATPlusConfig, gate_apart: bool) -> list[Piece]:
  """Where the authors' state dict keeps our leaves; `gate_apart`: the gate as `fgate_proj`, not in `in_proj`."""
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
