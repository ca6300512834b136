"""Times a whole model under several modes against dense attention, in one run: prefill, decoding, a training step.

Claim: a decode step reads what its mode chose, a dilated prefill computes what it sees, and both save time.
Command: python -m experiments.bench_model --mode=dense --mode=quest:0.0625 --context=16384
A preset through files: --preset=olmo2-7b --dtype=bfloat16 --through_files --part=prefill --part=decode
Where the time goes, kernel by kernel: --profile   Training and decoding by the authors' code too: --torch_reference=DIR
Weights are random, decoding starts from caches of random numbers, medians are of several rounds. Before a part is
timed, its logits, or the loss of training, are compared with those of plain JAX. Floors are the parameters and the part
of the cache that a step reads, or the operations, over what this device's reads and products were measured to do.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import shutil
import time
from collections.abc import Callable
from typing import Any, NamedTuple, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import pallas_kernels
import rat_jax
from experiments import common, kernel_times, plots, torch_reference
from experiments.kernel_times import Speeds, Work
from rat_jax import Dense, RATPlusConfig, RATPlusLM
from rat_jax.axes import Params
from rat_jax.caches.cache import Cache, empty_cache
from rat_jax.costs import PEAK_FLOPS
from rat_jax.modes import Mode, PerLayer
from rat_jax.plan import layer_runs
from rat_jax.train import ARL
from rat_jax.train.loss import cross_entropy
from rat_jax.transformer import Remat

MODES = common.define_modes(
    ["dense", "dilated:16", "quest:0.0625", "moba:0.0625", "dilated_topk:64,0.0625", "snapkv:0.0625"],
    "A mode; repeat the flag for several.")
PARTS = flags.DEFINE_multi_enum("part", ["decode"], ["prefill", "decode", "train"], "What to time; repeat it.")
CONTEXTS = flags.DEFINE_multi_integer("context", [16384], "Tokens in the cache, of the prompt, or of a training row;"
                                      " repeat it.", lower_bound=1)
BATCH_SIZES = flags.DEFINE_multi_integer("batch_size", [1], "Rows; repeat it.", lower_bound=1)
CHUNK = flags.DEFINE_integer("chunk", None, "Tokens of the prompt at a time.", lower_bound=1)
PRESET = flags.DEFINE_string("preset", None, "A ready-made size instead of those below.")
MEMORY = flags.DEFINE_bool("memory", True, "Give a preset of OLMo 2 a memory.")
THROUGH_FILES = flags.DEFINE_bool("through_files", False, "Write the weights as save_pretrained does and time loading.")
LAYERS = flags.DEFINE_integer("layers", 4, "Layers.", lower_bound=1)
WIDTH = flags.DEFINE_integer("width", 512, "Model width E.", lower_bound=2)
HEADS = flags.DEFINE_integer("heads", 4, "Attention heads.", lower_bound=1)
KV_HEADS = flags.DEFINE_integer("kv_heads", None, "Key/value heads. Default: as many as heads.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["bfloat16", "float32"], "Type of matrix products and caches, and of"
                          " parameters that are not trained.")
REMAT = flags.DEFINE_enum("remat", "products", get_args(Remat), "What layers keep for gradients.")
UNROLL = flags.DEFINE_bool("unroll", False, "Compile layers one by one for training.")
STEPS = flags.DEFINE_integer("steps", 16, "Timed decode steps of a round.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds; the median counts.", lower_bound=1)
TORCH_REFERENCE = flags.DEFINE_string("torch_reference", None, "A checkout of the RAT+ authors' code, whose training"
                                      " and decoding are timed too.")
flags.DEFINE_alias("torch-reference", "torch_reference")
CHECKED = 2  # rows whose logits are compared with plain JAX: of more the caches might not fit beside the others


def configuration() -> RATPlusConfig:
  """The model that the flags ask for."""
  choices: dict[str, Any] = {"dtype": DTYPE.value, "param_dtype": "float32" if "train" in PARTS.value else DTYPE.value}
  if PRESET.value is None:
    choices["num_kv_heads"] = KV_HEADS.value
    return RATPlusConfig(vocab_size=256, num_layers=LAYERS.value, embed_dim=WIDTH.value, num_heads=HEADS.value,
                         **choices)
  config = RATPlusConfig.preset(PRESET.value)
  if MEMORY.value and not config.memory:
    choices |= {"memory": True, "gate_bias": -12.0}
  return dataclasses.replace(config, **choices)


def random_cache(config: RATPlusConfig, mode: Mode, batch: int, context: int, steps: int) -> Cache:
  """A cache as after a prompt of `context` tokens, keys, values and summaries random, with room for `steps`.

  All layers of a run get the same numbers, so that drawing them takes little more memory than the cache.
  """
  cache = jax.eval_shape(lambda: empty_cache(config, mode, batch, context + steps, prompt_width=context))
  lengths = jnp.full(batch, context, jnp.int32)
  leaves, structure = jax.tree.flatten(cache.runs)
  keys = jax.random.split(jax.random.key(common.SEED.value), len(leaves))
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


def decode(model: RATPlusLM, params: Params, mode: Mode, batch_size: int, context: int) -> Measured:
  """A decode step, host work included."""
  rounds, steps = ROUNDS.value, STEPS.value
  room = (1 + rounds + kernel_times.PROFILE.value) * steps + 1
  cache = random_cache(model.config, mode, batch_size, context, room)
  tokens = jax.random.randint(jax.random.key(common.SEED.value), (batch_size,), 0, model.config.vocab_size)
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

  return Measured(median_seconds(run, steps), needs(compiled), error)


def first_rows(cache: Cache) -> Cache:
  """The cache of the first rows alone."""
  cut = functools.partial(jax.tree.map, lambda x: x[:CHECKED])
  of_layers = functools.partial(jax.tree.map, lambda x: x[:, :CHECKED])
  return dataclasses.replace(cache, lengths=cut(cache.lengths), runs=of_layers(cache.runs),
                             state=of_layers(cache.state), row_ids=cut(cache.row_ids),
                             prompt_lengths=cut(cache.prompt_lengths))


def prefill(model: RATPlusLM, params: Params, mode: Mode, batch_size: int, context: int) -> Measured:
  """A prompt of `context` tokens in every row."""
  shape = (batch_size, context)
  tokens = jax.random.randint(jax.random.key(common.SEED.value), shape, 0, model.config.vocab_size)
  run = lambda params, tokens: rat_jax.prefill(model, params, tokens, mode=mode, max_length=context, chunk=CHUNK.value)
  with pallas_kernels.force("xla"):
    expected = jax.jit(lambda *arguments: run(*arguments)[0])(params, tokens[:CHECKED])
  compiled = jax.jit(run).lower(params, tokens).compile()
  error = check("prefill", mode, compiled(params, tokens)[0], expected, tolerance(model.config, mode))
  return Measured(median_seconds(lambda: compiled(params, tokens)), needs(compiled), error)


def train(model: RATPlusLM, params: Params, mode: Mode, batch_size: int, context: int) -> Measured:
  """A batch of training: ARL's two updates for a sparse mode, two dense ones for Dense."""
  modes = (mode, ARL[1])
  optimizer = rat_jax.make_optimizer(1e-5, total_steps=1000)
  draw = np.random.default_rng(common.SEED.value)
  tokens = draw.integers(0, model.config.vocab_size, (batch_size, context), np.int32)
  batch = {"tokens": jnp.asarray(tokens), "targets": jnp.asarray(tokens)}
  carried = [rat_jax.init_train_state(model, jax.tree.map(jnp.array, params), optimizer)]

  def loss(params, tokens):
    def of_row(row):
      logits: Any = model.apply({"params": params}, row[None], mode=mode)
      return cross_entropy(logits, row[None])[0]

    return jnp.sum(jax.lax.map(of_row, tokens)) / tokens.size  # no array of all logits

  with pallas_kernels.force("xla"):
    expected = jax.jit(loss)(carried[0].params, batch["tokens"])
  step = jax.jit(functools.partial(rat_jax.train_step, model, optimizer, modes=modes, remat=cast(Remat, REMAT.value),
                                   unroll=UNROLL.value), donate_argnums=0, compiler_options=rat_jax.compiler_options())
  compiled = step.lower(carried[0], batch).compile()

  def run():
    carried[0], metrics = compiled(carried[0], batch)
    return metrics

  metrics = run()
  error = check("train", mode, jnp.append(metrics["loss"], metrics["grad_norm"]), expected[None], 5e-3)
  return Measured(median_seconds(run), needs(compiled), error)


