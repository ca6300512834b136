"""Models as folders: config.json, safetensors, and a card that says what it is."""

from __future__ import annotations

import collections
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rat_jax import checks
from rat_jax.axes import Params
from rat_jax.config import RATPlusConfig
from rat_jax.convert import mapping
from rat_jax.convert.mapping import Place
from rat_jax.convert.tensors import SafetensorsFolder, new_folder, read_json, write_safetensors
from rat_jax.leaves import check_leaves, check_params, is_finite, named_leaves, shapes_of
from rat_jax.parallel import processes
from rat_jax.paths import local_path, read_text
from rat_jax.version import __version__


def save_pretrained(folder: str | os.PathLike[str], config: RATPlusConfig, params: Params, *,
                    about: Mapping[str, Any] = {}, max_file_bytes: int = 5 * 10**9) -> None:
  """Writes a model: config.json, model.safetensors (or several files and an index), README.md.

  Leaves are fetched one at a time. Nothing is left of a write that fails. Of several processes all must call it;
  the first one writes, and what fails there fails in all.

  Args:
    about: what the card is to say, such as {"source": "...", "sha256": "...", "steps": 1000}.
    max_file_bytes: a new file begins where a leaf would take the last beyond this.

  Raises:
    ValueError: a URL, a folder that is not empty, parameters that are no arrays or do not fit the config in shape or
      type, `max_file_bytes` that is no count. FloatingPointError: parameters that are not finite.
  """
  folder = local_path(folder, "folder")
  check_params(params, config)
  leaves = ((name, processes.on_host(leaf)) for name, leaf in named_leaves(params).items())

  def write() -> None:
    try:
      if processes.is_first():
        write_pretrained(folder, config, leaves, about=about, max_file_bytes=max_file_bytes)
    finally:
      collections.deque(leaves, maxlen=0)  # all processes fetch each leaf together, also when the first one has failed

  processes.together(write)


def write_pretrained(folder: str | os.PathLike[str], config: RATPlusConfig, leaves: Iterable[tuple[str, np.ndarray]], *,
                     about: Mapping[str, Any] = {}, max_file_bytes: int = 5 * 10**9) -> None:
  """As `save_pretrained`, of (name, leaf) pairs that come one after another, in any order; one is held at a time."""
  folder = local_path(folder, "folder")
  checks.check_count("max_file_bytes", max_file_bytes)
  metadata = {"rat_jax": __version__} | {str(key): str(value) for key, value in about.items()}  # it holds text alone
  with new_folder(folder) as made:
    specs = write_safetensors(made, _finite(leaves, folder), count=len(shapes_of(config)), metadata=metadata,
                              max_file_bytes=max_file_bytes)
    check_leaves(specs, config, "the parameters")
    size = sum(int(np.prod(spec.shape)) for spec in specs.values())
    name = os.path.basename(os.path.abspath(folder))  # not its path, which is no reader's business
    lines = [f"# {name}", "", f"{size:,} parameters, "
             + ("RAT+" if config.memory else "attention") + f", written by rat_jax {__version__}.", "",
             *(f"* {key}: {value}" for key, value in about.items()), "",
             f"    config, params = rat_jax.load_pretrained({name!r})", ""]
    (made / "config.json").write_text(config.to_json() + "\n", encoding="utf-8")
    (made / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _finite(leaves: Iterable[tuple[str, np.ndarray]], folder: pathlib.Path) -> Iterator[tuple[str, np.ndarray]]:
  """Passes the leaves on. Raises FloatingPointError for one that is not finite."""
  for name, leaf in leaves:
    if not is_finite(leaf):
      raise FloatingPointError(f"{folder} is not written: {name} is not finite.")
    yield name, leaf
    del leaf  # before the next is made


def on_device(name: str, leaf: np.ndarray) -> jax.Array:
  """Puts the leaf on JAX's default device: a numpy leaf would be copied there by every call that takes it."""
  del name
  return jnp.asarray(leaf)


def load_pretrained(folder: str | os.PathLike[str], *, place: Place = on_device) -> tuple[RATPlusConfig, Params]:
  """(config, parameters) of a folder that `save_pretrained` wrote.

  Args:
    place: (leaf's name, the numpy leaf) -> what takes its place in the tree, such as an array that is sharded over
      devices. Leaves come one at a time. Default: the leaf on JAX's default device.

  Raises:
    FileNotFoundError, ValueError: missing or broken files, a URL, tensors that do not fit the config.
  """
  folder = local_path(folder, "folder")
  path = folder / "config.json"
  if "model_type" in read_json(path, "give a folder that save_pretrained wrote"):
    raise ValueError(f"{path} is of the Hugging Face package; convert the folder first, with rat_jax.convert.load_olmo2"
                     " or experiments.convert.")
  try:
    config = RATPlusConfig.from_json(read_text(path))
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  tensors = SafetensorsFolder(folder)
  check_leaves(tensors.specs(), config, str(folder))
  return config, mapping.tree(((name, tensors.read(name)) for name in tensors.specs()), place)
