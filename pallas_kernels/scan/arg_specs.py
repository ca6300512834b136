"""Shapes of `gated_scan`, by name: small ones that tests run everywhere, real ones that they compile and benchmarks
time.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.drawn import normal

Type = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class ArgSpec:
  """Arguments of `gated_scan` for keys and values of heads of one width: [B, T, heads, width] each."""

  batch: int
  length: int
  heads: int
  width: int = 128
  dtype: str = "bfloat16"
  logits_dtype: str = "bfloat16"
  reset: bool = False
  inputs: int = 2

  def types(self) -> tuple[Type, tuple[Type, ...], tuple[Type, ...], Type | None]:
    """(gate_logits, inputs, state, reset) as `jax.ShapeDtypeStruct`s; reset may be None."""
    shape = (self.batch, self.length, self.heads, self.width)
    x = Type(shape, jnp.dtype(self.dtype))
    state = Type((self.batch, self.heads, self.width), jnp.float32)
    reset = Type(shape[:2], jnp.bool_) if self.reset else None
    logits = Type(shape, jnp.dtype(self.logits_dtype))
    return logits, (x,) * self.inputs, (state,) * self.inputs, reset

  def draw(self, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(what has gradients, the rest by name); logits with infinities of both signs."""
    rng = np.random.default_rng(seed)
    logits, inputs, state, reset = self.types()
    drawn = 3 * rng.standard_normal(logits.shape)
    drawn = np.where(rng.random(logits.shape) < 0.03, np.inf, np.where(rng.random(logits.shape) < 0.03, -np.inf, drawn))
    drawn_reset = None if reset is None else jnp.asarray(rng.random(reset.shape) < 0.08)
    return (jnp.asarray(drawn, logits.dtype), tuple(normal(rng, x.shape, x.dtype) for x in inputs),
            tuple(normal(rng, x.shape, x.dtype) for x in state)), {"reset": drawn_reset}


SMALL = {
    "one token": ArgSpec(2, 1, 1, 64, "float32", "float32"),
    "odd, reset": ArgSpec(2, 37, 3, 8, "float32", "float32", reset=True),
    "one input": ArgSpec(3, 70, 1, 12, "float32", "float32", inputs=1),
    "bfloat16, reset": ArgSpec(2, 129, 2, 16, reset=True),
    "two types": ArgSpec(1, 64, 2, 64, logits_dtype="float32"),
}

ARG_SPECS = {
    "prefill_256k": ArgSpec(batch=1, length=262144, heads=32),
    "prefill_32k": ArgSpec(batch=1, length=32768, heads=32),
    "prefill_256k_float32": ArgSpec(batch=1, length=262144, heads=32, dtype="float32"),
    "prefill_64k_float32": ArgSpec(batch=1, length=65536, heads=32, dtype="float32", logits_dtype="float32"),
    "prefill_32k_batch": ArgSpec(batch=8, length=32768, heads=32),
    "train_4k": ArgSpec(batch=8, length=4096, heads=16, reset=True),
    "few_channels": ArgSpec(batch=1, length=262144, heads=4),
}
# Those that benchmarks time: alone, and with gradients.
TIMED = ("prefill_32k", "prefill_256k")
TIMED_GRADIENTS = ("prefill_32k",)
