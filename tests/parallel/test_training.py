"""Training over meshes of eight devices: loss, gradients and weights of one device."""

from __future__ import annotations

import collections
import functools
import itertools
import math
import re

import jax
import numpy as np
import pytest

import rat_jax
from conftest import run_python
from rat_jax import Dense, Dilated, RATPlusConfig, RATPlusLM
from rat_jax.parallel import AXES, make_mesh, shard


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
def test_each_device_has_its_share_of_the_work():
  run_python("-m", "parallel.shares", devices=8)


@pytest.mark.slow
def test_a_mesh_of_one_device_compiles_to_the_program_without_a_mesh():
  """The same operations on arrays of the same shapes, as often."""
  config, rows = RATPlusConfig(61, 2, 32, 8, num_kv_heads=2, head_dim=4, mlp_dim=48), np.zeros((4, 24), np.int32)
  model, optimizer = RATPlusLM(config), rat_jax.make_optimizer(1e-3, total_steps=2)
  state = rat_jax.init_train_state(model, model.init(jax.random.key(0), rows)["params"], optimizer)
  step = functools.partial(rat_jax.train_step, model, optimizer, modes=(Dilated(4, window=2), Dense()))

  def operations(*arguments):
    text = jax.jit(step, donate_argnums=0).lower(*arguments).compile().as_text()
    return collections.Counter(re.findall(r"= (\(?[a-z0-9]+\[.*?\]\S* [a-z-]+)\(", text))

  mesh, batch = make_mesh(devices=jax.devices()[:1]), {"tokens": rows, "targets": rows}
  without = operations(state, batch)
  assert without.total() > 1000
  assert operations(shard(state, mesh), shard(batch, mesh)) == without


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
