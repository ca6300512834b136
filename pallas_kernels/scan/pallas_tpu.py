"""`gated_scan` on TPUs: one pass over HBM forward, one backward; `pallas_tpu_kernel.py` has the kernels.

The arrays of a kernel are [B, X, T, LANES]: X groups of 128 channels, whose tokens are sublanes. Heads of 128 are the
groups; a TPU may lay out what a projection writes like that, so that nothing is copied. Other channels are cut into
groups, the last one filled up.

Lengths that do not fill whole tiles are filled up with logits of +inf, which keep the state, and zeros.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.devices import TPU
from pallas_kernels.implementation import Implementation
from pallas_kernels.scan import pallas_tpu_kernel as kernel
from pallas_kernels.scan.context import implementation
from pallas_kernels.scan.pallas_tpu_kernel import Tuning
from pallas_kernels.scan.passes import Arrays
from pallas_kernels.tpu import LANES, largest_divisor

Array = jax.Array
_GROUPS = 8  # of a tile: as many independent recurrences hide the latency of one
_BYTES = 40 * 2**20  # of tiles
_TOKENS = (512, 256, 128)  # of a tile, the best first


@dataclasses.dataclass(frozen=True)
class PallasTPU:
  """The passes of the kernels.

  Attributes:
    tuning: None for `default_tuning`.
    interpret: interpreter parameters to run without a TPU.
  """

  tuning: Tuning | None = None
  interpret: Any = None

  def forward(self, gate_logits: Array, inputs: Arrays, state: Arrays, reset: Array | None) -> tuple[Arrays, Arrays]:
    """As `Passes.forward`."""
    results: tuple[Arrays, Arrays] = _forward(gate_logits, inputs, state, reset, self.tuning, self.interpret)
    return results

  def backward(self, gate_logits: Array, inputs: Arrays, state: Arrays, reset: Array | None, states: Arrays,
               d_outputs: Arrays, d_last: Arrays) -> tuple[Array, Arrays, Arrays]:
    """As `Passes.backward`."""
    cotangents: tuple[Array, Arrays, Arrays] = _backward(gate_logits, inputs, state, reset, states, d_outputs, d_last,
                                                         self.tuning, self.interpret)
    return cotangents

  def ends(self, gate_logits: Array, inputs: Arrays, reset: Array | None) -> Arrays:
    """As `Passes.ends`."""
    found: Arrays = _summed(gate_logits, inputs, reset, False, self.tuning, self.interpret)
    return found

  def messages(self, gate_logits: Array, reset: Array | None, d_outputs: Arrays) -> Arrays:
    """As `Passes.messages`."""
    found: Arrays = _summed(gate_logits, d_outputs, reset, True, self.tuning, self.interpret)
    return found


def default_tuning(layout: Layout, inputs: int = 2, itemsize: int = 2) -> Tuning:
  """Tiles of up to eight groups, as many as fit VMEM, and of tokens that leave little of the last tile empty."""
  tokens = next((n for n in _TOKENS if -layout.length % n <= layout.length // 16), _TOKENS[-1])
  # Backward there are two blocks of each array, and float32 scratch of each recurrence.
  of_group = tokens * LANES * (2 * itemsize * (2 + 4 * inputs) + 4 * (1 + inputs))
  return Tuning(largest_divisor(layout.groups, min(_GROUPS, max(_BYTES // of_group, 1))), tokens)


@dataclasses.dataclass(frozen=True)
class Layout:
  """How arrays [B, T, ...] lie before a kernel: [B, groups, T, LANES], with T filled up to whole tiles."""

  shape: tuple[int, ...]

  @property
  def length(self) -> int:
    return self.shape[1]

  @property
  def channels(self) -> int:
    return math.prod(self.shape[2:])

  @property
  def groups(self) -> int:
    return -(-self.channels // LANES)

  def tokens(self, x: Array, tuning: Tuning, fill: float = 0.0) -> Array:
    """[B, T, ...] laid out."""
    x = x.reshape(*x.shape[:2], self.channels)
    widths = ((0, 0), (0, -self.length % tuning.tokens), (0, self.groups * LANES - self.channels))
    if any(map(any, widths)):
      x = jnp.pad(x, widths, constant_values=fill)
    return jnp.swapaxes(x.reshape(*x.shape[:2], self.groups, LANES), 1, 2)

  def state(self, x: Array) -> Array:
    """[B, ...] as float32 [B, groups, 1, LANES]."""
    x = x.astype(jnp.float32).reshape(x.shape[0], self.channels)
    return jnp.pad(x, ((0, 0), (0, self.groups * LANES - self.channels))).reshape(-1, self.groups, 1, LANES)

  def back(self, x: Array) -> Array:
    """The inverse of `tokens`."""
    x = jnp.swapaxes(x, 1, 2)[:, :self.length]
    return x.reshape(*x.shape[:2], -1)[..., :self.channels].reshape(self.shape)

  def state_back(self, x: Array) -> Array:
    """The inverse of `state`."""
    return x.reshape(x.shape[0], -1)[:, :self.channels].reshape(self.shape[0], *self.shape[2:])


def _tuned(gate_logits: Array, inputs: Arrays, tuning: Tuning | None) -> tuple[Layout, Tuning]:
  layout, itemsize = Layout(gate_logits.shape), max(x.dtype.itemsize for x in (gate_logits, *inputs))
  return layout, tuning or default_tuning(layout, len(inputs), itemsize)


def _flags(reset: Array | None, tuning: Tuning) -> Array | None:
  """bool [B, T] as int32 [B, 1, T filled up]."""
  if reset is None:
    return None
  return jnp.pad(reset.astype(jnp.int32), ((0, 0), (0, -reset.shape[1] % tuning.tokens)))[:, None]


# Under a jit of its own, a kernel is lowered once for all layers of a program, not once for each.
@functools.partial(jax.jit, static_argnames=("tuning", "interpret"))
def _forward(gate_logits: Array, inputs: Arrays, state: Arrays, reset: Array | None, tuning: Tuning | None,
             interpret: Any) -> tuple[Arrays, Arrays]:
  layout, tuning = _tuned(gate_logits, inputs, tuning)
  outputs, last = kernel.forward(
      layout.tokens(gate_logits, tuning, jnp.inf), tuple(layout.tokens(x, tuning) for x in inputs),
      tuple(map(layout.state, state)), _flags(reset, tuning), tuning, interpret)
  return tuple(map(layout.back, outputs)), tuple(map(layout.state_back, last))


@functools.partial(jax.jit, static_argnames=("tuning", "interpret"))
def _backward(gate_logits: Array, inputs: Arrays, state: Arrays, reset: Array | None, states: Arrays, d_outputs: Arrays,
              d_last: Arrays, tuning: Tuning | None, interpret: Any) -> tuple[Array, Arrays, Arrays]:
  layout, tuning = _tuned(gate_logits, inputs, tuning)

  def tokens(arrays: Arrays) -> Arrays:
    return tuple(layout.tokens(x, tuning) for x in arrays)

  d_logits, d_inputs, d_state = kernel.backward(
      layout.tokens(gate_logits, tuning, jnp.inf), tokens(inputs), tuple(map(layout.state, state)),
      _flags(reset, tuning), tokens(states), tokens(d_outputs), tuple(map(layout.state, d_last)), tuning, interpret)
  return layout.back(d_logits), tuple(map(layout.back, d_inputs)), tuple(map(layout.state_back, d_state))


@functools.partial(jax.jit, static_argnames=("reverse", "tuning", "interpret"))
def _summed(gate_logits: Array, arrays: Arrays, reset: Array | None, reverse: bool, tuning: Tuning | None,
            interpret: Any) -> Arrays:
  layout, tuning = _tuned(gate_logits, arrays, tuning)
  found = kernel.summed(layout.tokens(gate_logits, tuning, jnp.inf), tuple(layout.tokens(x, tuning) for x in arrays),
                        _flags(reset, tuning), reverse, tuning, interpret)
  return tuple(map(layout.state_back, found))


def made(interpret: Any = None) -> Implementation:
  """The implementation; `interpret` as in `PallasTPU`."""
  return implementation(PallasTPU(interpret=interpret), runs_on=TPU)


IMPLEMENTATION = made()
