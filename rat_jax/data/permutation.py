"""A seeded permutation of 0..n-1 that is computed entry by entry: no table, no state to save."""

from __future__ import annotations

import numpy as np

_ROUNDS = 6


def permute(index: np.ndarray, size: int, seed: int) -> np.ndarray:
  """The images of `index` (ints in 0..size-1) under the permutation of 0..size-1 that `seed` names.

  A Feistel network permutes the smallest power of four that holds `size`; an image outside is permuted again
  until it falls inside (cycle walking), which keeps it a permutation.
  """
  if size < 1:
    raise ValueError(f"size={size}; there is nothing to permute.")
  half = max(1, (int(size - 1).bit_length() + 1) // 2)
  mask = np.uint64((1 << half) - 1)
  image = np.array(index, np.uint64)
  pending = np.ones(image.shape, bool)
  while pending.any():
    left, right = image[pending] >> np.uint64(half), image[pending] & mask
    for turn in range(_ROUNDS):
      left, right = right, left ^ (_mix(right, seed * _ROUNDS + turn) & mask)
    image[pending] = (left << np.uint64(half)) | right
    pending = image >= size
  return image.astype(np.int64)


def _mix(x: np.ndarray, key: int) -> np.ndarray:
  """A 64-bit hash of x under a key (the finaliser of SplitMix64)."""
  with np.errstate(over="ignore"):
    x = x + np.uint64((key * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
  return mixed
