"""The RAT+ authors' weights (github.com/wimh966/rat-plus): their files, names and layouts to our parameters and back.

Their matrices are [out, in]. `in_proj` stacks output gate, query, key, value and, with memory, the recurrence gate;
older files keep the gate apart as `fgate_proj`. Names of what was compiled have `_orig_mod.` in them.
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
from rat_jax.convert.mapping import Piece, Place, heads_of_columns, heads_of_rows, transposed
from rat_jax.convert.tensors import InMemory, Tensors, TorchTensors
from rat_jax.leaves import check_params
from rat_jax.paths import local_path

_COMPILED = "_orig_mod."
_EMBEDDING, _HEAD = "embedding.wte.weight", "head.lm_head.weight"
_LAYER = "backbone.layers.{i}."
_NEEDED = object()
# Their settings that say how a model was trained.
_TRAINING = (
    "wandb.job_type", "trainer.pretrained_path", "trainer.dtype", "trainer.seed", "trainer.max_epoch",
    "trainer.gradient_clipping", "data._name_", "data.seq_len", "data.global_batch_size", "data.ignore_input_index",
    "data.train._name_", "data.train.tokenized_file_path", "data.train.limit_tokens", "optim.optimizer._name_",
    "optim.optimizer.lr", "optim.optimizer.weight_decay", "optim.optimizer.betas", "optim.lr_scheduler._name_",
    "optim.lr_scheduler.warmup_iter", "optim.lr_scheduler.T_max", "optim.lr_scheduler.eta_min",
    *(f"model.backbone.seq_cell.{name}" for name in ("dilation_size", "local_size", "initial_size", "joint_train")))


def from_ratplus_state_dict(state_dict: Mapping[str, np.ndarray], config: RATPlusConfig) -> Params:
  """Our parameters (numpy, `config.param_dtype`) from the authors' state dict of numpy arrays.

  Raises ValueError for a config that their layer cannot be, and for missing, unknown or misshapen entries.
  """
  return mapping.tree(_leaves(InMemory(_plain(state_dict)), config), mapping.as_is)


def load_ratplus(path: str | os.PathLike[str], config: RATPlusConfig | None = None, *, place: Place = mapping.as_is
                 ) -> tuple[RATPlusConfig, Params]:
  """(config, parameters) of a checkpoint file of the authors, read without running what is pickled in it.

  The file stays on the disk and is read a tensor at a time. Its dilation is a setting of its training, which is not
  applied: the mode is chosen per call, Dense by default. Needs torch.

  Args:
    config: for a file that holds none, or an older one; one that says otherwise than the file's is refused, but for
      dtype, param_dtype and init_std.
    place: (our leaf's name, the numpy leaf) -> what takes its place in the tree.

  Raises:
    FileNotFoundError, ValueError: no such file, a broken one, one that holds more than tensors and settings, no
      config, tensors that do not fit it.
    ImportError: torch is missing.
  """
  config, named, _ = read_ratplus(path, config)
  return config, mapping.tree(named, place)


def read_ratplus(path: str | os.PathLike[str], config: RATPlusConfig | None = None
                 ) -> tuple[RATPlusConfig, Iterator[tuple[str, np.ndarray]], dict[str, Any]]:
  """As `load_ratplus`, but the parameters come as pairs (name, leaf), one after another; and how they were trained.

  The last result holds what the file says of the training, {} where it says nothing.
  """
  found = _load_file(local_path(path, "path"))
  config = _config(found.get("config"), config, path)
  return config, _leaves(TorchTensors(_plain(found.get("task", found)), str(path)), config), _training(found)


def _training(found: Mapping[str, Any]) -> dict[str, Any]:
  """What a file says of its model's training: the batches that it took, and settings under the authors' names."""
  step = found.get("step")  # the index of the last batch
  said = {"batches": step + 1 if type(step) is int else None} | {
      key: _at(found.get("config"), key, None) for key in _TRAINING}
  return {key: value for key, value in said.items() if _is_setting(value)}


def _is_setting(value: Any) -> bool:
  """Whether the entry is text, a number, or several; files may hold tensors in their place."""
  return all(isinstance(one, str | int | float) for one in (value if isinstance(value, list | tuple) else [value]))


def _plain(state_dict: Mapping[str, Any]) -> dict[str, Any]:
  """The entries under the names of a model that was not compiled. Raises ValueError where two get one name."""
  plain: dict[str, Any] = {}
  for name, value in state_dict.items():
    own = str(name).replace(_COMPILED, "")
    if own in plain:
      raise ValueError(f"the weights hold {own!r} twice, with {_COMPILED!r} in its name and without; keep one.")
    plain[own] = value
  return plain


def _load_file(path: pathlib.Path) -> dict[str, Any]:
  if not path.is_file():
    raise FileNotFoundError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; give a .pth file of the"
                            " RAT+ authors.")
  with path.open("rb") as file:
    if file.read(1) == b"\x80":  # of a pickle; torch.save writes a zip file
      raise ValueError(f"{path} is a pickle, or in the old format of torch; load it with torch where you trust it, and"
                       " save it again with torch.save.")
  try:
    import torch
  except ImportError as error:
    raise ImportError("reading .pth files needs torch; run `pip install torch`.") from error
  # Their settings are EasyDicts; read as what they are underneath, they need no code of that package.
  known: list[Any] = [(collections.OrderedDict, "easydict.EasyDict")]

  def load(sharing: int) -> Any:
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
  task = found.get("task", found) if isinstance(found, dict) else found
  if not isinstance(task, dict):
    where = "" if task is found else " as its task"
    raise ValueError(f"{path} holds a {type(task).__name__}{where}; a checkpoint is a dict with the weights, by name,"
                     " as \"task\".")
  whole: dict[str, Any] = found
  return whole


def _config(said: Any, given: RATPlusConfig | None, path: str | os.PathLike[str]) -> RATPlusConfig:
  """What the file says, or what is given for it. Raises ValueError where they differ, or say what we have no field for.

  `trainer.dtype` is what they compute in; their parameters are float32.
  """
  if said is None:
    if given is None:
      raise ValueError(f"{path} holds no config; give one, as config.")
    return given
  of_layer = "model.backbone.seq_cell."
  _check_said(said, given, path)
  try:
    found = {name: _at(said, key) for name, key in {
        "vocab_size": "model.head.vocab_size", "num_layers": "model.backbone.num_layers",
        "embed_dim": "model.backbone.d_model", "num_heads": of_layer + "num_head", "head_dim": of_layer + "d_head",
        "mlp_dim": "model.backbone.hidden_cell.d_ffn", "memory": of_layer + "apply_re",
        "rope_base": "model.embedding.pe.base", "tie_embeddings": "task.tie_embedding"}.items()}
  except KeyError as error:
    if given is not None:
      return given
    raise ValueError(f"the config in {path} lacks {error}; give one, as config.") from error
  free = {"dtype": _at(said, "trainer.dtype", "float32")}
  if given is not None:
    free = {name: getattr(given, name) for name in ("dtype", "param_dtype", "init_std")}
  try:
    theirs = RATPlusConfig(**found, **free)
  except ValueError as error:
    raise ValueError(f"the config in {path} makes no model: {error}") from error
  if given is not None and given != theirs:
    raise ValueError(f"the config in {path} is not the one that is given: {theirs.difference(given)}; leave it out.")
  return theirs


def _check_said(said: Any, given: RATPlusConfig | None, path: str | os.PathLike[str]) -> None:
  """Raises ValueError for settings of other layers than theirs; those that are absent are theirs."""
  layer, mlp, rope = "model.backbone.seq_cell.", "model.backbone.hidden_cell.", "model.embedding.pe."
  needs = {layer + "_name_": "ratplus", layer + "ln": "rmsnorm", layer + "bias": False, mlp + "_name_": "ffn",
           mlp + "act_fn": "gelu", mlp + "ln": "rmsnorm", mlp + "bias": False, rope + "_name_": "rope",
           rope + "dim": _at(said, layer + "d_head", None)}
  if given is not None and str(_at(said, layer + "_name_", "")).startswith("ratplus"):
    del needs[layer + "_name_"]  # older names of the layer, of which the config says what it is
  for key, value in needs.items():
    has = _at(said, key, value)
    if value is not None and has != value:
      raise ValueError(f"the config in {path} has {key}={has!r}, which is not supported; RAT+ has {value!r}.")


def _at(said: Any, key: str, default: Any = _NEEDED) -> Any:
  """The entry of nested dicts at "a.b.c". Raises KeyError where there is none, unless a default is given."""
  for part in key.split("."):
    if not isinstance(said, Mapping) or part not in said:
      if default is _NEEDED:
        raise KeyError(key)
      return default
    said = said[part]
  return said


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
  """The authors' state dict of our parameters: float32 numpy arrays, the gate fused, both tied matrices written out.

  Raises ValueError for a config that their layer cannot be, and for parameters that do not fit it.
  """
  _check_config(config)
  check_params(params, config, same_type=False)
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
