"""Tensors by name, read one at a time: from a dict, a torch file or safetensors files, which stay on the disk."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from rat_jax.leaves import Spec
from rat_jax.paths import local_path

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_WEIGHTS = frozenset(_DTYPES.values())


class Tensors(Protocol):
  """Tensors that are read by their names."""

  def specs(self) -> Mapping[str, Spec]: ...

  def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
    """The tensor of that name, or a slice of its first axis."""
    ...


class InMemory:
  """Tensors that stand in a dict."""

  def __init__(self, arrays: Mapping[str, np.ndarray]):
    self._arrays = {name: np.asarray(array) for name, array in arrays.items()}

  def specs(self) -> Mapping[str, Spec]:
    return {name: Spec(array.shape, str(array.dtype)) for name, array in self._arrays.items()}

  def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
    return self._arrays[name][rows]


class TorchTensors:
  """The tensors of a torch state dict; those of a memory-mapped file stay on the disk.

  Raises ValueError for what is no tensor, and for tensors that hold no weights or not where they can be read.
  """

  def __init__(self, state_dict: Mapping[str, Any], where: str):
    import torch

    for name, value in state_dict.items():
      if not isinstance(value, torch.Tensor):
        raise ValueError(f"{where}: {name!r} is no tensor but a {type(value).__name__}; a state dict holds tensors"
                         " alone.")
      dtype, layout = (str(x).removeprefix("torch.") for x in (value.dtype, value.layout))
      if dtype not in _WEIGHTS or layout != "strided" or value.device.type != "cpu":
        raise ValueError(f"{where}: {name!r} is {dtype}, {layout}, on the device {value.device}; weights are of"
                         f" {sorted(_WEIGHTS)}, strided and on the cpu, so save them as such.")
    self._tensors = {name: value.detach() for name, value in state_dict.items()}

  def specs(self) -> Mapping[str, Spec]:
    return {name: Spec(tuple(x.shape), str(x.dtype).removeprefix("torch.")) for name, x in self._tensors.items()}

  def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
    import torch

    part = self._tensors[name][rows]
    if part.dtype == torch.bfloat16:  # which numpy has under another name
      array: np.ndarray = part.contiguous().view(torch.uint16).numpy().view(jnp.bfloat16)
    else:
      array = part.numpy()
    array.setflags(write=False)  # it may be the file itself
    return array


class SafetensorsFolder:
  """model.safetensors of a folder, or the files that its index names.

  Raises FileNotFoundError for a folder without either or a file that the index names and that is not there, ValueError
  for a file that is no safetensors file, and where the index and the files do not name the same tensors.
  """

  def __init__(self, folder: str | os.PathLike[str]):
    folder = local_path(folder, "folder")
    self._files: dict[str, pathlib.Path] = {}
    self._specs: dict[str, Spec] = {}
    index = folder / INDEX
    if index.exists():
      named = _weight_map(index)
    elif (folder / _SINGLE).is_file():
      named = None
    else:
      raise FileNotFoundError(f"{folder} has neither {_SINGLE} nor {INDEX}; give a folder with a model's weights.")
    for file in sorted(set(named.values())) if named is not None else [_SINGLE]:
      path = folder / file
      if not path.is_file():
        raise FileNotFoundError(f"{index} names {file}, which is not there; the download is not complete.")
      for name, spec in _header(path).items():
        if named is not None and name not in named:
          raise ValueError(f"{path} holds {name!r}, which {INDEX} does not name; are they of one download?")
        if named is None or named[name] == file:
          self._files[name], self._specs[name] = path, spec
    lost = sorted(set(named or ()) - self._files.keys())
    if lost:
      raise ValueError(f"{index} names {lost[:3]}, which its files do not hold.")

  def specs(self) -> Mapping[str, Spec]:
    return self._specs

  def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
    with _open(self._files[name]) as file:
      array: np.ndarray = file.get_slice(name)[rows] if self._specs[name].shape else file.get_tensor(name)
      return array


def _weight_map(index: pathlib.Path) -> dict[str, str]:
  """{tensor: file} of an index; its files are beside it."""
  named = read_json(index, "an index has a weight_map").get("weight_map")
  if not isinstance(named, dict):
    raise ValueError(f"{index} has weight_map={named!r}; give {{tensor: file}}.")
  for name, file in named.items():
    if not isinstance(file, str) or os.path.basename(file.replace("\\", "/")) != file:
      raise ValueError(f"{index} has {file!r} for {name!r}; give the name of a file beside it.")
  return named


def _open(path: pathlib.Path) -> Any:
  try:
    from safetensors import SafetensorError, safe_open
  except ImportError as error:
    raise ImportError("reading weights needs safetensors; run `pip install safetensors`.") from error
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


def write_safetensors(folder: pathlib.Path, arrays: Iterable[tuple[str, np.ndarray]], *, count: int,
                      metadata: Mapping[str, str], max_file_bytes: int) -> dict[str, Spec]:
  """Writes tensors to model.safetensors, or to several files and an index, holding one at a time.

  The package's own writer holds all of a file, twice. Here a file's header is written last, into room left for it.

  Args:
    count: how many tensors there are at most.
    max_file_bytes: a new file begins where a tensor would take the last beyond this.

  Returns:
    {name: shape and type} of what was written.
  """
  writer = _Files(folder, count, metadata)
  for name, array in arrays:
    if writer.filled and writer.filled + array.nbytes > max_file_bytes:
      writer.next_file()
    writer.add(name, array)
    del array  # before the next is made
  return writer.close()


class _Files:
  """Safetensors files that are written one after another."""

  _OF_TENSOR = 256  # bytes of a header for one tensor, more than any name of ours takes

  def __init__(self, folder: pathlib.Path, count: int, metadata: Mapping[str, str]):
    self._folder, self._metadata = folder, {"__metadata__": dict(metadata)}
    self._room = 8 * -(-(len(json.dumps(self._metadata).encode()) + self._OF_TENSOR * count) // 8)
    self._headers: list[dict[str, Any]] = []
    self.next_file()

  def next_file(self) -> None:
    self._finish()
    self._headers.append({})
    self.filled = 0
    self._file = (self._folder / f"part-{len(self._headers)}").open("wb")
    self._file.seek(8 + self._room)

  def add(self, name: str, array: np.ndarray) -> None:
    array = np.asarray(array, order="C")
    kinds = {jnp.dtype(dtype): kind for kind, dtype in _DTYPES.items()}
    if array.dtype not in kinds:
      raise ValueError(f"{name!r} is {array.dtype}; weights are of {sorted(_WEIGHTS)}.")
    self._headers[-1][name] = {"dtype": kinds[array.dtype], "shape": list(array.shape),
                               "data_offsets": [self.filled, self.filled + array.nbytes]}
    self._file.write(array.reshape(-1).view(np.uint8).data)  # its errors say what is wrong, those of `tofile` do not
    self.filled += array.nbytes

  def _finish(self) -> None:
    if self._headers:
      header = json.dumps(self._metadata | self._headers[-1]).encode()
      if len(header) > self._room:
        raise ValueError(f"the header takes {len(header)} bytes of {self._room}; use shorter names or metadata.")
      self._file.seek(0)
      self._file.write(struct.pack("<Q", self._room) + header.ljust(self._room))
      self._file.close()

  def close(self) -> dict[str, Spec]:
    """Ends the last file, names all, writes an index if they are several; what was written, by name."""
    self._finish()
    many, where, total, specs = len(self._headers), dict[str, str](), 0, dict[str, Spec]()
    for i, header in enumerate(self._headers, 1):
      name = _SINGLE if many == 1 else f"model-{i:05}-of-{many:05}.safetensors"
      (self._folder / f"part-{i}").rename(self._folder / name)
      where |= dict.fromkeys(header, name)
      specs |= {one: Spec(tuple(entry["shape"]), _DTYPES[entry["dtype"]]) for one, entry in header.items()}
      total += sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values())
    if many > 1:
      index = {"metadata": {"total_size": total}, "weight_map": where}
      (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    return specs


def check_new_folder(folder: str | os.PathLike[str]) -> None:
  """Raises ValueError where `new_folder` would: for what is there and is no empty folder."""
  path = local_path(folder, "folder")
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise ValueError(f"{folder} exists and is not empty; give a new folder.")


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """A folder to write into, which takes its name only when all went well; an existing one must be empty.

  An existing one is kept, for it may be a mount point or the current folder: files move into it, config.json last.
  """
  check_new_folder(folder)
  path = pathlib.Path(os.path.realpath(local_path(folder, "folder")))  # what a link names, and of "." the name
  there = path.exists()
  path.parent.mkdir(parents=True, exist_ok=True)
  beside = (path if there else path.parent) / f".{path.name}.{os.getpid()}"
  beside.mkdir()
  try:
    yield beside
    if there:
      _move_files(beside, path)
      beside.rmdir()
    else:
      beside.rename(path)
  finally:
    if beside.exists():
      for file in beside.iterdir():
        file.unlink()
      beside.rmdir()


def _move_files(source: pathlib.Path, target: pathlib.Path) -> None:
  """All files of one folder to another of the same file system; none where one cannot be moved."""
  moved: list[pathlib.Path] = []
  try:
    for file in sorted(source.iterdir(), key=lambda file: file.name == "config.json"):
      moved.append(file.rename(target / file.name))
  except BaseException:
    for file in moved:
      file.unlink()
    raise


def read_json(path: pathlib.Path, what: str) -> dict[str, Any]:
  """A JSON object. Raises FileNotFoundError and ValueError that say what it should have been."""
  if not path.is_file():
    raise FileNotFoundError(f"{path} does not exist; {what}.")
  try:
    found = json.loads(path.read_text("utf-8-sig"))
  except (ValueError, RecursionError) as error:  # also of text, of a number's length and of depth
    raise ValueError(f"{path} is not JSON: {error}; {what}.") from error
  if not isinstance(found, dict):
    raise ValueError(f"{path} holds a {type(found).__name__}; {what}.")
  return found
