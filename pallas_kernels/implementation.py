"""What an operation and its implementations are, and the one rule by which a call takes one of them.

An implementation is written for one device. Over several devices the compiler can split plain JAX ("xla"), but no
kernel: any other implementation is run by `split.run` on every device's share of the arguments.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax

from pallas_kernels import devices, split
from pallas_kernels.crossovers import ASSUMED, FASTEST
from pallas_kernels.table import IMPLEMENTATIONS, known_names

Arguments = tuple[Any, ...]  # of an operation
_OTHER = "Pass implementation=None to take the fastest one that serves."


@dataclasses.dataclass(frozen=True)
class Operation:
  """What all implementations of an operation share.

  Its arguments are arrays and tuples of arrays, any of them None where it may be left out; and options, by name, which
  are static and hashable.

  Attributes:
    name: that of the public function.
    axes: of the arguments, the letters of their axes: a tuple like the arguments, of a string for every array. Letters
      may be fewer than axes; those at the end then have none. B batch, T query position, S key position, N query heads,
      K key/value heads, R cache rows, H head width, L layers, n chosen blocks, C the first of trailing channels.
    results: the letters of the results, likewise.
    size: of arguments and options, how large the work is: the measure of crossovers.py.
  """

  name: str
  axes: Callable[..., tuple[split.Letters, ...]]
  results: split.Letters
  size: Callable[..., int]


def _without_limits(*arguments: Any, **options: Any) -> str | None:
  """The check of an implementation without limits: always None."""
  del arguments, options
  return None


@dataclasses.dataclass(frozen=True)
class Implementation:
  """One way to compute an operation. Its module, which is in `table.IMPLEMENTATIONS`, holds it as IMPLEMENTATION.

  Attributes:
    run: from the operation's arguments and options to its results; differentiable where the operation is.
    unsupported: of the same, or of anything else of their shapes and types: why `run` does not serve them, or None.
    runs_on: the devices that have it.
    independent: the letters of axes along which arguments may be cut: each piece of a result needs its piece alone.
  """

  run: Callable[..., Any]
  unsupported: Callable[..., str | None] = _without_limits
  runs_on: devices.Devices = devices.ANY
  independent: str = ""


_FORCED = jax.make_user_context(default_value=None)


def force(implementation: str) -> AbstractContextManager[None]:
  """A context, for `with`, in which every operation runs by this implementation, whatever name it is given.

  An operation without it raises as if it were named. Programs of inside and outside are compiled apart
  (`jax.make_user_context`).

  Raises:
    ValueError: an unknown name.
  """
  if implementation not in known_names():
    raise ValueError(f"implementation={implementation!r} is unknown; use one of {known_names()}.")
  context: AbstractContextManager[None] = _FORCED(implementation)
  return context


def call(operation: Operation, name: str | None, *arguments: Any, **options: Any) -> Any:
  """Runs the operation by the implementation that is forced or named, else by the fastest one that serves.

  The fastest is the first one in crossovers.py, of the device's kind or else assumed, that runs on the device and
  serves the work of one, whose size it reaches; else "xla".

  Raises:
    ValueError: `name` is no known name.
    NotImplementedError: the operation does not have the one that was named, or that does not run on this device, does
      not serve these arguments, or both; a forward-mode gradient.
  """
  device = devices.device_of(*jax.tree.leaves(arguments))
  name = _FORCED.value or name
  if name is None:
    implementation, cut = _fastest(operation, device, arguments, options)
  else:
    implementation, cut = _named(operation, name, device, arguments, options)
  try:
    return split.run(implementation.run, cut, arguments, operation.results, options)
  except TypeError as error:
    if "custom_vjp" not in str(error):
      raise
    raise NotImplementedError(f"{operation.name} has no forward-mode gradient (jax.jvp, jax.jacfwd); take a reverse"
                              " one: jax.grad, jax.vjp or jax.jacrev.") from error


def load(operation: str, name: str) -> Implementation:
  """Imports an implementation of the table."""
  found: Implementation = importlib.import_module(IMPLEMENTATIONS[operation][name]).IMPLEMENTATION
  return found


# An implementation, and how its arguments are cut over a mesh: None where they are not, or the compiler does it.
Taken = tuple[Implementation, split.Cut | None]


def _cut(operation: Operation, implementation: Implementation, arguments: Arguments) -> split.Cut | None:
  return split.cut(arguments, operation.axes(*arguments), implementation.independent)


def _fastest(operation: Operation, device: devices.Device, arguments: Arguments, options: dict[str, Any]) -> Taken:
  for name, least in FASTEST.get(device.kind, ASSUMED).get(operation.name, {}).items():
    implementation = load(operation.name, name)
    if implementation.runs_on.unsupported(device):
      continue
    cut = _cut(operation, implementation, arguments)
    if cut and not cut.complete:  # the compiler may know better how to split plain JAX
      continue
    share = cut.share(arguments) if cut else arguments
    if operation.size(*share, **options) >= least and not implementation.unsupported(*share, **options):
      return implementation, cut
  return load(operation.name, "xla"), None


def _named(operation: Operation, name: str, device: devices.Device, arguments: Arguments, options: dict[str, Any]
           ) -> Taken:
  available = tuple(IMPLEMENTATIONS[operation.name])
  if name not in known_names():
    raise ValueError(f"implementation={name!r} is unknown; use None or, for {operation.name}, one of {available}.")
  if name not in available:
    raise NotImplementedError(
        f"implementation={name!r} does not exist for {operation.name}; it has {available}. {_OTHER}")
  try:
    implementation = load(operation.name, name)
  except ImportError as error:
    raise NotImplementedError(f"implementation={name!r} of {operation.name} is no part of this installation: {error}."
                              f" {_OTHER}") from error
  cut = None if name == "xla" else _cut(operation, implementation, arguments)
  reasons = [implementation.runs_on.unsupported(device),
             implementation.unsupported(*(cut.share(arguments) if cut else arguments), **options)]
  if any(reasons):
    raise NotImplementedError(f"implementation={name!r} of {operation.name} {', and '.join(filter(None, reasons))}."
                              f" {_OTHER}")
  return implementation, cut
