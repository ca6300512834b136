"""Lets the kernels for TPUs run on any device, in Pallas' interpreter: slowly, to see whether they are right."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator
from typing import Any

from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import check, devices, implementation
from pallas_kernels.implementation import Implementation
from pallas_kernels.table import IMPLEMENTATIONS

NAME = "pallas_tpu"


@contextlib.contextmanager
def kernels(**parameters: Any) -> Iterator[None]:
  """A context in which every device has them, with parameters of `pltpu.InterpretParams`; unwritten memory is NaN."""
  load, interpret = implementation.load, pltpu.InterpretParams(uninitialized_memory="nan", **parameters)

  def of_interpreter(operation: str, name: str) -> Implementation:
    if name != NAME:
      return load(operation, name)
    made: Implementation = importlib.import_module(IMPLEMENTATIONS[operation][name]).made(interpret)
    return dataclasses.replace(made, runs_on=devices.ANY)

  modules: tuple[Any, ...] = (implementation, check)
  try:
    for module in modules:
      module.load = of_interpreter
    yield
  finally:
    for module in modules:
      module.load = load
