"""`gated_scan` in plain JAX: one parallel scan over time, and the same scan backwards for the gradient."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.scan.context import implementation
from pallas_kernels.scan.passes import Array, Arrays, coefficients, linear_scan, passed


def scan_states(decay: Array, write: Array, inputs: Arrays, state: Arrays) -> Arrays:
  """All states h [B, T, ...] of every input in float32, from the states [B, ...] before the first token."""
  drives = tuple((write * x.astype(jnp.float32)).at[:, 0].add(passed(decay[:, 0], h))
                 for x, h in zip(inputs, state, strict=True))
  return linear_scan(decay, drives)


def scan_cotangents(decay: Array, d_states: Arrays) -> Arrays:
  """dL/dh_t given the direct cotangents of h_t: the reversed scan dh_t = d_t + decay_(t+1) * dh_(t+1)."""
  next_decay = jnp.concatenate([decay[:, 1:], jnp.zeros_like(decay[:, :1])], axis=1)
  return linear_scan(next_decay, d_states, reverse=True)


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
      d_state.append(passed(decay[:, 0], d_h[:, 0]))
    return d_logits.astype(gate_logits.dtype), tuple(d_inputs), tuple(d_state)

  def ends(self, gate_logits: Array, inputs: Arrays, reset: Array | None) -> Arrays:
    """As `Passes.ends`."""
    decay, write = coefficients(gate_logits, reset)
    states = linear_scan(decay, tuple(write * x.astype(jnp.float32) for x in inputs))
    return *(h[:, -1] for h in states), jnp.prod(decay, axis=1)

  def messages(self, gate_logits: Array, reset: Array | None, d_outputs: Arrays) -> Arrays:
    """As `Passes.messages`."""
    decay, _ = coefficients(gate_logits, reset)
    d_states = scan_cotangents(decay, tuple(d.astype(jnp.float32) for d in d_outputs))
    return *(passed(decay[:, 0], d[:, 0]) for d in d_states), jnp.prod(decay, axis=1)


IMPLEMENTATION = implementation(XLA())
