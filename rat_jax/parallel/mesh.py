"""Meshes of devices, by their text form."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType

# data     rows; parameters lie on every device
# fsdp     rows; every device keeps its part of parameters and optimizer state, and gathers a layer when it needs it
# tensor   heads, the MLP's width and the vocabulary
# context  the tokens of a row
AXES = ("data", "fsdp", "tensor", "context")
_EXAMPLE = "such as data:2,fsdp:4"


def make_mesh(text: str | None = None, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
  """A mesh with the axes data, fsdp, tensor and context; those that the text does not name have size 1.

  Args:
    text: "data:2,fsdp:4"; None puts all devices on fsdp.
    devices: default all, of all processes.

  Raises:
    ValueError: an axis that is unknown or repeated, a size that is no count, a mesh of another number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = sizes_of(text, len(devices))
  # The chips of a TPU are a torus, whose axes are split where the mesh needs it (jax.make_mesh refuses that).
  laid_out = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  return jax.sharding.Mesh(laid_out, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def sizes_of(text: str | None, count: int) -> tuple[int, ...]:
  """The sizes of `AXES` in a mesh of `count` devices. Raises ValueError as `make_mesh`."""
  if text is None:
    text = f"fsdp:{count}"
  if not isinstance(text, str):
    raise ValueError(f"mesh={text!r}; give a text {_EXAMPLE}.")
  sizes: dict[str, int] = {}
  for part in text.split(","):
    name, colon, size = (piece.strip() for piece in part.partition(":"))
    if not part.strip():
      raise ValueError(f"mesh={text!r} has an empty part; give an axis and its size between commas, {_EXAMPLE}.")
    if not colon or ":" in size:
      raise ValueError(f"mesh={text!r}: {part.strip()!r} is no axis, colon and size; write {_EXAMPLE}.")
    if name not in AXES:
      raise ValueError(f"mesh={text!r}: the axis {name!r} is unknown; use {', '.join(AXES)}, {_EXAMPLE}.")
    if name in sizes:
      raise ValueError(f"mesh={text!r}: the axis {name} is repeated; give every axis once.")
    if not (size.isascii() and size.isdigit()) or int(size) < 1:
      raise ValueError(f"mesh={text!r}: {name} has the size {size!r}; give a count of 1 or more, {_EXAMPLE}.")
    sizes[name] = int(size)
  product = math.prod(sizes.values())
  if product != count:
    fits = [f"{name}:{count * size // product}" for name, size in sizes.items() if count * size % product == 0]
    advice = f", such as {' or '.join(fits)} instead" if fits else ""
    raise ValueError(f"mesh={text!r} is of {product} devices, and there are {count}; give sizes whose product is"
                     f" {count}{advice}.")
  return tuple(sizes.get(name, 1) for name in AXES)
