"""Arrays in the files of a checkpoint: Orbax writes them, TensorStore reads them, each process its devices' parts.

Nothing here waits for another process, so that processes can vote on what each of them did (`processes.together`).
Orbax's own reading and writing of a checkpoint wait in between: a process that fails would leave the others there.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

_CHUNK_BYTES = 64 * 2**20  # of an array's pieces in a file: an array of one piece is read with a second one beside it
# How the messages of TensorStore begin, whose errors are ValueErrors, where a file could not be read and may be whole.
_NOT_NOW = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "ABORTED",
            "UNKNOWN")


def write(folder: pathlib.Path, arrays: Mapping[str, jax.Array | np.ndarray]) -> None:
  """Writes this process's parts of arrays, and the first process those on the host. All processes must come here."""
  import orbax.checkpoint as ocp  # in place: that takes as long as the rest of the library, as TensorStore does
  from etils import epath

  pieces = dict.fromkeys(arrays, ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES))
  ocp.PyTreeCheckpointHandler().save(epath.Path(folder), args=ocp.args.PyTreeSave(dict(arrays), save_args=pieces))


def finish(folder: pathlib.Path) -> None:
  """Makes one of what all processes wrote, when they have; one of them does so."""
  import orbax.checkpoint as ocp
  from etils import epath

  ocp.PyTreeCheckpointHandler().finalize(epath.Path(folder))


def read(folder: pathlib.Path, name: str, place: jax.sharding.Sharding | None) -> Any:
  """An array, whole on the host, or of a place what the devices of this process have of it.

  Raises ValueError for files that are gone or broken, or cannot be read: `is_damage` tells them apart.
  """
  from tensorstore import open as opened

  files = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}, "path": name}
  store = opened({"driver": "zarr", "kvstore": files}, open=True, read=True).result()
  if place is None:
    return store.read().result()
  cuts = place.addressable_devices_indices_map(tuple(store.shape))
  reads = {key: store[cut].read() for key, cut in {str(cut): cut for cut in cuts.values()}.items()}  # each cut once
  parts = [jax.device_put(reads[str(cut)].result(), device) for device, cut in cuts.items()]
  return jax.make_array_from_single_device_arrays(tuple(store.shape), place, parts)


def is_damage(error: Exception) -> bool:
  """Whether it says that a file is missing or not as it was written, rather than that it cannot be read now."""
  if isinstance(error, OSError):
    return isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError))
  return isinstance(error, (ValueError, KeyError)) and not str(error).startswith(_NOT_NOW)
