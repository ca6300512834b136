"""Shapes of `dilated_attention`, by name: small ones that tests run everywhere, real ones that they compile and
benchmarks time.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.drawn import normal
from pallas_kernels.pattern import Pattern


@dataclasses.dataclass(frozen=True)
class ArgSpec:
  """Arguments of `dilated_attention`."""

  batch: int
  length: int
  heads: int = 32
  kv_heads: int = 32
  width: int = 128
  dtype: str = "bfloat16"
  pattern: Pattern = Pattern(dilation=16, window=0, sinks=4)
  packed: bool = False

  def types(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """(q, k, v) as `jax.ShapeDtypeStruct`s, and segment_ids of packed rows."""

    def of(heads: int) -> jax.ShapeDtypeStruct:
      return jax.ShapeDtypeStruct((self.batch, self.length, heads, self.width), jnp.dtype(self.dtype))

    ids = (jax.ShapeDtypeStruct((self.batch, self.length), jnp.int32),) * self.packed
    return of(self.heads), of(self.kv_heads), of(self.kv_heads), *ids

  def draw(self, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(what has gradients, the rest by name)."""
    rng = np.random.default_rng(seed)
    q, k, v = (normal(rng, x.shape, x.dtype) for x in self.types()[:3])
    rest = dict(self.pattern._asdict(), segment_ids=None)
    if self.packed:
      ids = np.sort(rng.integers(1, 4, (self.batch, self.length)), axis=1)
      ids[rng.random(ids.shape) < 0.1] = 0
      rest["segment_ids"] = jnp.asarray(ids, jnp.int32)
    return (q, k, v), rest


SMALL = {
    "one token": ArgSpec(2, 1, 2, 1, 64, "float32"),
    "shorter than D": ArgSpec(2, 9, 4, 2, 64, "float32", Pattern(16)),
    "window and sinks": ArgSpec(2, 75, 6, 2, 64, "float32", Pattern(4, 17, 9)),
    "a window beyond the row": ArgSpec(1, 33, 2, 2, 8, "float32", Pattern(8, 256, 4)),
    "no dilation": ArgSpec(1, 61, 4, 1, 64, "float32", Pattern(None, 20, 4)),
    "dense": ArgSpec(2, 40, 2, 2, 64, "float32", Pattern(1)),
    "packed": ArgSpec(2, 60, 4, 2, 16, "float32", Pattern(4, 3, 2), packed=True),
    "bfloat16": ArgSpec(2, 130, 4, 2, 64, "bfloat16", Pattern(16, 0, 4)),
    "bfloat16, wide": ArgSpec(1, 48, 2, 2, 256, "bfloat16", Pattern(4, 5, 1)),
}

ARG_SPECS = {
    "prefill_256k": ArgSpec(batch=1, length=262144),
    "prefill_256k_sparser": ArgSpec(batch=1, length=262144, pattern=Pattern(64, 0, 4)),
    "prefill_256k_window": ArgSpec(batch=1, length=262144, pattern=Pattern(16, 256, 4)),
    "prefill_32k": ArgSpec(batch=1, length=32768),
    "prefill_32k_sparser": ArgSpec(batch=1, length=32768, pattern=Pattern(64, 0, 4)),
    "prefill_32k_batch": ArgSpec(batch=8, length=32768),
    "prefill_32k_batch_sparser": ArgSpec(batch=8, length=32768, pattern=Pattern(64, 0, 4)),
    "train_4k": ArgSpec(batch=8, length=4096),
    "train_4k_sparser": ArgSpec(batch=8, length=4096, pattern=Pattern(64, 0, 4)),
    "train_4k_without_sinks": ArgSpec(batch=8, length=4096, heads=16, kv_heads=16, pattern=Pattern(64, 0, 0)),
    "grouped_heads": ArgSpec(batch=1, length=4096, heads=8, kv_heads=2, width=64, pattern=Pattern(16, 5, 4)),
    "window_and_sinks": ArgSpec(batch=1, length=16384, pattern=Pattern(None, 1024, 4)),
    "short_rows": ArgSpec(batch=32, length=512),
}
# Those that benchmarks time, beside dense attention of the same lengths: alone, and with gradients.
TIMED = ("prefill_256k", "prefill_256k_sparser", "prefill_256k_window", "prefill_32k_batch",
         "prefill_32k_batch_sparser")
TIMED_GRADIENTS = ("prefill_32k", "prefill_32k_sparser", "train_4k", "train_4k_sparser")
