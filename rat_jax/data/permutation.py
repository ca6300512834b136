"""A seeded permutation of 0..n-1 that is computed entry by entry: no table, no state to save."""

from __future__ import annotations

import numpy as np

from rat_jax import checks

_ROUNDS = 6


def permute(index: np.ndarray, size: int, seed: int) -> np.ndarray:
  """The images of `index` (ints in 0..size-1) under the permutation of 0..size-1 that `seed` names.

  A Feistel network permutes the smallest power of four that holds `size`; an image outside is permuted again
  until it falls inside (cycle walking), which keeps it a permutation.

  Raises ValueError for an index outside, and for what is no integer.
  """
  checks.check_count("size", size)
  if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
    raise ValueError(f"seed={seed!r}; use an integer.")
  index, size, seed = np.asarray(index), int(size), int(seed)  # numpy's own integers would overflow below
  if not np.issubdtype(index.dtype, np.integer):
    raise ValueError(f"index has type {index.dtype}; give integers in 0..{size - 1}.")
  if index.size and not 0 <= index.min() <= index.max() < size:
    raise ValueError(f"index runs from {index.min()} to {index.max()}; give integers in 0..{size - 1}.")
  half = max(1, ((size - 1).bit_length() + 1) // 2)
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
