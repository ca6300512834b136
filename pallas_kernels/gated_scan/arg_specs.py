"""Real shapes of `gated_scan`, by name: what tests compile."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


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

  def types(self) -> tuple:
    """(gate_logits, inputs, state, reset) as `jax.ShapeDtypeStruct`s; reset may be None."""
    shape = (self.batch, self.length, self.heads, self.width)
    x = jax.ShapeDtypeStruct(shape, jnp.dtype(self.dtype))
    state = jax.ShapeDtypeStruct((self.batch, self.heads, self.width), jnp.float32)
    reset = jax.ShapeDtypeStruct(shape[:2], jnp.bool_) if self.reset else None
    return jax.ShapeDtypeStruct(shape, jnp.dtype(self.logits_dtype)), (x, x), (state, state), reset


ARG_SPECS = {
    "prefill_256k": ArgSpec(batch=1, length=262144, heads=32),
    "prefill_256k_float32": ArgSpec(batch=1, length=262144, heads=32, dtype="float32"),
    "prefill_64k_float32": ArgSpec(batch=1, length=65536, heads=32, dtype="float32", logits_dtype="float32"),
    "prefill_32k_batch": ArgSpec(batch=8, length=32768, heads=32),
    "train_4k": ArgSpec(batch=8, length=4096, heads=16, reset=True),
    "few_channels": ArgSpec(batch=1, length=262144, heads=4),
}
