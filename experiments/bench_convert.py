"""Peak memory of converting a model of 7 billion parameters from file to file, and of loading it.

Claim: a conversion holds one stacked leaf and little else, whatever the size of the model; loading adds a leaf to the
model.
Command: python -m experiments.bench_convert          (and --from=olmo2)
Result: RAT+ 7B: the largest leaf has 8.59 GB, the peak is 8.82 GB.
Cost: 233 seconds on two CPU cores, and 45 GB of disk.
Makes a checkpoint of the preset's shape with no data in it, which takes no room on the disk, and converts it.
With --from=checkpoints it is one of our own, cut to four layers: making it holds the whole state. --seed draws its
parameters, and nothing in the other forms.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Literal

import jax
import numpy as np
from absl import flags

import rat_jax
from experiments.shared import command, output
from rat_jax import RATPlusConfig, RATPlusLM
from rat_jax.convert import mapping, ratplus
from rat_jax.convert.families import FAMILIES, pieces_of
from rat_jax.convert.tensors import SafetensorsFolder
from rat_jax.convert.their_configs import their_config
from rat_jax.train import Checkpoints

_LOAD = """
import sys, jax, rat_jax
rat_jax.load_pretrained(sys.argv[1], place=lambda name, leaf: jax.block_until_ready(jax.device_put(leaf)))
"""
_DEFAULTS = {"ratplus": "ratplus-7b", "olmo2": "olmo2-7b", "checkpoints": "ratplus-1b"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(command.Settings):
  """`from_` is --from, a word that Python keeps for itself."""

  from_: Literal["ratplus", "olmo2", "checkpoints"]
  preset: str | None
  load: bool


def define_flags() -> None:
  command.define_common_flags("bench_convert")
  flags.DEFINE_enum("from", "ratplus", list(_DEFAULTS), "Whose form: float32 .pth, bfloat16 safetensors, our own.")
  flags.DEFINE_string("preset", None, f"Default: {', '.join(_DEFAULTS.values())}.")
  flags.DEFINE_bool("load", False, "Load what was written too, to the CPU: it takes as much memory as the model.")


def main(settings: Settings) -> None:
  form = settings.from_
  preset = settings.preset or _DEFAULTS[form]
  config = RATPlusConfig.preset(preset)
  if form == "checkpoints":
    config = dataclasses.replace(config, num_layers=4)
  folder = output.made(settings.workdir)
  source, converted = folder / "source", folder / "output"
  for path in (source, converted):
    shutil.rmtree(path, ignore_errors=True)
  source.mkdir()
  make: dict[str, Callable[[RATPlusConfig, pathlib.Path], pathlib.Path]] = {
      "ratplus": empty_pth, "olmo2": empty_olmo2,
      "checkpoints": functools.partial(random_checkpoint, seed=settings.seed)}
  given = make[form](config, source)
  seconds, peak = run([sys.executable, "-m", "experiments.convert", f"--from={form}", f"--source={given}",
                       f"--output={converted}", *([f"--config={preset}"] if form == "ratplus" else [])])
  size = sum(path.stat().st_size for path in converted.glob("*.safetensors"))
  specs = SafetensorsFolder(converted).specs().values()
  leaf = max(np.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in specs)
  print(f"{preset}: {size / 1e9:.1f} GB in {seconds:.0f} s; largest leaf {leaf / 1e9:.2f} GB; peak memory of its"
        f" own {peak['RssAnon'] / 1e9:.2f} GB, pages of the file {peak['RssFile'] / 1e9:.2f} GB")
  if settings.load:
    seconds, peak = run([sys.executable, "-c", _LOAD, str(converted)])
    print(f"loaded in {seconds:.0f} s; peak memory of its own {peak['RssAnon'] / 1e9:.2f} GB, pages of the file"
          f" {peak['RssFile'] / 1e9:.2f} GB")
  for path in (source, converted):
    shutil.rmtree(path)


def run(arguments: list[str]) -> tuple[float, dict[str, int]]:
  """(seconds, peak memory) of a process."""
  start = time.perf_counter()
  with subprocess.Popen(arguments, env=os.environ | {"JAX_PLATFORMS": "cpu"}) as process:
    peak = watch(process)
  return time.perf_counter() - start, peak


def watch(process: subprocess.Popen) -> dict[str, int]:
  """The largest memory in bytes that a process had: its own, and pages of files that the system takes back at need."""
  peak = {"RssAnon": 0, "RssFile": 0}
  while process.poll() is None:
    for line in pathlib.Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines():
      name, value = line.split(":", 1)
      if name in peak:
        peak[name] = max(peak[name], 1024 * int(value.split()[0]))
    time.sleep(0.02)
  if process.returncode:
    raise ValueError(f"{process.args!r} ended with {process.returncode}.")
  return peak


def empty_pth(config: RATPlusConfig, folder: pathlib.Path) -> pathlib.Path:
  """A .pth file of the authors' names and shapes, in float32, with no data."""
  import torch
  from torch._subclasses.fake_tensor import FakeTensorMode

  with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
    weights = {name: torch.empty(shape) for name, shape in
               mapping.foreign_shapes(ratplus.pieces_of(config, gate_apart=False), config.num_layers).items()}
    torch.save({"task": weights}, folder / "model.pth")
  return folder / "model.pth"


def empty_olmo2(config: RATPlusConfig, folder: pathlib.Path) -> pathlib.Path:
  """A folder of OLMo 2's names and shapes, in bfloat16, with no data."""
  header, at = {}, 0
  for name, shape in mapping.foreign_shapes(pieces_of(config, FAMILIES["olmo2"]), config.num_layers).items():
    size = 2 * int(np.prod(shape))
    header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
    at += size
  text = json.dumps(header).encode()
  with (folder / "model.safetensors").open("wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    file.truncate(8 + len(text) + at)
  theirs = their_config(config, FAMILIES["olmo2"]) | {"dtype": "bfloat16"}
  (folder / "config.json").write_text(json.dumps(theirs), encoding="utf-8")
  return folder


def random_checkpoint(config: RATPlusConfig, folder: pathlib.Path, seed: int) -> pathlib.Path:
  """A checkpoint of parameters as they are drawn, with the moments of AdamW."""
  model, optimizer = RATPlusLM(config), rat_jax.make_optimizer(1e-3, total_steps=1)
  params = jax.jit(model.init)(jax.random.key(seed), np.zeros((1, 4), np.int32))["params"]
  Checkpoints(folder).save(rat_jax.init_train_state(model, params, optimizer), config, {})
  return folder


if __name__ == "__main__":
  command.run(main, Settings, define_flags)
