"""The pattern of dilated attention as a predicate on positions: what every implementation is tested against."""

from __future__ import annotations

import jax

Array = jax.Array


def dilated_pattern(t: Array, s: Array, dilation: int | None, window: int, sinks: int) -> Array:
  """Which keys s a query t reads, given 0 <= s <= t (arXiv 2602.18196, section 3): bool, t and s broadcast.

  The last token of every block of `dilation`, the `window` tokens before the query and itself, the first `sinks`.
  """
  reads = (t - s <= window) | (s < sinks)
  return reads if dilation is None else reads | ((s + 1) % dilation == 0)
