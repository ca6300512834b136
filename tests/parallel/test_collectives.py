"""What crosses devices in an update that is compiled for a TPU, counted by layer. Needs no TPU."""

from __future__ import annotations

import pytest

from conftest import run_python, tpu_compiler


@pytest.mark.slow
@pytest.mark.tpu
@tpu_compiler
@pytest.mark.parametrize("axis", ["fsdp", "tensor", "context"])
def test_each_layer_sends_what_is_expected(axis):
  run_python("-m", "parallel.collectives", axis, optimize=True)
