"""What the parts of a model cannot do without: what they read, their operations, and the seconds of both."""

from __future__ import annotations

import jax

import rat_jax
from experiments.bench.times import Speeds, Work
from rat_jax import Dense, RATPlusConfig
from rat_jax.axes import Params
from rat_jax.caches.cache import empty_cache
from rat_jax.modes import Mode, PerLayer
from rat_jax.plan import layer_runs
from rat_jax.train import ARL


def work(part: str, config: RATPlusConfig, params: Params, mode: Mode, batch_size: int, context: int) -> Work:
  """Of a decode step the parameters and what it reads of the cache; of prefill and training the operations."""
  tokens, head = batch_size * context, 2 * config.vocab_size * config.embed_dim
  if part == "train":
    return Work(0.0, tokens * sum(rat_jax.training_flops(config, one, context) for one in (mode, ARL[1])))
  if part == "prefill":  # a third of training's, but for the head, which the last token alone goes through
    forms = [run.form for run in layer_runs(mode, config.num_layers) for _ in range(run.start, run.stop)]
    each = rat_jax.training_flops(config, PerLayer(tuple(forms)), context) / 3 - head
    return Work(0.0, tokens * each + batch_size * head)
  rows = rat_jax.tokens_read(config, mode, context + 1, prompt_length=context)
  size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
  cache = jax.eval_shape(lambda: empty_cache(config, mode, batch_size, context + 1, prompt_width=context))
  read = size(params) + size(cache.state)
  if not config.tie_embeddings:
    read -= size(params["embedding"])  # but for a row for each token
  for run, kept in zip(cache.plan, cache.runs, strict=True):
    of_row = size((kept.keys, kept.values)) / kept.keys.shape[0] / kept.keys.shape[3]
    read += size(getattr(kept, "summaries", ()))
    read += of_row * sum(count - 1 for count in rows[run.start:run.stop])  # the own one is new
  each = rat_jax.training_flops(config, Dense(), 1) / 3 + 4 * config.num_heads * config.head_dim * sum(rows)
  return Work(read, batch_size * each)


def floor(of: Work, speeds: Speeds) -> float:
  """Seconds that reads and operations take at least."""
  return max(of.bytes / speeds.reads, of.flops / speeds.product)
