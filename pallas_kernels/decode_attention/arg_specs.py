"""Real shapes of `decode_attention`, by name: what tests compile."""

from __future__ import annotations

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class ArgSpec:
  """One call: `batch` rows of `heads` queries, and a cache of `rows` rows for each of `kv_heads` heads."""

  batch: int
  rows: int
  heads: int = 32
  kv_heads: int = 32
  width: int = 128
  dtype: str = "bfloat16"

  def types(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """(q, keys, values, visible) as `jax.ShapeDtypeStruct`s."""
    cache = jax.ShapeDtypeStruct((self.batch, self.kv_heads, self.rows, self.width), self.dtype)
    q = jax.ShapeDtypeStruct((self.batch, self.heads, self.width), self.dtype)
    return q, cache, cache, jax.ShapeDtypeStruct((self.batch, self.rows), bool)


# The caches of Dilated(16) and Dilated(64): one row for every D tokens, and one for the last token.
ARG_SPECS = {
    "T=4096, D=16": ArgSpec(256, 4096 // 16 + 1),
    "T=4096, D=64": ArgSpec(256, 4096 // 64 + 1),
    "T=16384, D=16": ArgSpec(128, 16384 // 16 + 1),
    "T=16384, D=64": ArgSpec(128, 16384 // 64 + 1),
}
