"""`experiments.bench_model` with a kernel of decode attention that gives so many times what it should, as the first
argument says. A processor is said to run it fastest.
"""

from __future__ import annotations

import sys

from experiments import bench_model
from experiments.shared import command
from pallas_kernels import crossovers, table
from pallas_kernels.decode import xla
from pallas_kernels.implementation import Implementation

IMPLEMENTATION = Implementation(lambda *arguments: tuple(FACTOR * x for x in xla.decode_attention(*arguments)))

if __name__ == "__main__":
  FACTOR = float(sys.argv.pop(1))
  table.IMPLEMENTATIONS["decode_attention"]["scaled"] = "__main__"
  crossovers.FASTEST["cpu"] = {"decode_attention": {"scaled": 0}}
  command.run(bench_model.main, bench_model.Settings, bench_model.define_flags)
