"""Permutations: every number once, mixed, and nothing else than integers in range."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, strategies as st

from rat_jax.data import permute


@given(st.integers(1, 300), st.integers(0, 10**9))
def test_permutations(size, seed):
  assert sorted(permute(np.arange(size), size, seed)) == list(range(size))


def test_permutations_differ_and_mix():
  a, b = permute(np.arange(1000), 1000, 0), permute(np.arange(1000), 1000, 1)
  assert (a == b).mean() < 0.02
  assert abs(np.corrcoef(a, np.arange(1000))[0, 1]) < 0.1


def test_permutations_take_any_integers_and_nothing_else():
  one = permute(np.arange(10), 10, 5)
  np.testing.assert_array_equal(permute(np.arange(10, dtype=np.int8), np.int32(10), np.int64(5)), one)
  for index, message in (([-1], "index runs from -1 to -1; give integers in 0..9."),
                         ([3, 10], "index runs from 3 to 10; give integers in 0..9."),
                         ([1.0], "index has type float64; give integers in 0..9."),
                         ([True], "index has type bool; give integers in 0..9.")):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
      permute(np.array(index), 10, 0)
  with pytest.raises(ValueError, match=r"^size=0; use an integer of at least 1\.$"):
    permute(np.array([0]), 0, 0)
  with pytest.raises(ValueError, match=r"^seed=1\.5; use an integer\.$"):
    permute(np.array([0]), 1, 1.5)
