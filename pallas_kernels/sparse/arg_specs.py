"""Shapes of `sparse_attention`, by name: small ones that tests run everywhere, real ones that they compile and
benchmarks time.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.drawn import normal
from pallas_kernels.pattern import Pattern, Rule


@dataclasses.dataclass(frozen=True)
class ArgSpec:
  """Arguments of `sparse_attention`.

  Attributes:
    queries: T, at positions drawn by tests; None: of every key, in order.
    chosen: n, the blocks that a query reads.
    apart: whether every query head chooses for itself.
  """

  batch: int
  length: int
  heads: int = 32
  kv_heads: int = 32
  width: int = 128
  dtype: str = "bfloat16"
  block: int = 64
  chosen: int = 1
  apart: bool = True
  rule: Rule | None = None
  queries: int | None = None

  def types(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """(q, k, v, blocks, valid) as `jax.ShapeDtypeStruct`s."""

    def of(length: int, heads: int) -> jax.ShapeDtypeStruct:
      return jax.ShapeDtypeStruct((self.batch, length, heads, self.width), jnp.dtype(self.dtype))

    queries = self.length if self.queries is None else self.queries
    chosen = (self.batch, queries, self.heads if self.apart else self.kv_heads, self.chosen)
    return (of(queries, self.heads), of(self.length, self.kv_heads), of(self.length, self.kv_heads),
            jax.ShapeDtypeStruct(chosen, jnp.int32), jax.ShapeDtypeStruct(chosen, jnp.bool_))

  @classmethod
  def sixteenth(cls, length: int, block: int, **rest: Any) -> ArgSpec:
    """MoBA's choice of a sixteenth of the keys."""
    return cls(1, length, block=block, chosen=length // (16 * block), **rest)

  def draw(self, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(what has gradients, the rest by name). Some blocks are chosen twice, some queries are padding."""
    rng = np.random.default_rng(seed)
    q, k, v, blocks, valid = self.types()
    count = -(-self.length // self.block)
    drawn, is_valid = rng.integers(0, count, blocks.shape), rng.random(valid.shape) < 0.8
    drawn = np.where(is_valid, drawn, rng.integers(-2, count + 3, blocks.shape))
    at = None
    if self.queries is not None:
      at = jnp.asarray(rng.integers(-1, self.length + self.block, blocks.shape[:2]), jnp.int32)
    return tuple(normal(rng, x.shape, x.dtype) for x in (q, k, v)), {
        "blocks": jnp.asarray(drawn, jnp.int32), "valid": jnp.asarray(is_valid), "block": self.block, "q_positions": at,
        "rule": self.rule}


SMALL = {
    "one key": ArgSpec(2, 1, 2, 1, 8, "float32", block=4),
    "odd": ArgSpec(2, 37, 6, 2, 8, "float32", block=5, chosen=3),
    "a choice for each group": ArgSpec(2, 64, 4, 2, 16, "float32", block=16, chosen=2, apart=False),
    "a rule": ArgSpec(2, 50, 4, 2, 16, "float32", block=8, chosen=2, rule=Pattern(4, 3, 2)),
    "one query": ArgSpec(3, 70, 4, 4, 64, "float32", block=16, chosen=2, queries=1, rule=Pattern(None, 5, 1)),
    "queries at any positions": ArgSpec(2, 40, 2, 2, 8, "float32", block=4, chosen=3, queries=11),
    "bfloat16": ArgSpec(1, 96, 4, 2, 64, block=16, chosen=2, rule=Pattern(None, 3, 1)),
    "several chunks": ArgSpec(1, 1100, 2, 1, 8, "float32", block=64, chosen=3),
}

ARG_SPECS = {
    "T=16384, blocks of 64": ArgSpec.sixteenth(16384, 64),
    "T=16384, blocks of 512": ArgSpec.sixteenth(16384, 512),
    "T=65536, blocks of 64": ArgSpec.sixteenth(65536, 64),
    "T=65536, blocks of 512": ArgSpec.sixteenth(65536, 512),
    "grouped heads": ArgSpec.sixteenth(16384, 64, kv_heads=8),
    "a choice for each group": ArgSpec.sixteenth(16384, 64, kv_heads=8, apart=False),
    "a rule": ArgSpec.sixteenth(16384, 64, rule=Pattern(64, 256, 4)),
    "a chunk of queries": ArgSpec.sixteenth(65536, 64, queries=512),
    "one query": ArgSpec.sixteenth(16384, 64, queries=1),
    "odd": ArgSpec(2, 999, 6, 2, 64, block=31, chosen=5),
}
# Those that benchmarks time, beside dense attention of the same lengths.
TIMED = ("T=16384, blocks of 64", "T=16384, blocks of 512", "T=65536, blocks of 64", "T=65536, blocks of 512")
