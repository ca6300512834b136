"""Times a whole model under several modes against dense attention, in one run: prefill, decoding, a training step.

Claim: a decode step reads what its mode chose, a dilated prefill computes what it sees, and both save time.
Command: python -m experiments.bench_model --mode=dense --mode=quest:0.0625 --context=16384
Result: 1.4 billion parameters, 32 rows of 16384 on an H200: a step takes 25.0 ms dense, 2.58 ms under dilated:64.
Cost: not timed; some minutes of one GPU.
A preset through files: --preset=olmo2-7b --dtype=bfloat16 --through_files --part=prefill --part=decode
Where the time goes, kernel by kernel: --profile   Training and decoding by the authors' code too: --torch_reference=DIR
Weights, tokens, and the caches that decoding starts from, are random by --seed; medians are of several rounds. Before a
part is timed, its logits, or the loss of training, are compared with those of plain JAX. Floors are the parameters and
the part of the cache that a step reads, or the operations, over what this device's reads and products were measured to
do.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import shutil
import time
from typing import Any, Literal

import jax
import numpy as np
from absl import flags

import rat_jax
from experiments import pictures
from experiments.bench import floors, parts, times, torch_reference
from experiments.bench.parts import Measured
from experiments.bench.times import Work
from experiments.shared import command, device, output
from rat_jax import Dense, RATPlusConfig, RATPlusLM, plan
from rat_jax.axes import Params
from rat_jax.convert.added_memory import GATE_BIAS
from rat_jax.costs import PEAK_FLOPS
from rat_jax.modes import Mode


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(parts.Settings):
  mode: tuple[Mode, ...]
  part: tuple[str, ...]
  context: tuple[int, ...]
  batch_size: tuple[int, ...]
  preset: str | None
  memory: bool
  through_files: bool
  layers: int
  width: int
  heads: int
  kv_heads: int | None
  dtype: Literal["bfloat16", "float32"]
  torch_reference: str | None


def define_flags() -> None:
  command.define_common_flags("bench_model")
  parts.define_flags()
  command.define_modes(
      ["dense", "dilated:16", "quest:0.0625", "moba:0.0625", "dilated_topk:64,0.0625", "snapkv:0.0625"],
      "A mode; repeat the flag for several.")
  flags.DEFINE_multi_enum("part", ["decode"], ["prefill", "decode", "train"], "What to time; repeat it.")
  flags.DEFINE_multi_integer("context", [16384], "Tokens in the cache, of the prompt, or of a training row; repeat it.",
                             lower_bound=1)
  flags.DEFINE_multi_integer("batch_size", [1], "Rows; repeat it.", lower_bound=1)
  flags.DEFINE_string("preset", None, "A ready-made size, instead of --layers, --width, --heads and --kv_heads.")
  flags.DEFINE_bool("memory", True, "Give a --preset of OLMo 2 a memory.")
  flags.DEFINE_bool("through_files", False, "Write the weights as save_pretrained does and time loading.")
  flags.DEFINE_integer("layers", 4, "Layers.", lower_bound=1)
  flags.DEFINE_integer("width", 512, "Model width E.", lower_bound=2)
  flags.DEFINE_integer("heads", 4, "Attention heads.", lower_bound=1)
  flags.DEFINE_integer("kv_heads", None, "Key/value heads. Default: as many as heads.")
  flags.DEFINE_enum("dtype", "float32", ["bfloat16", "float32"], "Type of matrix products and caches, and of"
                    " parameters that are not trained.")
  flags.DEFINE_string("torch_reference", None, "A checkout of the RAT+ authors' code, whose training and decoding are"
                      " timed too.")
  flags.DEFINE_alias("torch-reference", "torch_reference")


def main(settings: Settings) -> None:
  check_flags(settings)
  config = configuration(settings)
  check_modes(settings, config)
  of_authors = authors(settings, config)
  folder, speeds = output.made(settings.workdir), times.speeds()
  model, params = RATPlusLM(config), weights(settings, config, folder / "weights")
  print(f"{settings.preset or 'a model'}: {config.num_layers} layers of width {config.embed_dim}, {config.num_heads}/"
        f"{config.num_kv_heads} heads, {config.dtype}, on {device.name()}: {speeds}", flush=True)
  if settings.part == ("train",):
    params = jax.device_get(params)  # a step has the device to itself
  lines: list[dict[str, Any]] = []
  text = []
  for part, context, batch_size in itertools.product(settings.part, settings.context, settings.batch_size):
    found: dict[Mode, tuple[Measured, Work, float]] = {}
    for mode in dict.fromkeys([Dense(), *settings.mode]):
      try:
        measured = parts.PARTS[part](settings, model, params, mode, batch_size, context)
      except jax.errors.JaxRuntimeError as error:
        if not device.out_of_memory(error):
          raise
        print(f"{part} of {batch_size} x {context} under {mode}: not timed: out of memory", flush=True)
        continue
      of = floors.work(part, config, params, mode, batch_size, context)
      found[mode] = measured, of, floors.floor(of, speeds)
      lines.append({"part": part, "mode": str(mode), "context": context, "batch_size": batch_size,
                    **measured._asdict(), **of._asdict(), "floor": found[mode][2],
                    "authors": of_authors.get((part, mode, context, batch_size))})
      output.write_json(folder / "results.json", {"device": device.name(), **speeds._asdict(),
                                                  "config": config.to_json(), "lines": lines})
    theirs = {mode: of_authors.get((part, mode, context, batch_size)) for mode in found}
    text.append(table(part, config, found, batch_size, context, theirs))
    print(f"\nbatch {batch_size}, {context} tokens\n\n{text[-1]}", flush=True)
  (folder / "table.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
  pictures.save(pictures.throughput(lines), folder / "decode.png")


def check_flags(settings: Settings) -> None:
  """Raises ValueError for flags that would change nothing."""
  if settings.preset is None:
    settings.refuse(("memory",), "it is for a --preset of OLMo 2; leave it out.")
  else:
    settings.refuse(("layers", "width", "heads", "kv_heads"), f"--preset={settings.preset} has its own sizes; leave one"
                    " of them out.")
    if RATPlusConfig.preset(settings.preset).memory:
      settings.refuse(("memory",), f"--preset={settings.preset} has a memory of its own; leave it out.")
  for part, names in parts.READ_BY.items():
    if part not in settings.part:
      settings.refuse(names, f"--part={part} alone reads it; give that too, or leave it out.")
  if set(settings.part) == {"prefill"}:
    settings.refuse(("torch_reference",), "the authors' code is timed in decoding and training; give --part=decode or"
                    " --part=train too, or leave it out.")


def check_modes(settings: Settings, config: RATPlusConfig) -> None:
  """Raises ValueError for a mode that does not fit the model, and for one that cannot be trained and is to be."""
  for mode in settings.mode:
    plan.check_modes(mode, None, config)
    reasons = [one.after_prompt for one in plan.layer_modes(mode, config.num_layers) if one.after_prompt]
    if reasons and "train" in settings.part:
      raise ValueError(f"--part=train with --mode={mode}: {reasons[0]}, and a row of training has none; give the modes"
                       " to train, such as --mode=dilated:16.")


def configuration(settings: Settings) -> RATPlusConfig:
  """The model that the flags ask for."""
  choices: dict[str, Any] = {"dtype": settings.dtype,
                             "param_dtype": "float32" if "train" in settings.part else settings.dtype}
  if settings.preset is None:
    choices["num_kv_heads"] = settings.kv_heads
    return RATPlusConfig(vocab_size=256, num_layers=settings.layers, embed_dim=settings.width,
                         num_heads=settings.heads, **choices)
  config = RATPlusConfig.preset(settings.preset)
  if settings.memory and not config.memory:
    choices |= {"memory": True, "gate_bias": GATE_BIAS}
  return dataclasses.replace(config, **choices)


def weights(settings: Settings, config: RATPlusConfig, folder: pathlib.Path) -> Params:
  """Random parameters; with --through_files, as they come back from a folder of save_pretrained."""
  params = jax.jit(RATPlusLM(config).init)(jax.random.key(settings.seed), np.zeros((1, 8), np.int32))["params"]
  if not settings.through_files:
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


def authors(settings: Settings, config: RATPlusConfig) -> dict[tuple[str, Mode, int, int], float]:
  """Seconds of the authors' code, where it is given, by part, mode, context and rows; it has the device to itself.

  Raises ValueError for a configuration that is not like theirs.
  """
  if not settings.torch_reference:
    return {}
  ours = ("vocab_size", "num_layers", "embed_dim", "num_heads", "mlp_dim", "memory", "tie_embeddings", "init_std",
          "param_dtype")
  like = RATPlusConfig(dtype="bfloat16", **{name: getattr(config, name) for name in ours})
  if config != like:
    raise ValueError(f"--torch_reference with {config.difference(like)} (of this model, of theirs); their model has one"
                     " form.")
  cases, keys = [], []
  for part, mode, context, batch_size in itertools.product(
      settings.part, dict.fromkeys([Dense(), *settings.mode]), settings.context, settings.batch_size):
    pattern = mode.pattern
    if part != "prefill" and pattern is not None:
      keys.append((part, mode, context, batch_size))
      cases.append({"gradient": part == "train", "context": context, "batch_size": batch_size,
                    "dilation": pattern.dilation or -1, "window": pattern.window, "sinks": pattern.sinks})
  answers = torch_reference.ask(settings.torch_reference, {
      "cases": cases, "model": dataclasses.asdict(config), "rounds": settings.rounds})
  for key, answer in zip(keys, answers, strict=True):
    if "error" in answer:
      print(f"{key[0]} of {key[3]} x {key[2]} under {key[1]} by the authors' code: {answer['error']}", flush=True)
  return {key: answer["seconds"] for key, answer in zip(keys, answers, strict=True) if "seconds" in answer}


def table(part: str, config: RATPlusConfig, found: dict[Mode, tuple[Measured, Work, float]], batch_size: int,
          context: int, theirs: dict[Mode, float | None]) -> str:
  """A line for every mode: what was measured, its work, the floor in seconds, and the authors' seconds."""
  tokens = batch_size * (1 if part == "decode" else context)
  peak, rows = PEAK_FLOPS.get(device.name()), []
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
  return output.markdown_table(header, rows)


if __name__ == "__main__":
  command.run(main, Settings, define_flags)
