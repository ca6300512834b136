"""One program on many devices: a mesh, and one table of how arrays are cut over its axes (docs/scaling.md)."""

from rat_jax.parallel.mesh import AXES, make_mesh
from rat_jax.parallel.placing import on_mesh, shard, sharded, shardings
from rat_jax.parallel.processes import check_agreement, from_rows, rows_of_process, start as start_processes

__all__ = ["AXES", "check_agreement", "from_rows", "make_mesh", "on_mesh", "rows_of_process", "shard", "sharded",
           "shardings", "start_processes"]
