"""The device that figures come from, and how programs are compiled for it."""

from __future__ import annotations

import os

import jax


def name() -> str:
  """The processor or card that the figures come from."""
  first = jax.devices()[0]
  return first.device_kind if first.platform != "cpu" else "CPU"


def compile_quickly() -> None:
  """Has XLA compile for a CPU in half the time, for a short command; to be called before the first array is made.

  The numbers stay the same to three decimals. What the environment's XLA_FLAGS say stays, and counts more.
  """
  quick = ["--xla_backend_optimization_level=1", "--xla_llvm_disable_expensive_passes=true"]
  if jax.__version_info__ < (0, 11):  # newer ones stop at this flag, and have no older emitters
    quick.append("--xla_cpu_use_fusion_emitters=false")
  os.environ["XLA_FLAGS"] = " ".join([*quick, os.environ.get("XLA_FLAGS", "")])


def out_of_memory(error: jax.errors.JaxRuntimeError) -> bool:
  """Whether it says that the device's memory did not suffice."""
  return "RESOURCE_EXHAUSTED" in str(error)
