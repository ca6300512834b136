"""Gives a trained attention model a memory and trains on, as was done with OLMo2-7B (arXiv 2605.28640).

Command: python -m experiments.retrofit --checkpoint=runs/olmo2-7b --data=runs/data
Its cost: python -m experiments.retrofit --cost=olmo2-7b
The defaults are the published ones: 10B tokens, 6e-5, ten times that for the memory, 2% warm-up. What the paper leaves
open is ours: a start at the identity (--gate_bias), and ARL (--mode=dense alone turns it off).
--nomemory is the control: the same extra training of the model as it is.  Resumes like `pretrain`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import pathlib
from typing import Any

import numpy as np
from absl import flags

import rat_jax
from experiments import common, training
from rat_jax import Dense, RATPlusConfig
from rat_jax.convert import add_memory
from rat_jax.costs import PEAK_FLOPS
from rat_jax.leaves import named_leaves
from rat_jax.train import ARL

CHECKPOINT = common.define_path("checkpoint", "Folder of checkpoints, or of save_pretrained: an attention model, or one"
                                " with a memory that has not been trained yet.")
DTYPE = common.define_dtype()
MODES = common.define_modes([str(mode) for mode in ARL], "One update of every batch for each, in order.")
MEMORY = flags.DEFINE_bool("memory", True, "False trains the attention model on without one.")
GATE_BIAS = flags.DEFINE_float("gate_bias", -12.0, "Where the gates of a memory that is added start.")
MEMORY_RATE = flags.DEFINE_float("memory_rate", 10.0, "The memory's learning rate over that of the rest.",
                                 lower_bound=0.0)
FREEZE = flags.DEFINE_multi_string("freeze", [], "Parameters that stay as they are, such as embedding or layers/mlp_*;"
                                   " repeat it for several.")
COST = flags.DEFINE_string("cost", None, "Print what the retrofit of this preset takes in chip-hours, and do no more.")
UTILISATION = flags.DEFINE_float("utilisation", 0.4, "Share of a chip's peak that --cost assumes.", 0.01, 1.0)
CHIPS = {"H100": "NVIDIA H100 80GB HBM3", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}  # as --cost names them


def main() -> None:
  if COST.value:
    common.refuse(("checkpoint", "data", "dtype", "memory", "memory_rate", "freeze"), f"--cost={COST.value} prints what"
                  " the retrofit of a preset takes, and trains nothing; leave it out.")
    print(cost(dataclasses.replace(RATPlusConfig.preset(COST.value), memory=True, gate_bias=GATE_BIAS.value)))
    return
  if CHECKPOINT.value is None:
    raise ValueError("--checkpoint is missing; give the folder of a trained attention model.")
  config, params, notes = training.load(CHECKPOINT.value, DTYPE.value)
  if GATE_BIAS.present and (config.memory or not MEMORY.value):
    raise ValueError(f"--gate_bias={GATE_BIAS.value:g} is where the gates of a memory that is added start, and none is"
                     " added; leave it out.")
  if not MEMORY.value:
    common.refuse(("memory_rate",), "--nomemory trains no memory; leave it out.")
  if MEMORY.value and not config.memory:
    config, params = add_memory(config, params, GATE_BIAS.value)
  elif config.memory and not MEMORY.value:
    raise ValueError(f"--nomemory: {CHECKPOINT.value} has a memory; give the attention model.")
  elif is_trained(params):
    raise ValueError(f"--checkpoint={CHECKPOINT.value} has a memory that was trained; train it on with"
                     " experiments.adapt, or give the attention model. A retrofit that was stopped goes on in its"
                     " --workdir, from the --checkpoint that it began with.")
  names = list(named_leaves(params))
  for pattern in FREEZE.value:
    if not fnmatch.filter(names, pattern):
      raise ValueError(f"--freeze={pattern} fits no parameter; they are {', '.join(names)}.")
  data = training.train_data("retrofit")
  common.check_data(data, config, notes)
  rates = [(pattern, 0.0) for pattern in FREEZE.value] + [("layers/memory_gate*", MEMORY_RATE.value)]
  training.fit(config, params, MODES.value, data, "retrofit", accumulate_by="target",  # rows are micro-batches there
               start=str(pathlib.Path(CHECKPOINT.value).absolute()), rates=rates)


def is_trained(params: Any) -> bool:
  """Whether a model's memory was trained: one that is added starts with weights of 0."""
  return bool(np.any(np.asarray(params["layers"]["memory_gate"])))


def cost(config: RATPlusConfig) -> str:
  """The chip-hours of the flags' run, with ARL and without, as a table."""
  tokens, length = training.STEPS.value * training.BATCH_SIZE.value * training.LENGTH.value, training.LENGTH.value
  rows = []
  for modes in (MODES.value, [Dense()]):
    total = tokens * sum(rat_jax.training_flops(config, mode, length) for mode in modes)
    hours = [f"{total / PEAK_FLOPS[kind] / UTILISATION.value / 3600:,.0f}" for kind in CHIPS.values()]
    rows.append([", then ".join(map(str, modes)), f"{tokens / 1e9:.1f}B", f"{total:.2e}", *hours])
  header = ["updates of a batch", "tokens", "operations", *(f"{chip}, hours" for chip in CHIPS)]
  return f"at {UTILISATION.value:.0%} of the peak\n\n{common.markdown_table(header, rows)}"


if __name__ == "__main__":
  for flag, value in ((training.LEARNING_RATE, 6e-5), (training.WARMUP, 0.02), (training.BATCH_SIZE, 768),
                      (training.LENGTH, 4096), (training.STEPS, 3179)):
    flags.set_default(flag, value)
  common.run(main)
