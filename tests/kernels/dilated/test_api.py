"""`dilated_attention`: the ids of packed rows are taken as they are given, or refused."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from pallas_kernels import dilated_attention

X = np.random.default_rng(0).normal(size=(1, 4, 1, 8)).astype(np.float32)


@pytest.mark.parametrize("wide", [False, True])
def test_segment_ids_of_any_integer_type(wide):
  expected = dilated_attention(X, X, X, dilation=1, segment_ids=np.array([[7, 7, 1, 0]], np.int32))
  with jax.enable_x64(wide):
    for dtype in (np.int64, np.uint8):
      ids = np.array([[7, 7, 1, 0]], dtype)
      np.testing.assert_array_equal(dilated_attention(X, X, X, dilation=1, segment_ids=ids), expected)


def test_segment_ids_that_int32_does_not_hold_are_refused():
  """2**32 + 1 would become 1, and two documents one."""
  for ids, message in (
      ([[2**32 + 1, 1, 1, 1]], r"segment_ids holds 4294967297, which int32 does not; use -2147483648\.\.2147483647\."),
      (np.array([[-2**31 - 1, 1, 1, 1]]), "segment_ids holds -2147483649"),
      (np.array([[2**31, 1, 1, 1]], np.uint32), "segment_ids holds 2147483648"),
      ([[1.0, 1.0, 1.0, 1.0]], r"segment_ids is float32 \(1, 4\); give integers \[B, T\] = \(1, 4\)\.")):
    with pytest.raises(ValueError, match=message):
      dilated_attention(X, X, X, dilation=1, segment_ids=ids)
