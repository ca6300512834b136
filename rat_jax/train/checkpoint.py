"""Checkpoints: Orbax does the writing, a manifest of ours makes sure that what is read is what was written.

A checkpoint holds the train state, the configuration and the caller's notes (the position in the data). Its
manifest lists shape, type and checksums of every array (`checksums`; SHA-256 in those of version 0.1). A checkpoint
that fails the test is passed over, loudly, for the newest one that does not.

Arrays of a mesh are written and read by whoever has their parts: no process or device holds a whole one, and a
checkpoint is read onto any mesh. Two readers hold one whole array at a time, on the host: `verify`, and the reader of
version 0.1, whose SHA-256 is of all bytes in order.

Where there are several processes, all of them must call what saves, reads and verifies. They vote on each stage, so
what fails in one fails in all, and none waits for one that has failed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pathlib
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from rat_jax import checks
from rat_jax.axes import Params
from rat_jax.config import RATPlusConfig
from rat_jax.convert import mapping
from rat_jax.leaves import check_params, named_leaves, shapes_of
from rat_jax.parallel import processes, rules
from rat_jax.paths import lacking, local_path
from rat_jax.train import array_files
from rat_jax.train.array_files import is_damage
from rat_jax.train.checksums import summed
from rat_jax.train.step import TrainState

_PARAMS = ".params"
_Found = TypeVar("_Found")


class _Damaged(ValueError):
  """A checkpoint that is not as it was written."""


class Checkpoints:
  """The checkpoints of one training run, the newest `keep`, in one folder. Raises ValueError for a URL or no count."""

  def __init__(self, folder: str | os.PathLike[str], *, keep: int = 2):
    checks.check_count("keep", keep)
    self.folder = local_path(folder, "folder").absolute()
    self._keep = keep

  def steps(self) -> list[int]:
    """The steps that there are checkpoints of, ascending."""
    if not self.folder.is_dir():
      return []
    names = {path.name.removeprefix("replaced-") for path in self.folder.iterdir() if path.is_dir()}
    return sorted(int(name) for name in names if name.isdecimal())

  def save(self, state: TrainState, config: RATPlusConfig, notes: dict[str, Any]) -> None:
    """Writes the state under its step; older checkpoints beyond `keep` go after the new one is whole.

    One of the same step goes too, when the new one is whole. It is "replaced-STEP" while the two change places, and is
    read there, and goes back at the next `restore`, where the program ends in between.

    Raises, and writes nothing: FloatingPointError for parameters that are not finite. ValueError for parameters that
    are not the config's, alone or stacked along one axis before all others, and for notes that are no plain JSON.
    """
    _check_config(state.params, config)
    check_notes(notes)
    arrays = _arrays(state)
    sums = {name: summed(array) for name, array in arrays.items()}
    bad = [name for name, found in sums.items() if not found.finite]
    if bad:
      raise FloatingPointError(f"step {int(state.step)} is not saved: {bad[0]} is not finite ({len(bad)} such arrays).")
    manifest = {name: {"shape": list(array.shape), "dtype": array.dtype.name, "sums": sums[name].sums}
                for name, array in arrays.items()}
    about = {"config": config.to_json(), "notes": notes, "manifest": manifest}
    made = self.folder / "unfinished"
    processes.by_first(lambda: _anew(made))
    try:
      processes.together(lambda: array_files.write(made / "state", arrays))
      processes.by_first(lambda: self._finish(int(state.step), about, made))
    finally:
      if processes.is_first():
        shutil.rmtree(made, ignore_errors=True)

  def restore(self, template: TrainState, config: RATPlusConfig) -> tuple[TrainState, dict[str, Any]]:
    """(state, notes) of the newest checkpoint that is intact. Damaged ones are moved aside, to "damaged-STEP".

    Args:
      template: a state of the wanted structure, for instance a fresh one, or the shapes of one. Arrays come to lie as
        its arrays do, alike in all processes.

    Raises:
      FileNotFoundError: no checkpoint. ValueError: one of another configuration (says which field differs), one
      whose parameters have other shapes or types than the template's, one of another optimizer, or none intact.
      OSError: a file that cannot be read now, such as one without permission; nothing is moved.
    """
    leaves, structure = jax.tree.flatten_with_path(template)
    like = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}

    def unfit(about: dict[str, Any]) -> str | None:
      difference, saved = config.difference(RATPlusConfig.from_json(about["config"])), about["manifest"]
      if difference:
        return f"has another config (field: wanted, saved): {difference}."
      for name, leaf in like.items():
        entry = saved.get(name)
        if name.startswith(_PARAMS) and entry and (entry["shape"], entry["dtype"]) != (list(leaf.shape), leaf.dtype):
          return (f"holds {_plain(name)} as {entry['dtype']} of shape {tuple(entry['shape'])}, the template as"
                  f" {leaf.dtype} of shape {leaf.shape}; give a template with parameters of the shapes and types that"
                  " were saved.")
      if saved.keys() != like.keys():
        return (f"holds another optimizer's state ({len(saved)} arrays for {len(like)}); resume with the optimizer that"
                " it was saved with.")
      return None

    arrays, about = self._read_newest(
        lambda step, about: self._read(step, about, {name: _place(leaf) for name, leaf in like.items()}), unfit,
        moves=True)
    return jax.tree.unflatten(structure, [_placed(arrays[name], leaf) for name, leaf in like.items()]), about["notes"]

  def load_params(self, mesh: jax.sharding.Mesh | None = None) -> tuple[RATPlusConfig, Params, dict[str, Any]]:
    """(config, params, notes) of the newest checkpoint whose parameters are intact, to run a model.

    Reads nothing of the optimizer, and a leaf at a time; onto a mesh, by its devices. Raises as `restore`, and
    ValueError for a mesh that does not divide heads or widths.
    """
    def read(step: int, about: dict[str, Any]) -> Params:
      return mapping.tree(self._params(step, about, mesh), lambda name, leaf: jnp.asarray(leaf))

    def unfit(about: dict[str, Any]) -> str | None:
      try:
        for name, entry in about["manifest"].items():
          if mesh is not None and name.startswith(_PARAMS):
            rules.spec(_last(name), tuple(entry["shape"]), mesh, strict=True)
      except ValueError as error:
        return f"does not fit the mesh: {error}"
      return None

    params, about = self._read_newest(read, unfit)
    return RATPlusConfig.from_json(about["config"]), params, about["notes"]

  def read_params(self) -> tuple[RATPlusConfig, Iterator[tuple[str, np.ndarray]], dict[str, Any], str]:
    """(config, parameters, notes, SHA-256 of the parameters): the same, (name, leaf) one after another, by name.

    All are read once before that, so that a damaged checkpoint is passed over before anything is made of it.
    """
    def read(step: int, about: dict[str, Any]) -> tuple[int, str]:
      digest = hashlib.sha256()
      for _, leaf in self._params(step, about):
        digest.update(_bytes(leaf))
        del leaf  # before the next is read
      return step, digest.hexdigest()

    (step, digest), about = self._read_newest(read)
    return RATPlusConfig.from_json(about["config"]), self._params(step, about), about["notes"], digest

  def verify(self, step: int | None = None) -> int:
    """The step of a checkpoint, by default of the newest, of which every array is as it was written.

    An array is read at a time; of several processes, each reads its share of them, and all answer alike. Raises
    FileNotFoundError for no such checkpoint, ValueError for a damaged one, OSError for one that cannot be read now.
    """
    steps = self._some_steps()
    step = steps[-1] if step is None else step
    if step not in steps:
      raise FileNotFoundError(f"{self.folder} holds no checkpoint of step {step}; it holds those of {steps}.")

    def read(step: int, about: dict[str, Any]) -> None:
      entries = about["manifest"]
      _check({name: _is_whole(self._array(step, name, entries[name], None), entries[name])
              for name in sorted(entries)[jax.process_index()::jax.process_count()]})

    self._attempt(step, lambda step, about: processes.together(lambda: read(step, about), is_damage))
    return step

  def _read_newest(self, read: Callable[[int, dict[str, Any]], _Found],
                   unfit: Callable[[dict[str, Any]], str | None] = lambda about: None, moves: bool = False
                   ) -> tuple[_Found, dict[str, Any]]:
    """(what `read` makes of the newest checkpoint that it can read, what is written about that one).

    `unfit` of what is written says why a checkpoint, which may be whole, is not the one that is asked for. `moves` says
    that damaged ones are set aside, and that those which a save moved go back.
    """
    steps, damaged = self._some_steps(), []
    if moves:
      processes.by_first(self._put_back)
    for step in reversed(steps):
      try:
        found, about = self._attempt(step, read, unfit)
      except _Damaged as error:
        warnings.warn(f"{error}. It is passed over.", stacklevel=3)
        damaged.append(step)
        continue
      if moves:
        processes.by_first(lambda: self._set_aside(damaged))
      return found, about
    raise ValueError(f"none of the checkpoints {steps} in {self.folder} is intact; start in another"
                     " folder, or put copies back.")

  def _attempt(self, step: int, read: Callable[[int, dict[str, Any]], _Found],
               unfit: Callable[[dict[str, Any]], str | None] = lambda about: None) -> tuple[_Found, dict[str, Any]]:
    """The same of one checkpoint. Raises _Damaged, in all processes if in one, and OSError where it may be whole."""
    part, reason = "about", None
    try:
      about = processes.together(lambda: self._about(step), is_damage)
      part, reason = "state", processes.together(lambda: unfit(about), is_damage)
      if reason is None:
        return read(step, about), about
    except (ValueError, KeyError, OSError) as error:
      told = str(error).partition(" [tensorstore_spec=")[0].rstrip(".")
      if is_damage(error):
        raise _Damaged(f"CHECKPOINT {step} in {self.folder} IS DAMAGED: {step}/{part}: {told}") from error
      raise OSError(f"{self._at(step) / part} cannot be read, and may be whole: {told}. Mend what stands in the way,"
                    " and start again.") from error
    raise ValueError(f"the checkpoint in {self.folder} {reason}")

  def _some_steps(self) -> list[int]:
    """The steps, the same in all processes. Raises FileNotFoundError for none."""
    def found() -> list[int]:
      steps = self.steps()
      if not steps:
        state = "holds no checkpoint" if self.folder.is_dir() else lacking(self.folder, "folder")
        raise FileNotFoundError(f"{self.folder} {state}; give the folder that a training saved to, such as"
                                " runs/pretrain/checkpoints.")
      return steps

    steps = processes.together(found)
    processes.check_agreement({f"checkpoints in {self.folder}": steps})
    return steps

  def _at(self, step: int) -> pathlib.Path:
    """The folder of a checkpoint."""
    place = self.folder / str(step)
    return place if place.exists() else self.folder / f"replaced-{step}"

  def _about(self, step: int) -> dict[str, Any]:
    about = json.loads((self._at(step) / "about" / "metadata").read_text(encoding="utf-8"))
    if not isinstance(about, dict) or not isinstance(about.get("manifest"), dict):
      raise ValueError("it does not say what the checkpoint holds")
    return about

  def _params(self, step: int, about: dict[str, Any], mesh: jax.sharding.Mesh | None = None
              ) -> Iterator[tuple[str, Any]]:
    """("layers/query", leaf) of a checkpoint one after another, by name. Raises as `_read`."""
    names = {_plain(name): name for name in about["manifest"] if name.startswith(_PARAMS)}
    for plain, name in sorted(names.items()):
      place = None
      if mesh is not None:
        cut = rules.spec(_last(name), tuple(about["manifest"][name]["shape"]), mesh, strict=True)
        place = jax.sharding.NamedSharding(mesh, cut)
      yield plain, self._read(step, about, {name: place})[name]  # not bound to a name: it goes when it is dropped

  def _read(self, step: int, about: dict[str, Any], places: Mapping[str, jax.sharding.Sharding | None]
            ) -> dict[str, Any]:
    """Arrays of a checkpoint, those with a place there. Raises ValueError for what is not as it was written."""
    entries = {name: about["manifest"][name] for name in places}
    found = processes.together(lambda: {name: self._array(step, name, entry, places[name])
                                        for name, entry in entries.items()}, is_damage)
    whole = {name: _is_whole(found[name], entry) for name, entry in entries.items()}  # all processes ask of each
    processes.together(lambda: _check(whole), is_damage)
    return found

  def _array(self, step: int, name: str, entry: dict[str, Any], place: jax.sharding.Sharding | None) -> Any:
    """An array of which all but the checksums is tested. One of version 0.1 has none, and is tested on the host."""
    digest = entry.get("sha256")
    array = array_files.read(self._at(step) / "state", name, None if digest else place)
    _check({name: list(array.shape) == list(entry["shape"]) and array.dtype.name == entry["dtype"]
            and (not digest or hashlib.sha256(_bytes(array)).hexdigest() == digest)})
    if digest and place is not None:
      return jax.make_array_from_callback(array.shape, place, array.__getitem__)
    return array

  def _finish(self, step: int, about: dict[str, Any], made: pathlib.Path) -> None:
    """Puts a checkpoint whose arrays are written in its place; what was there goes, and older ones beyond `keep`."""
    array_files.finish(made / "state")
    (made / "about").mkdir()
    (made / "about" / "metadata").write_text(json.dumps(about), encoding="utf-8")
    place, aside = self.folder / str(step), self.folder / f"replaced-{step}"
    if place.exists():
      _remove(aside)
      place.rename(aside)
    try:
      made.rename(place)
    except OSError:
      self._put_back()
      raise
    _remove(aside)
    others = [other for other in self.steps() if other != step]
    for other in others[:max(0, len(others) + 1 - self._keep)]:
      _remove(self._at(other))

  def _put_back(self) -> None:
    """Gives each checkpoint that was moved away for a new one its place again, where no new one came."""
    for step in self.steps():
      if not (self.folder / str(step)).exists():
        self._at(step).rename(self.folder / str(step))

  def _set_aside(self, damaged: list[int]) -> None:
    for step in damaged:
      self._at(step).rename(_unused(self.folder / f"damaged-{step}"))


def check_notes(notes: Mapping[str, Any]) -> None:
  """Raises ValueError for notes that no checkpoint could hold: what is no dict of plain JSON."""
  if not isinstance(notes, Mapping):
    raise ValueError(f"notes={notes!r}; give a dict.")
  for name, value in notes.items():
    try:
      json.dumps({name: value})
    except (TypeError, ValueError, RecursionError) as error:
      raise ValueError(f"notes[{name!r}]={value!r} is no plain JSON: {error}; give numbers of Python, texts, lists and"
                       " dicts, such as float(x) and x.tolist().") from error


def _check_config(params: Params, config: RATPlusConfig) -> None:
  """Raises ValueError for parameters that are not the config's, nor a stack of such, as of several seeds."""
  wanted, leaves = shapes_of(config), named_leaves(params)
  if len({np.shape(leaf)[:1] for leaf in leaves.values()}) == 1 and all(
      name in wanted and np.ndim(leaf) == len(wanted[name]) + 1 for name, leaf in leaves.items()):
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), params)
  check_params(params, config, same_type=False)