def median_seconds(run: Callable[[], Any], calls: int = 1) -> float:
  """Of one of the calls that `run` makes: the median over rounds, after one that is not counted."""
  times = []
  for _ in range(1 + ROUNDS.value):
    start = time.perf_counter()
    jax.block_until_ready(run())
    times.append(time.perf_counter() - start)
  kernel_times.report(run, calls)
  return float(np.median(times[1:])) / calls


def needs(compiled: Any) -> float:
  """Bytes that a compiled program needs; nan where the platform does not say."""
  memory = compiled.memory_analysis()
  if memory is None:
    return float("nan")
  return (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
          + memory.temp_size_in_bytes)


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


def weights(config: RATPlusConfig, folder) -> Params:
  """Random parameters; with --through_files, as they come back from a folder of save_pretrained."""
  params = jax.jit(RATPlusLM(config).init)(jax.random.key(common.SEED.value), np.zeros((1, 8), np.int32))["params"]
  if not THROUGH_FILES.value:
    return params
  shutil.rmtree(folder, ignore_errors=True)
  start = time.perf_counter()
  rat_jax.save_pretrained(folder, config, params)
  written = time.perf_counter()
  del params
  _, params = rat_jax.load_pretrained(folder, place=lambda _, leaf: jax.block_until_ready(jax.device_put(leaf)))
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e9
  print(f"{size:.1f} GB written in {written - start:.0f} s, loaded in {time.perf_counter() - written:.0f} s")
  shutil.rmtree(folder)
  return params


