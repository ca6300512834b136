"""Two small trained models find needles under sparse attention; then others are trained on real text and switched.

Claim: a model whose keys and values pass the memory, trained densely with ARL, keeps its quality when inference
reads a sixteenth of the keys; plain attention does not, and training attention on ARL's sparse branch is no cure.
Command: make quickstart, or python -m experiments.quickstart      (make quickstart FULL=1)
Result: at 1/8 under Quest RAT+ finds 94% of the needles, attention 62; under dilation 38 and none. On text RAT+
loses a few hundredths of a bit per byte from Dense to Dilated(16), attention more than one bit.
Cost: 3.5 minutes on two CPU cores of an AMD EPYC; with --full, which trains three arms for longer, 9 to 19.
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
from experiments import pictures
from experiments.needles import demo
from experiments.shared import command, device, inputs, output
from experiments.shared.chosen import chosen_keys
from rat_jax import Dense, Dilated, MoBA, PerLayer, Quest, RATPlusConfig, RATPlusLM, SnapKV, StreamingLLM
from rat_jax.data import BYTES, TokenFile
from rat_jax.evaluate import loss_by_mode
from rat_jax.modes import Mode
from rat_jax.train import Checkpoints, train

DECODE_CONTEXT, DECODE_BATCH, DECODE_STEPS = 4096, 8, 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(command.Settings):
  full: bool
  count: int
  data: str | None
  steps: int | None
  batch_size: int
  length: int
  layers: int
  width: int
  heads: int
  learning_rate: float
  arl_dilation: int
  eval_windows: int | None


def define_flags() -> None:
  command.define_common_flags("quickstart")
  flags.DEFINE_bool("full", False, "Train three arms rather than two, for longer, and score more modes.")
  flags.DEFINE_integer("count", 4, "Questions of each needle task.", lower_bound=1)
  flags.DEFINE_string("data", None, "Text file or folder. Default: the Python standard library's text.")
  flags.DEFINE_integer("steps", None, "Batches of training, two updates each. Default: 160, or 1000 with --full.",
                       lower_bound=1)
  flags.DEFINE_integer("batch_size", 8, "Sequences in a batch.", lower_bound=1)
  flags.DEFINE_integer("length", 256, "Tokens in a sequence.", lower_bound=8)
  flags.DEFINE_integer("layers", 3, "Layers.", lower_bound=1)
  flags.DEFINE_integer("width", 64, "Model width E.", lower_bound=2)
  flags.DEFINE_integer("heads", 4, "Attention heads.", lower_bound=1)
  flags.DEFINE_float("learning_rate", 6e-3, "Peak learning rate.", lower_bound=0.0)
  flags.DEFINE_integer("arl_dilation", 16, "Dilation of the sparse update.", lower_bound=1)
  flags.DEFINE_integer("eval_windows", None, "Held-out sequences that are scored. Default: 64, or 256 with --full.",
                       lower_bound=1)


def configuration(settings: Settings) -> RATPlusConfig:
  """The model of RAT+, over bytes. Raises ValueError for sizes that do not fit each other."""
  return RATPlusConfig(BYTES.vocab_size, settings.layers, settings.width, settings.heads, init_std=None)


def check_data(settings: Settings, data: dict[str, TokenFile]) -> None:
  """Raises ValueError for tokens that are no bytes, and for text that is too short."""
  tokenizer = data["train"].sidecar.tokenizer
  if tokenizer != BYTES.name:
    raise ValueError(f"--data={settings.data} has the tokenizer {tokenizer}, and the quickstart is of bytes; give the"
                     " text itself.")
  for part in data.values():
    part.epoch(batch_size=settings.batch_size, length=settings.length)  # which says what is too short


def modes_of(settings: Settings) -> list[Mode]:
  """The modes of the table."""
  if not settings.full:
    return [Dense(), Dilated(4), Dilated(16), Dilated(16, window=32, sinks=4)]
  hybrid = PerLayer(tuple(Dense() if i == 0 else Dilated(16) for i in range(settings.layers)))
  return [Dense(), *(Dilated(d) for d in (4, 8, 16, 32)), Dilated(16, window=32, sinks=4), StreamingLLM(32, 4), hybrid]


def choosing_modes() -> list[Mode]:
  """The modes of the second table, with blocks and windows that fit into so short a sequence."""
  return [Dense(), *(mode for share in (0.25, 0.125) for mode in (
      Quest(share, block=4), MoBA(share, block=4), SnapKV(share, obs_window=8)))]


def arms(settings: Settings, config: RATPlusConfig) -> dict[str, tuple[RATPlusConfig, tuple[Mode, ...]]]:
  """{name: (config, the modes of the two updates)}; attention gets the gate's parameters as MLP width instead."""
  attention = dataclasses.replace(config, memory=False, mlp_dim=config.mlp_dim + config.embed_dim // 2)
  sparse = Dilated(settings.arl_dilation)
  found: dict[str, tuple[RATPlusConfig, tuple[Mode, ...]]] = {
      "RAT+": (config, (sparse, Dense())), "attention": (attention, (Dense(), Dense()))}
  if settings.full:
    found["attention, sparse branch"] = (attention, (sparse, Dense()))
  return found


def train_arm(settings: Settings, name: str, config: RATPlusConfig, modes: tuple[Mode, ...], data: TokenFile,
              folder: pathlib.Path):
  """(model, parameters, seconds) after training one arm; every arm sees the same batches."""
  model = RATPlusLM(config)
  seed, steps = settings.seed, steps_of(settings)

  def batch_at(step):
    return data.batch(step, batch_size=settings.batch_size, length=settings.length, seed=seed)

  params = model.init(jax.random.key(seed), batch_at(0)["tokens"])["params"]
  optimizer = rat_jax.make_optimizer(settings.learning_rate, total_steps=steps, warmup_steps=steps // 10)
  state = rat_jax.init_train_state(model, params, optimizer)
  slug = name.replace(", ", "-").replace(" ", "-").replace("+", "plus").lower()
  shutil.rmtree(folder / "checkpoints" / slug, ignore_errors=True)  # every run trains anew
  checkpoints = Checkpoints(folder / "checkpoints" / slug, keep=1)
  start = time.perf_counter()
  metrics = folder / f"metrics-{slug}.jsonl"
  metrics.unlink(missing_ok=True)
  state = train(model, optimizer, state, batch_at, steps=steps, modes=modes, metrics_path=metrics,
                checkpoints=checkpoints, label=name)
  return model, state.params, time.perf_counter() - start


def bits_by_mode(settings: Settings, model: RATPlusLM, params, data: TokenFile, modes: list[Mode],
                 prompt_length: int | None = None) -> dict[Mode, float]:
  """Held-out bits per byte under every mode, of what comes after the prompt; a token is a byte."""
  batches = data.epoch(batch_size=settings.batch_size, length=settings.length, limit=windows_of(settings))
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


def continuations(settings: Settings, model: RATPlusLM, params, data: TokenFile, modes: list[Mode]
                  ) -> dict[str, Any]:
  """A held-out text, continued under every mode by the same random numbers."""
  middle, half = len(data.tokens) // 2, settings.length // 2
  prompt = np.asarray(data.tokens[middle:middle + half])[None].astype(np.int32)
  texts = {"prompt": BYTES.decode(prompt[0])}
  for mode in modes:
    new = rat_jax.generate(model, params, prompt, mode=mode, max_new_tokens=half, temperature=0.7, top_p=0.95,
                           key=jax.random.key(settings.seed))
    texts[str(mode)] = BYTES.decode_after(prompt[0], np.asarray(new)[0])
  return texts


def table_of(config: RATPlusConfig, bits: dict[str, dict[Mode, float]], length: int,
             prompt_length: int | None = None) -> tuple[str, dict[str, Any]]:
  """(a Markdown table, its figures for results.json) of bits per byte by model and mode, beside what a mode costs."""
  modes = list(next(iter(bits.values())))
  keys = {mode: float(np.mean(rat_jax.tokens_read(config, mode, length, prompt_length))) for mode in modes}
  cache = {mode: rat_jax.cache_bytes(config, mode, 1, length, prompt_length) for mode in modes}
  header = ["mode", "keys per query", "cache bytes", *(f"bits/byte: {name}" for name in bits)]
  rows = [["per_layer: dense, then dilated:16" if isinstance(mode, PerLayer) else str(mode), f"{keys[mode]:g}",
           f"{cache[mode]:,}", *(f"{by_mode[mode]:.3f}" for by_mode in bits.values())] for mode in modes]
  return output.markdown_table(header, rows), {
      "keys_per_query": {str(m): v for m, v in keys.items()}, "cache_bytes": {str(m): v for m, v in cache.items()},
      "bits_per_byte": {name: {str(m): v for m, v in by_mode.items()} for name, by_mode in bits.items()}}


def draw_quality(config: RATPlusConfig, bits: dict[str, dict[Mode, float]], length: int, prompt_length: int | None,
                 path: pathlib.Path) -> None:
  """Bits per byte against keys; Dense and plain dilation are one method, as are the budgets of another mode."""
  points: dict[str, dict[str, list[tuple[float, float]]]] = {}
  for name, by_mode in bits.items():
    for mode, value in by_mode.items():
      keys = float(np.mean(rat_jax.tokens_read(config, mode, length, prompt_length)))
      points.setdefault(name, {}).setdefault(_method(mode), []).append((keys, value))
  pictures.save(pictures.against_keys(points, "held-out bits per byte", "The mode is chosen at inference"), path)


def _method(mode: Mode) -> str:
  if mode == Dense() or (isinstance(mode, Dilated) and mode.window == mode.sinks == 0):
    return "dense, dilated"
  if isinstance(mode, PerLayer):
    return "dense first layer, then dilated:16"
  return type(mode).__name__ if isinstance(mode, Quest | MoBA | SnapKV) else str(mode)


def steps_of(settings: Settings) -> int:
  return settings.steps or (1000 if settings.full else 160)


def windows_of(settings: Settings) -> int:
  return settings.eval_windows or (256 if settings.full else 64)


def main(settings: Settings) -> None:
  start = time.perf_counter()
  device.compile_quickly()
  config = configuration(settings)
  data = inputs.corpus(settings.data, settings.workdir / "data")
  check_data(settings, data)
  folder = output.made(settings.workdir)
  result: dict[str, Any] = {"flags": {
      "full": settings.full, "count": settings.count, "data": settings.data, "steps": steps_of(settings),
      "batch_size": settings.batch_size, "length": settings.length, "layers": settings.layers, "width": settings.width,
      "heads": settings.heads, "learning_rate": settings.learning_rate, "arl_dilation": settings.arl_dilation,
      "eval_windows": windows_of(settings), "seed": settings.seed}, "device": device.name()}
  with device.unoptimized():
    result["needles"] = find_needles(settings, folder)
  result["first_result_seconds"] = time.perf_counter() - start
  print(f"\nThat took {result['first_result_seconds']:.0f} s. Now others of their kind are trained on real text.\n",
        flush=True)
  result |= learn_text(settings, config, data, folder) | {"total_seconds": time.perf_counter() - start}
  output.write_json(folder / "results.json", result)
  print(f"\n{result['total_seconds']:.0f} s in all. Tables, pictures, text and checkpoints are in {folder}.")


def find_needles(settings: Settings, folder: pathlib.Path) -> dict[str, Any]:
  """The shipped models find needles: a table, printed as it comes, and two pictures. What goes to results.json."""
  models = demo.shipped()
  size, others = (one.size for one in models.values())
  print(f"Two models of {size:,} and {others:,} parameters, trained to find needles in {demo.LENGTH} tokens under dense"
        f" attention, and asked under modes that choose what is read.\n{settings.count} questions of each of"
        f" {', '.join(demo.TASKS_ASKED)}; % answered right, the mean of the tasks:\n", flush=True)
  print(f"{'mode':<14} {'keys read':>9} {'RAT+':>6} {'attention':>9}")
  points: dict[str, dict[str, list[tuple[float, float]]]] = {name: {} for name in models}
  rows: list[list[str]] = []
  cells: dict[str, dict[str, dict[str, Any]]] = {}
  every = demo.answers(models, settings.count, settings.seed)
  for of_row in zip(every, every, strict=True):  # RAT+ and attention under one mode
    label, keys = of_row[0].row, of_row[0].keys
    print(f"{label:<14} {keys:>9.0f} {of_row[0].mean:>6.0f} {of_row[1].mean:>9.0f}", flush=True)
    rows.append([label, f"{keys:.0f}", *(f"{one.mean:.1f}" for one in of_row)])
    cells[label] = {one.model: {"keys": one.keys, "accuracy": one.accuracy} for one in of_row}
    for one in of_row:
      points[one.model].setdefault(label.split(",")[0], []).append((one.keys, one.mean))
  table = output.markdown_table(["mode", "keys read", *models], rows)
  (folder / "needles.md").write_text(table + "\n", encoding="utf-8")
  found = pictures.against_keys(points, "% answered right", "Needles found, one set of parameters for each colour",
                                "keys that the query of the answer reads")
  pictures.save(found, folder / "needles.png")
  read = demo.reads(models["RAT+"], settings.seed)
  title = f"What the query of the answer reads: RAT+, layer {read.layer}, head {read.head}"
  pictures.save(pictures.one_query(read.seen, read.needle, title), folder / "reads.png")
  return cells


def learn_text(settings: Settings, config: RATPlusConfig, data: dict[str, TokenFile], folder: pathlib.Path
               ) -> dict[str, Any]:
  """Models are trained on real text and run under modes that they did not see. What goes to results.json."""
  modes, prompt = modes_of(settings), settings.length // 2
  print(f"{data['train'].sidecar.tokens:,} bytes to train on, {data['heldout'].sidecar.tokens:,} held out,"
        f" from {data['train'].sidecar.source}")
  trained, bits, choosing, seconds = {}, {}, {}, {}
  for name, (arm_config, arm_modes) in arms(settings, config).items():
    print(f"{name}: compiling, then {steps_of(settings)} batches", flush=True)
    model, params, seconds[name] = train_arm(settings, name, arm_config, arm_modes, data["train"], folder)
    trained[name] = (model, params)
    bits[name] = bits_by_mode(settings, model, params, data["heldout"], modes)
    if settings.full:
      choosing[name] = bits_by_mode(settings, model, params, data["heldout"], choosing_modes(), prompt)
  table, figures = table_of(config, bits, settings.length)
  print(f"\nHeld-out bits per byte, every byte of a sequence:\n\n{table}\n")
  model, params = trained["RAT+"]
  if settings.full:
    choosing_table, figures["after_prompt"] = table_of(config, choosing, settings.length, prompt)
    print(f"The bytes after a prompt of {prompt}, under modes that choose by the query:\n\n{choosing_table}\n")
    table += f"\n\n{choosing_table}"
    speed = {str(mode): decode_speed(model, params, mode) for mode in (Dense(), Dilated(16))}
    figures["decoded_tokens_per_second"] = speed
    speed_line = ", ".join(f"{mode} {rate:.0f}" for mode, rate in speed.items())
    print(f"decoded tokens/s at a context of {DECODE_CONTEXT}, batch {DECODE_BATCH}, {device.name()}: {speed_line}")
  (folder / "table.md").write_text(f"{table}\n", encoding="utf-8")
  texts = continuations(settings, model, params, data["heldout"], [Dense(), Dilated(16)] if settings.full else
                        [Dilated(16)])
  continued = "\n".join(f"--- {name}\n{text}\n" for name, text in texts.items())
  print(f"\n{continued}")
  (folder / "continuations.txt").write_text(continued, encoding="utf-8")
  pictures.save(pictures.masks(modes), folder / "masks.png")
  pictures.save(pictures.caches(modes, length=96), folder / "caches.png")
  draw_quality(config, bits, settings.length, None, folder / "quality.png")
  if settings.full:
    draw_quality(config, choosing, settings.length, prompt, folder / "quality-after-prompt.png")
    sample = next(data["heldout"].epoch(batch_size=1, length=settings.length, limit=2))["tokens"]
    chosen = {str(mode): chosen_keys(model, params, sample, mode, prompt) for mode in choosing_modes()[1:4]}
    pictures.save(pictures.choices(chosen, prompt), folder / "choices.png")
  return {"source": data["train"].sidecar.source,
          "parameters": {name: sum(x.size for x in jax.tree.leaves(params)) for name, (_, params) in trained.items()},
          "train_seconds": seconds, **figures, "prompt_length": prompt, "continuations": texts}


if __name__ == "__main__":
  command.run(main, Settings, define_flags)
