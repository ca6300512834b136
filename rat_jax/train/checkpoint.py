"""Checkpoints: Orbax does the writing, a manifest of ours makes sure that what is read is what was written.

A checkpoint holds the train state, the configuration and the caller's notes (the position in the data). Its
manifest lists shape, type and checksums of every array (`checksums`; SHA-256 in those of version 0.1). A checkpoint
that fails the test is passed over, loudly, for the newest one that does not.

Arrays of a mesh are written and read by whoever has their parts: no process or device ever holds a whole one, and a
checkpoint is read onto any mesh. Where there are several processes, all of them must call what saves and reads.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

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
from rat_jax.train.checksums import summed
from rat_jax.train.step import TrainState

if TYPE_CHECKING:  # where it is needed it is imported in place: that takes as long as the rest of the library
  import orbax.checkpoint as ocp

_PARAMS = ".params"
_CHUNK_BYTES = 64 * 2**20  # of an array's pieces in a file: an array of one piece is read with a second one beside it
# How the messages of TensorStore begin, whose errors are ValueErrors, where a file could not be read and may be whole.
_NOT_NOW = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "ABORTED")
_Found = TypeVar("_Found")


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
    with self._manager() as manager:
      return sorted(manager.all_steps())

  def save(self, state: TrainState, config: RATPlusConfig, notes: dict[str, Any]) -> None:
    """Writes the state under its step; older checkpoints beyond `keep` go after the new one is whole.

    One of the same step goes too. It is "replaced-STEP" meanwhile, and takes its place again where the write fails.

    Raises, and writes nothing: FloatingPointError for parameters that are not finite. ValueError for parameters that
    are not the config's, alone or stacked along one axis before all others, and for notes that are no plain JSON.
    """
    import orbax.checkpoint as ocp

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
    pieces = dict.fromkeys(arrays, ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES))
    with self._aside(int(state.step)), self._manager() as manager:
      manager.save(int(state.step), args=ocp.args.Composite(
          state=ocp.args.StandardSave(arrays, save_args=pieces), about=ocp.args.JsonSave(about)), force=True)
      manager.wait_until_finished()

  def restore(self, template: TrainState, config: RATPlusConfig) -> tuple[TrainState, dict[str, Any]]:
    """(state, notes) of the newest checkpoint that is intact. Damaged ones are moved aside, to "damaged-STEP".

    Args:
      template: a state of the wanted structure, for instance a fresh one, or the shapes of one. Arrays come to lie as
        its arrays do.

    Raises:
      FileNotFoundError: no checkpoint. ValueError: one of another configuration (says which field differs), one
      whose parameters have other shapes or types than the template's, one of another optimizer, or none intact.
      OSError: a file that cannot be read now, such as one without permission; nothing is moved.
    """
    places = {jax.tree_util.keystr(path): _place(leaf) for path, leaf in jax.tree.leaves_with_path(template)}

    def unfit(about: dict[str, Any]) -> str | None:
      difference = config.difference(RATPlusConfig.from_json(about["config"]))
      return f"it has another config (field: wanted, saved): {difference}." if difference else None

    arrays, about = self._read_newest(lambda step, about: self._arrays(step, about, places), unfit, set_aside=True)
    params = {_plain(name): array for name, array in arrays.items() if name.startswith(_PARAMS)}
    for name, leaf in named_leaves(template.params).items():
      saved = params.get(name)
      if saved is not None and (saved.shape != leaf.shape or saved.dtype != leaf.dtype):
        raise ValueError(f"the checkpoint in {self.folder} holds {name} as {saved.dtype} of shape {saved.shape}, the"
                         f" template as {leaf.dtype} of shape {leaf.shape}; give a template with parameters of the"
                         " shapes and types that were saved.")
    leaves, structure = jax.tree.flatten_with_path(template)
    missing = [jax.tree_util.keystr(path) for path, _ in leaves if jax.tree_util.keystr(path) not in arrays]
    if missing or len(leaves) != len(arrays):
      raise ValueError(f"the checkpoint in {self.folder} holds another optimizer's state ({len(arrays)} arrays for"
                       f" {len(leaves)}); resume with the optimizer that it was saved with.")
    state = jax.tree.unflatten(structure, [_placed(arrays[jax.tree_util.keystr(path)], leaf) for path, leaf in leaves])
    return state, about["notes"]

  def load_params(self, mesh: jax.sharding.Mesh | None = None) -> tuple[RATPlusConfig, Params, dict[str, Any]]:
    """(config, params, notes) of the newest checkpoint whose parameters are intact, to run a model.

    Reads nothing of the optimizer, and a leaf at a time; onto a mesh, by its devices. Raises as `restore`, and
    ValueError for a mesh that does not divide heads or widths.
    """
    def read(step: int, about: dict[str, Any]) -> Params:
      return mapping.tree(self._params(step, about, mesh), lambda name, leaf: jnp.asarray(leaf))

    def unfit(about: dict[str, Any]) -> str | None:
      try:
        for name, entry in about["manifest"].items() if mesh else ():
          if name.startswith(_PARAMS):
            rules.spec(_last(name), tuple(entry["shape"]), mesh, strict=True)
      except ValueError as error:
        return str(error)
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

  def _read_newest(self, read: Callable[[int, dict[str, Any]], _Found],
                   unfit: Callable[[dict[str, Any]], str | None] = lambda about: None, set_aside: bool = False
                   ) -> tuple[_Found, dict[str, Any]]:
    """(what `read` makes of the newest checkpoint that it can read, what is written about that one).

    `unfit` of what is written says why a checkpoint, which may be whole, is not the one that is asked for.
    """
    steps = self.steps()
    if not steps:
      state = "holds no checkpoint" if self.folder.is_dir() else lacking(self.folder, "folder")
      raise FileNotFoundError(f"{self.folder} {state}; give the folder that a training saved to, such as"
                              " runs/pretrain/checkpoints.")
    damaged = []
    for step in reversed(steps):
      part = "about"
      try:
        about = self._about(step)
        part, reason = "state", unfit(about)
        if reason is None:
          found = read(step, about)
      except (ValueError, KeyError, OSError) as error:
        if not _is_damage(error):
          raise OSError(f"{self.folder / str(step) / part} cannot be read, and may be whole: {error}. Mend what stands"
                        " in the way, and start again.") from error
        warnings.warn(f"CHECKPOINT {step} in {self.folder} IS DAMAGED and passed over: {step}/{part}: {error}",
                      stacklevel=3)
        damaged.append(step)
        continue
      if reason is not None:
        raise ValueError(f"the checkpoint in {self.folder}: {reason}")
      if set_aside and processes.is_first():
        for later in damaged:
          (self.folder / str(later)).rename(_unused(self.folder / f"damaged-{later}"))
      processes.wait_for_all("damaged checkpoints are set aside")
      return found, about
    raise ValueError(f"none of the checkpoints {steps} in {self.folder} is intact.")

  def _about(self, step: int) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    with self._manager() as manager:
      about = manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
    if not isinstance(about, dict) or not isinstance(about.get("manifest"), dict):
      raise ValueError("it does not say what the checkpoint holds")
    return about

  def _arrays(self, step: int, about: dict[str, Any], places: Mapping[str, jax.sharding.Sharding | None]
              ) -> dict[str, jax.Array | np.ndarray]:
    """All that a checkpoint holds, those with a place there. Raises ValueError for what is not as it was written."""
    import orbax.checkpoint as ocp

    target = {name: jax.ShapeDtypeStruct(entry["shape"], entry["dtype"], sharding=places.get(name))
              for name, entry in about["manifest"].items()}
    with self._manager() as manager:
      restored = processes.together(lambda: manager.restore(
          step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))["state"])
    arrays = {name: x if places.get(name) else np.asarray(x) for name, x in restored.items()}
    return {name: _checked(name, arrays[name], about) for name in about["manifest"]}

  def _params(self, step: int, about: dict[str, Any], mesh: jax.sharding.Mesh | None = None
              ) -> Iterator[tuple[str, Any]]:
    """("layers/query", leaf) of a checkpoint one after another, by name. Raises as `_arrays`."""
    names = {_plain(name): name for name in about["manifest"] if name.startswith(_PARAMS)}
    with self._manager() as manager:
      for plain, name in sorted(names.items()):
        yield plain, self._leaf(manager, step, name, about, mesh)  # not bound to a name: it goes when it is dropped

  def _leaf(self, manager: ocp.CheckpointManager, step: int, name: str, about: dict[str, Any],
            mesh: jax.sharding.Mesh | None) -> Any:
    import orbax.checkpoint as ocp

    entry = about["manifest"][name]
    shape = tuple(entry["shape"])
    how = ocp.RestoreArgs(restore_type=np.ndarray)
    if mesh is not None:
      place = jax.sharding.NamedSharding(mesh, rules.spec(_last(name), shape, mesh, strict=True))
      how = ocp.ArrayRestoreArgs(sharding=place, global_shape=shape)
    args = ocp.args.PyTreeRestore({name: jax.ShapeDtypeStruct(shape, entry["dtype"])}, partial_restore=True,
                                  restore_args={name: how})
    found = processes.together(lambda: manager.restore(step, args=ocp.args.Composite(state=args))["state"][name])
    return _checked(name, found, about)

  @contextlib.contextmanager
  def _aside(self, step: int) -> Iterator[None]:
    """Moves a checkpoint of that step, of a run begun anew, away; afterwards back again, unless a new one is there."""
    place, aside = self.folder / str(step), _unused(self.folder / f"replaced-{step}")
    first = processes.is_first()
    if first and place.exists():
      place.rename(aside)
    processes.wait_for_all("a checkpoint of this step is set aside")
    try:
      yield
    finally:
      if first and aside.exists() and place.exists():
        shutil.rmtree(aside)
      elif first and aside.exists():
        aside.rename(place)

  def _manager(self) -> ocp.CheckpointManager:
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, enable_async_checkpointing=False)
    return ocp.CheckpointManager(self.folder, options=options)


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


def _is_damage(error: Exception) -> bool:
  """Whether it says that a file is missing or not as it was written, rather than that it cannot be read now."""
  if isinstance(error, OSError):
    return isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError))
  return not str(error).startswith(_NOT_NOW)


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


def _checked(name: str, array: Any, about: dict[str, Any]) -> Any:
  entry = about["manifest"][name]
  is_whole = list(array.shape) == list(entry["shape"]) and array.dtype.name == entry["dtype"]
  if is_whole and "sha256" in entry:  # of version 0.1
    is_whole = hashlib.sha256(_bytes(np.asarray(array))).hexdigest() == entry["sha256"]
  elif is_whole:
    is_whole = summed(array).sums == entry["sums"]
  if not is_whole:
    raise ValueError(f"{name} is not what was written")
  return array


def _unused(path: pathlib.Path) -> pathlib.Path:
  """The path, or where that is taken, the path with the next free number."""
  names = (path.with_name(f"{path.name}-{i}") if i else path for i in itertools.count())
  return next(name for name in names if not name.exists())


def _bytes(array: np.ndarray) -> memoryview:
  """Its bytes, not copied."""
  return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
