"""--mesh and --distributed: commands on several devices, and on several machines (docs/scaling.md)."""

from __future__ import annotations

import dataclasses
import os

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
      return parallel.make_mesh(self.mesh)
    for name in ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
      if os.environ.get(name, "1") != "1":
        print(f"{name}={os.environ[name]} in the environment, but no --distributed: this process does all of the work",
              flush=True)
        break
    return None if self.mesh is None else parallel.make_mesh(self.mesh)


def described(mesh: jax.sharding.Mesh | None) -> str:
  """", mesh fsdp:4,tensor:2" of a mesh, nothing of one device."""
  axes = ",".join(f"{name}:{size}" for name, size in mesh.shape.items() if size > 1) if mesh else ""
  return axes and f", mesh {axes}"


def define_flags() -> None:
  """All of `Settings`."""
  flags.DEFINE_string("mesh", None, "How devices share the work, such as data:2,fsdp:4 (axes data, fsdp, tensor,"
                      " context). Default: one device; with --distributed, all on fsdp.")
  flags.DEFINE_bool("distributed", False, "This is one of several processes, which find each other by what Cloud TPU,"
                    " SLURM, Open MPI or torchrun say in the environment.")
