"""Models as folders: config.json, safetensors, and a card that says what it is."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable, Mapping

import jax
import numpy as np

from rat_jax import transformer
from rat_jax.axes import Params
from rat_jax.config import RATPlusConfig
from rat_jax.convert import mapping
from rat_jax.convert.mapping import Place
from rat_jax.convert.tensors import SafetensorsFolder, Spec, new_folder, write_safetensors
from rat_jax.version import __version__


def save_pretrained(folder: str | os.PathLike, config: RATPlusConfig, params: Params, *, about: Mapping[str, str] = {},
                    max_file_bytes: int = 5 * 10**9) -> None:
  """Writes a model: config.json, model.safetensors (or several files and an index), README.md.

  Leaves keep their types and are fetched one at a time. Nothing is left of a write that fails.

  Args:
    about: what the card is to say, such as {"source": "...", "sha256": "...", "trained": "..."}.
    max_file_bytes: a new file begins where a leaf would take the last beyond this.

  Raises:
    ValueError: a folder that is not empty, parameters that do not fit the config.
  """
  named = _named(params)
  _check({name: Spec(leaf.shape, str(leaf.dtype)) for name, leaf in named.items()}, config, "the parameters")
  write_pretrained(folder, config, ((name, np.asarray(leaf)) for name, leaf in named.items()), about=about,
                   max_file_bytes=max_file_bytes)


def write_pretrained(folder: str | os.PathLike, config: RATPlusConfig, leaves: Iterable[tuple[str, np.ndarray]], *,
                     about: Mapping[str, str] = {}, max_file_bytes: int = 5 * 10**9) -> None:
  """The same of (name, leaf) pairs that come one after another, in any order; one is held at a time."""
  with new_folder(folder) as made:
    specs = write_safetensors(made, leaves, count=len(_shapes(config)), metadata={"rat_jax": __version__, **about},
                              max_file_bytes=max_file_bytes)
    _check(specs, config, "the parameters")
    size = sum(int(np.prod(spec.shape)) for spec in specs.values())
    lines = [f"# {os.path.basename(os.path.abspath(folder))}", "", f"{size:,} parameters, "
             + ("RAT+" if config.memory else "attention") + f", written by rat_jax {__version__}.", "",
             *(f"* {key}: {value}" for key, value in about.items()), "",
             f"    config, params = rat_jax.load_pretrained({str(folder)!r})", ""]
    (made / "config.json").write_text(config.to_json() + "\n")
    (made / "README.md").write_text("\n".join(lines))


def load_pretrained(folder: str | os.PathLike, *, place: Place = mapping.as_is) -> tuple[RATPlusConfig, Params]:
  """(config, parameters) of a folder that `save_pretrained` wrote.

  Args:
    place: (leaf's name, the numpy leaf) -> what takes its place in the tree, such as an array that is sharded over
      devices. Leaves come one at a time.

  Raises:
    FileNotFoundError, ValueError: missing or broken files, tensors that do not fit the config.
  """
  folder = pathlib.Path(folder)
  path = folder / "config.json"
  if not path.is_file():
    raise FileNotFoundError(f"{path} does not exist; give a folder that save_pretrained wrote.")
  config = RATPlusConfig.from_json(path.read_text())
  tensors = SafetensorsFolder(folder)
  _check(tensors.specs(), config, str(folder))
  return config, mapping.tree(((name, tensors.read(name)) for name in tensors.specs()), place)


def _named(params: Params) -> dict[str, jax.Array | np.ndarray]:
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
          for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def _shapes(config: RATPlusConfig) -> dict[str, tuple[int, ...]]:
  """The leaves of a config."""
  drawn = {name: jax.eval_shape(draw, jax.random.key(0)) for name, draw in transformer.initializers(config).items()}
  return {name: leaf.shape for name, leaf in _named(drawn).items()}


def _check(found: Mapping[str, Spec], config: RATPlusConfig, where: str) -> None:
  """Raises ValueError where leaves are not those of the config, whatever their types."""
  shapes = _shapes(config)
  wrong = [name for name in sorted(shapes.keys() | found.keys())
           if name not in found or name not in shapes or found[name].shape != shapes[name]]
  if wrong:
    name = wrong[0]
    raise ValueError(f"{where}: {name} is {found[name].shape if name in found else 'missing'}, the config wants"
                     f" {shapes.get(name, 'no such leaf')}; {len(wrong)} leaves differ in all.")
