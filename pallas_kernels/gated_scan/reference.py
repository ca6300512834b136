"""The recurrence, one step at a time: what every implementation of `gated_scan` is tested against."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


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


def step(decay: Array, write: Array, x: Array, state: Array) -> Array:
  """One token of the recurrence, in float32. A decay of exactly 0 forgets, also a state that is not finite."""
  return jnp.where(decay == 0, 0.0, decay * state) + write * x.astype(jnp.float32)


def gated_scan_sequential(
    gate_logits: Array, inputs: tuple[Array, ...], state: tuple[Array, ...], reset: Array | None = None
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
  """`gated_scan` by `lax.scan` over time. Arguments and results as there, everything in float32."""
  decay, write = coefficients(gate_logits, reset)

  def body(carry, at_t):
    decay_t, write_t, inputs_t = at_t
    new = tuple(step(decay_t, write_t, x, h) for x, h in zip(inputs_t, carry, strict=True))
    return new, new

  time_first = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (decay, write, inputs))
  last, outputs = jax.lax.scan(body, state, time_first)
  return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), outputs), last
