"""Prefill, extension, decoding and generation over a mesh, in a process of eight devices: the numbers of one device.

Run by `test_serving.py`, with a mesh, a number of rows, and the numbers of modes in `MODES`.
"""

from __future__ import annotations

import sys

import jax
import numpy as np

import rat_jax
from conftest import assert_logits_close
from rat_jax import (
  Dense,
  Dilated,
  DilatedTopK,
  MoBA,
  PerHead,
  PerLayer,
  Quest,
  RATPlusConfig,
  RATPlusLM,
  SnapKV,
  StreamingLLM,
  TopK,
)
from rat_jax.parallel import make_mesh, shard

MODES = (
    Dense(), Dilated(4), Dilated(4, window=3, sinks=2), StreamingLLM(5, 2), Quest(0.5, block=4), MoBA(0.5, block=4),
    SnapKV(10, obs_window=4), DilatedTopK(4, 2), TopK(6), PerLayer((Dense(), Dilated(4))),
    PerHead((Dense(), Dilated(4))), StreamingLLM(3, 1) | Quest(8, block=4), Quest(0.5, block=4, selector="random"),
    Quest(8, block=4, group="kv"))
CONFIG = RATPlusConfig(vocab_size=61, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, mlp_dim=48)
TOKENS = np.random.default_rng(0).integers(0, 61, (4, 32))
LENGTHS, MORE = np.array([32, 7, 20, 1]), np.array([5, 0, 3, 5])
NEW = 6


def run(mode, rows, params, put):
  """What the ways to serve a mode give: whole sequences, a prompt, more of it, steps, and generated tokens."""
  model, given, lengths, more = RATPlusLM(CONFIG), TOKENS[:rows], LENGTHS[:rows], MORE[:rows]
  tokens = put({"tokens": given})["tokens"]
  prompts = {"prompt_lengths": np.minimum(lengths, 16)} if mode.after_prompt else {}
  whole = model.apply({"params": params}, tokens, mode=mode, lengths=lengths, **prompts)
  found = [np.asarray(whole)[np.arange(32) < lengths[:, None]]]
  logits, cache = rat_jax.prefill(model, params, tokens, lengths, mode=mode, max_length=48)
  found.append(logits)
  logits, cache = rat_jax.extend(model, params, given[:, :5], cache, lengths=more)
  found.append(np.asarray(logits)[np.arange(5) < more[:, None]])
  for i in range(3):
    logits, cache = rat_jax.decode_step(model, params, given[:, i], cache)
    found.append(logits)
  new = rat_jax.generate(model, params, given, lengths, mode=mode, max_new_tokens=NEW)
  return [np.asarray(x) for x in found], np.asarray(new), cache


def main(text, rows, *numbers):
  assert jax.device_count() == 8
  params = RATPlusLM(CONFIG).init(jax.random.key(0), TOKENS)["params"]
  mesh = make_mesh(text)
  placed = shard(params, mesh)
  for number in numbers:
    mode = MODES[int(number)]
    expected, said, _ = run(mode, int(rows), params, lambda tree: tree)
    put = (lambda tree: shard(tree, mesh)) if int(rows) > 1 else lambda tree: tree  # a single row is everybody's
    found, also_said, cache = run(mode, int(rows), placed, put)
    for ours, theirs in zip(found, expected, strict=True):
      assert_logits_close(ours, theirs, "float32")
    np.testing.assert_array_equal(also_said, said)
    for (path, leaf), wanted in zip(jax.tree.leaves_with_path(cache), jax.tree.leaves(put(cache)), strict=True):
      assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim), (mode, jax.tree_util.keystr(path))
    print(mode, flush=True)
    jax.clear_caches()


if __name__ == "__main__":
  main(*sys.argv[1:])
