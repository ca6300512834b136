"""Checksums of checkpoints: the same however an array lies, and other ones for other arrays."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from conftest import run_python
from rat_jax.train import checksums
from rat_jax.train.checksums import summed

SHAPES = [(), (7,), (3, 5), (2, 3, 4), (2, 3, 4, 5)]


def drawn(shape, dtype, seed=0):
  return np.asarray(100 * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int32, np.bool_])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_device_finds_what_the_host_finds(shape, dtype, monkeypatch):
  x = drawn(shape, dtype)
  expected = summed(x)
  assert expected.finite
  assert summed(jnp.asarray(x)) == expected
  monkeypatch.setattr(checksums, "_SMALL", 0)
  assert summed(x) == expected


def test_any_changed_bit_shows():
  x = drawn((2, 3, 4), np.float32)
  known = summed(x).sums
  for bit in range(8 * x.nbytes):
    changed = x.copy().view(np.uint8).reshape(-1)
    changed[bit // 8] ^= 1 << bit % 8
    assert summed(changed.view(np.float32).reshape(x.shape)).sums != known, bit
  assert summed(x[:, :, ::-1]).sums != known
  assert summed(x[::-1]).sums != known


def test_pieces_are_found_by_their_rows(monkeypatch):
  """Of 24 rows of 20 bytes, three fit a piece of 64 bytes; a change shows in its own piece alone."""
  monkeypatch.setattr(checksums, "_PIECE_BYTES", 64)
  x = drawn((4, 6, 5), np.float32)
  known = summed(x).sums
  assert len(known) == 8
  x[1, 1, 2] += 1  # row 7
  assert [i for i, (old, new) in enumerate(zip(known, summed(x).sums, strict=True)) if old != new] == [2]


def test_what_is_not_finite_is_told():
  for bad in (np.nan, np.inf):
    x = drawn((3, 4), np.float32)
    x[1, 2] = bad
    assert not summed(x).finite
    assert not summed(jnp.asarray(x)).finite


def test_cut_over_eight_devices():
  run_python("-c", """
import jax, numpy as np
from rat_jax.parallel import make_mesh
from rat_jax.train.checksums import summed
x = np.random.default_rng(0).standard_normal((4, 8, 6)).astype(np.float32)
for text, spec in (("fsdp:8", jax.P(None, "fsdp")), ("fsdp:2,tensor:4", jax.P("tensor", "fsdp")), ("data:8", jax.P())):
  placed = jax.device_put(x, jax.sharding.NamedSharding(make_mesh(text), spec))
  assert summed(placed) == summed(x), text
""", devices=8)
