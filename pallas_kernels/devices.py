"""The device that a program is for: a device of its arguments' mesh, which need not be one of this process.

The only file that asks which devices there are. An array knows its mesh (`jax.typeof(x).sharding.mesh`), inside
`jax.jit` too, and a mesh the kind of its devices; so a program that is compiled for another machine takes that
machine's kernels.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax

MULTIPROCESSORS = 132  # of an H100 or H200, for which the Mosaic kernels cut their work
# CUDA compute capabilities by the names of GPUs, for kinds of which this process has none.
_CAPABILITIES = {"V100": 7.0, "T4": 7.5, "A100": 8.0, "A800": 8.0, "A30": 8.0, "A10": 8.6, "A10G": 8.6, "A40": 8.6,
                 "L4": 8.9, "L40": 8.9, "L40S": 8.9, "H100": 9.0, "H200": 9.0, "H800": 9.0, "H20": 9.0, "GH200": 9.0,
                 "B200": 10.0, "GB200": 10.0, "B300": 10.3, "GB300": 10.3, "3090": 8.6, "A6000": 8.6, "4090": 8.9,
                 "5090": 12.0}
_OTHER_NAMES = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}


def kind_of(device: Any) -> str:
  """What a jax device, or an abstract one, is called; TPUs with two names by the one that tables here have."""
  kind: str = device.device_kind
  return _OTHER_NAMES.get(kind, kind)


@dataclasses.dataclass(frozen=True)
class Device:
  """The kind of device that a program is for.

  Attributes:
    platform: "cpu", "gpu" or "tpu".
    kind: the name that the maker gave it, as "NVIDIA H200".
    capability: the CUDA compute capability of an NVIDIA GPU, where it is known.
    generation: of a TPU: 5 of a "TPU v5 lite".
    count: the devices of the arguments' mesh, over which the compiler spreads the program; 1 without a mesh.
    manual: whether every axis of that mesh is Manual, as inside `jax.shard_map`: then the program is one device's.
  """

  platform: str
  kind: str
  capability: float | None = None
  generation: int | None = None
  count: int = 1
  manual: bool = False


@dataclasses.dataclass(frozen=True)
class Devices:
  """The devices on which an implementation runs: of one platform (None: of any).

  `least` and `most` are compute capabilities of GPUs, and generations of TPUs.
  """

  described: str
  platform: str | None = None
  least: float = 0.0
  most: float = math.inf

  def unsupported(self, device: Device) -> str | None:
    """Why an implementation for these devices does not run on this one, or None."""
    serves = self.platform in (None, device.platform)
    if serves and self.platform in ("gpu", "tpu"):
      version = device.capability if self.platform == "gpu" else device.generation
      serves = version is not None and self.least <= version <= self.most
    return None if serves else f"runs on {self.described}, not on {device.kind!r}"


ANY = Devices("any device")
HOPPER = Devices("Hopper GPUs (compute capability 9.0)", "gpu", 9.0, 9.0)  # later GPUs lack some of its instructions
AMPERE = Devices("Ampere GPUs (compute capability 8.0) and newer", "gpu", 8.0)

TPU = Devices("TPUs from v5e and v5p on", "tpu", 5)


def device_of(*arrays: Any) -> Device:
  """The device of an operation on these arrays: of their mesh, else of the mesh in context, else the first device."""
  mesh = mesh_of(*arrays)
  of = jax.devices()[0] if mesh.empty or mesh.abstract_device is None else mesh.abstract_device
  platform = "gpu" if of.platform in ("cuda", "rocm") else of.platform
  return Device(platform, kind_of(of), _capability(of.device_kind) if platform == "gpu" else None,
                _generation(of.device_kind) if platform == "tpu" else None, 1 if mesh.empty else mesh.size,
                bool(mesh.axis_names) and set(mesh.manual_axes) == set(mesh.axis_names))


def is_here(device: Device) -> bool:
  """Whether this process has a device of that kind, rather than compiling for another machine."""
  return any(kind_of(one) == device.kind for one in jax.devices())


def platform_of(*arrays: Any) -> str:
  """The platform of `device_of`: "cpu", "gpu" or "tpu"."""
  return device_of(*arrays).platform


def mesh_of(*arrays: Any) -> jax.sharding.AbstractMesh:
  """The mesh of the first array that has one, else the mesh in context, else an empty one."""
  meshes = (jax.typeof(x).sharding.mesh for x in arrays)
  return next((mesh for mesh in meshes if not mesh.empty), jax.sharding.get_abstract_mesh())


def _capability(kind: str) -> float | None:
  present = [str(getattr(device, "compute_capability", "")) for device in jax.devices() if device.device_kind == kind]
  if present:
    return float(present[0]) if re.fullmatch(r"\d+\.\d+", present[0]) else None  # AMD's are no numbers
  names = re.split(r"[\s-]+", kind)
  return next((_CAPABILITIES[name] for name in names if name in _CAPABILITIES), None)


def _generation(kind: str) -> int | None:
  found = re.match(r"TPU ?v?(\d+)", kind)
  return int(found.group(1)) if found else None
