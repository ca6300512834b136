"""`gated_scan` of a sequence whose pieces lie on several devices: a state and a product of decays are all that crosses.

Every device sums its piece up (`Passes.ends`), gathers the sums of all, and runs its piece from the state that enters
it. The gradient does the same backwards. A row and device send B * (inputs + 1) * C float32 numbers each way.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.implementation import Implementation
from pallas_kernels.scan.passes import Arrays, OfPieces, differentiable, passed
from pallas_kernels.split import CONTEXT

Array = jax.Array
_AT_ONCE = 8  # pieces that are passed in a step of a loop


@dataclasses.dataclass(frozen=True)
class OverContext:
  """The passes of a device's piece, inside `jax.shard_map` over the axis "context"; as `Passes`.

  Arguments and results along time are the device's own; the states before the sequence and after it are everybody's.
  """

  passes: OfPieces

  def forward(self, gate_logits: Array, inputs: Arrays, state: Arrays, reset: Array | None) -> tuple[Arrays, Arrays]:
    """As `Passes.forward`."""
    enters, last = _crossing(self.passes.ends(gate_logits, inputs, reset), state)
    return self.passes.forward(gate_logits, inputs, enters, reset)[0], last

  def backward(self, gate_logits: Array, inputs: Arrays, state: Arrays, reset: Array | None, states: Arrays,
               d_outputs: Arrays, d_last: Arrays) -> tuple[Array, Arrays, Arrays]:
    """As `Passes.backward`."""
    devices = jax.lax.axis_size(CONTEXT)
    ends = tuple(h[:, -1].astype(jnp.float32) for h in states)
    arrived = jax.lax.ppermute(ends, CONTEXT, [(i, i + 1) for i in range(devices - 1)])
    is_first = jax.lax.axis_index(CONTEXT) == 0
    enters = tuple(jnp.where(is_first, own, before) for own, before in zip(state, arrived, strict=True))
    # What is everybody's result has a share of its cotangent on every device; what is everybody's argument gets the sum
    # of all devices' cotangents.
    d_last = jax.lax.psum(d_last, CONTEXT)
    messages, d_first = _crossing(self.passes.messages(gate_logits, reset, d_outputs), d_last, reverse=True)
    d_logits, d_inputs, _ = self.passes.backward(gate_logits, inputs, enters, reset, states, d_outputs, messages)
    return d_logits, d_inputs, tuple(jnp.where(is_first, d, 0) for d in d_first)


def _crossing(ends: Arrays, entering: Arrays, *, reverse: bool = False) -> tuple[Arrays, Arrays]:
  """(what enters the device's piece, what leaves the sequence) of every input, [B, ...] each."""
  gathered = jax.lax.all_gather(jnp.stack(ends), CONTEXT)

  def pass_piece(enters: Arrays, of_piece: Array) -> tuple[Arrays, Arrays]:
    *made, decay = of_piece
    return tuple(passed(decay, x) + end for x, end in zip(enters, made, strict=True)), enters

  # One piece after another, as devices are few; some compilers for TPUs abort on a parallel scan of so few entries.
  last, enters = jax.lax.scan(pass_piece, entering, gathered, reverse=reverse, unroll=_AT_ONCE)
  own = jax.lax.axis_index(CONTEXT)
  return tuple(jax.lax.dynamic_index_in_dim(x, own, keepdims=False) for x in enters), last


def implementation(passes: OfPieces, **limits: Any) -> Implementation:
  """What computes `gated_scan` by these passes; `limits` as in `Implementation`."""
  return Implementation(functools.partial(differentiable, passes), independent="BC",
                        over_context=functools.partial(differentiable, OverContext(passes)), **limits)
