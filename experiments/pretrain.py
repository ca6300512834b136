"""Trains a RAT+ (or, with --nomemory, an attention model) from scratch, with active recurrence learning.

Claim: training is dense, with one sparse update for each batch, and costs what two dense updates cost.
Command: python -m experiments.pretrain --layers=4 --width=256 --heads=4 --steps=200     (a toy)
A preset: python -m experiments.pretrain --preset=ratplus-1b --data=runs/data --length=4096 --batch_size=8
Result: 1.4 billion parameters train at 24,400 tokens/s on an H200, both updates of a batch counted once.
Cost: 200 batches of the preset take 6 minutes there.
Resumes from the newest checkpoint in --workdir.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from absl import flags

from experiments.shared import command, training
from rat_jax import RATPlusConfig
from rat_jax.data import BYTES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(training.Settings):
  preset: str | None
  layers: int
  width: int
  heads: int
  kv_heads: int | None
  mlp_width: int | None
  mlp: Literal["gelu", "swiglu"]
  memory: bool
  dtype: Literal["bfloat16", "float32"]


def define_flags() -> None:
  command.define_common_flags("pretrain")
  training.define_flags()
  command.define_modes(["dilated:64", "dense"], "One update of every batch, repeat it for several in order.")
  flags.DEFINE_string("preset", None, "A ready-made size (RATPlusConfig.preset) instead of the sizes below.")
  flags.DEFINE_integer("layers", 12, "Layers.")
  flags.DEFINE_integer("width", 768, "Model width E.")
  flags.DEFINE_integer("heads", 12, "Attention heads.")
  flags.DEFINE_integer("kv_heads", None, "Key/value heads. Default: as many as heads.")
  flags.DEFINE_integer("mlp_width", None, "MLP width F. Default: 4 * width.")
  flags.DEFINE_enum("mlp", "gelu", ["gelu", "swiglu"], "The MLP.")
  flags.DEFINE_bool("memory", True, "False is the attention baseline.")
  flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Type of matrix products and attention.")


def main(settings: Settings) -> None:
  configuration(settings, BYTES.vocab_size)  # wrong sizes are said before text is read, which decides the vocabulary
  mesh = settings.made_mesh()
  data = training.train_data(settings)
  training.fit(settings, configuration(settings, data.sidecar.vocab_size), None, data, "pretrain", mesh)


def configuration(settings: Settings, vocab_size: int) -> RATPlusConfig:
  """The model that is trained. Raises ValueError for sizes beside --preset."""
  if settings.preset is None:
    sizes: dict[str, Any] = {"num_kv_heads": settings.kv_heads, "mlp_dim": settings.mlp_width}  # None: as usual
    return RATPlusConfig(vocab_size, settings.layers, settings.width, settings.heads, mlp=settings.mlp,
                         memory=settings.memory, dtype=settings.dtype, init_std=None, **sizes)
  settings.refuse(("layers", "width", "heads", "kv_heads", "mlp_width", "mlp"),
                  f"--preset={settings.preset} has its own sizes; leave it out.")
  choices: dict[str, Any] = {"memory": settings.memory, "dtype": settings.dtype}
  given = {name: value for name, value in choices.items() if name in settings.given}
  return dataclasses.replace(RATPlusConfig.preset(settings.preset), **given)


if __name__ == "__main__":
  command.run(main, Settings, define_flags)
