"""A scan as two directions, which are joined to a function with a gradient, and what both directions are made of."""

from __future__ import annotations

import functools
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

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


class OfPieces(Passes, Protocol):
  """Passes of a device that may have a piece of the sequence, with what the other devices need of it."""

  def ends(self, gate_logits: Array, inputs: Arrays, reset: Array | None) -> Arrays:
    """What is left of a sequence: of every input the last state from zero, then the product of decays; [B, ...]."""

  def messages(self, gate_logits: Array, reset: Array | None, d_outputs: Arrays) -> Arrays:
    """The same backwards: of every input the cotangent of the first state where that of the last is zero, then the
    product of decays."""


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
    return decay_1 * decay_2, tuple(passed(decay_2, a) + b for a, b in zip(drives_1, drives_2, strict=True))

  states: Arrays = jax.lax.associative_scan(combine, (decay, drives), axis=1, reverse=reverse)[1]
  return states


def between(ends: Array, entering: Arrays, *, reverse: bool = False) -> tuple[Arrays, Arrays]:
  """What enters every segment of a sequence, and what leaves the last one.

  Args:
    ends: [inputs + 1, B, segments, ...], what segments make of a state of zero, then their products of decays.
    entering: [B, ...] each, what enters the first segment; backwards, the last one.

  Returns:
    ([B, segments, ...] each, [B, ...] each).
  """
  *made, product = ends
  first = -1 if reverse else 0
  made = [end.at[:, first].add(passed(product[:, first], x)) for end, x in zip(made, entering, strict=True)]
  after = linear_scan(product, tuple(made), reverse=reverse)
  if reverse:
    enters = [jnp.concatenate([h[:, 1:], x[:, None]], axis=1) for h, x in zip(after, entering, strict=True)]
  else:
    enters = [jnp.concatenate([x[:, None], h[:, :-1]], axis=1) for h, x in zip(after, entering, strict=True)]
  return tuple(enters), tuple(h[:, 0 if reverse else -1] for h in after)


def passed(decay: Array, x: Array) -> Array:
  """decay * x; a decay of exactly 0 drops also an x that is not finite, a state or the cotangent of one."""
  # The zero is the decay's own. Constants of this size would be kept for the gradient, as they depend on no argument.
  return jnp.where(decay == 0, decay, decay * x)
