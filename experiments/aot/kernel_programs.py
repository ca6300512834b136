"""Whole programs with the kernels for TPUs in them, compiled for one host of each chip: which kernels, what memory."""

from __future__ import annotations

import collections
import dataclasses
import re
from typing import Any

import jax

from experiments.aot import chips, programs
from experiments.aot.roofline import kernels_in
from experiments.shared.output import markdown_table
from rat_jax import Dense, Dilated, MoBA, Quest, RATPlusConfig
from rat_jax.modes import Mode
from rat_jax.parallel import make_mesh
from rat_jax.transformer import Remat

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


@dataclasses.dataclass(frozen=True)
class Whole:
  """A program of RAT+ 1B.

  Attributes:
    rows: of a training batch, or that are served; length: of a sequence, a prompt, or a cache.
    calls: the kernels that must be in it.
  """

  label: str
  kind: str
  modes: tuple[Mode, ...]
  rows: int
  length: int
  calls: tuple[str, ...]
  remat: Remat = "nothing"
  preset: str = "ratplus-1b"
  layers: int | None = None

  def traced(self, mesh: jax.sharding.Mesh) -> Any:
    config = dataclasses.replace(RATPlusConfig.preset(self.preset), dtype="bfloat16")
    config = dataclasses.replace(config, num_layers=self.layers or config.num_layers)
    work = programs.Work(config, self.rows, self.length, 1, self.remat, self.rows, self.modes)
    return programs.traced(self.kind, work, mesh).program


_ATTENTION = ("dilated_attention", "dilated_attention_backward")
_SCAN = ("gated_scan", "gated_scan_backward")
CASES = (
    Whole("a step of active recurrence learning, 8 rows of 4096", "train", (Dilated(64), Dense()), 8, 4096,
          (*_SCAN, *_ATTENTION)),
    *(Whole(f"a prompt of 65536, {mode}", "prefill", (mode,), 4, 65536, ("gated_scan", kernel))
      for mode, kernel in ((Dilated(64), "dilated_attention"), (MoBA(1 / 16, 512), "sparse_attention"))),
    *(Whole(f"a step of decoding, 16 rows of 65536, {mode}", "decode", (mode,), 16, 65536, (kernel,))
      for mode, kernel in ((Dilated(64), "decode_attention"), (Quest(1 / 16, 64), "decode_attention_blocks"),
                           (MoBA(1 / 16, 512), "decode_attention_blocks"))))


def compiled(case: Whole, topology: str, mesh: str = "fsdp:4") -> dict[str, Any]:
  """Plain JSON: how often the program calls each kernel, and the bytes that it needs on a device beside arguments.

  Raises ValueError where a kernel that must be in it is not.
  """
  traced = case.traced(make_mesh(mesh, chips.devices_of(topology)))
  done = traced.lower().compile()
  found = calls(done.as_text())
  missing = set(case.calls) - set(found)
  if missing:
    raise ValueError(f"{case.label} on {topology} has the kernels {dict(found)}, without {sorted(missing)}.")
  memory = done.memory_analysis()
  return {"label": case.label, "topology": topology, "calls": found, "temporary": memory.temp_size_in_bytes,
          "arguments": memory.argument_size_in_bytes,
          "vmem": max(kernel.vmem for kernel in kernels_in(traced.jaxpr.jaxpr))}


def calls(text: str) -> dict[str, int]:
  """How often a compiled program's text has each kernel."""
  names = re.findall(r"%?([\w-]+?)(?:\.\d+)? = [^=]*custom-call\([^\n]*custom_call_target=\"tpu_custom_call\"", text)
  return dict(sorted(collections.Counter(names).items()))


def table(cells: list[dict[str, Any]]) -> str:
  """A row for every program and chip."""
  rows = [[cell["label"], cell["topology"], ", ".join(f"{name} {count}" for name, count in cell["calls"].items()),
           f"{cell['arguments'] / 2**30:.2f}", f"{cell['temporary'] / 2**30:.2f}", f"{cell['vmem'] / 2**20:.1f}"]
          for cell in cells]
  return markdown_table(["program of RAT+ 1B", "chips", "kernels", "arguments, GiB", "temporary, GiB", "VMEM, MiB"],
                        rows)
