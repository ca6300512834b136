"""The parts of a model that `bench_model` times: a decode step, a prompt, a batch of training.

Each is compared with plain JAX before it is timed.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import pallas_kernels
import rat_jax
from experiments.bench import times
from rat_jax import RATPlusConfig, RATPlusLM, parallel
from rat_jax.axes import Params
from rat_jax.caches.cache import Cache, empty_cache
from rat_jax.modes import Mode
from rat_jax.plan import layer_runs
from rat_jax.train import ARL
from rat_jax.train.loss import cross_entropy
from rat_jax.transformer import Remat

CHECKED = 2  # rows whose logits are compared with plain JAX: of more the caches might not fit beside the others
# The flags below that one part alone reads.
READ_BY = {"prefill": ("chunk",), "decode": ("steps",), "train": ("remat", "unroll")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(times.Settings):
  """How the parts run."""

  chunk: int | None
  remat: Remat
  unroll: bool
  steps: int
  rounds: int
  mesh: str | None = None

  def placed(self, tree: Any) -> Any:
    """Parameters, a batch, a cache or a train state where --mesh says."""
    return tree if self.mesh is None else parallel.shard(tree, parallel.make_mesh(self.mesh))


def define_flags() -> None:
  times.define_flags()
  flags.DEFINE_integer("chunk", None, "Tokens of the prompt at a time, in prefill.", lower_bound=1)
  flags.DEFINE_enum("remat", "products", get_args(Remat), "What layers keep for gradients, in training.")
  flags.DEFINE_bool("unroll", False, "Compile layers one by one for training.")
  flags.DEFINE_integer("steps", 16, "Timed decode steps of a round.", lower_bound=1)
  flags.DEFINE_integer("rounds", 5, "Rounds; the median counts.", lower_bound=1)
  flags.DEFINE_string("mesh", None, "How devices share the work, such as fsdp:2. Default: one device, without a mesh.")


class Measured(NamedTuple):
  """What was found of a part."""

  seconds: float
  memory: float  # bytes that the program needs: arguments, results and what is between
  error: float   # of logits, or the loss, as a share of the largest entry


def check(part: str, mode: Mode, ours: jax.Array, theirs: jax.Array, bound: float) -> float:
  """The largest difference to the first rows, as a share of the largest entry. Raises ValueError above `bound`."""
  if not jnp.isfinite(ours).all():
    raise ValueError(f"{part} under {mode}: the result is not finite; it is not timed.")
  error = float(jnp.max(jnp.abs(ours[:len(theirs)] - theirs)) / jnp.max(jnp.abs(theirs)))
  if not error < bound:
    raise ValueError(f"{part} under {mode}: the result is off by {error:.2g} of its largest entry from that of plain"
                     " JAX; it is not timed.")
  return error


def tolerance(config: RATPlusConfig, mode: Mode) -> float:
  """That of logits: a rounding may change which blocks are chosen, and with them more than a rounding."""
  chooses = any(run.mode.chooses for run in layer_runs(mode, config.num_layers))
  return 1e-1 if chooses else 3e-2


def decode(settings: Settings, model: RATPlusLM, params: Params, mode: Mode, batch_size: int, context: int
           ) -> Measured:
  """A decode step, host work included."""
  steps = settings.steps
  room = (1 + settings.rounds + settings.profile) * steps + 1
  cache = random_cache(model.config, mode, batch_size, context, room, settings.seed)
  tokens = jax.random.randint(jax.random.key(settings.seed), (batch_size,), 0, model.config.vocab_size)
  params, cache = settings.placed(params), settings.placed(cache)
  step = functools.partial(rat_jax.decode_step, model)
  with pallas_kernels.force("xla"):
    expected = jax.jit(step)(params, tokens[:CHECKED], first_rows(cache))[0]
  compiled = jax.jit(step, donate_argnums=2,  # the cache is updated in place
                     compiler_options=rat_jax.compiler_options()).lower(params, tokens, cache).compile()
  carried = [compiled(params, tokens, cache)]
  error = check("decode", mode, carried[0][0], expected, tolerance(model.config, mode))

  def run():
    for _ in range(steps):
      carried[0] = compiled(params, tokens, carried[0][1])
    return carried[0][0]

  return Measured(median_seconds(settings, run, steps), needs(compiled), error)


def first_rows(cache: Cache) -> Cache:
  """The cache of the first rows alone."""
  cut = functools.partial(jax.tree.map, lambda x: x[:CHECKED])
  of_layers = functools.partial(jax.tree.map, lambda x: x[:, :CHECKED])
  return dataclasses.replace(cache, lengths=cut(cache.lengths), runs=of_layers(cache.runs),
                             state=of_layers(cache.state), row_ids=cut(cache.row_ids),
                             prompt_lengths=cut(cache.prompt_lengths))


def random_cache(config: RATPlusConfig, mode: Mode, batch: int, context: int, steps: int, seed: int) -> Cache:
  """A cache as after a prompt of `context` tokens, keys, values and summaries random, with room for `steps`.

  All layers of a run get the same numbers, so that drawing them takes little more memory than the cache.
  """
  cache = jax.eval_shape(lambda: empty_cache(config, mode, batch, context + steps, prompt_width=context))
  lengths = jnp.full(batch, context, jnp.int32)
  leaves, structure = jax.tree.flatten(cache.runs)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  at = jnp.arange(context + steps)
  leaves = [_random(key, leaf.shape, leaf.dtype) if leaf.dtype != jnp.int32 else jnp.where(
      at[:leaf.shape[-1]] < leaf.shape[-1] - steps, at[:leaf.shape[-1]], -1) + jnp.zeros(leaf.shape, jnp.int32)
      for key, leaf in zip(keys, leaves, strict=True)]
  empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), dataclasses.replace(cache, runs=()))
  prompt = None if cache.prompt_lengths is None else lengths + 0  # a buffer of its own, to be given away
  return dataclasses.replace(empty, lengths=lengths, prompt_lengths=prompt, runs=jax.tree.unflatten(structure, leaves))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
  return jnp.broadcast_to(jax.random.normal(key, shape[1:], dtype), shape)


def prefill(settings: Settings, model: RATPlusLM, params: Params, mode: Mode, batch_size: int, context: int
            ) -> Measured:
  """A prompt of `context` tokens in every row."""
  tokens = jax.random.randint(jax.random.key(settings.seed), (batch_size, context), 0, model.config.vocab_size)
  params, tokens = settings.placed(params), settings.placed({"tokens": tokens})["tokens"]
  run = lambda params, tokens: rat_jax.prefill(model, params, tokens, mode=mode, max_length=context,
                                               chunk=settings.chunk)
  with pallas_kernels.force("xla"):
    expected = jax.jit(lambda *arguments: run(*arguments)[0])(params, tokens[:CHECKED])
  compiled = jax.jit(run).lower(params, tokens).compile()
  error = check("prefill", mode, compiled(params, tokens)[0], expected, tolerance(model.config, mode))
  return Measured(median_seconds(settings, lambda: compiled(params, tokens)), needs(compiled), error)


def train(settings: Settings, model: RATPlusLM, params: Params, mode: Mode, batch_size: int, context: int
          ) -> Measured:
  """A batch of training: ARL's two updates for a sparse mode, two dense ones for Dense."""
  modes = (mode, ARL[1])
  optimizer = rat_jax.make_optimizer(1e-5, total_steps=1000)
  draw = np.random.default_rng(settings.seed)
  tokens = draw.integers(0, model.config.vocab_size, (batch_size, context), np.int32)
  batch = settings.placed({"tokens": jnp.asarray(tokens), "targets": jnp.asarray(tokens)})
  carried = [settings.placed(rat_jax.init_train_state(model, jax.tree.map(jnp.array, params), optimizer))]

  def loss(params, tokens):
    def of_row(row):
      logits: Any = model.apply({"params": params}, row[None], mode=mode)
      return cross_entropy(logits, row[None])[0]

    return jnp.sum(jax.lax.map(of_row, tokens)) / tokens.size  # no array of all logits

  with pallas_kernels.force("xla"):
    expected = jax.jit(loss)(carried[0].params, batch["tokens"])
  step = jax.jit(functools.partial(rat_jax.train_step, model, optimizer, modes=modes, remat=settings.remat,
                                   unroll=settings.unroll),
                 donate_argnums=0, compiler_options=rat_jax.compiler_options())
  compiled = step.lower(carried[0], batch).compile()

  def run():
    carried[0], metrics = compiled(carried[0], batch)
    return metrics

  metrics = run()
  error = check("train", mode, jnp.append(metrics["loss"], metrics["grad_norm"]), expected[None], 5e-3)
  return Measured(median_seconds(settings, run), needs(compiled), error)


PARTS: dict[str, Callable[..., Measured]] = {"prefill": prefill, "decode": decode, "train": train}


def median_seconds(settings: Settings, run: Callable[[], Any], calls: int = 1) -> float:
  """Of one of the calls that `run` makes: the median over rounds, after one that is not counted."""
  seconds = []
  for _ in range(1 + settings.rounds):
    start = time.perf_counter()
    jax.block_until_ready(run())
    seconds.append(time.perf_counter() - start)
  if settings.profile:
    times.report(run, calls)
  return float(np.median(seconds[1:])) / calls


def needs(compiled: Any) -> float:
  """Bytes that a compiled program needs; nan where the platform does not say."""
  memory = compiled.memory_analysis()
  if memory is None:
    return float("nan")
  return (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
          + memory.temp_size_in_bytes)
