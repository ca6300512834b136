"""Training over meshes of eight devices: loss, gradients and weights of one device."""

from __future__ import annotations

import itertools
import math

import pytest

from conftest import run_python
from rat_jax.parallel import AXES


def every_mesh(count):
  """The texts of all meshes of so many devices."""
  sizes = [n for n in range(1, count + 1) if count % n == 0]
  for shape in itertools.product(sizes, repeat=len(AXES)):
    if math.prod(shape) == count:
      yield ",".join(f"{axis}:{size}" for axis, size in zip(AXES, shape, strict=True))


EVERY = list(every_mesh(8))
THREE = ("data:2,tensor:2,context:2", "fsdp:2,context:4", "fsdp:4,tensor:2")
SAMPLE = ("data:2,fsdp:2,tensor:1,context:2", "data:1,fsdp:1,tensor:8,context:1", "data:1,fsdp:1,tensor:2,context:4",
          "data:1,fsdp:8,tensor:1,context:1")


def train(case, *meshes):
  run_python("-m", "parallel.eight_devices", case, *meshes, devices=8)


def test_there_are_twenty():
  assert len(EVERY) == len(set(EVERY)) == 20
  assert set(SAMPLE) < set(EVERY)


@pytest.mark.slow
def test_four_meshes_of_all_kinds():
  train("grouped heads, packed", *SAMPLE)


@pytest.mark.slow
@pytest.mark.mesh
@pytest.mark.parametrize("text", sorted(set(EVERY) - set(SAMPLE)))
def test_every_other_mesh(text):
  train("grouped heads, packed", text)


@pytest.mark.slow
@pytest.mark.mesh
@pytest.mark.parametrize("case", ["plain heads", "lengths that do not divide", "attention", "bfloat16 parameters"])
def test_other_models_on_three_meshes(case):
  train(case, *THREE)