def authors(directory: str, config: RATPlusConfig) -> dict[tuple[str, Mode, int, int], float]:
  """Seconds of the authors' code by part, mode, context and rows, which has the device to itself.

  Raises ValueError for a configuration that is not like theirs.
  """
  ours = ("vocab_size", "num_layers", "embed_dim", "num_heads", "mlp_dim", "memory", "tie_embeddings", "init_std",
          "param_dtype")
  like = RATPlusConfig(dtype="bfloat16", **{name: getattr(config, name) for name in ours})
  if config != like:
    raise ValueError(f"--torch_reference with {config.difference(like)} (of this model, of theirs); their model has one"
                     " form.")
  cases, keys = [], []
  for part, mode, context, batch_size in itertools.product(
      PARTS.value, dict.fromkeys([Dense(), *MODES.value]), CONTEXTS.value, BATCH_SIZES.value):
    pattern = mode.pattern
    if part != "prefill" and pattern is not None:
      keys.append((part, mode, context, batch_size))
      cases.append({"gradient": part == "train", "context": context, "batch_size": batch_size,
                    "dilation": pattern.dilation or -1, "window": pattern.window, "sinks": pattern.sinks})
  answers = torch_reference.ask(directory, {"cases": cases, "model": dataclasses.asdict(config),
                                            "rounds": ROUNDS.value})
  for key, answer in zip(keys, answers, strict=True):
    if "error" in answer:
      print(f"{key[0]} of {key[3]} x {key[2]} under {key[1]} by the authors' code: {answer['error']}", flush=True)
  return {key: answer["seconds"] for key, answer in zip(keys, answers, strict=True) if "seconds" in answer}


PARTS_OF_A_MODEL = {"prefill": prefill, "decode": decode, "train": train}


