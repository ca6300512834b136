"""Models of several seeds, spread over the devices; which questions they answer; work spread over processes."""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import math
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rat_jax import RATPlusConfig, RATPlusLM
from rat_jax.evaluate import mini_niah
from rat_jax.evaluate.mini_niah import TASKS
from rat_jax.evaluate.needles import answered
from rat_jax.parallel import processes
from rat_jax.paths import lacking, local_path
from rat_jax.train import Checkpoints

MATCHED = 95.0  # percent that every task needs under Dense for a comparison
ACCURACY_SEED, DATA_SEED = 1_000_003, 20_000_003  # of the questions of `sft_niah` itself, and of tables


def check_tasks(names: Sequence[str]) -> None:
  """Raises ValueError for --tasks that are none of mini-NIAH's."""
  unknown = sorted(set(names) - TASKS.keys())
  if unknown or not names:
    raise ValueError(f"--tasks={unknown} are unknown; use some of {list(TASKS)}.")


def check_seeds(seed: int, seeds: range) -> None:
  """Raises ValueError where --seed, with which these seeds are trained, would train on what is asked later."""
  if ACCURACY_SEED in seeds or DATA_SEED in seeds:
    raise ValueError(f"--seed={seed}: with it would be trained on what is asked later; use another.")


@functools.cache
def mesh() -> Mesh:
  """All devices in a row, along the axis of seeds."""
  return jax.make_mesh((jax.device_count(),), ("seeds",), axis_types=(AxisType.Auto,))


def over_seeds() -> NamedSharding:
  """The leading axis spread over the devices."""
  return NamedSharding(mesh(), PartitionSpec("seeds"))


def load(folders: str, mesh: Mesh | None = None) -> tuple[RATPlusConfig, Any]:
  """(config, the parameters of all seeds, stacked) of a folder of seed-*, or of several, with commas between.

  `mesh`: on which each seed's parameters lie.

  Raises ValueError and FileNotFoundError for a URL, folders without seeds, and models that do not belong together.
  """
  configs, params = [], []
  for folder in folders.split(","):
    around = local_path(folder, "folder")
    found = [path for path in around.glob("seed-*") if path.name.removeprefix("seed-").isdecimal()]
    paths = sorted(found, key=lambda path: int(path.name.removeprefix("seed-")))
    if not paths:
      state = "holds no seed-* checkpoints" if around.is_dir() else lacking(around, "folder")
      raise FileNotFoundError(f"{around} {state}; give the folder around seed-*, which experiments.sft_niah makes.")
    for path in paths:
      config, of_seed, notes = Checkpoints(path).load_params(mesh)
      if notes.get("seeds", len(paths)) != len(paths):
        raise ValueError(f"{folder} holds {len(paths)} seeds of a run of {notes['seeds']}; run experiments.sft_niah to"
                         " its end, or move what is not of that run away.")
      configs.append(config)
      params.append(of_seed)
  if len(set(configs)) > 1:
    raise ValueError(f"{folders} hold models of different configurations; one arm has one.")
  if configs[0].vocab_size != mini_niah.VOCAB_SIZE:
    raise ValueError(f"{folders} has vocab_size={configs[0].vocab_size}; mini-NIAH's is {mini_niah.VOCAB_SIZE}:"
                     " give models of experiments.sft_niah, or --text for language models.")
  return configs[0], jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)


def name_of(folders: str) -> str:
  """What tables call the folders of `load`: the name of the first."""
  return pathlib.Path(folders.split(",")[0]).name


def check_names(checkpoints: Sequence[str]) -> None:
  """Raises ValueError where tables could not tell checkpoints apart, or would count one twice."""
  folders = [local_path(folder, "--checkpoint").resolve() for folders in checkpoints for folder in folders.split(",")]
  if len(set(folders)) < len(folders):
    raise ValueError(f"--checkpoint={list(checkpoints)}: one folder is given twice; give each once.")
  if len({name_of(checkpoint) for checkpoint in checkpoints}) < len(checkpoints):
    raise ValueError(f"--checkpoint={list(checkpoints)}: two have one name; give folders of different names.")


Job = TypeVar("Job")
Result = TypeVar("Result")


