"""Whole programs that are compiled for TPUs have the kernels in them, forward and backward, over a mesh too."""

from __future__ import annotations

import dataclasses

import pytest

from conftest import tpu_compiler
from experiments.aot import kernel_programs
from experiments.aot.kernel_programs import CASES, HOSTS, compiled

pytestmark = [pytest.mark.slow, pytest.mark.tpu, tpu_compiler]


@pytest.mark.parametrize("topology", HOSTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_kernels_are_in_programs_of_two_layers(case, topology):
  """Of the 1B model's sizes; `compiled` raises where a kernel is missing."""
  found = compiled(dataclasses.replace(case, layers=2), topology)
  assert found["vmem"] < 56 * 2**20


def test_kernels_run_over_rows_and_heads():
  case = dataclasses.replace(CASES[0], layers=2)
  over_rows, over_heads = (compiled(case, "v5p:2x2x1", mesh) for mesh in ("fsdp:4", "fsdp:2,tensor:2"))
  assert set(over_rows["calls"]) == set(over_heads["calls"])


def test_calls_of_a_text():
  line = ('  %gated_scan.{} = (f32[8,128]{{1,0:T(8,128)}}) custom-call(%a), custom_call_target="tpu_custom_call",'
          ' b={{}}\n')
  text = line.format(1) + line.format(2) + line.replace("gated_scan", "other_scan").format(3)
  assert kernel_programs.calls(text) == {"gated_scan": 2, "other_scan": 1}
