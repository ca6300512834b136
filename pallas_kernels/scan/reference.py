"""The recurrence, one step at a time: what every implementation of `gated_scan` is tested against."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array
Arrays = tuple[Array, ...]


def gated_scan(gate_logits: Array, inputs: Arrays, state: Arrays | None = None, reset: Array | None = None
               ) -> tuple[Arrays, Arrays]:
  """As `api.gated_scan`, by `lax.scan` over time; all in float32, of float64 arguments in float64."""

  def wide(x: Array) -> Array:
    return jnp.asarray(x).astype(jnp.promote_types(jnp.float32, jnp.result_type(x)))

  logits, inputs = wide(gate_logits), tuple(map(wide, inputs))
  decay, write = jax.nn.sigmoid(logits), jax.nn.sigmoid(-logits)  # 1 - sigmoid loses all digits near a gate of 1
  if reset is not None:
    decay = jnp.where(jnp.reshape(reset, (*logits.shape[:2], *(1,) * (logits.ndim - 2))), 0.0, decay)
  first = tuple(jnp.zeros_like(x[:, 0]) for x in inputs) if state is None else tuple(map(wide, state))

  def step(before: Arrays, at_t: tuple[Array, Array, Arrays]) -> tuple[Arrays, Arrays]:
    decay_t, write_t, inputs_t = at_t
    # A decay of exactly 0 forgets, also a state that is not finite.
    new = tuple(jnp.where(decay_t == 0, 0.0, decay_t * h) + write_t * x for x, h in zip(inputs_t, before, strict=True))
    return new, new

  time_first = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (decay, write, inputs))
  last, outputs = jax.lax.scan(step, first, time_first)
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), outputs), last
