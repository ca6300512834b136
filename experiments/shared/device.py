"""The device that figures come from, and how programs are compiled for it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import jax


def name() -> str:
  """The processor or card that the figures come from."""
  first = jax.devices()[0]
  return first.device_kind if first.platform != "cpu" else "CPU"


def compile_quickly() -> None:
  """Has XLA compile for a CPU in half the time, for a short command; to be called before the first array is made.

  The numbers stay the same to three decimals. What the environment's XLA_FLAGS say stays, and counts more.
  """
  # A program is compiled in one piece: two of them side by side are then faster than the pieces of one.
  quick = ["--xla_backend_optimization_level=1", "--xla_llvm_disable_expensive_passes=true",
           "--xla_cpu_parallel_codegen_split_count=1"]
  if jax.__version_info__ < (0, 11):  # newer ones stop at this flag, and have no older emitters
    quick.append("--xla_cpu_use_fusion_emitters=false")
  os.environ["XLA_FLAGS"] = " ".join([*quick, os.environ.get("XLA_FLAGS", "")])


@contextlib.contextmanager
def unoptimized() -> Iterator[None]:
  """Inside, programs are compiled as quickly as can be, and run slowly: for what runs once."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  try:
    yield
  finally:
    jax.config.update("jax_disable_most_optimizations", before)


def out_of_memory(error: jax.errors.JaxRuntimeError) -> bool:
  """Whether it says that the device's memory did not suffice."""
  return "RESOURCE_EXHAUSTED" in str(error)
