"""`decode_attention` to a cache whose rows lie on several devices: each attends to its own, then parts are merged."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import softmax
from pallas_kernels.implementation import Implementation, Run
from pallas_kernels.split import CONTEXT

Array = jax.Array


def over_context(run: Run) -> Run:
  """`run` of a device's rows of the cache, inside `jax.shard_map` over the axis "context"."""

  def of_piece(q: Array, keys: Array, values: Array, visible: Array, layer: Array | int | None = None,
               own: tuple[Array, Array] | None = None, blocks: Array | None = None) -> tuple[Array, Array]:
    if blocks is not None:
      here = keys.shape[-2] // visible.shape[-1]  # blocks of the device's rows
      blocks = blocks - jax.lax.axis_index(CONTEXT) * here
      visible = visible & ((blocks >= 0) & (blocks < here))[..., None]
      blocks = jnp.clip(blocks, 0, here - 1)
    parts = jax.lax.all_gather(run(q, keys, values, visible, layer, None, blocks), CONTEXT)
    merged = [*zip(*parts, strict=True)]
    if own is not None:
      value = jnp.repeat(own[1].astype(jnp.float32), q.shape[1] // own[1].shape[1], axis=1)
      merged.append((value, softmax.own_scores(q[:, None], own[0][:, None])[:, 0]))
    return softmax.merge_parts(merged)

  return of_piece


def implementation(run: Run, **limits: Any) -> Implementation:
  """What computes `decode_attention` by `run`; `limits` as in `Implementation`."""
  return Implementation(run, independent="BNK", over_context=over_context(run), **limits)
