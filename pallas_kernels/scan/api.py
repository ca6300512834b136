"""`gated_scan`: the exponentially decaying memory as one operation on arrays (arXiv 2602.18196, section 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import arguments
from pallas_kernels.implementation import Operation, Sequences, call
from pallas_kernels.scan.passes import STATES, Arrays
from pallas_kernels.split import Letters

__all__ = ["OPERATION", "STATES", "gated_scan"]

Array = jax.Array
_FEW_TOKENS = 64  # a row of fewer is mostly padding to a kernel that takes 128 at a time


def _axes(gate_logits: Array, inputs: Arrays, state: Arrays, reset: Array | None) -> tuple[Letters, ...]:
  return "BTC", ("BTC",) * len(inputs), ("BC",) * len(state), None if reset is None else "BT"


def _size(gate_logits: Array, *_: Any) -> int:
  return gate_logits.size if gate_logits.shape[1] >= _FEW_TOKENS else 0


# Filled-up tokens leave the state as it is.
OPERATION = Operation("gated_scan", _axes, ("BTC", "BC"), _size, Sequences("T", fills=(math.inf, 0, 0, 0)))


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
    gate_logits: [B, T, ...], float32 or bfloat16; float64 becomes float32, here and below.
    inputs: tuple of arrays of the same shape as `gate_logits`, float32 or bfloat16.
    state: one array of floats [B, ...] per input, the state before the first token; None is zero.
    reset: bool [B, T]; True drops the state before that token.
    implementation: None for the fastest; "xla"; "mosaic_gpu" for Hopper GPUs, any shape (what does not fill tiles of
      128 tokens and 32 channels is padded, so None takes "xla" for fewer than 64 tokens); "pallas_tpu" for TPUs, any
      shape.

  Returns:
    (outputs, state): outputs like `inputs`, in their types; state float32 [B, ...] each, after the last token.

  Raises:
    ValueError: shapes or types that do not match, an unknown implementation.
    NotImplementedError: a known implementation that this operation does not have, or that cannot take this case.
  """
  gate_logits, inputs = arguments.as_floats("gate_logits", gate_logits), _arrays("inputs", inputs)
  state = None if state is None else _arrays("state", state)
  reset = None if reset is None else jnp.asarray(reset)
  _check(gate_logits, inputs, state, reset)
  if state is None:
    state = tuple(jnp.zeros(x.shape[:1] + x.shape[2:], jnp.float32) for x in inputs)
  state = tuple(h.astype(jnp.float32) for h in state)
  results: tuple[Arrays, Arrays] = call(OPERATION, implementation, gate_logits, inputs, state, reset)
  return results


def _arrays(name: str, given: Sequence[Array]) -> tuple[Array, ...]:
  if not isinstance(given, Sequence):
    raise ValueError(f"{name} is a {type(given).__name__}; give a tuple of arrays, also of a single one.")
  return tuple(arguments.as_floats(f"{name}[{i}]", x) for i, x in enumerate(given))


def _check(gate_logits: Array, inputs: Arrays, state: Arrays | None, reset: Array | None) -> None:
  if gate_logits.ndim < 2 or not inputs:
    raise ValueError(f"gate_logits has shape {gate_logits.shape} and there are {len(inputs)} inputs;"
                     " give gate_logits [B, T, ...] and at least one input of that shape.")
  if 0 in gate_logits.shape:
    raise ValueError(f"gate_logits has shape {gate_logits.shape}; every axis must have at least one entry.")
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
  if reset is not None and (reset.dtype != jnp.bool_ or reset.shape != gate_logits.shape[:2]):
    raise ValueError(f"reset is {reset.dtype} {reset.shape}; give bool [B, T] = {gate_logits.shape[:2]}.")
