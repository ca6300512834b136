"""How each axis of a mesh cuts arrays, as `rat_jax.parallel.rules` says."""

from __future__ import annotations

import numpy as np
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from experiments.pictures.canvas import COLOURS, panels
from rat_jax.parallel import AXES, rules

DEVICES, SIDE, GAP = 4, 8, 2
NOWHERE, WHOLE = -2, -1  # instead of a device: no array; an array of which every device has this part
# What is drawn of an array: (label, name, shape, the axis down, the axis across).
ARRAYS = (("a batch\nrows x tokens", "tokens", (SIDE, SIDE), 0, 1),
          ("query\nE x heads", "query", (1, SIDE, SIDE, 2), 1, 2),
          ("mlp_out\nF x E", "mlp_out", (1, SIDE, SIDE), 1, 2),
          ("keys of a cache\nheads x tokens", "keys", (1, SIDE, SIDE, SIDE, 2), 2, 3))
_SENT = {"data": "sent: gradients", "fsdp": "sent: a layer's matrices,\ngradients", "tensor": "sent: the stream",
         "context": "sent: the memory's state,\nkeys, gradients"}


def meshes() -> Figure:
  """A panel for each axis of a mesh, with four devices on it alone: the squares are arrays, the colours devices."""
  figure, axes = panels(len(AXES), len(AXES), 2.0, 6.5)
  colours = ListedColormap(["white", "0.88", *COLOURS[:DEVICES]])
  centres = [SIDE / 2 - 0.5 + i * (SIDE + GAP) for i in range(len(ARRAYS))]
  for axis, mesh_axis in zip(axes, AXES, strict=True):
    sizes = tuple(DEVICES if one == mesh_axis else 1 for one in AXES)
    mesh = AbstractMesh(sizes, AXES, (AxisType.Auto,) * len(AXES))
    gap, squares = np.full((GAP, SIDE), NOWHERE), list[np.ndarray]()
    for centre, (_, name, shape, down, across) in zip(centres, ARRAYS, strict=True):
      spec = rules.spec(name, shape, mesh)
      squares += [_owners(spec, down, across), gap]
      if (squares[-2] == WHOLE).all():
        text = "cut along\nthe batch" if any(spec) else "whole on\neach device"
        axis.text(SIDE / 2 - 0.5, centre, text, ha="center", va="center", fontsize=8)
    axis.imshow(np.concatenate(squares[:-1]), cmap=colours, vmin=NOWHERE, vmax=DEVICES - 1)
    axis.set_title(f"{mesh_axis}:{DEVICES}", fontsize=10)
    axis.set_xlabel(_SENT[mesh_axis], fontsize=8)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
  axes[0].set_yticks(centres, [label for label, *_ in ARRAYS], fontsize=8)
  return figure


def _owners(spec: PartitionSpec, down: int, across: int) -> np.ndarray:
  """The device that has each entry of a square; `WHOLE` where the axis of the mesh cuts neither of its sides."""
  of_device = np.arange(SIDE) * DEVICES // SIDE
  if spec[down]:
    return np.tile(of_device[:, None], SIDE)
  return np.tile(of_device, (SIDE, 1)) if spec[across] else np.full((SIDE, SIDE), WHOLE)
