"""`gated_scan`: the exponentially decaying memory as one operation on arrays (arXiv 2602.18196, section 3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import dispatch
from pallas_kernels.gated_scan import xla
from pallas_kernels.gated_scan.reference import coefficients

Array = jax.Array
STATES = "gated_scan_states"  # the name, for `jax.checkpoint` policies, of what the gradient needs of the scan
_AVAILABLE = {"xla": xla}


def gated_scan(
    gate_logits: Array,
    inputs: tuple[Array, ...],
    state: tuple[Array, ...] | None = None,
    reset: Array | None = None,
    *,
    implementation: str | None = None,
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
  """h_t = g_t * h_(t-1) + (1 - g_t) * x_t with g = sigmoid(gate_logits), for every x in `inputs`.

  One gate serves all inputs. Everything is float32 inside; 1 - g is formed as sigmoid(-gate_logits). Logits of
  +inf keep the state as it is, -inf replaces it.

  Args:
    gate_logits: [B, T, ...], float32 or bfloat16.
    inputs: tuple of arrays of the same shape as `gate_logits`, float32 or bfloat16.
    state: one float32 array [B, ...] per input, the state before the first token; None is zero.
    reset: bool [B, T]; True drops the state before that token.
    implementation: None or "xla".

  Returns:
    (outputs, state): outputs like `inputs`, in their types; state float32 [B, ...] each, after the last token.

  Raises:
    ValueError: shapes or types that do not match, an unknown implementation.
    NotImplementedError: a known implementation that this operation does not have.
  """
  dispatch.resolve("gated_scan", implementation, _AVAILABLE)
  gate_logits, inputs = jnp.asarray(gate_logits), tuple(jnp.asarray(x) for x in inputs)
  _check(gate_logits, inputs, state, reset)
  if state is None:
    state = tuple(jnp.zeros(x.shape[:1] + x.shape[2:], jnp.float32) for x in inputs)
  return _scan(gate_logits, inputs, tuple(jnp.asarray(h, jnp.float32) for h in state), reset)


def _check(gate_logits, inputs, state, reset):
  if gate_logits.ndim < 2 or not inputs:
    raise ValueError(f"gate_logits has shape {gate_logits.shape} and there are {len(inputs)} inputs;"
                     " give gate_logits [B, T, ...] and at least one input of that shape.")
  for i, x in enumerate(inputs):
    if x.shape != gate_logits.shape:
      raise ValueError(f"inputs[{i}] has shape {x.shape}; it must equal that of gate_logits, {gate_logits.shape}.")
  for name, x in (("gate_logits", gate_logits), *((f"inputs[{i}]", x) for i, x in enumerate(inputs))):
    if x.dtype not in (jnp.float32, jnp.bfloat16):
      raise ValueError(f"{name} is {x.dtype}; use float32 or bfloat16.")
  state_shape = gate_logits.shape[:1] + gate_logits.shape[2:]
  if state is not None and (len(state) != len(inputs) or any(s.shape != state_shape for s in state)):
    raise ValueError(f"state has shapes {[s.shape for s in state]}; give one array of shape {state_shape} for each"
                     f" of the {len(inputs)} inputs.")
  if reset is not None and reset.shape != gate_logits.shape[:2]:
    raise ValueError(f"reset has shape {reset.shape}; it must be [B, T] = {gate_logits.shape[:2]}.")


@jax.custom_vjp
def _scan(gate_logits, inputs, state, reset):
  return _forward(gate_logits, inputs, state, reset)[0]


def _forward(gate_logits, inputs, state, reset):
  decay, write = coefficients(gate_logits, reset)
  states = tuple(checkpoint_name(h, STATES) for h in xla.scan_states(decay, write, inputs, state))
  outputs = tuple(h.astype(x.dtype) for h, x in zip(states, inputs, strict=True))
  return (outputs, tuple(h[:, -1] for h in states)), (gate_logits, inputs, state, reset, states)


def _backward(residuals, cotangents):
  gate_logits, inputs, state, reset, states = residuals
  decay, write = coefficients(gate_logits, reset)
  logits = gate_logits.astype(jnp.float32)
  slope = jax.nn.sigmoid(logits) * jax.nn.sigmoid(-logits)
  d_logits = jnp.zeros_like(logits)
  d_inputs, d_state = [], []
  direct = tuple(d_output.astype(jnp.float32).at[:, -1].add(d_last)
                 for d_output, d_last in zip(*cotangents, strict=True))
  for x, first, h, d_h in zip(inputs, state, states, xla.scan_cotangents(decay, direct), strict=True):
    # After a reset the gate no longer multiplies the past, so the past is no part of its gradient either.
    past = jnp.concatenate([first[:, None], h[:, :-1]], axis=1)
    past = jnp.where(decay == 0, 0.0, past)
    d_logits += d_h * slope * (past - x.astype(jnp.float32))
    d_inputs.append((write * d_h).astype(x.dtype))
    d_state.append(decay[:, 0] * d_h[:, 0])
  return d_logits.astype(gate_logits.dtype), tuple(d_inputs), tuple(d_state), None


_scan.defvjp(_forward, _backward)
