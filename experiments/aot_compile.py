"""Compiles a model's programs for a TPU topology, on a machine without one: does it fit, and how long should it take?

Claim: what a pod would hold, send and take follows from the compiled program and the chip's public figures.
Commands: python -m experiments.aot_compile --preset=ratplus-7b --topology=v5p:4x8x8 --mesh=data:4,fsdp:64
          python -m experiments.aot_compile --table      every case of docs/scaling.md that was not tried yet
          python -m experiments.aot_compile --kernels    the kernels for TPUs, alone and in programs (docs/kernels.md)
Result: a table of every program, by device; results.json. Of --kernels, what memory they need.
Cost: some minutes for each case, on any machine with Linux and the tpu extra.
Nothing is measured: times are predictions. docs/scaling.md says what they count. Fails where a program does not fit.
"""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

from absl import flags

from experiments.aot import cases, chips, kernel_programs, programs
from experiments.aot.cases import CASES, Case
from experiments.shared import command, output
from rat_jax import Dilated, RATPlusConfig
from rat_jax.modes import Mode
from rat_jax.transformer import Remat

_OF_CASE = tuple(field.name for field in dataclasses.fields(Case))


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
  table: bool
  kernels: bool

  @property
  def case(self) -> Case:
    return Case(**{name: getattr(self, name) for name in _OF_CASE} | {"mode": self.mode[0]})


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
  flags.DEFINE_bool("table", False, "Compile the cases of docs/scaling.md.")
  flags.DEFINE_bool("kernels", False, "Compile the kernels for TPUs and the programs of docs/kernels.md.")


def main(settings: Settings) -> None:
  path = settings.workdir / "results.json"
  if settings.table or settings.kernels:
    settings.refuse(("table",) if settings.kernels else (), "--kernels has a table of its own; leave one of them out.")
    settings.refuse((*_OF_CASE, "program"), "--table and --kernels have cases of their own; leave it out.")
    output.made(settings.workdir)
    print(of_kernels(path) if settings.kernels else cases.table(whole_table(path)))
    return
  check(settings)
  case = settings.case
  print(f"{case.preset} on {case.topology}, mesh {case.mesh or 'of all devices on fsdp'}: {case.batch_size} rows of"
        f" {case.length} tokens in {case.accumulation} micro-batches, under {case.mode} and then dense", flush=True)
  found = cases.compiled(case, settings.program, lambda kind: print(f"compiling: {kind}", flush=True))
  print(f"\n{of_device(found)}")
  output.made(settings.workdir)
  output.write_json(path, found)
  fail_if_too_large(found)


def check(settings: Settings) -> None:
  """Raises ValueError for flags that do not go together, before a compiler is asked for."""
  if len(settings.mode) != 1:
    raise ValueError(f"--mode is given {len(settings.mode)} times; give one.")
  command.check_trained(settings.mode)
  RATPlusConfig.preset(settings.preset)
  chips.chip_of(settings.topology)
  if settings.batch_size % settings.accumulation:
    raise ValueError(f"--accumulation={settings.accumulation} does not divide --batch_size={settings.batch_size}; cut a"
                     " batch into equal parts.")


def whole_table(path: Any) -> list[dict[str, Any]]:
  """The cells of all cases, which are written as they are done."""
  done = {cases.key(cell): cell for cell in output.read_json(path).get("cells", [])}
  for case in CASES:
    if cases.key(dataclasses.asdict(case)) not in done:
      print(f"{case.preset}, {case.length} tokens, {case.topology}", flush=True)
      key = cases.key(dataclasses.asdict(case))
      done[key] = cases.begun(case)  # which stays where the compiler ends the process
      output.write_json(path, {"cells": list(done.values())})
      done[key] = cases.compiled(case, programs.KINDS, lambda kind: None)
      output.write_json(path, {"cells": list(done.values())})
  return [done[cases.key(dataclasses.asdict(case))] for case in CASES]


def of_kernels(path: Any) -> str:
  """The tables of kernels and of programs with them."""
  found = kernel_programs.all_compiled(path, lambda text: print(text, flush=True))
  return f"{kernel_programs.memory_table(found['kernels'])}\n\n{kernel_programs.programs_table(found['programs'])}"


def fail_if_too_large(found: dict[str, Any]) -> None:
  """Raises ValueError where a program does not fit."""
  reasons = [f"{kind}: {one['too_large']}" for kind, one in found["programs"].items() if "too_large" in one]
  if reasons:
    raise ValueError(f"does not fit into a device of {found['memory'] / 2**30:.0f} GiB: {'; '.join(reasons)} Give more"
                     " micro-batches, --remat=nothing, or more devices of fsdp, tensor or context.")


def of_device(found: dict[str, Any]) -> str:
  """What every program that fits holds, does, sends and takes on a device, a column for each."""
  columns = {kind: one for kind, one in found["programs"].items() if "too_large" not in one}

  def row(name: str, values: list[float], unit: float) -> list[str]:
    return [name, *(f"{value / unit:,.3f}" if value else "" for value in values)]

  def rows_of(field: str, unit: float, label: str) -> list[list[str]]:
    names = dict.fromkeys(name for one in columns.values() for name in one[field])
    rows = {name: [one[field].get(name, 0.0) for one in columns.values()] for name in names}
    return [row(label.format(_LABELS.get(name, name)), values, unit) for name, values in rows.items() if any(values)]

  def of_all(field: str) -> list[float]:
    return [one[field] for one in columns.values()]

  rows = [*rows_of("held", 2**30, "{}, GiB"), row("all of it, GiB", of_all("total"), 2**30),
          row("the device has, GiB", len(columns) * [found["memory"]], 2**30),
          row("matrix products, TFLOP", of_all("products"), 1e12), row("read and written, GB", of_all("moved"), 1e9),
          *rows_of("sent", 1e6, "{}, MB"), *rows_of("seconds", 1e-3, "{} alone, ms"),
          row("predicted, ms", of_all("step"), 1e-3),
          ["of the chips' peak", *(f"{one['utilisation']:.0%}" if "utilisation" in one else ""
                                   for one in columns.values())]]
  return output.markdown_table(["of a device", *columns], rows)


_LABELS = {"kept": "kept for the gradient", "optimizer": "optimizer state", "temporary": "other temporary arrays",
           "other": "other arguments"}


if __name__ == "__main__":
  command.run(main, Settings, define_flags)