def _arrays(state: TrainState) -> dict[str, jax.Array | np.ndarray]:
  """The state's leaves by their path: arrays of several devices as they lie, others on the host."""
  return {jax.tree_util.keystr(path): leaf if _place(leaf) else np.asarray(leaf)
          for path, leaf in jax.tree.leaves_with_path(state)}


def _last(name: str) -> str:
  """The last name of a path such as ".params['layers']['query']"."""
  return name.rsplit("'", 2)[1]


def _place(leaf: Any) -> jax.sharding.Sharding | None:
  """Where a leaf lies, if on several devices."""
  place = getattr(leaf, "sharding", None)
  return place if place is not None and len(place.device_set) > 1 else None


def _placed(array: jax.Array | np.ndarray, like: Any) -> jax.Array:
  """An array that was read, where `like` lies."""
  place = getattr(like, "sharding", None)
  return jnp.asarray(array) if place is None or _place(like) is not None else jax.device_put(array, place)


def _plain(name: str) -> str:
  """".params['layers']['query']" as "layers/query"."""
  return "/".join(key.strip("'\"") for key in name.removeprefix(f"{_PARAMS}[").removesuffix("]").split("]["))


def _is_whole(array: Any, entry: dict[str, Any]) -> bool:
  """Whether an array has the manifest's checksums, if any. Where several processes share it, all of them must ask."""
  return "sha256" in entry or summed(array).sums == entry["sums"]


def _check(whole: Mapping[str, bool]) -> None:
  """Raises ValueError for the first of the arrays that is not as it was written."""
  for name, is_whole in whole.items():
    if not is_whole:
      raise ValueError(f"{name} is not what was written")


def _anew(folder: pathlib.Path) -> None:
  """Makes an empty folder."""
  _remove(folder)
  folder.mkdir(parents=True)


def _remove(folder: pathlib.Path) -> None:
  """Removes a folder, if it is there."""
  if folder.exists():
    shutil.rmtree(folder)


def _unused(path: pathlib.Path) -> pathlib.Path:
  """The path, or where that is taken, the path with the next free number."""
  names = (path.with_name(f"{path.name}-{i}") if i else path for i in itertools.count())
  return next(name for name in names if not name.exists())


def _bytes(array: np.ndarray) -> memoryview:
  """Its bytes, not copied."""
  return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
