"""The table of docs/scaling.md: models on topologies, each with the mesh and the batch that it is given there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from experiments.aot import chips, predict, programs
from experiments.shared import output
from rat_jax import Dense, Dilated, RATPlusConfig
from rat_jax.costs import training_flops
from rat_jax.modes import Mode
from rat_jax.parallel import make_mesh
from rat_jax.transformer import Remat


@dataclasses.dataclass(frozen=True)
class Case:
  """A model on a topology; fields are named as the flags of `experiments.aot_compile`, whose help describes them."""

  preset: str
  topology: str
  mesh: str | None
  batch_size: int = 768
  length: int = 4096
  accumulation: int = 1
  remat: Remat = "products"
  rows: int | None = None
  layers: int | None = None
  mode: Mode = Dilated(64)


def _of_size(preset: str, v5e: Remat) -> tuple[Case, ...]:
  """768 rows of 4096 tokens on 256 chips of each kind."""
  return (Case(preset, "v5e:16x16", "data:4,fsdp:64", accumulation=3, remat=v5e),
          Case(preset, "v5p:4x8x8", "data:4,fsdp:64"),
          Case(preset, "v6e:16x16", "data:4,fsdp:64", accumulation=3),
          Case(preset, "tpu7x:4x8x8", "data:4,fsdp:64,tensor:2"))


CASES = (
    *_of_size("ratplus-1b", "products"), *_of_size("ratplus-3b", "nothing"), *_of_size("ratplus-7b", "nothing"),
    Case("ratplus-7b", "v5p:2x2x2", "fsdp:8", accumulation=32),
    Case("ratplus-7b", "v5p:4x4x4", "fsdp:64", accumulation=4),
    Case("ratplus-7b", "v5p:16x16x16", "data:4,fsdp:64,tensor:4,context:4"),
    *(Case("ratplus-7b", topology, mesh, batch_size=16, length=2**18, accumulation=accumulation, remat="nothing")
      for topology, mesh, accumulation in (
          ("v5e:16x16", "fsdp:4,tensor:4,context:16", 4), ("v5p:4x8x8", "fsdp:16,context:16", 1),
          ("v6e:16x16", "fsdp:8,tensor:2,context:16", 2), ("tpu7x:4x8x8", "fsdp:16,tensor:2,context:16", 1))),
)


def begun(case: Case) -> dict[str, Any]:
  """As `compiled`, before any program is."""
  return dataclasses.asdict(case) | {"mode": str(case.mode), "programs": {}}


def compiled(case: Case, kinds: tuple[str, ...], show: Callable[[str], None]) -> dict[str, Any]:
  """Plain JSON: the case, its devices, and {kind: what is predicted}, or why a program does not fit, as "too_large".

  `show` is called with every program's kind before it is compiled. Raises ValueError for what no mesh could run.
  """
  config = RATPlusConfig.preset(case.preset)
  config = dataclasses.replace(config, num_layers=case.layers or config.num_layers)
  chip = chips.chip_of(case.topology)
  mesh = make_mesh(case.mesh, chips.devices_of(case.topology))
  served = case.rows or mesh.shape["data"] * mesh.shape["fsdp"]
  work = programs.Work(config, case.batch_size, case.length, case.accumulation, case.remat, served,
                       modes=tuple(dict.fromkeys((case.mode, Dense()))))
  useful = case.batch_size * case.length * sum(training_flops(config, mode, case.length) for mode in work.modes)
  found: dict[str, Any] = {}
  for kind in kinds:
    show(kind)
    try:
      one = predict.predicted(programs.traced(kind, work, mesh), chip, mesh)
    except predict.DoesNotFit as error:
      found[kind] = {"too_large": str(error)}
      continue
    found[kind] = predict.as_results(one)
    if kind == "train":
      found[kind]["utilisation"] = useful / (one.step * chip.products / chip.devices * mesh.size)
  return begun(case) | {"rows": served, "devices": mesh.size, "memory": chip.memory / chip.devices, "programs": found}


def key(case: dict[str, Any]) -> tuple[Any, ...]:
  """What tells results of cases apart."""
  return tuple(case[name] for name in ("preset", "topology", "mesh", "batch_size", "length", "accumulation", "remat"))


def table(cells: list[dict[str, Any]]) -> str:
  """A row for every case."""
  rows = []
  for cell in cells:
    train, prefill, decode = (cell["programs"].get(kind, {}) for kind in programs.KINDS)
    trained = ["does not fit", "", "", ""] if "too_large" in train else [
        of_memory(cell), f"{train['step']:.2f}",
        max(train["seconds"], key=train["seconds"].get), f"{train['utilisation']:.0%}"] if train else 4 * [""]
    rows.append([f"{cell['preset']}, {cell['length']}", cell["topology"], f"`{cell['mesh']}`",
                 f"{cell['batch_size']} in {cell['accumulation']}", cell["remat"], *trained,
                 _milliseconds(prefill), _milliseconds(decode)])
  return output.markdown_table(
      ["model, T", "chips", "mesh", "rows in micro-batches", "kept", "GiB a device", "step, s", "longest",
       "of the peak", "prompt, ms", "decode, ms"], rows)


def of_memory(cell: dict[str, Any]) -> str:
  """What training holds on a device, of what that has, in GiB."""
  return f"{cell['programs']['train']['total'] / 2**30:.1f} of {cell['memory'] / 2**30:.0f}"


def _milliseconds(found: dict[str, Any]) -> str:
  return "does not fit" if "too_large" in found else f"{1e3 * found['step']:,.1f}" if found else ""