def main() -> None:
  folder, config = common.workdir("bench_model"), configuration()
  of_authors = authors(TORCH_REFERENCE.value, config) if TORCH_REFERENCE.value else {}
  speeds = kernel_times.speeds()
  model, params = RATPlusLM(config), weights(config, common.workdir("bench_model") / "weights")
  print(f"{PRESET.value or 'a model'}: {config.num_layers} layers of width {config.embed_dim}, {config.num_heads}/"
        f"{config.num_kv_heads} heads, {config.dtype}, on {common.device()}: {speeds}", flush=True)
  if PARTS.value == ["train"]:
    params = jax.device_get(params)  # a step has the device to itself
  lines: list[dict[str, Any]] = []
  text = []
  for part, context, batch_size in itertools.product(PARTS.value, CONTEXTS.value, BATCH_SIZES.value):
    found: dict[Mode, tuple[Measured, Work, float]] = {}
    for mode in dict.fromkeys([Dense(), *MODES.value]):
      try:
        measured = PARTS_OF_A_MODEL[part](model, params, mode, batch_size, context)
      except jax.errors.JaxRuntimeError as error:
        if not common.out_of_memory(error):
          raise
        print(f"{part} of {batch_size} x {context} under {mode}: not timed: out of memory", flush=True)
        continue
      of = work(part, config, params, mode, batch_size, context)
      found[mode] = measured, of, floor(of, speeds)
      lines.append({"part": part, "mode": str(mode), "context": context, "batch_size": batch_size,
                    **measured._asdict(), **of._asdict(), "floor": found[mode][2],
                    "authors": of_authors.get((part, mode, context, batch_size))})
      common.write_json(folder / "results.json", {"device": common.device(), **speeds._asdict(),
                                                  "config": config.to_json(), "lines": lines})
    theirs = {mode: of_authors.get((part, mode, context, batch_size)) for mode in found}
    text.append(table(part, config, found, batch_size, context, theirs))
    print(f"\nbatch {batch_size}, {context} tokens\n\n{text[-1]}", flush=True)
  (folder / "table.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
  plots.draw_throughput([line for line in lines if line["part"] == "decode"], folder / "decode.png")


def table(part: str, config: RATPlusConfig, found: dict[Mode, tuple[Measured, Work, float]], batch_size: int,
          context: int, theirs: dict[Mode, float | None]) -> str:
  """A line for every mode: what was measured, its work, the floor in seconds, and the authors' seconds."""
  tokens = batch_size * (1 if part == "decode" else context)
  peak, rows = PEAK_FLOPS.get(common.device()), []
  for mode, (measured, of, least) in found.items():
    seconds = measured.seconds
    keys = float(np.mean(rat_jax.tokens_read(config, mode, context, prompt_length=context - 1)))
    row = [str(mode), f"{keys:g}", f"{seconds * 1e3:.2f}", f"{tokens / seconds:,.0f}",
           f"{found[Dense()][0].seconds / seconds:.1f}" if Dense() in found else "", f"{measured.memory / 1e9:.1f}",
           f"{of.bytes / 1e9:.3g}" if of.bytes else "", f"{of.flops / 1e12:.3g}", f"{least * 1e3:.2f}",
           f"{least / seconds:.0%}", f"{measured.error:.1e}"]
    if part == "train":
      row.append(f"{100 * of.flops / seconds / peak:.0f}%" if peak else "unknown chip")
    if any(theirs.values()):
      row.append(f"{1e3 * of_mode:.2f}" if (of_mode := theirs[mode]) else "")
    rows.append(row)
  header = [part, "keys per query", "ms", "tokens/s", "times faster than dense", "memory, GB", "reads, GB", "TFLOP",
            "floor, ms", "share of the floor", "error"]
  header += ["of the peak"] * (part == "train") + ["authors, ms"] * any(theirs.values())
  return common.markdown_table(header, rows)


if __name__ == "__main__":
  common.run(main)
