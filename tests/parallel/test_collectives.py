"""What crosses devices in an update that is compiled for a TPU, counted by layer. Needs no TPU."""

from __future__ import annotations

import importlib.util

import pytest

from conftest import run_python


@pytest.mark.slow
@pytest.mark.tpu
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="there is no compiler for TPUs; `make"
                    " test-slow-tpu` installs it")
@pytest.mark.parametrize("axis", ["fsdp", "tensor", "context"])
def test_each_layer_sends_what_is_expected(axis):
  run_python("-m", "parallel.collectives", axis, optimize=True)
