"""What an operation and its implementations are, and the one rule by which a call takes one of them.

An implementation is written for one device. Over several devices the compiler can split plain JAX ("xla"), but no
kernel: any other implementation is run by `split.run` on every device's share of the arguments. Where the mesh cuts
sequences, pieces of a result need more than their pieces: `Implementation.over_context` fetches that.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import checked, devices, split
from pallas_kernels.crossovers import ASSUMED, FASTEST, PREDICTED
from pallas_kernels.table import IMPLEMENTATIONS, known_names

Arguments = tuple[Any, ...]  # of an operation
Run = Callable[..., Any]
_OTHER = "Pass implementation=None to take the fastest one that serves."
_OUTSIDE = "Leave pallas_kernels.force to take the fastest one that serves."


@dataclasses.dataclass(frozen=True)
class Sequences:
  """Along what the mesh axis "context" cuts an operation's arguments.

  Attributes:
    letter: of the axis that is cut: T or R.
    fills: what lengths are filled up with that do not divide, by argument; None: they are not cut then.
    unit: of the arguments: what the length of a piece is a multiple of.
  """

  letter: str
  fills: tuple[float, ...] | None = None
  unit: Callable[..., int] = lambda *_: 1


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
    sequences: along what a mesh may cut sequences.
    entry: of arguments and options, the entry of crossovers.py, where that is not the operation's name.
  """

  name: str
  axes: Callable[..., tuple[split.Letters, ...]]
  results: split.Letters
  size: Callable[..., int]
  sequences: Sequences | None = None
  entry: Callable[..., str] | None = None


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
    over_context: as `run`, of pieces of sequences on the devices of the axis "context", inside `jax.shard_map`; None
      where it has no such form.
  """

  run: Run
  unsupported: Callable[..., str | None] = _without_limits
  runs_on: devices.Devices = devices.ANY
  independent: str = ""
  over_context: Run | None = None


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


def is_forced() -> bool:
  """Whether this is inside `force`."""
  return _FORCED.value is not None


def call(operation: Operation, name: str | None, *arguments: Any, **options: Any) -> Any:
  """Runs the operation by the implementation that is forced or named, else by the fastest one that serves.

  The fastest is the first one in crossovers.py, of the device's kind or else assumed, that runs on the device and
  serves the work of one, whose size it reaches; else "xla". What is predicted there is taken of a device that is here
  only after `check.check_device`.

  Raises:
    ValueError: `name` is no known name.
    NotImplementedError: the operation does not have the one that was named, or that does not run on this device, does
      not serve these arguments, or both; a forward-mode gradient.
  """
  device = devices.device_of(*jax.tree.leaves(arguments))
  name = _FORCED.value or name
  whole = arguments
  arguments = _filled_up(operation, arguments)
  if name is None:
    implementation, cut = _fastest(operation, device, arguments, options)
  else:
    implementation, cut = _named(operation, name, device, arguments, options)
  run = implementation.over_context if cut and cut.of_sequences else implementation.run
  assert run is not None
  try:
    return _as_long_as(operation, whole, split.run(run, cut, arguments, operation.results, options))
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
  sequence = operation.sequences if implementation.over_context else None
  letters, unit = (sequence.letter, sequence.unit(*arguments)) if sequence else ("", 1)
  return split.cut(arguments, operation.axes(*arguments), implementation.independent + letters, unit)


def _filled_up(operation: Operation, arguments: Arguments) -> Arguments:
  """The arguments with sequences that the mesh's pieces divide; those of fewer tokens than pieces as they are."""
  pieces, sequence = split.pieces(arguments), operation.sequences
  if pieces == 1 or sequence is None or sequence.fills is None:
    return arguments

  def of_array(fill: float, x: jax.Array, letters: str) -> jax.Array:
    widths = [(0, -n % pieces if letter == sequence.letter and n >= pieces else 0)
              for n, letter in itertools.zip_longest(x.shape, letters)]
    return jnp.pad(x, widths, constant_values=fill) if any(map(any, widths)) else x

  return tuple(jax.tree.map(functools.partial(of_array, fill), *of)
               for *of, fill in zip(arguments, operation.axes(*arguments), sequence.fills, strict=True))


