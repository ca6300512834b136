"""Shapes of `decode_attention`, by name: small ones that tests run everywhere, real ones that they compile and
benchmarks time.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.drawn import normal


@dataclasses.dataclass(frozen=True)
class ArgSpec:
  """One call: `batch` rows of `heads` queries, and a cache of `rows` rows for each of `kv_heads` heads.

  Attributes:
    per_head: whether every key/value head has a mask of its own.
    block, chosen: of `blocks`: their rows, and how many are read; 0 for the whole cache.
    apart: whether every query head chooses blocks for itself.
    own: whether the new token comes with its own key and value.
    layers: of a cache that has layers, how many.
    dilation: of a compact cache, the tokens that a row stands for; 1 of a full one.
  """

  batch: int
  rows: int
  heads: int = 32
  kv_heads: int = 32
  width: int = 128
  dtype: str = "bfloat16"
  per_head: bool = False
  block: int = 0
  chosen: int = 0
  apart: bool = False
  own: bool = False
  layers: int | None = None
  dilation: int = 1

  def types(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """(q, keys, values, visible) as `jax.ShapeDtypeStruct`s."""
    layers = () if self.layers is None else (self.layers,)
    cache = jax.ShapeDtypeStruct((*layers, self.batch, self.kv_heads, self.rows, self.width), self.dtype)
    q = jax.ShapeDtypeStruct((self.batch, self.heads, self.width), self.dtype)
    seen: tuple[int, ...] = (self.kv_heads, self.rows) if self.per_head else (self.rows,)
    if self.block:
      seen = (self.heads if self.apart else self.kv_heads, self.chosen, self.block)
    return q, cache, cache, jax.ShapeDtypeStruct((self.batch, *seen), bool)

  def optional_types(self) -> dict[str, Any]:
    """layer, own and blocks, where they are given."""
    found: dict[str, Any] = {}
    if self.layers is not None:
      found["layer"] = jax.ShapeDtypeStruct((), jnp.int32)
    if self.own:
      found["own"] = (jax.ShapeDtypeStruct((self.batch, self.kv_heads, self.width), self.dtype),) * 2
    if self.block:
      found["blocks"] = jax.ShapeDtypeStruct(self.types()[3].shape[:-1], jnp.int32)
    return found

  @classmethod
  def compact(cls, batch: int, tokens: int, dilation: int, **rest: Any) -> ArgSpec:
    """A cache with a row for every `dilation` tokens, and one for the last token."""
    return cls(batch, tokens // dilation + 1, dilation=dilation, **rest)

  def draw(self, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(what has gradients, the rest by name). Rows are ragged; the last of several sees its own token alone."""
    rng = np.random.default_rng(seed)
    types = self.types()
    q, keys, values = (normal(rng, x.shape, x.dtype) for x in types[:3])
    visible, blocks, rest = rng.random(types[3].shape) < 0.6, None, {}
    if self.block:
      count = -(-self.rows // self.block)
      heads = types[3].shape[1]
      blocks = np.stack([rng.permutation(count)[:self.chosen] for _ in range(self.batch * heads)])
      blocks = blocks.reshape(self.batch, heads, self.chosen).astype(np.int32)
      visible &= blocks[..., None] * self.block + np.arange(self.block) < self.rows
      visible[0, 0, self.chosen // 2:], blocks[0, 0, self.chosen // 2:] = False, count + 5
    elif self.batch > 1:
      visible[0, ..., self.rows * 2 // 3:] = False
    if self.batch > 1:
      visible[-1] = False
    own = None
    if self.own:
      own = tuple(normal(rng, (self.batch, self.kv_heads, self.width), self.dtype) for _ in range(2))
    rest = {"visible": jnp.asarray(visible), "layer": None if self.layers is None else jnp.int32(self.layers - 1),
            "blocks": None if blocks is None else jnp.asarray(blocks)}
    return (q, keys, values, own), rest


SMALL = {
    "one row": ArgSpec(1, 1, 1, 1, 64, "float32"),
    "ragged": ArgSpec(3, 37, 2, 2, 64, "float32"),
    "grouped heads, own token": ArgSpec(3, 21, 6, 2, 64, "float32", own=True),
    "a mask for every head": ArgSpec(2, 30, 4, 2, 128, "float32", per_head=True),
    "the last of three layers": ArgSpec(2, 10, 2, 1, 64, "float32", layers=3),
    "blocks": ArgSpec(2, 90, 2, 2, 128, "float32", block=16, chosen=3),
    "blocks of query heads, own token": ArgSpec(2, 70, 4, 2, 64, "float32", block=16, chosen=4, apart=True, own=True),
    "odd blocks": ArgSpec(2, 29, 4, 2, 8, "float32", block=5, chosen=3),
    "bfloat16": ArgSpec(3, 65, 4, 4, 128, own=True),
    "bfloat16, grouped heads, blocks": ArgSpec(2, 50, 4, 2, 64, block=16, chosen=2),
}

ARG_SPECS = {
    "T=4096, D=16": ArgSpec.compact(256, 4096, 16),
    "T=4096, D=64": ArgSpec.compact(256, 4096, 64),
    "T=16384, D=16": ArgSpec.compact(128, 16384, 16),
    "T=16384, D=64": ArgSpec.compact(128, 16384, 64),
    "T=16384, blocks of 64": ArgSpec(128, 16384, block=64, chosen=16, apart=True),
    "T=16384, blocks of 16": ArgSpec(128, 16384, block=16, chosen=64, apart=True),
    "uneven blocks": ArgSpec(4, 999, 16, 2, 64, block=32, chosen=3, apart=True),
    "one long row": ArgSpec(1, 4097, 32, 16),
    "grouped heads": ArgSpec(4, 77, 12, 2, 64, own=True),
    "wide heads": ArgSpec(2, 5, 6, 2, 256, "float32"),
}
# Those that benchmarks time, beside dense attention of the same lengths.
TIMED = ("T=4096, D=16", "T=4096, D=64", "T=16384, D=16", "T=16384, D=64", "T=16384, blocks of 64",
         "T=16384, blocks of 16")
