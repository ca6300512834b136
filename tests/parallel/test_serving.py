"""Serving over a mesh of eight devices: every mode gives the numbers of one device."""

from __future__ import annotations

import pytest

from conftest import run_python

COUNT, QUICKER = 14, (0, 2, 4)  # of `serving.MODES`: dense, a window and sinks, chosen blocks
DILATED, TOGETHER = 2, 13


def serve(text, *numbers, rows=4):
  run_python("-m", "parallel.serving", text, str(rows), *map(str, numbers), devices=8)


@pytest.mark.slow
def test_three_modes():
  serve("data:2,tensor:2,context:2", *QUICKER)


@pytest.mark.slow
def test_one_row_whose_parameters_are_cut():
  serve("fsdp:4,tensor:2", DILATED, rows=1)


@pytest.mark.slow
def test_query_heads_that_choose_together_on_several_devices():
  serve("tensor:4,context:2", TOGETHER)


@pytest.mark.slow
@pytest.mark.mesh
@pytest.mark.parametrize("number", sorted(set(range(COUNT)) - set(QUICKER)))
def test_every_other_mode(number):
  serve("data:2,tensor:2,context:2", number)
