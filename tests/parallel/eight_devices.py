"""Training over meshes, in a process of eight devices: the numbers of one device.

Run by `test_training.py`, with the name of a case and meshes.
"""

from __future__ import annotations

import dataclasses
import sys

import jax
import numpy as np

import rat_jax
from rat_jax import Dense, Dilated, RATPlusConfig, RATPlusLM
from rat_jax.parallel import make_mesh, shard
from rat_jax.train.loss import sequence_loss

ROWS, UPDATES = 8, 3
RAT_PLUS = RATPlusConfig(vocab_size=61, num_layers=2, embed_dim=32, num_heads=8, num_kv_heads=2, head_dim=4, mlp_dim=48)
PLAIN = dataclasses.replace(RAT_PLUS, num_kv_heads=8)
# (configuration, tokens of a row, modes of the updates, whether rows are packed)
CASES = {
    "grouped heads, packed": (RAT_PLUS, 24, (Dilated(4, window=3, sinks=2), Dense()), True),
    "plain heads": (PLAIN, 32, (Dilated(4), Dense()), False),
    "lengths that do not divide": (RAT_PLUS, 29, (Dilated(4, window=3, sinks=2), Dense()), False),
    "attention": (dataclasses.replace(PLAIN, memory=False), 24, (Dense(),), True),
    "bfloat16 parameters": (dataclasses.replace(RAT_PLUS, param_dtype="bfloat16"), 24, (Dilated(4), Dense()), True),
}


def batches(case):
  """One for every update: random tokens, and where rows are packed, documents that cross pieces of any size."""
  config, length, _, packed = CASES[case]
  for step in range(UPDATES):
    random = np.random.default_rng(step)
    tokens = random.integers(0, config.vocab_size, (ROWS, length + 1))
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    if packed:
      ends = np.cumsum(random.integers(1, length, (ROWS, 4)), axis=1)
      batch["segment_ids"] = 1 + (np.arange(length)[None, :, None] >= ends[:, None]).sum(axis=2)
      batch["segment_ids"][:, -2:] = 0
    yield batch


class Run:
  """What a case gives on a mesh, or on one device: loss and gradients of a batch, then some batches of training."""

  def __init__(self, case, mesh=None):
    config, _, modes, _ = CASES[case]
    model = RATPlusLM(config)
    put = (lambda tree: shard(tree, mesh)) if mesh else lambda tree: tree
    made = list(map(put, batches(case)))
    params = model.init(jax.random.key(0), made[0]["tokens"])["params"]
    optimizer = rat_jax.make_optimizer(1e-2, total_steps=10, warmup_steps=2)
    state = put(rat_jax.init_train_state(model, params, optimizer))

    def loss(params, batch):
      return sum(total / count for total, count in (
          sequence_loss(model, params, batch, mode=mode) for mode in modes))

    self.loss, self.gradients = jax.jit(jax.value_and_grad(loss))(state.params, made[0])
    self.metrics = []
    for batch in made:
      state, metrics = rat_jax.train_step(model, optimizer, state, batch, modes=modes)
      self.metrics.append(metrics)
    self.state = state


def compare(case, one, other, text):
  """Asserts the numbers of one device, and that arrays still lie as the table says."""
  at, exact = f"{case} on {text}", CASES[case][0].param_dtype == "float32"
  of_losses = 1e-5 if exact else 1e-3  # a step may round a bfloat16 parameter to either neighbour
  np.testing.assert_allclose(other.loss, one.loss, rtol=of_losses, err_msg=at)
  for (path, theirs), ours in zip(jax.tree.leaves_with_path(one.gradients), jax.tree.leaves(other.gradients),
                                  strict=True):
    largest = np.abs(np.asarray(theirs, np.float32)).max()
    bound = 1e-5 if exact else 2**-7
    np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(theirs, np.float32), rtol=0,
                               atol=bound * largest, err_msg=f"{at}: the gradient of {jax.tree_util.keystr(path)}")
  for theirs, ours in zip(one.metrics, other.metrics, strict=True):
    np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=of_losses, err_msg=at)
    np.testing.assert_allclose(ours["tokens"], theirs["tokens"], err_msg=at)
  worst = 0.0
  for (path, theirs), ours in zip(jax.tree.leaves_with_path(one.state.params), jax.tree.leaves(other.state.params),
                                  strict=True):
    theirs, ours = np.asarray(theirs, np.float32), np.asarray(ours, np.float32)
    away = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    worst = max(worst, away)
    # A gradient that bfloat16 rounds to either side of zero moves a weight by twice the learning rate.
    assert not exact or away < 2e-4, (at, jax.tree_util.keystr(path), away)
  placed = shard(other.state, make_mesh(text))
  for (path, leaf), wanted in zip(jax.tree.leaves_with_path(other.state), jax.tree.leaves(placed), strict=True):
    assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim), (at, jax.tree_util.keystr(path), leaf.sharding)
  print(f"{at}: weights {worst:.1e}", flush=True)


def main(case, *meshes):
  assert jax.device_count() == 8
  one = Run(case)
  for text in meshes:
    compare(case, one, Run(case, make_mesh(text)), text)
    jax.clear_caches()


if __name__ == "__main__":
  main(*sys.argv[1:])
