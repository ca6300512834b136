"""Real shapes of `gated_scan`, by name: what tests compile and benchmarks time."""

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

  def draw(self, key: jax.Array) -> tuple:
    """Random arguments of these types: gates from .05 to .999, one token in 1000 a reset."""
    keys = jax.random.split(key, 6)
    logits, (x, _), (first, _), reset = self.types()
    return (jax.random.uniform(keys[0], logits.shape, jnp.float32, -3.0, 7.0).astype(logits.dtype),
            tuple(jax.random.normal(k, x.shape, x.dtype) for k in keys[1:3]),
            tuple(jax.random.normal(k, first.shape, first.dtype) for k in keys[3:5]),
            None if reset is None else jax.random.bernoulli(keys[5], 1e-3, reset.shape))

  def forward_bytes(self) -> int:
    """Bytes that must pass through HBM: logits and inputs in, outputs out."""
    size = self.batch * self.length * self.heads * self.width
    return size * (jnp.dtype(self.logits_dtype).itemsize + 4 * jnp.dtype(self.dtype).itemsize)

  def backward_bytes(self) -> int:
    """Logits, inputs, outputs and their cotangents in; cotangents of logits and inputs out."""
    size = self.batch * self.length * self.heads * self.width
    return size * (2 * jnp.dtype(self.logits_dtype).itemsize + 8 * jnp.dtype(self.dtype).itemsize)


ARG_SPECS = {
    "prefill_256k": ArgSpec(batch=1, length=262144, heads=32),
    "prefill_256k_float32": ArgSpec(batch=1, length=262144, heads=32, dtype="float32"),
    "prefill_64k_float32": ArgSpec(batch=1, length=65536, heads=32, dtype="float32", logits_dtype="float32"),
    "prefill_32k_batch": ArgSpec(batch=8, length=32768, heads=32),
    "train_4k": ArgSpec(batch=8, length=4096, heads=16, reset=True),
    "few_channels": ArgSpec(batch=1, length=262144, heads=4),
}
