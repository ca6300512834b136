"""`gated_scan` in plain JAX: one parallel scan over time, and the same scan backwards for the gradient."""

from __future__ import annotations

import dataclasses
import functools
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.implementation import Implementation

Array = jax.Array
Arrays = tuple[Array, ...]
Residuals = tuple[Array, Arrays, Arrays, Array | None, Arrays]  # the arguments and all states
STATES = "gated_scan_states"  # the name, for `jax.checkpoint` policies, of what the gradient needs of the scan


class Passes(Protocol):
  """The two directions of a scan, which `differentiable` joins. Hashable."""

  def forward(self, gate_logits: Array, inputs: Arrays, state: Arrays, reset: Array | None) -> tuple[Arrays, Arrays]:
    """(all states in the types of the inputs, last state float32 [B, ...]) of every input."""

  def backward(self, gate_logits: Array, inputs: Arrays, state: Arrays, reset: Array | None, states: Arrays,
               d_outputs: Arrays, d_last: Arrays) -> tuple[Array, Arrays, Arrays]:
    """Cotangents of (gate_logits, inputs, state), in their types; `states` are those that `forward` returned."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def differentiable(passes: Passes, gate_logits: Array, inputs: Arrays, state: Arrays, reset: Array | None
                   ) -> tuple[Arrays, Arrays]:
  """`passes.forward`, with the gradient that `passes.backward` gives."""
  return _forward(passes, gate_logits, inputs, state, reset)[0]


def _forward(passes: Passes, gate_logits: Array, inputs: Arrays, state: Arrays, reset: Array | None
             ) -> tuple[tuple[Arrays, Arrays], Residuals]:
  states, last = passes.forward(gate_logits, inputs, state, reset)
  states = tuple(checkpoint_name(h, STATES) for h in states)
  return (states, last), (gate_logits, inputs, state, reset, states)


def _backward(passes: Passes, residuals: Residuals, cotangents: tuple[Arrays, Arrays]
              ) -> tuple[Array, Arrays, Arrays, None]:
  return *passes.backward(*residuals, *cotangents), None


differentiable.defvjp(_forward, _backward)


def coefficients(gate_logits: Array, reset: Array | None) -> tuple[Array, Array]:
  """(decay, write) in float32, so that h_t = decay * h_(t-1) + write * x_t.

  `write` is sigmoid(-logits), never 1 - sigmoid(logits): near a gate of 1 the subtraction loses all its digits.
  A reset drops the old state (decay 0) and leaves the write as it is.
  """
  logits = gate_logits.astype(jnp.float32)
  decay, write = jax.nn.sigmoid(logits), jax.nn.sigmoid(-logits)
  if reset is not None:
    decay = jnp.where(jnp.reshape(reset, reset.shape + (1,) * (logits.ndim - reset.ndim)), 0.0, decay)
  return decay, write


def linear_scan(decay: Array, drives: Arrays, *, reverse: bool = False) -> Arrays:
  """h_t = decay_t * h_(t-1) + drive_t from h_(-1) = 0 for every drive, along axis 1, in log2(T) parallel steps.

  Pairs (decay, drives) compose associatively; nothing is ever divided by a decay. Where a decay is 0 the past is
  dropped rather than multiplied, so what is not finite in one document does not reach the next.
  """

  def combine(earlier: tuple[Array, Arrays], later: tuple[Array, Arrays]) -> tuple[Array, Arrays]:
    (decay_1, drives_1), (decay_2, drives_2) = earlier, later
    return decay_1 * decay_2, tuple(_passed(decay_2, a) + b for a, b in zip(drives_1, drives_2, strict=True))

  states: Arrays = jax.lax.associative_scan(combine, (decay, drives), axis=1, reverse=reverse)[1]
  return states


def scan_states(decay: Array, write: Array, inputs: Arrays, state: Arrays) -> Arrays:
  """All states h [B, T, ...] of every input in float32, from the states [B, ...] before the first token."""
  drives = tuple((write * x.astype(jnp.float32)).at[:, 0].add(_passed(decay[:, 0], h))
                 for x, h in zip(inputs, state, strict=True))
  return linear_scan(decay, drives)


def scan_cotangents(decay: Array, d_states: Arrays) -> Arrays:
  """dL/dh_t given the direct cotangents of h_t: the reversed scan dh_t = d_t + decay_(t+1) * dh_(t+1)."""
  next_decay = jnp.concatenate([decay[:, 1:], jnp.zeros_like(decay[:, :1])], axis=1)
  return linear_scan(next_decay, d_states, reverse=True)


def _passed(decay: Array, x: Array) -> Array:
  """decay * x; a decay of exactly 0 drops also an x that is not finite, a state or the cotangent of one."""
  return jnp.where(decay == 0, 0.0, decay * x)


@dataclasses.dataclass(frozen=True)
class XLA:
  """The passes of plain JAX."""

  def forward(self, gate_logits: Array, inputs: Arrays, state: Arrays, reset: Array | None) -> tuple[Arrays, Arrays]:
    """As `Passes.forward`."""
    states = scan_states(*coefficients(gate_logits, reset), inputs, state)
    return (tuple(h.astype(x.dtype) for h, x in zip(states, inputs, strict=True)), tuple(h[:, -1] for h in states))

  def backward(self, gate_logits: Array, inputs: Arrays, state: Arrays, reset: Array | None, states: Arrays,
               d_outputs: Arrays, d_last: Arrays) -> tuple[Array, Arrays, Arrays]:
    """As `Passes.backward`."""
    decay, write = coefficients(gate_logits, reset)
    logits = gate_logits.astype(jnp.float32)
    slope = jax.nn.sigmoid(logits) * jax.nn.sigmoid(-logits)
    d_logits = jnp.zeros_like(logits)
    d_inputs, d_state = [], []
    direct = tuple(d_output.astype(jnp.float32).at[:, -1].add(d)
                   for d_output, d in zip(d_outputs, d_last, strict=True))
    for x, first, h, d_h in zip(inputs, state, states, scan_cotangents(decay, direct), strict=True):
      # After a reset the gate no longer multiplies the past, so the past is no part of its gradient either.
      past = jnp.concatenate([first[:, None], h[:, :-1].astype(jnp.float32)], axis=1)
      past = jnp.where(decay == 0, 0.0, past)
      d_logits += d_h * slope * (past - x.astype(jnp.float32))
      d_inputs.append((write * d_h).astype(x.dtype))
      d_state.append(_passed(decay[:, 0], d_h[:, 0]))
    return d_logits.astype(gate_logits.dtype), tuple(d_inputs), tuple(d_state)


IMPLEMENTATION = Implementation(functools.partial(differentiable, XLA()), independent="BC")
