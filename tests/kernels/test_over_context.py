"""Operations on sequences that a mesh cuts."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from conftest import OPERATION, assert_close, run_python
from pallas_kernels.scan.passes import between
from pallas_kernels.scan.xla import XLA


@pytest.mark.slow
def test_on_eight_devices():
  run_python("-m", "kernels.over_context", devices=8)


@pytest.mark.parametrize("with_reset", [False, True])
def test_segments_of_a_scan_are_the_scan(with_reset):
  """States before and after segments, forwards and backwards, of the sums of the segments alone."""
  random, passes, pieces = np.random.default_rng(0), XLA(), 3
  logits, x, d = (jnp.asarray(random.standard_normal((2, 12, 5)), jnp.float32) for _ in range(3))
  first, d_last = (jnp.asarray(random.standard_normal((2, 5)), jnp.float32) for _ in range(2))
  reset = jnp.asarray(random.random((2, 12)) < 0.2) if with_reset else None
  cut = lambda a: [None] * pieces if a is None else jnp.split(a, pieces, axis=1)
  (states,), (last,) = passes.forward(logits, (x,), (first,), reset)
  ends = [passes.ends(g, (y,), r) for g, y, r in zip(cut(logits), cut(x), cut(reset), strict=True)]
  (enters,), (found,) = between(jnp.stack([jnp.stack(end) for end in ends], axis=2), (first,))
  assert_close(enters, jnp.stack([first, states[:, 3], states[:, 7]], axis=1), OPERATION)
  assert_close(found, last, OPERATION)
  _, _, (d_first,) = passes.backward(logits, (x,), (first,), reset, (states,), (d,), (d_last,))
  sums = [passes.messages(g, r, (y,)) for g, y, r in zip(cut(logits), cut(d), cut(reset), strict=True)]
  _, (found,) = between(jnp.stack([jnp.stack(one) for one in sums], axis=2), (d_last,), reverse=True)
  assert_close(found, d_first, OPERATION)
