"""Prints bytes, operations and floors of some cases of bench_ops."""

from __future__ import annotations

import sys

from absl import flags

from experiments.bench_cases import Case, floor, work
from experiments.kernel_times import Speeds

flags.FLAGS([sys.argv[0], "--heads=2", "--kv_heads=1", "--head_dim=8"])
for case in (Case("scan", 10), Case("prefill", 4), Case("prefill", 4, 1, 2, 0, 1), Case("decode", 32, 3, 16),
             Case("prefill", 4, gradient=True), Case("scan", 10, gradient=True)):
  print(*work(case), *(f"{floor(case, Speeds(10, read, 1000)):g}" for read in (5, 20)))
