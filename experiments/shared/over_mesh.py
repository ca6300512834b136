"""--mesh and --distributed: commands on several devices, and on several machines (docs/scaling.md)."""

from __future__ import annotations

import dataclasses

import jax
from absl import flags

from experiments.shared import command
from rat_jax import parallel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(command.Settings):
  """Of every command that runs on a mesh."""

  mesh: str | None = None
  distributed: bool = False

  def made_mesh(self) -> jax.sharding.Mesh | None:
    """The mesh that --mesh says, with --distributed all devices on fsdp by default; None: one device.

    With --distributed the processes find each other here, so that it must come before any device is asked for. Raises
    ValueError in each of them where their flags differ.
    """
    if self.distributed:
      parallel.start_processes()
      parallel.check_agreement({f"--{field.name}": str(getattr(self, field.name)) for field in dataclasses.fields(self)
                                if field.name != "given"})
    elif self.mesh is None:
      return None
    return parallel.make_mesh(self.mesh)


def define_flags() -> None:
  """All of `Settings`."""
  flags.DEFINE_string("mesh", None, "How devices share the work, such as data:2,fsdp:4 (axes data, fsdp, tensor,"
                      " context). Default: one device; with --distributed, all on fsdp.")
  flags.DEFINE_bool("distributed", False, "This is one of several processes, which find each other by what Cloud TPU,"
                    " SLURM, Open MPI or torchrun say in the environment.")