def _as_long_as(operation: Operation, arguments: Arguments, results: Any) -> Any:
  """The results without what was filled up."""
  sequence, pieces = operation.sequences, split.pieces(arguments)
  if pieces == 1 or sequence is None or sequence.fills is None:
    return results
  letters = operation.axes(*arguments)
  length = next(n for x, of in zip(*map(jax.tree.leaves, (arguments, letters)), strict=True)
                for n, letter in zip(x.shape, of, strict=False) if letter == sequence.letter)

  def of_array(letters: str, x: jax.Array) -> jax.Array:
    return x[(*(slice(length if letter == sequence.letter else None) for letter in letters),)]

  return jax.tree.map(lambda of, part: jax.tree.map(lambda x: of_array(of, x), part), operation.results, results)


def _fastest(operation: Operation, device: devices.Device, arguments: Arguments, options: dict[str, Any]) -> Taken:
  entry = operation.entry(*arguments, **options) if operation.entry else operation.name
  for name, least in _crossovers(entry, device).items():
    implementation = load(operation.name, name)
    if implementation.runs_on.unsupported(device):
      continue
    cut = _cut(operation, implementation, arguments)
    if cut and not cut.complete:  # the compiler may know better how to split plain JAX
      continue
    share = cut.share(arguments) if cut else arguments
    if operation.size(*share, **options) >= least and not implementation.unsupported(*share, **options):
      return implementation, cut
  return _in_plain_jax(operation, arguments)


def _crossovers(entry: str, device: devices.Device) -> dict[str, int]:
  """Measured; else predicted, where the kernels were checked or nobody could; else assumed."""
  if device.kind in FASTEST:
    return FASTEST[device.kind].get(entry, {})
  predicted = PREDICTED.get(device.kind, {}).get(entry)
  if predicted is None:
    return ASSUMED.get(entry, {})
  if devices.is_here(device) and not checked.has_passed(device):
    _say_once(f"operations take plain JAX on {device.kind!r}: " + (
        "programs of several processes take kernels only by name; with pallas_kernels.force(\"pallas_tpu\") all do."
        if jax.process_count() > 1 else "its kernels were not checked, or did not pass; call rat_jax.check_device(),"
        " which should take less than two minutes and leaves a file."))
    return {}
  return predicted


@functools.cache
def _say_once(text: str) -> None:
  warnings.warn(text, stacklevel=1)


def _in_plain_jax(operation: Operation, arguments: Arguments) -> Taken:
  """The compiler splits plain JAX over all axes of a mesh but that of sequences."""
  implementation = load(operation.name, "xla")
  cut = _cut(operation, implementation, arguments) if split.pieces(arguments) > 1 else None
  return implementation, cut if cut and cut.of_sequences else None


def _named(operation: Operation, name: str, device: devices.Device, arguments: Arguments, options: dict[str, Any]
           ) -> Taken:
  available, other = tuple(IMPLEMENTATIONS[operation.name]), _OUTSIDE if is_forced() else _OTHER
  if name not in known_names():
    raise ValueError(f"implementation={name!r} is unknown; use None or, for {operation.name}, one of {available}.")
  if name not in available:
    raise NotImplementedError(
        f"implementation={name!r} does not exist for {operation.name}; it has {available}. {other}")
  try:
    implementation = load(operation.name, name)
  except ImportError as error:
    raise NotImplementedError(f"implementation={name!r} of {operation.name} is no part of this installation: {error}."
                              f" {other}") from error
  cut = _cut(operation, implementation, arguments) if name != "xla" else _in_plain_jax(operation, arguments)[1]
  reasons = [implementation.runs_on.unsupported(device),
             implementation.unsupported(*(cut.share(arguments) if cut else arguments), **options)]
  if any(reasons):
    raise NotImplementedError(f"implementation={name!r} of {operation.name} {', and '.join(filter(None, reasons))}."
                              f" {other}")
  return implementation, cut
