"""What the needle scripts share: models of several seeds side by side, spread over the devices."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rat_jax import RATPlusConfig
from rat_jax.evaluate import mini_niah
from rat_jax.train import Checkpoints


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
  configs, params, _ = zip(*(Checkpoints(path).load_params() for path in paths), strict=True)
  if configs[0].vocab_size != mini_niah.VOCAB_SIZE:
    raise ValueError(f"{folder} has vocab_size={configs[0].vocab_size}; mini-NIAH's is {mini_niah.VOCAB_SIZE}.")
  return configs[0], jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)


def to_hex(right: np.ndarray) -> list[str]:
  """Which sequences were answered, bool [seeds, count], as a text for each seed."""
  return [np.packbits(one).tobytes().hex() for one in right]


def from_hex(cell: dict[str, Any]) -> np.ndarray:
  """The bool [seeds, count] that `to_hex` made "right" of a cell."""
  rows = [np.unpackbits(np.frombuffer(bytes.fromhex(one), np.uint8), count=cell["count"]) for one in cell["right"]]
  return np.array(rows, bool)
