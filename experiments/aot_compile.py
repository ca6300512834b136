"""Compiles a model's programs for a TPU topology, on a machine without one: does it fit, and how long should it take?

Claim: what a pod would hold, send and take follows from the compiled program and the chip's public figures.
Command: python -m experiments.aot_compile --preset=ratplus-7b --topology=v5p:4x8x8 --mesh=data:4,fsdp:64
Result: a table of every program, by device; results.json.
Cost: minutes for each program, on any machine with Linux and the tpu extra.
Nothing is measured: times are predictions. docs/scaling.md says what they count. Fails where a program does not fit.
"""

from __future__ import annotations

import dataclasses
from typing import get_args

from absl import flags

from experiments.aot import chips, predict, programs
from experiments.shared import command, output
from rat_jax import Dilated, RATPlusConfig
from rat_jax.costs import training_flops
from rat_jax.modes import Mode
from rat_jax.parallel import make_mesh
from rat_jax.transformer import Remat


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(command.Settings):
  preset: str
  layers: int | None
  topology: str
  mesh: str | None
  batch_size: int
  length: int
  accumulation: int
  remat: Remat
  rows: int | None
  mode: tuple[Mode, ...]
  program: tuple[str, ...]


def define_flags() -> None:
  command.define_common_flags("aot_compile")
  flags.DEFINE_string("preset", "ratplus-7b", "The model (RATPlusConfig.preset).")
  flags.DEFINE_integer("layers", None, "Layers, other than the preset's.", lower_bound=1)
  flags.DEFINE_string("topology", "v5p:4x8x8", "Chips, by the compiler's name: v5e, v5p, v6e or tpu7x, and how many in"
                      " every dimension.")
  flags.DEFINE_string("mesh", None, "How devices share the work, such as data:4,fsdp:64. Default: all on fsdp.")
  flags.DEFINE_integer("batch_size", 768, "Sequences of a training batch.", lower_bound=1)
  flags.DEFINE_integer("length", 4096, "Tokens of a sequence, a prompt and a cache.", lower_bound=2)
  flags.DEFINE_integer("accumulation", 1, "Micro-batches that a training batch is cut into.", lower_bound=1)
  flags.DEFINE_enum("remat", "products", get_args(Remat), "What layers keep for gradients.")
  flags.DEFINE_integer("rows", None, "Rows of prompts and caches. Default: one for every device of data and fsdp.",
                       lower_bound=1)
  command.define_modes([str(Dilated(64))], "The mode of the prompt, of decoding, and of a batch's first update.")
  flags.DEFINE_multi_enum("program", list(programs.KINDS), list(programs.KINDS), "What to compile; repeat the flag.")


def main(settings: Settings) -> None:
  if len(settings.mode) != 1:
    raise ValueError(f"--mode is given {len(settings.mode)} times; give one.")
  if settings.batch_size % settings.accumulation:
    raise ValueError(f"--accumulation={settings.accumulation} does not divide --batch_size={settings.batch_size}; cut a"
                     " batch into equal parts.")
  config = RATPlusConfig.preset(settings.preset)
  if settings.layers:
    config = dataclasses.replace(config, num_layers=settings.layers)
  command.check_trained(settings.mode)
  chip = chips.chip_of(settings.topology)
  mesh = make_mesh(settings.mesh, chips.devices_of(settings.topology))
  served = settings.rows or mesh.shape["data"] * mesh.shape["fsdp"]
  work = programs.Work(config, settings.batch_size, settings.length, settings.accumulation,
                       settings.remat, served, settings.mode[0])
  useful = settings.batch_size * settings.length * sum(
      training_flops(config, mode, settings.length) for mode in work.modes)
  print(f"{settings.preset} on {settings.topology}, {mesh.size} devices as {settings.mesh or f'fsdp:{mesh.size}'}."
        f" Training: {settings.batch_size} rows of {settings.length} tokens in {settings.accumulation} micro-batches,"
        f" updates under {', then '.join(map(str, work.modes))}. Serving: {served} rows under {settings.mode[0]}.\n",
        flush=True)
  results, columns, too_large = {}, [], []
  for kind in settings.program:
    try:
      found = predict.predicted(programs.traced(kind, work, mesh), chip, mesh)
    except predict.DoesNotFit as error:
      too_large.append(f"{kind}: {error}")
      continue
    share = predict.utilisation(useful, found, chip, mesh.size) if kind == "train" else None
    results[kind] = predict.as_results(found) | {"utilisation": share}
    columns.append((kind, found, share))
  if columns:
    print(table(columns))
  about = {name: getattr(settings, name) for name in ("preset", "topology", "mesh", "batch_size", "length",
                                                       "accumulation", "remat")}
  output.write_json(output.made(settings.workdir) / "results.json", about | {
      "rows": served, "mode": str(settings.mode[0]), "devices": mesh.size, "programs": results})
  if too_large:
    raise ValueError(f"does not fit into a device of {chip.memory / chip.devices / 2**30:.1f} GiB: "
                     f"{'; '.join(too_large)} Give more micro-batches, or more devices of fsdp, tensor or context.")


def table(columns: list[tuple[str, predict.Predicted, float | None]]) -> str:
  """What every program holds, does, sends and takes, a column for each."""
  def row(name: str, values: list[float], unit: float, digits: int = 3) -> list[str]:
    return [name, *(f"{value / unit:,.{digits}f}" if value else "" for value in values)]

  found = [one for _, one, _ in columns]
  held = list(dict.fromkeys(name for one in found for name in one.held))
  names = {"kept": "kept for the gradient", "optimizer": "optimizer state", "other": "other arguments"}
  rows = [row(f"{names.get(name, name)}, GiB", [one.held.get(name, 0) for one in found], 2**30) for name in held]
  rows += [row("all of it, GiB", [sum(one.held.values()) for one in found], 2**30),
           row("the device has, GiB", [one.memory for one in found], 2**30),
           row("matrix products, TFLOP", [one.products for one in found], 1e12),
           row("read and written, GB", [one.moved for one in found], 1e9)]
  rows += [row(f"{kind}, MB", [one.sent[kind] for one in found], 1e6)
           for kind in found[0].sent if any(one.sent[kind] for one in found)]
  rows += [row(f"{name} alone, ms", [one.seconds[name] for one in found], 1e-3) for name in found[0].seconds]
  rows += [row("predicted, ms", [one.step for one in found], 1e-3),
           ["utilisation", *("" if share is None else f"{share:.0%}" for *_, share in columns)]]
  return output.markdown_table(["of a device", *(kind for kind, *_ in columns)], rows)


if __name__ == "__main__":
  command.run(main, Settings, define_flags)
