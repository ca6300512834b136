"""Gives a trained attention model a memory and trains on, as was done with OLMo2-7B (arXiv 2605.28640).

Claim: a memory that is added to a trained model helps it under sparse attention after a short training.
Command: python -m experiments.retrofit --checkpoint=runs/olmo2-7b --data=runs/data
Result: on needles, a small model under MoBA at 1/16 answers 46.9% after training on, 52.7% with a memory, trained so.
Cost: python -m experiments.retrofit --cost=olmo2-7b prints it: 649 hours of an H100 for the published recipe.
The defaults are the published ones: 10B tokens, 6e-5, ten times that for the memory, 2% warm-up. What the paper leaves
open is ours: a start at the identity (--gate_bias), and ARL (--mode=dense alone turns it off).
--nomemory is the control: the same extra training of the model as it is.  Resumes like `pretrain`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import pathlib
from typing import Any

import jax.numpy as jnp
from absl import flags

import rat_jax
from experiments.needles import planted
from experiments.shared import command, inputs, output, training
from rat_jax import Dense, RATPlusConfig
from rat_jax.convert.added_memory import GATE_BIAS, add_memory
from rat_jax.costs import PEAK_FLOPS
from rat_jax.data import TokenFile, Tokenizer
from rat_jax.leaves import named_leaves
from rat_jax.train import ARL

CHIPS = {"H100": "NVIDIA H100 80GB HBM3", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}  # as --cost names them
_OF_COST = ("workdir", "seed", "mode", "steps", "batch_size", "length", "cost", "utilisation")  # flags beside --cost


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(training.Settings):
  checkpoint: pathlib.Path | None
  dtype: str | None
  memory: bool
  gate_bias: float
  memory_rate: float
  freeze: tuple[str, ...]
  needles: tuple[str, ...]
  needle_weight: float
  tokenizer: Tokenizer
  cost: str | None
  utilisation: float


def define_flags() -> None:
  command.define_common_flags("retrofit")
  training.define_flags(steps=3179, batch_size=768, length=4096, learning_rate=6e-5, warmup=0.02)
  command.define_path("checkpoint", "Folder of checkpoints, or of save_pretrained: an attention model, or one with a"
                      " memory that has not been trained yet.")
  command.define_dtype()
  command.define_modes([str(mode) for mode in ARL], "One update of every batch, repeat it for several in order.")
  flags.DEFINE_bool("memory", True, "False trains the attention model on without one.")
  flags.DEFINE_float("gate_bias", GATE_BIAS, "Where the gates of a memory that is added start.")
  flags.DEFINE_float("memory_rate", 10.0, "The memory's learning rate over that of the rest.", lower_bound=0.0)
  flags.DEFINE_multi_string("freeze", [], "Parameters that stay as they are, such as embedding or layers/mlp_*; repeat"
                            " it for several.")
  flags.DEFINE_list("needles", [], "Rows of every batch that hold needles in their text, by their tasks, such as"
                    " multikey_1,multikey_2; a task can stand there twice.")
  flags.DEFINE_float("needle_weight", 4.0, "The weight of a digit of an answer beside that of a token of text.",
                     lower_bound=0.0)
  command.define_tokenizer()
  flags.DEFINE_string("cost", None, "Print what the retrofit of this preset takes in chip-hours, and do no more.")
  flags.DEFINE_float("utilisation", 0.4, "Share of a chip's peak that --cost assumes.", 0.01, 1.0)


def main(settings: Settings) -> None:
  if settings.cost:
    settings.refuse([field.name for field in dataclasses.fields(settings) if field.name not in _OF_COST],
                    f"--cost={settings.cost} prints what the retrofit of a preset takes, and trains nothing; leave it"
                    " out.")
    print(cost(settings, dataclasses.replace(RATPlusConfig.preset(settings.cost), memory=True)))
    return
  settings.refuse(("utilisation",), "--cost alone reads it; give that too, or leave it out.")
  if settings.checkpoint is None:
    raise ValueError("--checkpoint is missing; give the folder of a trained attention model.")
  mesh = settings.made_mesh()
  config, params, notes = training.load(settings.checkpoint, settings.dtype, mesh)
  if "gate_bias" in settings.given and (config.memory or not settings.memory):
    raise ValueError(f"--gate_bias={settings.gate_bias:g} is where the gates of a memory that is added start, and none"
                     " is added; leave it out.")
  if not settings.memory:
    settings.refuse(("memory_rate",), "--nomemory trains no memory; leave it out.")
  if settings.memory and not config.memory:
    config, params = add_memory(config, params, settings.gate_bias)
  elif config.memory and not settings.memory:
    raise ValueError(f"--nomemory: {settings.checkpoint} has a memory; give the attention model.")
  elif config.memory and is_trained(params):
    raise ValueError(f"--checkpoint={settings.checkpoint} has a memory that was trained; train it on with"
                     " experiments.adapt, or give the attention model. A retrofit that was stopped goes on in its"
                     " --workdir, from the --checkpoint that it began with.")
  names = list(named_leaves(params))
  for pattern in settings.freeze:
    if not fnmatch.filter(names, pattern):
      raise ValueError(f"--freeze={pattern} fits no parameter; they are {', '.join(names)}.")
  data = training.train_data(settings)
  inputs.check_data(data, config, notes)
  rates = [(pattern, 0.0) for pattern in settings.freeze]
  if config.memory:
    rates.append(("layers/memory_gate*", settings.memory_rate))
  training.fit(settings, config, params, data, "retrofit", mesh, accumulate_by="target",  # rows are micro-batches there
               start=settings.checkpoint, rates=rates, **planting(settings, data))


def planting(settings: Settings, data: TokenFile) -> dict[str, Any]:
  """The arguments of `training.fit` that plant --needles in the text; {} without."""
  if not settings.needles:
    settings.refuse(("needle_weight", "tokenizer"), "it is of --needles; give some, or leave it out.")
    return {}
  settings.refuse(("documents_apart",), "--needles has rows in which a question is asked about all documents; leave"
                  " one of them out.")
  tasks = planted.check_tasks(settings.needles, "needles")
  if len(tasks) >= settings.batch_size:
    raise ValueError(f"--needles={','.join(settings.needles)} takes {len(tasks)} rows of --batch_size="
                     f"{settings.batch_size}; give fewer, or a larger batch.")
  if settings.tokenizer.name != data.sidecar.tokenizer:
    raise ValueError(f"--tokenizer={settings.tokenizer} is {settings.tokenizer.name}, and --data was prepared with"
                     f" {data.sidecar.tokenizer}; give that.")
  words = planted.words_of(settings.tokenizer)
  return {"plant": functools.partial(planted.into_batch, words, tasks, settings.needle_weight, settings.seed),
          "about": {"needles": list(settings.needles), "needle_weight": settings.needle_weight}}


def is_trained(params: Any) -> bool:
  """Whether a model's memory was trained: one that is added starts with weights of 0."""
  return bool(jnp.any(params["layers"]["memory_gate"] != 0))


def cost(settings: Settings, config: RATPlusConfig) -> str:
  """The chip-hours of the run, with ARL and without, as a table."""
  tokens = settings.steps * settings.batch_size * settings.length
  rows = []
  for modes in (settings.mode, (Dense(),)):
    total = tokens * sum(rat_jax.training_flops(config, mode, settings.length) for mode in modes)
    hours = [f"{total / PEAK_FLOPS[kind] / settings.utilisation / 3600:,.0f}" for kind in CHIPS.values()]
    rows.append([", then ".join(map(str, modes)), f"{tokens / 1e9:.1f}B", f"{total:.2e}", *hours])
  header = ["updates of a batch", "tokens", "operations", *(f"{chip}, hours" for chip in CHIPS)]
  return f"at {settings.utilisation:.0%} of the peak\n\n{output.markdown_table(header, rows)}"


if __name__ == "__main__":
  command.run(main, Settings, define_flags)
