"""Trains a RAT+ (or, with --nomemory, an attention model) from scratch, with active recurrence learning.

A toy:   python -m experiments.pretrain --layers=4 --width=256 --heads=4 --steps=200
A preset: python -m experiments.pretrain --preset=ratplus-1b --data=runs/data --length=4096 --batch_size=8
Resumes from the newest checkpoint in --workdir.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from absl import flags

from experiments import common, training
from rat_jax import RATPlusConfig

PRESET = flags.DEFINE_string("preset", None, "A ready-made size (RATPlusConfig.preset) instead of the sizes below.")
LAYERS = flags.DEFINE_integer("layers", 12, "Layers.")
WIDTH = flags.DEFINE_integer("width", 768, "Model width E.")
HEADS = flags.DEFINE_integer("heads", 12, "Attention heads.")
KV_HEADS = flags.DEFINE_integer("kv_heads", None, "Key/value heads. Default: as many as heads.")
MLP_WIDTH = flags.DEFINE_integer("mlp_width", None, "MLP width F. Default: 4 * width.")
MLP = flags.DEFINE_enum("mlp", "gelu", ["gelu", "swiglu"], "The MLP.")
MEMORY = flags.DEFINE_bool("memory", True, "False is the attention baseline.")
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Type of matrix products and attention.")
MODES = common.define_modes(["dilated:64", "dense"], "One update of every batch for each, in order.")


def main() -> None:
  data = training.train_data("pretrain")
  training.fit(configuration(data.sidecar.vocab_size), None, MODES.value, data, "pretrain")


def configuration(vocab_size: int) -> RATPlusConfig:
  """What the flags ask for. Raises ValueError for sizes beside --preset."""
  sizes: dict[str, Any] = {"num_layers": LAYERS, "embed_dim": WIDTH, "num_heads": HEADS, "num_kv_heads": KV_HEADS,
                           "mlp_dim": MLP_WIDTH, "mlp": MLP}
  choices: dict[str, Any] = {"memory": MEMORY, "dtype": DTYPE}
  if PRESET.value:
    beside = [flag.name for flag in sizes.values() if flag.present]
    if beside:
      raise ValueError(f"--preset={PRESET.value} has its own sizes and --{beside[0]} is given too; drop one of them.")
    given = {name: flag.value for name, flag in choices.items() if flag.present}
    return dataclasses.replace(RATPlusConfig.preset(PRESET.value), **given)
  return RATPlusConfig(vocab_size=vocab_size, init_std=None,
                       **{name: flag.value for name, flag in (sizes | choices).items()})


if __name__ == "__main__":
  common.run(main)
