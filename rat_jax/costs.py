"""What a mode costs: the keys that a query reads. (What a cache stores is `rat_jax.cache.cache_bytes`.)"""

from __future__ import annotations

import numpy as np

from rat_jax.config import RATPlusConfig
from rat_jax.modes import Mode, layer_modes, visible


def tokens_read(config: RATPlusConfig, mode: Mode, length: int) -> tuple[int, ...]:
  """Keys that the query at position length-1 reads, for every layer. Raises ValueError for a length below 1."""
  if length < 1:
    raise ValueError(f"length={length}; use at least 1.")
  counts: dict[Mode, int] = {}
  for one in layer_modes(mode, config.num_layers):
    if one not in counts:
      counts[one] = int(np.sum(visible(one, np.array([length - 1]), np.arange(length))))
  return tuple(counts[one] for one in layer_modes(mode, config.num_layers))
