"""Tensors by name, read one at a time: from a dict, or from safetensors files that stay on the disk."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Spec(NamedTuple):
  """What a tensor is before it is read."""

  shape: tuple[int, ...]
  dtype: str


class Tensors(Protocol):
  """Named tensors."""

  def specs(self) -> Mapping[str, Spec]: ...

  def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
    """The tensor, or some of its first axis."""
    ...


class InMemory:
  """The tensors of a dict."""

  def __init__(self, arrays: Mapping[str, np.ndarray]):
    self._arrays = {name: np.asarray(array) for name, array in arrays.items()}

  def specs(self) -> Mapping[str, Spec]:
    return {name: Spec(array.shape, str(array.dtype)) for name, array in self._arrays.items()}

  def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
    return self._arrays[name][rows]


class SafetensorsFolder:
  """model.safetensors of a folder, or the files that its index names.

  Raises FileNotFoundError for a folder without either or a file that the index names and that is not there, ValueError
  for a file that is no safetensors file, and for a tensor that is in another file than the index says.
  """

  def __init__(self, folder: str | os.PathLike):
    folder = pathlib.Path(folder)
    self._files: dict[str, pathlib.Path] = {}
    self._specs: dict[str, Spec] = {}
    index = folder / INDEX
    if index.exists():
      try:
        named = json.loads(index.read_text())["weight_map"]
      except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is no index with a weight_map: {error!r}.") from error
    elif (folder / _SINGLE).exists():
      named = None
    else:
      raise FileNotFoundError(f"{folder} has neither {_SINGLE} nor {INDEX}; give a folder with a model's weights.")
    for file in sorted(set(named.values())) if named is not None else [_SINGLE]:
      path = folder / file
      if not path.is_file():
        raise FileNotFoundError(f"{index} names {file}, which is not there; the download is not complete.")
      for name, spec in _header(path).items():
        if named is None or named.get(name) == file:
          self._files[name], self._specs[name] = path, spec
    lost = sorted(set(named or ()) - self._files.keys())
    if lost:
      raise ValueError(f"{index} names {lost[:3]}, which its files do not hold.")

  def specs(self) -> Mapping[str, Spec]:
    return self._specs

  def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
    with _open(self._files[name]) as file:
      if not self._specs[name].shape:
        return file.get_tensor(name)
      return file.get_slice(name)[rows]


def _open(path: pathlib.Path) -> Any:
  try:
    from safetensors import SafetensorError, safe_open
  except ImportError as error:
    raise ImportError("reading weights needs safetensors; run `pip install 'rat_jax[convert]'`.") from error
  try:
    return safe_open(path, "numpy")
  except SafetensorError as error:
    raise ValueError(f"{path} is no whole safetensors file: {error}.") from error


def _header(path: pathlib.Path) -> dict[str, Spec]:
  with _open(path) as file:
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    unknown = {name: x.get_dtype() for name, x in slices.items() if x.get_dtype() not in _DTYPES}
    if unknown:
      raise ValueError(f"{path} holds tensors of types {unknown}; weights are of {sorted(_DTYPES)}.")
    return {name: Spec(tuple(x.get_shape()), _DTYPES[x.get_dtype()]) for name, x in slices.items()}


def write_safetensors(folder: pathlib.Path, specs: Mapping[str, Spec], arrays: Iterable[tuple[str, np.ndarray]], *,
                      metadata: Mapping[str, str], max_file_bytes: int) -> None:
  """Writes tensors to model.safetensors, or to several files and an index, holding one array at a time.

  Args:
    specs: all tensors, in the order in which `arrays` yields them.
    max_file_bytes: a new file begins where a tensor would take the last beyond this.
  """
  files: list[list[str]] = [[]]
  sizes = {name: int(np.prod(spec.shape, dtype=np.int64)) * jnp.dtype(spec.dtype).itemsize
           for name, spec in specs.items()}
  filled = 0
  for name in specs:
    if files[-1] and filled + sizes[name] > max_file_bytes:
      files.append([])
      filled = 0
    files[-1].append(name)
    filled += sizes[name]
  many = len(files)
  names = [_SINGLE] if many == 1 else [f"model-{i:05}-of-{many:05}.safetensors" for i in range(1, many + 1)]
  source = iter(arrays)
  for file, held in zip(names, files, strict=True):
    _write_file(folder / file, {name: specs[name] for name in held}, sizes, source, metadata)
  if len(files) > 1:
    where = {name: file for file, held in zip(names, files, strict=True) for name in held}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": sum(sizes.values())}, "weight_map": where},
                                           indent=2) + "\n")


def _write_file(path: pathlib.Path, specs: Mapping[str, Spec], sizes: Mapping[str, int],
                source: Iterator[tuple[str, np.ndarray]], metadata: Mapping[str, str]) -> None:
  """One file; the package's own writer would hold a second copy of everything in it."""
  kinds, header, at = {dtype: kind for kind, dtype in _DTYPES.items()}, dict[str, Any](), 0
  for name, spec in specs.items():
    header[name] = {"dtype": kinds[spec.dtype], "shape": list(spec.shape), "data_offsets": [at, at + sizes[name]]}
    at += sizes[name]
  text = json.dumps({"__metadata__": dict(metadata)} | header).encode()
  text += b" " * (-len(text) % 8)
  with path.open("wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    for expected, spec in specs.items():
      name, array = next(source)
      array = np.asarray(array, jnp.dtype(spec.dtype), order="C")
      if name != expected or array.shape != spec.shape:
        raise ValueError(f"{name} {array.shape} came where {expected} {spec.shape} was to be written.")
      array.reshape(-1).view(np.uint8).tofile(file)


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
  """A folder to write into, which takes its name only when all went well; an existing one must be empty."""
  folder = pathlib.Path(folder)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ValueError(f"{folder} exists and is not empty; give a new folder.")
  folder.parent.mkdir(parents=True, exist_ok=True)
  beside = folder.with_name(f".{folder.name}.{os.getpid()}")
  beside.mkdir()
  try:
    yield beside
    if folder.exists():
      folder.rmdir()
    beside.rename(folder)
  finally:
    if beside.exists():
      for path in beside.iterdir():
        path.unlink()
      beside.rmdir()


def read_json(path: pathlib.Path, what: str) -> dict[str, Any]:
  """A JSON object. Raises FileNotFoundError and ValueError that say what it should have been."""
  if not path.is_file():
    raise FileNotFoundError(f"{path} does not exist; {what}.")
  try:
    found = json.loads(path.read_text())
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f"{path} is not JSON: {error}.") from error
  if not isinstance(found, dict):
    raise ValueError(f"{path} holds a {type(found).__name__}; {what}.")
  return found
