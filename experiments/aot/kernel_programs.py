"""The kernels for TPUs as their compiler takes them, alone and in whole programs: what is called, what memory it needs.

Programs are compiled for one host of each chip, kernels for one of its devices. All work takes the kernels, of whatever
size it is.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from experiments.aot import chips, kernel_cases, predict, programs
from experiments.aot.kernel_cases import KernelCase, Spec, public, with_gradient
from experiments.aot.roofline import kernels_in
from experiments.shared import output
from experiments.shared.output import markdown_table
from pallas_kernels.crossovers import PREDICTED
from pallas_kernels.table import IMPLEMENTATIONS
from rat_jax import Dense, Dilated, MoBA, Quest, RATPlusConfig
from rat_jax.modes import Mode
from rat_jax.parallel import make_mesh
from rat_jax.transformer import Remat

# One host of each chip, and how its devices share a program.
HOSTS = {"v5e:2x2": "fsdp:4", "v5p:2x2x1": "fsdp:4", "v6e:2x2": "fsdp:4", "tpu7x:2x2x1": "fsdp:4,tensor:2"}


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
    with of_any_size():
      return programs.traced(self.kind, work, mesh).program


@contextlib.contextmanager
def of_any_size() -> Iterator[None]:
  """A context in which work of any size takes the kernels on TPUs that are elsewhere."""
  before = dict(PREDICTED)
  entries = {name: {"pallas_tpu": 0} for name in (*IMPLEMENTATIONS, "decode_attention_blocks")}
  try:
    PREDICTED.update({kind: entries for kind in before})
    yield
  finally:
    PREDICTED.update(before)


_ATTENTION = ("dilated_attention", "dilated_attention_backward")
_SCAN = ("gated_scan", "gated_scan_backward")
CASES = (
    Whole("a step of active recurrence learning, 8 rows of 4096", "train", (Dilated(64), Dense()), 8, 4096,
          (*_SCAN, *_ATTENTION)),
    *(Whole(f"4 prompts of 65536, {mode}", "prefill", (mode,), 4, 65536, ("gated_scan", kernel))
      for mode, kernel in ((Dilated(64), "dilated_attention"), (MoBA(1 / 16, 512), "sparse_attention"))),
    *(Whole(f"a step of decoding, 4 rows of 65536, {mode}", "decode", (mode,), 4, 65536, (kernel,))
      for mode, kernel in ((Dilated(64), "decode_attention"), (Quest(1 / 16, 64), "decode_attention_blocks"),
                           (MoBA(1 / 16, 512), "decode_attention_blocks"))))


def compiled(case: Whole, topology: str, mesh: str | None = None) -> dict[str, Any]:
  """Plain JSON: how often the program calls each kernel, and the bytes that it needs on a device; or "too_large".

  Raises ValueError where a kernel that must be in it is not.
  """
  traced = case.traced(make_mesh(mesh or HOSTS[topology], chips.devices_of(topology)))
  found = _memory(case.label, topology, traced)
  missing = set(case.calls) - set(found.get("calls", case.calls))
  if missing:
    raise ValueError(f"{case.label} on {topology} has the kernels {found['calls']}, without {sorted(missing)}.")
  return found | {"vmem": max((kernel.vmem for kernel in kernels_in(traced.jaxpr.jaxpr)), default=0)}


def compiled_kernel(case: KernelCase, topology: str) -> dict[str, Any]:
  """Plain JSON of an operation alone, as `compiled`; of a gradient with what comes before it."""
  return _memory(case.label, topology, traced_kernel(case.spec, topology, case.gradient))


def traced_kernel(spec: Spec, topology: str, gradient: bool = False, name: str = "pallas_tpu") -> Any:
  """The public function of a spec by an implementation, traced for one device; or that and its gradient."""
  mesh = jax.make_mesh((1,), ("device",), (jax.sharding.AxisType.Auto,), devices=chips.devices_of(topology)[:1])
  run, types = public(spec, name)
  types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(
      mesh, jax.P())), types)
  return jax.jit(lambda *given: with_gradient(run, given) if gradient else run(*given)).trace(*types)


def _memory(label: str, topology: str, traced: Any) -> dict[str, Any]:
  try:
    done = predict.compiled_of(traced)
  except predict.DoesNotFit as error:
    return {"label": label, "topology": topology, "too_large": str(error)}
  memory = done.memory_analysis()
  return {"label": label, "topology": topology, "calls": calls(done.as_text()),
          "arguments": memory.argument_size_in_bytes, "temporary": memory.temp_size_in_bytes}


def calls(text: str) -> dict[str, int]:
  """How often a compiled program's text has each kernel."""
  names = re.findall(r"%?([\w-]+?)(?:\.\d+)? = [^\n]*? custom-call\([^\n]*custom_call_target=\"tpu_custom_call\"", text)
  return dict(sorted(collections.Counter(names).items()))


def all_compiled(path: pathlib.Path, say: Callable[[str], None]) -> dict[str, Any]:
  """The cells of all kernels and programs on every chip, which are written to a file as they are done."""
  found = output.read_json(path) or {"kernels": [], "programs": []}
  parts: tuple[tuple[str, Sequence[Any], Callable[..., dict[str, Any]]], ...] = (
      ("kernels", kernel_cases.CASES, compiled_kernel), ("programs", CASES, compiled))
  for part, cases, compile_one in parts:
    done = {(cell["label"], cell["topology"]) for cell in found[part]}
    for case, topology in itertools.product(cases, HOSTS):
      if (case.label, topology) not in done:
        say(f"compiling: {case.label}, {topology}")
        found[part].append(compile_one(case, topology))
        output.write_json(path, found)
  return found


def memory_table(cells: list[dict[str, Any]]) -> str:
  """A row for every kernel or program, with the temporary memory on every chip."""
  rows: dict[str, list[str]] = {}
  for cell in cells:
    rows.setdefault(cell["label"], [cell["label"]]).append(
        "does not fit" if "too_large" in cell else f"{cell['temporary'] / 2**30:.2f}")
  chip_names = [topology.split(":")[0] for topology in HOSTS]
  return markdown_table(["temporary memory, GiB", *chip_names], list(rows.values()))


def programs_table(cells: list[dict[str, Any]]) -> str:
  """A row for every program: its kernels, their VMEM, and on every chip the memory of arguments and of the rest."""
  rows = []
  for label in dict.fromkeys(cell["label"] for cell in cells):
    of_program = [cell for cell in cells if cell["label"] == label]
    called = next(cell["calls"] for cell in of_program if "calls" in cell)
    memory = ["does not fit" if "too_large" in cell else
              f"{cell['arguments'] / 2**30:.2f} + {cell['temporary'] / 2**30:.2f}" for cell in of_program]
    rows.append([label, ", ".join(f"{name} {count}" for name, count in called.items()),
                 f"{max(cell['vmem'] for cell in of_program) / 2**20:.1f}", *memory])
  return markdown_table(["program of RAT+ 1B", "kernels", "VMEM, MiB", *HOSTS], rows)
