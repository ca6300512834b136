"""The suite's checks on a TPU: the shapes of the interpreter's tests, larger ones, and any shapes.

Run by `make test-tpu` together with the suite; it prints the worst errors (as shares of the largest entry) at the end.
"""

from __future__ import annotations

import dataclasses

import jax
import pytest
from hypothesis import given, settings, strategies as st

import rat_jax
from experiments.aot.interpreted import NAME
from kernels import suite, tpu_shapes as shapes
from pallas_kernels.pattern import Pattern

pytestmark = [pytest.mark.tpu, pytest.mark.slow, pytest.mark.usefixtures("true_float32"),
              pytest.mark.skipif(jax.default_backend() != "tpu", reason="there is no TPU; `make test-tpu` is for one")]
LARGE = [
    ("gated_scan", shapes.Scan(8, 1024, 16, reset=True)), ("gated_scan", shapes.Scan(1, 8192, 3, 64)),
    ("dilated_attention", shapes.Dilated(2, 4096, 8, 2, pattern=Pattern(16, 0, 4))),
    ("dilated_attention", shapes.Dilated(1, 4500, 4, 4, dtype="float32", pattern=Pattern(16, 700, 4))),
    ("dilated_attention", shapes.Dilated(1, 4096, 2, 2, pattern=Pattern(1))),
    ("decode_attention", shapes.Decode(16, 4096, 8, 8, own=True)),
    ("decode_attention", shapes.Decode(4, 4096, 16, 4, block=64, chosen=16, apart=True, own=True)),
    ("sparse_attention", shapes.Sparse(1, 4096, 8, 2, block=64, chosen=8)),
    ("sparse_attention", shapes.Sparse(1, 3000, 4, 4, dtype="float32", block=128, chosen=3,
                                       rule=Pattern(None, 64, 4)))]


@pytest.mark.parametrize(("operation", "spec"), [*shapes.EVERY, *LARGE])
def test_values_and_gradients(operation, spec):
  suite.check_numbers(operation, NAME, spec)
  suite.check_poison(operation, NAME, spec)


@settings(deadline=None, max_examples=10, derandomize=True)
@given(st.integers(1, 1500), st.none() | st.integers(1, 40), st.integers(0, 300), st.integers(0, 40), st.integers(1, 2),
       st.integers(1, 3), st.integers(0, 9))
def test_dilated_attention_of_any_shape(length, dilation, window, sinks, heads, groups, seed):
  spec = shapes.dilated(length, (dilation, window, sinks), heads, groups)
  suite.check_numbers("dilated_attention", NAME, dataclasses.replace(spec, dtype="bfloat16"), seed)


def test_the_check_of_the_device():
  found = rat_jax.check_device()
  print(found)
  assert found.passed
