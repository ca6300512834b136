"""Times decoding under several modes against dense decoding, in one run, on caches filled with random numbers.

Command: python -m experiments.bench_model --mode=dense --mode=quest:0.0625 --context=16384
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import rat_jax
from experiments import common
from rat_jax import RATPlusConfig, RATPlusLM, cache as caches
from rat_jax.modes import Mode

MODES = common.define_modes(
    ["dense", "dilated:16", "quest:0.0625", "moba:0.0625", "dilated_topk:64,0.0625", "snapkv:0.0625"],
    "A mode; repeat the flag for several.")
CONTEXT = flags.DEFINE_integer("context", 16384, "Tokens in the cache.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "Rows.", lower_bound=1)
LAYERS = flags.DEFINE_integer("layers", 4, "Layers.", lower_bound=1)
WIDTH = flags.DEFINE_integer("width", 512, "Model width E.", lower_bound=2)
HEADS = flags.DEFINE_integer("heads", 4, "Attention heads.", lower_bound=1)
KV_HEADS = flags.DEFINE_integer("kv_heads", None, "Key/value heads. Default: as many as heads.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["bfloat16", "float32"], "Type of matrix products and caches.")
STEPS = flags.DEFINE_integer("steps", 16, "Timed steps of a round.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds; the median counts.", lower_bound=1)


def random_cache(config: RATPlusConfig, mode: Mode, batch: int, context: int, steps: int) -> caches.Cache:
  """A cache as after a prompt of `context` tokens, its keys, values and statistics random, with room for `steps`."""
  cache = caches.empty_cache(config, mode, batch, context + steps, prompt_width=context)
  lengths = jnp.full(batch, context, jnp.int32)
  leaves, structure = jax.tree.flatten(cache.runs)
  keys = jax.random.split(jax.random.key(common.SEED.value), len(leaves))
  at = jnp.arange(context + steps)
  leaves = [jax.random.normal(key, leaf.shape).astype(leaf.dtype) if leaf.dtype != jnp.int32 else jnp.where(
      at[:leaf.shape[-1]] < leaf.shape[-1] - steps, at[:leaf.shape[-1]], -1) + jnp.zeros_like(leaf)
      for key, leaf in zip(keys, leaves, strict=True)]
  prompt = None if cache.prompt_lengths is None else lengths + 0  # a buffer of its own, to be given away
  return dataclasses.replace(cache, lengths=lengths, prompt_lengths=prompt, runs=jax.tree.unflatten(structure, leaves))


def seconds_per_step(model: RATPlusLM, params, mode: Mode) -> float:
  """The median over the rounds of the time of a step, host work included."""
  rounds, steps = ROUNDS.value, STEPS.value
  cache = random_cache(model.config, mode, BATCH_SIZE.value, CONTEXT.value, rounds * steps + 1)
  step = jax.jit(functools.partial(rat_jax.decode_step, model), donate_argnums=2)  # the cache is updated in place
  tokens = jnp.ones(BATCH_SIZE.value, jnp.int32)
  logits, cache = step(params, tokens, cache)
  jax.block_until_ready(logits)
  times = []
  for _ in range(rounds):
    start = time.perf_counter()
    for _ in range(steps):
      logits, cache = step(params, tokens, cache)
    jax.block_until_ready(logits)
    times.append((time.perf_counter() - start) / steps)
  return float(np.median(times))


def main() -> None:
  folder = common.workdir("bench_model")
  sizes: dict[str, Any] = {"num_heads": HEADS.value, "num_kv_heads": KV_HEADS.value, "dtype": DTYPE.value}
  config = RATPlusConfig(vocab_size=256, num_layers=LAYERS.value, embed_dim=WIDTH.value, **sizes)
  model = RATPlusLM(config)
  params = jax.jit(model.init)(jax.random.key(common.SEED.value), np.zeros((1, 8), np.int32))["params"]
  dense = seconds_per_step(model, params, rat_jax.Dense())
  rows, result = [], {}
  for mode in MODES.value:
    seconds = dense if mode == rat_jax.Dense() else seconds_per_step(model, params, mode)
    keys = float(np.mean(rat_jax.tokens_read(config, mode, CONTEXT.value, prompt_length=CONTEXT.value - 1)))
    result[str(mode)] = {"seconds_per_step": seconds, "keys_per_query": keys, "dense_over_this": dense / seconds}
    rows.append([str(mode), f"{keys:g}", f"{seconds * 1e3:.2f}", f"{dense / seconds:.1f}"])
  table = common.markdown_table(["mode", "keys per query", "ms per step", "times faster than dense"], rows)
  print(f"decoding at a context of {CONTEXT.value}, batch {BATCH_SIZE.value}, {config.num_layers} layers of width"
        f" {config.embed_dim}, {config.num_heads}/{config.num_kv_heads} heads, {config.dtype}, {common.device()}")
  print(table)
  (folder / "table.md").write_text(table + "\n")
  common.write_json(folder / "results.json", {"device": common.device(), "config": config.to_json(), "decode": result})


if __name__ == "__main__":
  common.run(main)
