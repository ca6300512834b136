"""Attention to chosen blocks in plain JAX: dense attention under a mask, made anew for every chunk of queries.

Memory grows with T and S, not with their product; the work is that of dense attention.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.attention import softmax
from pallas_kernels.attention.masks import keys_read, to_groups
from pallas_kernels.implementation import Implementation
from pallas_kernels.pattern import Rule

Array = jax.Array


def run(q: Array, k: Array, v: Array, blocks: Array, valid: Array, q_positions: Array, *, block: int,
        rule: Rule | None) -> softmax.Part:
  """As `api.sparse_attention`."""
  blocks = jnp.where(valid, blocks, -1)  # no block

  def attend_chunk(chunk: tuple[Array, ...]) -> softmax.Part:
    q, blocks, t = chunk
    mask = to_groups(keys_read(blocks, t, k.shape[1], block, rule), k.shape[2])
    # A weight of 0 is not enough: what is not read may hold what is not finite.
    read = jnp.moveaxis(jnp.any(mask, axis=(2, 3)), 1, 2)[..., None]
    return softmax.attend_part(q, jnp.where(read, k, 0), jnp.where(read, v, 0), mask)

  return softmax.by_chunks(attend_chunk, (q, blocks, q_positions))


IMPLEMENTATION = Implementation(run, independent="BNK")
