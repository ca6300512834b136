"""What a compiled program holds on a device, and how long it should take: the longest of products, memory and links."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments.aot.chips import Chip
from experiments.aot.hlo import COLLECTIVES, Program, Sent
from experiments.aot.products import per_device
from experiments.aot.programs import Traced


@dataclasses.dataclass(frozen=True)
class Predicted:
  """A program on one of a mesh's devices.

  Attributes:
    held: bytes of its arguments, by what they are, and "kept" for the gradient; "temporary" is all else that it needs.
    memory: bytes that the device has.
    products, moved: operations of matrix products; bytes read from memory and written to it.
    sent: bytes by the kind of collective, of the larger of what goes in and what comes out.
    seconds: what products, memory and links would take alone.
  """

  held: Mapping[str, float]
  memory: float
  products: float
  moved: float
  sent: Mapping[str, float]
  seconds: Mapping[str, float]

  @property
  def step(self) -> float:
    """Seconds, if all three went on side by side."""
    return max(self.seconds.values())


def predicted(traced: Traced, chip: Chip, mesh: jax.sharding.Mesh) -> Predicted:
  """Compiles a program for the devices of its mesh. Raises `DoesNotFit` where a device's memory does not suffice."""
  compiled = compiled_of(traced.program)
  program, stats = Program(compiled.as_text()), compiled.memory_analysis()
  given = stats.argument_size_in_bytes
  kept = min(traced.kept, stats.temp_size_in_bytes)
  temporary = stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes - kept
  held = {**traced.held, "kept": kept, "temporary": temporary, "other": given - sum(traced.held.values())}
  memory = chip.memory / chip.devices
  if (total := math.fsum(held.values())) > memory:  # the compiler leaves arguments out when it refuses
    raise DoesNotFit(f"Arguments and temporary arrays take {total / 2**30:.1f} GiB.")
  products, moved, sent = per_device(traced.program, mesh.size), program.moved(), program.sent()
  seconds = {"products": products * chip.devices / chip.products, "memory": moved * chip.devices / chip.bandwidth,
             "links": sum(one.times * _seconds(one, chip, mesh) for one in sent)}
  by_kind = {kind: sum(one.times * one.size for one in sent if one.kind == kind) for kind in COLLECTIVES}
  return Predicted(held, memory, products, moved, by_kind, seconds)


def compiled_of(traced: Any) -> Any:
  """A traced program, compiled. Raises `DoesNotFit` where a device's memory does not suffice."""
  try:
    return traced.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise DoesNotFit(next(line for line in str(error).splitlines() if line)) from error


class DoesNotFit(ValueError):
  """A program needs more memory than a device has; the message says how much."""


def _seconds(sent: Sent, chip: Chip, mesh: jax.sharding.Mesh) -> float:
  """How long a collective takes over the links of the torus, which devices of one chip share.

  A group goes round each dimension that it fills in both directions, and along each that it fills in part in one. An
  exchange of all with all is a quarter of the longest dimension's length slower than its bytes.
  """
  count = sent.groups.shape[1]
  if count == 1:
    return 0.0
  places = np.array([device.coords for device in mesh.devices.flat])
  size = places.max(axis=0) + 1
  if sent.kind == "collective-permute":
    hops = _hops(places[sent.groups[:, 0]], places[sent.groups[:, 1]], size)
    return chip.devices * sent.size * max(hops, 1) / chip.link
  spans = np.array([len(set(places[sent.groups[0], dimension])) for dimension in range(places.shape[1])])
  links = sum(2 if span == of and span > 2 else 1 for span, of in zip(spans, size, strict=True) if span > 1)
  wire = sent.size * (count - 1) / count * (2 if sent.kind == "all-reduce" else 1)
  if sent.kind == "all-to-all":
    wire *= max(spans) / 4
  return chip.devices * wire / (max(links, 1) * chip.link)


def _hops(senders: np.ndarray, receivers: np.ndarray, size: Sequence[int] | np.ndarray) -> int:
  away = np.abs(senders - receivers)
  return int(np.minimum(away, np.asarray(size) - away).sum(axis=1).max())


def as_results(found: Predicted) -> dict[str, Any]:
  """Plain JSON."""
  return dataclasses.asdict(found) | {"step": found.step, "total": math.fsum(found.held.values())}
