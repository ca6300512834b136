"""Rotary position embedding, half-split: channel d turns with channel d + H/2 (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

import jax.numpy as jnp

from rat_jax.axes import Array, Positions


def rotate(x: Array, positions: Positions, base: float) -> Array:
  """x [B, T, heads, H] turned by its positions [B, T]; float32. Padding (position -1) is left as it is."""
  half = x.shape[-1] // 2
  frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = jnp.maximum(positions, 0)[:, :, None, None].astype(jnp.float32) * frequency
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
