"""Train three small models on real text, then run each under sparse attention that it never saw.

Claim: a model whose keys and values pass the memory, trained densely with ARL, keeps its quality when inference
reads a sixteenth of the keys; plain attention does not, and training attention on ARL's sparse branch is no cure.
Expected: RAT+ loses a few hundredths of a bit per byte from Dense to Dilated(16), attention more than one bit.
Cost: 10 to 18 minutes on two CPU cores.  Command: make quickstart, or python -m experiments.quickstart
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import shutil
import time
from typing import Any

import jax
import numpy as np
from absl import flags

import rat_jax
from experiments import common, plots
from rat_jax import Dense, Dilated, MoBA, PerLayer, Quest, RATPlusConfig, RATPlusLM, SnapKV, StreamingLLM
from rat_jax.data import BYTES, TokenFile
from rat_jax.evaluate import loss_by_mode
from rat_jax.modes import Mode
from rat_jax.train import Checkpoints, train

DATA = flags.DEFINE_string("data", None, "Text file or folder. Default: the Python standard library's text.")
STEPS = flags.DEFINE_integer("steps", 1000, "Batches of training, two updates each.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Sequences in a batch.", lower_bound=1)
LENGTH = flags.DEFINE_integer("length", 256, "Tokens in a sequence.", lower_bound=8)
LAYERS = flags.DEFINE_integer("layers", 3, "Layers.", lower_bound=1)
WIDTH = flags.DEFINE_integer("width", 64, "Model width E.", lower_bound=2)
HEADS = flags.DEFINE_integer("heads", 4, "Attention heads.", lower_bound=1)
LEARNING_RATE = flags.DEFINE_float("learning_rate", 6e-3, "Peak learning rate.", lower_bound=0.0)
ARL_DILATION = flags.DEFINE_integer("arl_dilation", 16, "Dilation of the sparse update.", lower_bound=1)
EVAL_WINDOWS = flags.DEFINE_integer("eval_windows", 256, "Held-out sequences that are scored.", lower_bound=1)

DECODE_CONTEXT, DECODE_BATCH, DECODE_STEPS = 4096, 8, 32


def modes_of(num_layers: int) -> list[Mode]:
  """The modes of the table."""
  hybrid = PerLayer(tuple(Dense() if i == 0 else Dilated(16) for i in range(num_layers)))
  return [Dense(), *(Dilated(d) for d in (4, 8, 16, 32)), Dilated(16, window=32, sinks=4), StreamingLLM(32, 4), hybrid]


def choosing_modes() -> list[Mode]:
  """The modes of the second table, with blocks and windows that fit into so short a sequence."""
  return [Dense(), *(mode for share in (0.25, 0.125) for mode in (
      Quest(share, block=4), MoBA(share, block=4), SnapKV(share, obs_window=8)))]


def arms(config: RATPlusConfig) -> dict[str, tuple[RATPlusConfig, tuple[Mode, ...]]]:
  """{name: (config, the modes of the two updates)}; attention gets the gate's parameters as MLP width instead."""
  attention = dataclasses.replace(config, memory=False, mlp_dim=config.mlp_dim + config.embed_dim // 2)
  sparse = Dilated(ARL_DILATION.value)
  return {
      "RAT+": (config, (sparse, Dense())),
      "attention": (attention, (Dense(), Dense())),
      "attention, sparse branch": (attention, (sparse, Dense())),
  }


def train_arm(name: str, config: RATPlusConfig, modes: tuple[Mode, ...], data: TokenFile, folder: pathlib.Path):
  """(model, parameters, seconds) after training one arm; every arm sees the same batches."""
  model = RATPlusLM(config)
  seed = common.SEED.value

  def batch_at(step):
    return data.batch(step, batch_size=BATCH_SIZE.value, length=LENGTH.value, seed=seed)

  params = model.init(jax.random.key(seed), batch_at(0)["tokens"])["params"]
  optimizer = rat_jax.make_optimizer(LEARNING_RATE.value, total_steps=STEPS.value, warmup_steps=STEPS.value // 10)
  state = rat_jax.init_train_state(model, params, optimizer)
  slug = name.replace(", ", "-").replace(" ", "-").replace("+", "plus").lower()
  shutil.rmtree(folder / "checkpoints" / slug, ignore_errors=True)  # every run trains anew
  checkpoints = Checkpoints(folder / "checkpoints" / slug, keep=1)
  start = time.perf_counter()
  metrics = folder / f"metrics-{slug}.jsonl"
  metrics.unlink(missing_ok=True)
  state = train(model, optimizer, state, batch_at, steps=STEPS.value, modes=modes, metrics_path=metrics,
                checkpoints=checkpoints, label=name)
  return model, state.params, time.perf_counter() - start


def bits_by_mode(model: RATPlusLM, params, data: TokenFile, modes: list[Mode], prompt_length: int | None = None
                 ) -> dict[Mode, float]:
  """Held-out bits per byte under every mode, of what comes after the prompt; a token is a byte."""
  batches = data.epoch(batch_size=BATCH_SIZE.value, length=LENGTH.value, limit=EVAL_WINDOWS.value)
  losses = loss_by_mode(model, params, batches, modes, prompt_length)
  return {mode: nats / math.log(2) for mode, nats in losses.items()}


def decode_speed(model: RATPlusLM, params, mode: Mode) -> float:
  """Decoded tokens per second of a batch with a long context."""
  tokens = jax.random.randint(jax.random.key(0), (DECODE_BATCH, DECODE_CONTEXT), 1, model.config.vocab_size)
  _, cache = rat_jax.prefill(model, params, tokens, mode=mode, max_length=DECODE_CONTEXT + DECODE_STEPS + 1, chunk=512)
  step = jax.jit(functools.partial(rat_jax.decode_step, model), donate_argnums=2)  # the cache is updated in place
  logits, cache = step(params, tokens[:, 0], cache)
  jax.block_until_ready(logits)
  start = time.perf_counter()
  for i in range(DECODE_STEPS):
    logits, cache = step(params, tokens[:, i], cache)
  jax.block_until_ready(logits)
  return DECODE_BATCH * DECODE_STEPS / (time.perf_counter() - start)


def continuations(model: RATPlusLM, params, data: TokenFile, modes: list[Mode]) -> dict[str, Any]:
  """A held-out text, continued under every mode by the same random numbers."""
  middle = len(data.tokens) // 2
  prompt = np.asarray(data.tokens[middle:middle + LENGTH.value // 2])[None].astype(np.int32)
  texts = {"prompt": BYTES.decode(prompt[0])}
  for mode in modes:
    new = rat_jax.generate(model, params, prompt, mode=mode, max_new_tokens=LENGTH.value // 2, temperature=0.7,
                           top_p=0.95, key=jax.random.key(common.SEED.value))
    texts[str(mode)] = BYTES.decode_after(prompt[0], np.asarray(new)[0])
  return texts


def table_of(config: RATPlusConfig, bits: dict[str, dict[Mode, float]], prompt_length: int | None = None
             ) -> tuple[str, dict[str, Any]]:
  """(a Markdown table, its figures for results.json) of bits per byte by model and mode, beside what a mode costs."""
  modes = list(next(iter(bits.values())))
  keys = {mode: float(np.mean(rat_jax.tokens_read(config, mode, LENGTH.value, prompt_length))) for mode in modes}
  cache = {mode: rat_jax.cache_bytes(config, mode, 1, LENGTH.value, prompt_length) for mode in modes}
  header = ["mode", "keys per query", "cache bytes", *(f"bits/byte: {name}" for name in bits)]
  rows = [["per_layer: dense, then dilated:16" if isinstance(mode, PerLayer) else str(mode), f"{keys[mode]:g}",
           f"{cache[mode]:,}", *(f"{by_mode[mode]:.3f}" for by_mode in bits.values())] for mode in modes]
  return common.markdown_table(header, rows), {
      "keys_per_query": {str(m): v for m, v in keys.items()}, "cache_bytes": {str(m): v for m, v in cache.items()},
      "bits_per_byte": {name: {str(m): v for m, v in by_mode.items()} for name, by_mode in bits.items()}}


def main() -> None:
  start = time.perf_counter()
  folder = common.workdir("quickstart")
  data = common.corpus(DATA.value, folder / "data")
  config = RATPlusConfig(vocab_size=data["train"].sidecar.vocab_size, num_layers=LAYERS.value, embed_dim=WIDTH.value,
                         num_heads=HEADS.value, init_std=None)
  modes = modes_of(config.num_layers)
  print(f"{data['train'].sidecar.tokens:,} bytes to train on, {data['heldout'].sidecar.tokens:,} held out,"
        f" from {data['train'].sidecar.source}")
  trained, bits, choosing, seconds = {}, {}, {}, {}
  prompt = LENGTH.value // 2
  for name, (arm_config, arm_modes) in arms(config).items():
    model, params, seconds[name] = train_arm(name, arm_config, arm_modes, data["train"], folder)
    trained[name] = (model, params)
    bits[name] = bits_by_mode(model, params, data["heldout"], modes)
    choosing[name] = bits_by_mode(model, params, data["heldout"], choosing_modes(), prompt)

  table, figures = table_of(config, bits)
  choosing_table, choosing_figures = table_of(config, choosing, prompt)
  print(f"\nEvery byte of a sequence:\n\n{table}\n")
  print(f"The bytes after a prompt of {prompt}, under modes that choose by the query:\n\n{choosing_table}\n")

  model, params = trained["RAT+"]
  speed = {str(mode): decode_speed(model, params, mode) for mode in (Dense(), Dilated(16))}
  speed_line = ", ".join(f"{mode} {rate:.0f}" for mode, rate in speed.items())
  print(f"decoded tokens/s at a context of {DECODE_CONTEXT}, batch {DECODE_BATCH}, {common.device()}: {speed_line}")
  texts = continuations(model, params, data["heldout"], [Dense(), Dilated(16)])
  for name, text in texts.items():
    print(f"\n--- {name}\n{text}")

  (folder / "table.md").write_text(f"{table}\n\n{choosing_table}\n", encoding="utf-8")
  continued = "\n".join(f"--- {name}\n{text}\n" for name, text in texts.items())
  (folder / "continuations.txt").write_text(continued, encoding="utf-8")
  plots.draw_masks(modes, folder / "masks.png")
  sample = next(data["heldout"].epoch(batch_size=1, length=LENGTH.value, limit=2))["tokens"]
  plots.draw_choices(model, params, sample, choosing_modes()[1:4], prompt, folder / "choices.png")
  keys = figures["keys_per_query"]
  plots.draw_quality({name: {mode: (keys[str(mode)], value) for mode, value in bits[name].items()} for name in bits},
                     folder / "quality.png")
  common.write_json(folder / "results.json", {
      "flags": {name: flags.FLAGS[name].value for name in ("data", "steps", "batch_size", "length", "layers", "width",
                                                           "heads", "learning_rate", "arl_dilation", "eval_windows",
                                                           "seed")},
      "device": common.device(), "source": data["train"].sidecar.source,
      "parameters": {name: sum(x.size for x in jax.tree.leaves(params)) for name, (_, params) in trained.items()},
      "train_seconds": seconds, "total_seconds": time.perf_counter() - start,
      **figures, "after_prompt": choosing_figures, "prompt_length": prompt,
      "decoded_tokens_per_second": speed, "continuations": texts,
  })
  print(f"\n{time.perf_counter() - start:.0f} s in all. Tables, plots, text and checkpoints are in {folder}.")


if __name__ == "__main__":
  common.run(main)
