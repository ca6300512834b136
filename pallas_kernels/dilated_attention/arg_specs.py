"""Real shapes of `dilated_attention`, by name: what tests compile."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.dilated_attention.folded import Pattern


@dataclasses.dataclass(frozen=True)
class ArgSpec:
  """Arguments of `dilated_attention` without packed rows."""

  batch: int
  length: int
  heads: int = 32
  kv_heads: int = 32
  width: int = 128
  dtype: str = "bfloat16"
  pattern: Pattern = Pattern(dilation=16, window=0, sinks=4)

  def types(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """(q, k, v) as `jax.ShapeDtypeStruct`s."""
    of = lambda heads: jax.ShapeDtypeStruct((self.batch, self.length, heads, self.width), jnp.dtype(self.dtype))
    return of(self.heads), of(self.kv_heads), of(self.kv_heads)


ARG_SPECS = {
    "prefill_256k": ArgSpec(batch=1, length=262144),
    "prefill_256k_window": ArgSpec(batch=1, length=262144, pattern=Pattern(16, 256, 4)),
    "prefill_32k_batch": ArgSpec(batch=8, length=32768, pattern=Pattern(64, 0, 4)),
    "train_4k": ArgSpec(batch=8, length=4096, heads=16, kv_heads=16, pattern=Pattern(64, 0, 0)),
    "grouped_heads": ArgSpec(batch=1, length=4096, heads=8, kv_heads=2, width=64, pattern=Pattern(16, 5, 4)),
    "window_and_sinks": ArgSpec(batch=1, length=16384, pattern=Pattern(None, 1024, 4)),
    "short_rows": ArgSpec(batch=32, length=512),
}
