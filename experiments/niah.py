"""What the needle scripts share: models of several seeds side by side, spread over the devices."""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import os
import pathlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rat_jax import RATPlusConfig, RATPlusLM
from rat_jax.evaluate import mini_niah
from rat_jax.evaluate.needles import answered
from rat_jax.train import Checkpoints

DEVICE = threading.Lock()  # held by a batch of `which_right`: programs compile side by side and run one by one


@functools.cache
def mesh() -> Mesh:
  """All devices in a row, along the axis of seeds."""
  return jax.make_mesh((jax.device_count(),), ("seeds",), axis_types=(AxisType.Auto,))


def over_seeds() -> NamedSharding:
  """The leading axis spread over the devices."""
  return NamedSharding(mesh(), PartitionSpec("seeds"))


def load(folder: str) -> tuple[RATPlusConfig, Any]:
  """(config, the parameters of all seeds, stacked) of a folder of seed-*."""
  paths = sorted(pathlib.Path(folder).glob("seed-*"), key=lambda path: int(path.name.removeprefix("seed-")))
  if not paths:
    raise FileNotFoundError(f"{folder} holds no seed-* checkpoints; experiments.sft_niah makes them.")
  configs, params, notes = zip(*(Checkpoints(path).load_params() for path in paths), strict=True)
  if notes[0].get("seeds", len(paths)) != len(paths):
    raise ValueError(f"{folder} holds {len(paths)} of {notes[0]['seeds']} seeds; run experiments.sft_niah to its end.")
  if configs[0].vocab_size != mini_niah.VOCAB_SIZE:
    raise ValueError(f"{folder} has vocab_size={configs[0].vocab_size}; mini-NIAH's is {mini_niah.VOCAB_SIZE}.")
  return configs[0], jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)


def prepare_threads() -> None:
  """Makes it safe to compile while other programs run; to be called before JAX does anything.

  XLA times kernels on the GPU while it compiles and records programs as graphs: each spoils the other, and more threads
  than one end in an error of cuDNN (jax 0.11.2). Both are turned off.
  """
  given = os.environ.get("XLA_FLAGS", "")
  os.environ["XLA_FLAGS"] = f"{given} --xla_gpu_autotune_level=0 --xla_gpu_enable_command_buffer="


def side_by_side(jobs: Sequence[Callable[[], Any]], workers: int = 8) -> Iterator[tuple[int, Any]]:
  """(number, result) of every job as it is done; so many at a time, for the sake of what they compile."""
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    futures = {pool.submit(job): i for i, job in enumerate(jobs)}
    try:
      for future in concurrent.futures.as_completed(futures):
        yield futures[future], future.result()
    finally:
      pool.shutdown(cancel_futures=True)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _answered(model: RATPlusLM, prompts: tuple[int, ...], arguments: tuple[tuple[str, Any], ...], params, batch,
              row_ids):
  return jax.vmap(lambda p: answered(model, p, batch, prompt_lengths=np.array(prompts), row_ids=row_ids,
                                     **dict(arguments)))(params)


def which_right(model: RATPlusLM, params: Any, parts: Sequence[dict[str, jax.Array]], prompts: Sequence[int], *,
                batch_size: int, **arguments: Any) -> np.ndarray:
  """Which sequences every seed answers, bool [parts, seeds, count]; all parts go through one program.

  Args:
    params: of all seeds, stacked.
    parts: dicts of `mini_niah.batch`, each of as many sequences; prompts: where the prompts of each part end.
    batch_size: about how many sequences to run at a time.
    arguments: `mode` and others of `model.apply`. Random selection depends on a sequence's number in its part.
  """
  count = len(parts[0]["tokens"])
  room = max(1, batch_size // len(parts))
  every = max(n for n in range(1, room + 1) if count % n == 0)  # sequences of each part in a batch
  of_rows = tuple(prompt for prompt in prompts for _ in range(every))
  program, right = None, []
  for first in range(0, count, every):
    with DEVICE:
      cut = [jax.tree.map(lambda x, first=first: x[first:first + every], part) for part in parts]
      batch = jax.tree.map(lambda *x: jnp.concatenate(x), *cut)
      ids = jnp.tile(jnp.arange(first, first + every, dtype=jnp.int32), len(parts))
    if program is None:
      program = _answered.lower(model, of_rows, tuple(arguments.items()), params, batch, ids).compile()
    with DEVICE:
      right.append(np.asarray(program(params, batch, ids)))
  return np.concatenate([x.reshape(len(x), len(parts), every) for x in right], axis=2).swapaxes(0, 1)


def fingerprint(params: Any) -> str:
  """Eight digits that tell parameters apart."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(params):
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()[:8]


def to_hex(right: np.ndarray) -> list[str]:
  """Which sequences were answered, bool [seeds, count], as a text for each seed."""
  return [np.packbits(one).tobytes().hex() for one in right]


def from_hex(cell: dict[str, Any]) -> np.ndarray:
  """The bool [seeds, count] that `to_hex` made "right" of a cell."""
  rows = [np.unpackbits(np.frombuffer(bytes.fromhex(one), np.uint8), count=cell["count"]) for one in cell["right"]]
  return np.array(rows, bool)