def share_device() -> None:
  """Leaves room on the device for other processes; to be called before JAX does anything."""
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def side_by_side(compute: Callable[[Job], Result], jobs: Sequence[Job], workers: int | None
                 ) -> Iterator[tuple[int, Result]]:
  """(number, compute(job)) of every job as it is done.

  Compiling takes longer than running, and a program with a cuDNN kernel cannot be loaded while another thread uses the
  GPU (jax 0.11.2): so jobs run in processes of their own, which share it.

  Args:
    compute: a function of a module, or a `functools.partial` of one, which every process is sent once; it is pickled,
      as are jobs and what it gives.
    workers: processes; 1 is this one. Default: 8 on a GPU, else 1.
  """
  if workers is None:
    workers = 8 if jax.default_backend() == "gpu" else 1
  if workers == 1:
    yield from ((i, compute(job)) for i, job in enumerate(jobs))
    return
  with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_begin,
                                              initargs=(compute, 0.9 / workers)) as pool:
    futures = {pool.submit(_computed, job): i for i, job in enumerate(jobs)}
    try:
      for future in concurrent.futures.as_completed(futures):
        yield futures[future], future.result()
    finally:
      pool.shutdown(cancel_futures=True)


_compute: Callable[[Any], Any]  # of a process that was started for jobs


def _begin(compute: Callable[[Any], Any], share: float) -> None:
  global _compute
  _compute = compute
  threading.Thread(target=_end_with_parent, daemon=True).start()
  share_device()
  os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{share:.3f}"  # what it has held it does not give back


def _computed(job: Any) -> Any:
  return _compute(job)


def _end_with_parent() -> None:
  """A parent that was killed takes nobody with it, and a worker would keep its share of the device."""
  parent = multiprocessing.parent_process()
  assert parent is not None
  multiprocessing.connection.wait([parent.sentinel])
  os._exit(1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _answered(model: RATPlusLM, prompts: tuple[int, ...], arguments: tuple[tuple[str, Any], ...], params, batches,
              row_ids):
  def of_batch(one):
    batch, ids = one
    return jax.vmap(lambda p: answered(model, p, batch, prompt_lengths=np.array(prompts), row_ids=ids,
                                       **dict(arguments)))(params)

  return jax.lax.map(of_batch, (batches, row_ids))  # one program: processes that share a device wait for each call


def which_right(model: RATPlusLM, params: Any, parts: Sequence[dict[str, jax.Array]], prompts: Sequence[int], *,
                batch_size: int, draw: int = 0, **arguments: Any) -> np.ndarray:
  """Which sequences every seed answers, bool [parts, seeds, count]; all parts go through one program.

  Args:
    params: of all seeds, stacked.
    parts: dicts of `mini_niah.batch`, each of as many sequences; prompts: where the prompts of each part end.
    batch_size: about how many sequences to run at a time.
    draw: which draw of a random selection; it depends on this and on a sequence's number in its part.
    arguments: `mode` and others of `model.apply`.
  """
  count = len(parts[0]["tokens"])
  room = max(1, batch_size // len(parts))
  every = max(n for n in range(1, room + 1) if count % n == 0)  # sequences of each part in a batch
  of_rows = tuple(prompt for prompt in prompts for _ in range(every))

  def batches(x):  # [parts, count, ...] -> [batches, rows, ...]
    return x.reshape(len(parts), -1, every, *x.shape[2:]).swapaxes(0, 1).reshape(-1, len(of_rows), *x.shape[2:])

  ids = np.tile(draw * count + np.arange(count, dtype=np.int32), (len(parts), 1))
  right = np.asarray(_answered(model, of_rows, tuple(arguments.items()), params,
                               jax.tree.map(lambda *x: batches(jnp.stack(x)), *parts), batches(ids)))
  by_part = right.reshape(*right.shape[:2], len(parts), every)  # [batches, seeds, parts, sequences]
  return by_part.transpose(2, 1, 0, 3).reshape(len(parts), -1, count)


def fingerprint(params: Any) -> str:
  """Eight digits that tell parameters apart."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(params):
    digest.update(processes.on_host(leaf).tobytes())
  return digest.hexdigest()[:8]


def cell_of(right: np.ndarray, tokens_read: float) -> dict[str, Any]:
  """A cell of a table, of which sequences were answered, bool [seeds, count], and the keys that a step reads."""
  count = right.shape[1]
  return {"accuracy": (100 * right.mean(axis=1)).tolist(), "count": count,
          "error_over_examples": (100 * right.std(axis=1) / math.sqrt(count)).tolist(), "tokens_read": tokens_read,
          "right": to_hex(right)}


def to_hex(right: np.ndarray) -> list[str]:
  """Which sequences were answered, bool [seeds, count], as a text for each seed."""
  return [np.packbits(one).tobytes().hex() for one in right]


def from_hex(cell: dict[str, Any]) -> np.ndarray:
  """The bool [seeds, count] that `to_hex` made "right" of a cell."""
  rows = [np.unpackbits(np.frombuffer(bytes.fromhex(one), np.uint8), count=cell["count"]) for one in cell["right"]]
  return np.array(rows, bool)
