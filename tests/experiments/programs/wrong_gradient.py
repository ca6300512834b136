"""bench_ops where a gradient is a fifth too large."""

from __future__ import annotations

from experiments import bench_cases, bench_ops, common

right = bench_cases.with_gradients


def scaled(*arguments, **made):
  values, gradients = right(*arguments, **made)
  return values, gradients | {"k": (1.2 if made["k"].dtype == "bfloat16" else 1) * gradients["k"]}


bench_cases.with_gradients = scaled
common.run(bench_ops.main)
