"""TPUs by the names that their compiler knows them by, with the public figures of a chip."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax

from pallas_kernels.devices import kind_of

GiB, GB, TFLOPS = 2**30, 1e9, 1e12


@dataclasses.dataclass(frozen=True)
class Chip:
  """What a maker's page says of a chip (Google Cloud's pages of v5e, v6e and TPU7x, November 2026).

  Attributes:
    kind: what jax calls a device of it.
    products: operations per second of matrix products in bfloat16.
    memory, bandwidth: bytes, and bytes per second of reads and writes.
    link: bytes per second of one link in one direction; a chip has two links in each dimension of the torus.
    dimensions: of the torus, the most.
    devices: devices that a program sees of one chip; they share the figures above.
    clock: per second. No page says it: it is what `products` implies for the matrix units of a core.
    cores: of a device; the parallel axes of a kernel's grid are spread over them.
  """

  kind: str
  products: float
  memory: float
  bandwidth: float
  link: float
  dimensions: int = 2
  devices: int = 1
  clock: float = 1.75e9
  cores: int = 1

  @property
  def vector(self) -> float:
    """Operations per second of a device's vector units: four units of 8 x 128 lanes in every core."""
    return 4 * 8 * 128 * self.clock * self.cores


CHIPS = {"v5e": Chip("TPU v5 lite", 197 * TFLOPS, 16 * GiB, 819 * GB, 50 * GB, clock=1.5e9),
         "v5p": Chip("TPU v5", 459 * TFLOPS, 95 * GiB, 2765 * GB, 100 * GB, 3, cores=2),
         "v6e": Chip("TPU v6 lite", 918 * TFLOPS, 32 * GiB, 1638 * GB, 100 * GB),
         "tpu7x": Chip("TPU7x", 2307 * TFLOPS, 192 * GiB, 7380 * GB, 100 * GB, 3, devices=2, clock=2.2e9)}
_EXAMPLE = "such as v5e:16x16, v5p:4x8x8, v6e:16x16 or tpu7x:4x8x8"


def chip_of_device(device: Any) -> Chip | None:
  """The chip of a jax device, where it is one of these."""
  return next((chip for chip in CHIPS.values() if chip.kind == kind_of(device)), None)


def programs_for(kind: str, platform: str = "gpu") -> AbstractContextManager[Any]:
  """A context in which programs are traced for a device of a kind, as "NVIDIA H200", that need not be here."""
  device = jax.sharding.AbstractDevice(kind, num_cores=None, platform=platform)
  mesh = jax.sharding.AbstractMesh((1,), ("device",), (jax.sharding.AxisType.Auto,), abstract_device=device)
  return jax.sharding.use_abstract_mesh(mesh)


def chip_of(topology: str) -> Chip:
  """The chip of a topology. Raises ValueError for a name that is none."""
  found = re.fullmatch(r"(\w+)(?::(\d+(?:x\d+)*))?", topology)
  if not found or found[1] not in CHIPS:
    raise ValueError(f"--topology={topology} is unknown; use {', '.join(CHIPS)} with the chips of every dimension,"
                     f" {_EXAMPLE}.")
  sizes = [int(size) for size in (found[2] or "").split("x") if size]
  most = CHIPS[found[1]].dimensions
  if not 2 <= len(sizes) <= most or 0 in sizes:
    raise ValueError(f"--topology={topology} has the sizes {sizes}; give {'2 or 3' if most > 2 else '2'} of 1 or more"
                     f" for {found[1]}, {_EXAMPLE}.")
  return CHIPS[found[1]]


def devices_of(topology: str) -> Sequence[Any]:
  """The devices of a topology, which need not be here; to be called before any other device is asked for.

  Raises:
    ValueError: a topology that there is none of; ImportError: no compiler for TPUs.
  """
  from jax.experimental import topologies

  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no TPU is looked for, and so none has to be kept for one process
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  if "JAX_PLATFORMS" not in os.environ:
    jax.config.update("jax_platforms", "cpu")
  try:
    import libtpu  # noqa: F401  the compiler
  except ImportError as error:
    raise ImportError("compiling for a TPU needs libtpu, on any machine with Linux; run pip install -e '.[tpu]'."
                      ) from error
  try:
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
  except jax.errors.JaxRuntimeError as error:
    if not str(error).startswith("INVALID_ARGUMENT"):
      raise
    raise ValueError(f"--topology={topology}: {str(error).removeprefix('INVALID_ARGUMENT: ')}; use one {_EXAMPLE}."
                     ) from error
