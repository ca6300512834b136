"""What share of a training step's operations a device has, in a process of eight devices. Run by `test_training.py`."""

from __future__ import annotations

import functools

import jax
import numpy as np

import rat_jax
from rat_jax import Dilated, RATPlusConfig, RATPlusLM
from rat_jax.parallel import make_mesh, shard

CONFIG = RATPlusConfig(256, 2, 64, 8, head_dim=16, mlp_dim=256)


def operations(put):
  """Of the program of one device, as the compiler counts them."""
  rows = np.zeros((8, 128), np.int32)
  model, optimizer = RATPlusLM(CONFIG), rat_jax.make_optimizer(1e-3, total_steps=2)
  state = rat_jax.init_train_state(model, model.init(jax.random.key(0), rows)["params"], optimizer)
  step = functools.partial(rat_jax.train_step, model, optimizer, modes=(Dilated(16, window=8),))
  compiled = jax.jit(step).lower(put(state), put({"tokens": rows, "targets": rows})).compile()
  return compiled.cost_analysis()["flops"]


def main():
  alone = operations(lambda tree: tree)
  for axis in ("data", "fsdp", "tensor", "context"):
    mesh = make_mesh(f"{axis}:8")
    share = 8 * operations(lambda tree, mesh=mesh: shard(tree, mesh)) / alone
    print(f"{axis}:8: {share:.2f} of an eighth", flush=True)
    assert 0.9 < share < 1.2, (axis, share)  # norms, optimizer and sums are everybody's on some axes


if __name__ == "__main__":
  main()
