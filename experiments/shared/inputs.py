"""What commands read: trained models, their tokenizers, and text as token files."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from typing import Any

import jax

from rat_jax import RATPlusConfig, convert, load_pretrained, parallel
from rat_jax.axes import Params
from rat_jax.convert.tensors import read_json as read_object
from rat_jax.data import BYTES, TokenFile, Tokenizer, load_tokenizer, prepare, prepare_standard_library
from rat_jax.data.token_file import Sidecar
from rat_jax.parallel import processes
from rat_jax.paths import local_path
from rat_jax.pretrained import on_device
from rat_jax.train import Checkpoints


def load_model(folder: str | os.PathLike[str], mesh: jax.sharding.Mesh | None = None
               ) -> tuple[RATPlusConfig, Params, dict[str, Any]]:
  """(config, parameters, notes) of a folder of checkpoints, or of one that `save_pretrained` wrote; onto a mesh.

  Also of a released model, as `rat_jax.convert.load` reads it. The notes are those of the run that trained it: {} where
  there was none of ours. Raises ValueError and FileNotFoundError for a URL, for what is not there and for what is no
  model that is served.
  """
  path = local_path(folder, "--checkpoint")
  place = on_device if mesh is None else parallel.on_mesh(mesh)
  if is_released(path):
    return *convert.load(path, place=place), {}
  if (path / "config.json").is_file():
    return *load_pretrained(path, place=place), _kept_notes(path)
  if any(path.glob("*.safetensors")):
    raise FileNotFoundError(f"{path} holds weights and no config.json; give the whole folder of save_pretrained.")
  return Checkpoints(path).load_params(mesh)


def is_released(path: pathlib.Path) -> bool:
  """Whether it is a file, or a folder whose config.json is somebody else's. Raises ValueError where that is no JSON."""
  beside = path / "config.json"
  return path.is_file() or (beside.is_file() and "model_type" in read_object(
      beside, "a model's configuration is an object"))


def check_length(checkpoint: str | os.PathLike[str], tokens: int, asked: str) -> None:
  """`convert.check_length` of a released model; any other has no length of its own."""
  if is_released(local_path(checkpoint, "--checkpoint")):
    convert.check_length(checkpoint, tokens, asked)


def tokenizer_of(settings: Any, checkpoint: str | os.PathLike[str]) -> Tokenizer:
  """--tokenizer where it is given, else the one that lies in a released model, else bytes."""
  path = local_path(checkpoint, "--checkpoint")
  has_one = path.is_file() or any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
  found: Tokenizer = load_tokenizer(path) if "tokenizer" not in settings.given and has_one else settings.tokenizer
  return found


def _kept_notes(folder: pathlib.Path) -> dict[str, Any]:
  """What `experiments.convert` wrote of a run beside its weights, the same into every file."""
  from safetensors import safe_open

  with safe_open(min(folder.glob("*.safetensors")), "numpy") as file:
    kept = (file.metadata() or {}).get("trained", "")
  try:
    notes = json.loads(kept)
  except json.JSONDecodeError:  # what else somebody had the card say
    return {}
  return notes if isinstance(notes, dict) else {}


def check_tokenizer(tokenizer: Tokenizer, config: RATPlusConfig, notes: dict[str, Any]) -> None:
  """Raises ValueError where a model was trained with another tokenizer, or cannot have been trained with this one."""
  trained = notes.get("tokenizer")
  if trained is None:
    tokenizer.check(config)
  elif trained != tokenizer.name:
    raise ValueError(f"the model was trained with the tokenizer {trained}, and this is {tokenizer.name};"
                     " use its own, as --tokenizer or to prepare --data.")


def check_data(data: TokenFile, config: RATPlusConfig, notes: dict[str, Any]) -> None:
  """The same of the tokenizer that data were prepared with."""
  sidecar = data.sidecar
  check_tokenizer(dataclasses.replace(BYTES, name=sidecar.tokenizer, vocab_size=sidecar.vocab_size), config, notes)


def corpus(data: str | os.PathLike[str] | None, folder: pathlib.Path) -> dict[str, TokenFile]:
  """{"train", "heldout"} token files.

  `data` is a folder that `experiments.prepare_data` wrote, or a text file or folder, which is prepared in `folder`;
  None is the text of the Python standard library. Of several processes the first prepares it. Raises ValueError for a
  URL.
  """
  path = None if data is None else local_path(data, "--data")
  if path is not None and (path / "train.bin").exists():
    folder = path
  else:
    processes.by_first(lambda: prepare_standard_library(folder) if path is None else prepare(path, folder))
  return {name: TokenFile(folder / f"{name}.bin") for name in ("train", "heldout")}


def bits_per_byte(nats: float, sidecar: Sidecar) -> float | None:
  """The loss of a byte in bits, of that of a token in nats; None where a file's sidecar does not know the text's bytes.

  A token is so many bytes as one of the whole file is on average, tokens that end a document included.
  """
  size = sidecar.bytes
  if size is None and sidecar.tokenizer == BYTES.name:
    size = sidecar.tokens - sidecar.documents  # a token that ends a document is no byte of it
  return nats / math.log(2) * sidecar.tokens / size if size else None
