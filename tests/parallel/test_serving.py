"""Serving over a mesh of eight devices: every mode gives the numbers of one device."""

from __future__ import annotations

import pytest

from conftest import run_python

COUNT, QUICKER = 14, (0, 2, 4)  # of `serving.MODES`: dense, a window and sinks, chosen blocks


def serve(text, *numbers):
  run_python("-m", "parallel.serving", text, *map(str, numbers), devices=8)


@pytest.mark.slow
def test_three_modes():
  serve("data:2,tensor:2,context:2", *QUICKER)


@pytest.mark.slow
@pytest.mark.mesh
@pytest.mark.parametrize("number", sorted(set(range(COUNT)) - set(QUICKER)))
def test_every_other_mode(number):
  serve("data:2,tensor:2,context:2", number)
