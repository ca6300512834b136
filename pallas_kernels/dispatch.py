"""The one rule by which an operation picks its implementation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax

from pallas_kernels.crossovers import FASTEST

MULTIPROCESSORS = 132  # of an H100 or H200, for which the Mosaic kernels cut their work
IMPLEMENTATIONS = ("xla", "mosaic_gpu", "cudnn", "cudnn_masked")  # of any operation
# The compute capabilities of GPUs, least and most: Mosaic's kernels use Hopper's instructions, later GPUs have others.
_HOPPER = (9.0, 9.0, "Hopper GPUs (compute capability 9.0)")
_AMPERE = (8.0, math.inf, "Ampere GPUs (compute capability 8.0) and newer")
_CAPABILITY = {"mosaic_gpu": _HOPPER, "cudnn": _AMPERE, "cudnn_masked": _AMPERE}


def serves_all() -> None:
  """Why an implementation that serves any arguments does not serve some: for no reason."""


def resolve(operation: str, implementation: str | None, available: Mapping[str, Callable[[], str | None]], size: int
            ) -> str:
  """Returns the name of the implementation to run.

  Args:
    operation: the operation's name.
    implementation: a name, or None for the fastest that was measured on this kind of device at this size
      (crossovers.py), where it serves; else "xla". Over several devices, outside `jax.shard_map`, "xla" too: the
      compiler can split that and no kernel.
    available: the implementations that the operation has; each says why it does not serve these arguments, or None.
    size: how large the work is, in the operation's own measure.

  Raises:
    ValueError: `implementation` is no known name.
    NotImplementedError: the operation does not have the one that was named, or that does not run on this device, does
      not serve these arguments, or both.
  """
  if implementation is None:
    return _fastest(operation, available, size)
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f"implementation={implementation!r} is unknown; use None or, for {operation}, one of"
                     f" {tuple(available)}.")
  other = "Pass implementation=None to take the fastest one that serves."
  if implementation not in available:
    raise NotImplementedError(
        f"implementation={implementation!r} does not exist for {operation}; it has {tuple(available)}. {other}")
  reasons = _reasons(implementation, available[implementation])
  if reasons:
    raise NotImplementedError(f"implementation={implementation!r} of {operation} {', and '.join(reasons)}. {other}")
  return implementation


def check_device(implementation: str) -> str | None:
  """Why the implementation does not run on the first device, or None."""
  if implementation not in _CAPABILITY:
    return None
  (least, most, of_whom), device = _CAPABILITY[implementation], jax.devices()[0]
  has = float(getattr(device, "compute_capability", 0)) if device.platform == "gpu" else 0.0
  return None if least <= has <= most else f"runs on {of_whom}, not on {device.device_kind!r}"


def _reasons(implementation: str, serves: Callable[[], str | None]) -> list[str]:
  """Why the implementation does not run on this device, and why it does not serve the arguments; [] if it does both."""
  of_device = check_device(implementation)
  try:
    of_arguments = serves()
  except ImportError:  # what is for other devices may be no part of this installation
    if of_device is None:
      raise
    of_arguments = None
  return [reason for reason in (of_device, of_arguments) if reason]


def _fastest(operation: str, available: Mapping[str, Callable[[], str | None]], size: int) -> str:
  mesh = jax.sharding.get_abstract_mesh()
  alone = jax.device_count() == 1 or (mesh.axis_names and set(mesh.manual_axes) == set(mesh.axis_names))
  for name, least in FASTEST.get(jax.devices()[0].device_kind, {}).get(operation, {}).items():
    if alone and size >= least and available[name]() is None:
      return name
  return "xla"
