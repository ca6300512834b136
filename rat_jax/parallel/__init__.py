"""One program on many devices: a mesh, and one table of how arrays are cut over its axes (docs/scaling.md)."""

from rat_jax.parallel.mesh import AXES, make_mesh
from rat_jax.parallel.placing import shard, sharded, shardings

__all__ = ["AXES", "make_mesh", "shard", "sharded", "shardings"]
