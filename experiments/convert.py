"""Checkpoints to a folder of our own, a leaf at a time.

Claim: no more than one leaf is held in memory.
Commands: python -m experiments.convert --from=ratplus --source=model.pth --output=runs/ratplus-7b
          python -m experiments.convert --from=released --source=MODEL --output=runs/mine     a folder, or a GGUF file
          python -m experiments.convert --from=olmo2 --source=OLMo-2-1124-7B --output=runs/olmo2-7b-memory
          python -m experiments.convert --from=checkpoints --source=runs/pretrain/checkpoints --output=runs/mine
Result: see bench_convert.
Cost: 1.5 minutes for OLMo 2 7B on two CPU cores, 4 for RAT+ 7B in float32.
Then: config, params = rat_jax.load_pretrained("runs/ratplus-7b"). --nomemory leaves OLMo 2 as it was released.
Releases are in float32 for the most part; --dtype=bfloat16 --param_dtype=bfloat16 makes a folder to run models from.
Of our own checkpoints the parameters alone are read, twice: the first time to pass over a damaged one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.shared import command
from rat_jax import RATPlusConfig
from rat_jax.convert import anyones
from rat_jax.convert.added_memory import GATE_BIAS
from rat_jax.convert.folders import read_folder
from rat_jax.convert.ratplus import read_ratplus
from rat_jax.convert.tensors import check_new_folder
from rat_jax.paths import local_path, read_text
from rat_jax.pretrained import write_pretrained
from rat_jax.train import Checkpoints


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(command.Settings):
  """`from_` is --from, a word that Python keeps for itself."""

  from_: Literal["ratplus", "released", "olmo2", "checkpoints"]
  source: pathlib.Path
  output: pathlib.Path
  config: str | None
  memory: bool
  gate_bias: float
  dtype: str | None
  param_dtype: str | None


def define_flags() -> None:
  command.define_common_flags("convert")
  flags.DEFINE_enum("from", None, ["ratplus", "released", "olmo2", "checkpoints"], "Whose it is: the authors' file; a"
                    " released model of any family that is served; OLMo 2, with a memory; our own.", required=True)
  command.define_path("source", "A .pth file (ratplus), a GGUF file (released), or a folder.", required=True)
  command.define_path("output", "A new folder.", required=True)
  flags.DEFINE_string("config", None, "JSON file of a RATPlusConfig, or a preset's name, for a .pth file without one.")
  flags.DEFINE_bool("memory", True, "Give it a memory, which starts as the identity. Default: for olmo2 alone.")
  flags.DEFINE_float("gate_bias", GATE_BIAS, "Where that memory's gates start.")
  command.define_dtype("dtype", "Type of matrix products and attention. Default: as the source says.")
  command.define_dtype("param_dtype", "Type that parameters are rounded to. Default: as the source says.")


def main(settings: Settings) -> None:
  source, output = settings.source, settings.output
  check_flags(settings)
  check_new_folder(output)  # asked now, for what follows takes long
  about = {"source": str(source)}
  leaves: Iterable[tuple[str, np.ndarray]]
  if settings.from_ == "ratplus":
    config, leaves, training = read_ratplus(source, configuration(settings))
    about["trained by the authors"] = json.dumps(training) if training else "the file does not say how"
  elif settings.from_ in ("released", "olmo2"):
    memory = gives_memory(settings)
    config, leaves = (anyones.read(source, memory, settings.gate_bias) if settings.from_ == "released" else
                      read_folder(source, memory, settings.gate_bias, only="olmo2"))
    if memory:
      about["memory"] = f"added and not trained; its gates start at sigmoid({config.gate_bias:g})"
  else:
    config, leaves, notes, digest = Checkpoints(source).read_params()
    about |= {"trained": json.dumps(notes), "sha256 of the parameters by name": digest}
  about |= _digests(source)
  if settings.param_dtype:
    about["parameters"] = f"{config.param_dtype} in the source, {settings.param_dtype} here"
    leaves = _as_type(leaves, jnp.dtype(settings.param_dtype))
  types: dict[str, Any] = {"dtype": settings.dtype or config.dtype,
                           "param_dtype": settings.param_dtype or config.param_dtype}
  config = dataclasses.replace(config, **types)
  write_pretrained(output, config, leaves, about=about)
  print(f"{output}: {config.num_layers} layers of width {config.embed_dim}, {'with' if config.memory else 'without'}"
        f" memory, parameters in {config.param_dtype}, products in {config.dtype}")


def check_flags(settings: Settings) -> None:
  """Raises ValueError for a flag that would change nothing."""
  released, memory = settings.from_ in ("released", "olmo2"), gives_memory(settings)
  uses = {"config": settings.from_ == "ratplus", "memory": released, "gate_bias": memory}
  without = " --nomemory" if released and not memory else ""
  settings.refuse([name for name, used in uses.items() if not used],
                  f"it changes nothing under --from={settings.from_}{without}; leave it out.")


def gives_memory(settings: Settings) -> bool:
  """Whether a memory is added: to OLMo 2 unless --nomemory, to other released models with --memory."""
  asked = settings.from_ == "released" and "memory" in settings.given
  return settings.memory and (settings.from_ == "olmo2" or asked)


def configuration(settings: Settings) -> RATPlusConfig | None:
  """What --config names. Raises ValueError for a file that is none, and for no name of a preset."""
  if settings.config is None:
    return None
  path = local_path(settings.config, "--config")
  try:
    if path.is_file():
      return RATPlusConfig.from_json(read_text(path))
    return RATPlusConfig.preset(settings.config)
  except ValueError as error:
    raise ValueError(f"--config={path}: {error}") from error


def _as_type(leaves: Iterable[tuple[str, np.ndarray]], dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
  for name, leaf in leaves:
    found = leaf.astype(dtype, copy=False)
    del leaf
    yield name, found
    del found  # before the next is made


def _digests(source: pathlib.Path) -> dict[str, str]:
  """SHA-256 of the file, or of each file of weights in the folder, as the card has them."""
  if not source.is_file():
    return {f"sha256 of {path.name}": _digest(path) for path in sorted(source.glob("*.safetensors"))}
  return {"sha256": _digest(source)}


def _digest(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
  command.run(main, Settings, define_flags)
