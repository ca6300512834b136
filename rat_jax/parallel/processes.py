"""Several processes that run one program, each with its own devices: who writes, what each reads, whether all agree."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.sharding import NamedSharding

from rat_jax.parallel import rules

Made = TypeVar("Made")


def start() -> None:
  """Joins the processes of one program, before any device is asked for; once they are joined it does nothing.

  Where a launcher like torchrun says RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, these are taken, with the port
  after that one, which is in use; of several processes of one machine each then takes the GPU of its LOCAL_RANK.
  Elsewhere jax finds out by itself (Cloud TPU, SLURM, Open MPI, Kubernetes).

  Waits five minutes for the others. Raises ValueError where nothing says what processes there are.
  """
  if jax.distributed.is_initialized():
    return
  jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM, and would have to be asked
  names = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")
  if all(name in os.environ for name in names):
    address, port, count, rank = (os.environ[name] for name in names)
    for name, value in (("MASTER_PORT", port), ("WORLD_SIZE", count), ("RANK", rank)):
      if not value.isdigit():
        raise ValueError(f"{name}={value!r} in the environment; give an integer, as launchers like torchrun do.")
    alone = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) == 1
    own = None if alone else [int(os.environ["LOCAL_RANK"])]
    meeting = f"{address}:{int(port) + 1}"
    logging.getLogger(__name__).warning("process %s of %s waits at %s for the others, up to five minutes", rank, count,
                                        meeting)
    jax.distributed.initialize(meeting, int(count), int(rank), own)
  else:
    try:
      jax.distributed.initialize()
    except ValueError as error:
      raise ValueError("no launcher says what processes there are (Cloud TPU, SLURM, Open MPI, or torchrun's RANK,"
                       " WORLD_SIZE, MASTER_ADDR and MASTER_PORT); start them by one, or leave --distributed out."
                       ) from error


def is_first() -> bool:
  """Whether this process is the one that writes what all would write alike."""
  return jax.process_index() == 0


def rows_of_process(mesh: jax.sharding.Mesh, batch_size: int) -> np.ndarray:
  """The rows of a batch that this process reads, ascending: those that its devices have.

  Raises ValueError where data and fsdp do not divide the batch.
  """
  cut = rules.axes_that_cut("a batch", "batch", batch_size, mesh, strict=True)
  places = NamedSharding(mesh, jax.P(cut)).addressable_devices_indices_map((batch_size,)).values()
  return np.unique(np.concatenate([np.arange(batch_size)[place] for place in places if place is not None]))


def from_rows(rows: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh, batch_size: int) -> dict[str, jax.Array]:
  """A batch on a mesh of which every process gives the rows of `rows_of_process`: [rows, T] each."""
  made: dict[str, jax.Array] = {}
  own = {int(row): i for i, row in enumerate(rows_of_process(mesh, batch_size))}
  for name, local in rows.items():
    shape = (batch_size, *local.shape[1:])
    sharding = NamedSharding(mesh, rules.spec(name, shape, mesh, strict=True))
    piece = functools.partial(_piece, local, own, batch_size)
    made[name] = jax.make_array_from_callback(shape, sharding, piece)
  return made


def _piece(local: np.ndarray, own: Mapping[int, int], batch_size: int, at: Any) -> np.ndarray:
  """What a device has of a batch, at slices of the whole, of this process's rows."""
  wanted = [own[row] for row in range(*at[0].indices(batch_size))]
  return local[wanted][:, at[1]]


def on_host(x: jax.Array | np.ndarray) -> np.ndarray:
  """The whole array, in every process."""
  if jax.process_count() == 1 or isinstance(x, np.ndarray) or x.is_fully_replicated:
    return np.asarray(x)
  from jax.experimental import multihost_utils

  return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def check_agreement(values: Mapping[str, Any]) -> None:
  """Raises ValueError, in every process, where values (plain JSON) differ between processes; it names them."""
  if jax.process_count() == 1:
    return
  from jax.experimental import multihost_utils

  digests = np.array([int.from_bytes(hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()[:4], "big")
                      for value in values.values()], np.uint32)
  of_all = np.asarray(multihost_utils.process_allgather(digests))
  differ = [name for name, column in zip(values, of_all.T, strict=True) if (column != column[0]).any()]
  if differ:
    own = ", ".join(f"{name}={values[name]}" for name in differ)
    raise ValueError(f"process {jax.process_index()} of {jax.process_count()} has {own}, and another process has"
                     " something else; start all of them with the same flags, configuration and data.")


def together(make: Callable[[], Made], is_damage: Callable[[Exception], bool] = lambda error: False) -> Made:
  """`make()`, which fails in every process if it fails in one, and alike: all raise errors of one kind.

  Where `is_damage` is true of every error, a process without one of its own raises ValueError. Otherwise the errors of
  damage give way: a process raises its own other error, or OSError for another's.
  """
  error: Exception | None = None
  made: Made | None = None
  try:
    made = make()
  except Exception as found:  # whatever it is, the others must not wait for this process
    error = found
  own = 0 if error is None else 1 if is_damage(error) else 2
  of_all = np.array([own])
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    of_all = np.asarray(multihost_utils.process_allgather(of_all)).reshape(-1)
  worst = int(of_all.max())
  if error is not None and own == worst:
    raise error
  if worst:
    kind = ValueError if worst == 1 else OSError
    raise kind(f"process {int(of_all.argmax())} could not do its part; its own output says why.") from error
  return cast(Made, made)


def by_first(act: Callable[[], object]) -> None:
  """What the first process does for all; it is done when any of them returns, and fails in all if it fails."""
  together(lambda: act() if is_first() else None)
