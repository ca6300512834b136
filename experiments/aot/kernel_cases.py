"""The kernels whose work on TPUs is counted and predicted: shapes of layers of 1 and of 7 billion parameters."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax

import pallas_kernels
from experiments.aot.chips import CHIPS, Chip
from experiments.aot.roofline import Data, Kernel, kernels_of, predicted
from experiments.bench.cases import keys_of_blocks, keys_of_pattern
from experiments.shared.output import markdown_table
from pallas_kernels.decode.arg_specs import ArgSpec as Decode
from pallas_kernels.dilated.arg_specs import ArgSpec as Dilated
from pallas_kernels.pattern import Pattern
from pallas_kernels.scan.arg_specs import ArgSpec as Scan
from pallas_kernels.sparse import pallas_tpu as sparse_tpu
from pallas_kernels.sparse.arg_specs import ArgSpec as Sparse

Spec = Scan | Dilated | Decode | Sparse
_BACKWARD = 2.5  # times the products of attention's forward pass


@dataclasses.dataclass(frozen=True)
class KernelCase:
  """An operation at one shape.

  Attributes:
    gradient: the gradient by all its inputs, rather than its results.
    shared: of sparse attention, the share of the blocks before a tile of queries that one of its queries chose.
  """

  label: str
  spec: Spec
  gradient: bool = False
  shared: float = 1.0

  @property
  def products(self) -> float:
    """Operations of matrix products that the results need."""
    return _products(self.spec) * (_BACKWARD if self.gradient else 1)

  def counted(self) -> dict[str, Any]:
    """Plain JSON: the case, the bytes and operations that it cannot do without, and its kernels."""
    run, types = _public(self.spec)
    with on_chip("TPU v5"):
      results, kernels = jax.eval_shape(run, *types), kernels_of(run, *types, data=self._data())
      if self.gradient:
        kernels = kernels_of(functools.partial(_with_gradient, run), types, data=self._data())[len(kernels):]
    moved = _bytes((types, results))
    if self.gradient:  # cotangents are like the results, gradients like the first arguments
      moved += _bytes(types[:3])
    if isinstance(self.spec, Decode) and self.spec.block:
      choosers = self.spec.heads if self.spec.apart else self.spec.kv_heads
      read = choosers * self.spec.chosen * self.spec.block / (self.spec.kv_heads * self.spec.rows)
      moved -= (1 - read) * _bytes(types[1:3])
    return {"label": self.label, "moved": moved, "products": self.products,
            "kernels": [dataclasses.asdict(kernel) for kernel in kernels]}

  def _data(self) -> dict[str, Data]:
    """Of sparse attention, how many blocks a tile of queries reads: half of what it could, as half lies before it.

    One of them is its own, the others are read whole or not at all.
    """
    if not isinstance(self.spec, Sparse):
      return {}
    q, k, _, chosen, _ = self.spec.types()
    plan = sparse_tpu.plan_of(q.shape, k.shape, chosen.shape[2], self.spec.block, self.spec.rule)
    _, size = sparse_tpu.parts_of(plan, q.shape[1], q.shape[3])
    blocks, tiles = (round(self.shared * n / 2) for n in (k.shape[1] / plan.block, size / plan.tile))
    whole = 1 - 1 / blocks
    return {"sparse_attention": Data(blocks, whole), "sparse_attention_backward": Data(tiles, whole)}


def on_chip(kind: str) -> Any:
  """A context in which programs are for a TPU that need not be here."""
  device = jax.sharding.AbstractDevice(kind, num_cores=None, platform="tpu")
  mesh = jax.sharding.AbstractMesh((1,), ("device",), (jax.sharding.AxisType.Auto,), abstract_device=device)
  return jax.sharding.use_abstract_mesh(mesh)


def _public(spec: Spec) -> tuple[Callable[..., Any], tuple[Any, ...]]:
  kernels: Any = dict(implementation="pallas_tpu")
  if isinstance(spec, Scan):
    return functools.partial(pallas_kernels.gated_scan, **kernels), spec.types()[:3]
  if isinstance(spec, Dilated):
    return functools.partial(pallas_kernels.dilated_attention, **spec.pattern._asdict(), **kernels), spec.types()
  if isinstance(spec, Sparse):
    return functools.partial(pallas_kernels.sparse_attention, block=spec.block, rule=spec.rule, **kernels), spec.types()
  optional = spec.optional_types()

  def decode(q: Any, keys: Any, values: Any, visible: Any, more: dict[str, Any]) -> Any:
    return pallas_kernels.decode_attention(q, keys, values, visible, **more, **kernels)

  return decode, (*spec.types(), optional)


def _with_gradient(run: Callable[..., Any], types: tuple[Any, ...]) -> Any:
  values, pull = jax.vjp(lambda *given: run(*given, *types[3:]), *types[:3])
  return values, pull(values)


def _bytes(tree: Any) -> float:
  return float(sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def _products(spec: Spec) -> float:
  if isinstance(spec, Scan):
    return 0.0
  if isinstance(spec, Decode):
    return 4.0 * spec.batch * spec.heads * spec.width * (spec.chosen * spec.block or spec.rows)
  if isinstance(spec, Sparse):
    counts = keys_of_blocks(spec.chosen * spec.block, spec.block, spec.length)
  else:
    counts = keys_of_pattern(spec.pattern, spec.length)
  return 4.0 * spec.batch * spec.heads * spec.width * counts


_1B: Any = dict(heads=16, kv_heads=16)
_7B: Any = dict(heads=32, kv_heads=32)
_LONG = 2**18


def _both(label: str, spec: Spec, **rest: Any) -> list[KernelCase]:
  return [KernelCase(label, spec, **rest), KernelCase(f"gradient of {label}", spec, gradient=True, **rest)]


CASES = (
    *_both("memory, 1B, B=8, T=4096", Scan(8, 4096, 16)),
    *_both("memory, 7B, B=8, T=4096", Scan(8, 4096, 32)),
    *_both("memory, 7B, T=262144", Scan(1, _LONG, 32)),
    *_both("dilated, 1B, B=8, T=4096, D=64", Dilated(8, 4096, **_1B, pattern=Pattern(64))),
    *_both("dense, 1B, B=8, T=4096", Dilated(8, 4096, **_1B, pattern=Pattern(1))),
    *_both("dilated, 7B, B=8, T=4096, D=64", Dilated(8, 4096, **_7B, pattern=Pattern(64))),
    *_both("dilated, 7B, T=262144, D=16", Dilated(1, _LONG, **_7B)),
    *_both("dilated, 7B, T=262144, D=16, W=256", Dilated(1, _LONG, **_7B, pattern=Pattern(16, 256, 4))),
    KernelCase("decode, 7B, B=128, T=16384, D=64", Decode.compact(128, 16384, 64, own=True)),
    KernelCase("decode, 7B, B=128, T=16384, D=16", Decode.compact(128, 16384, 16, own=True)),
    KernelCase("decode, 7B, B=16, T=16384, dense", Decode(16, 16384, own=True)),
    KernelCase("decode, 7B, T=131072, dense", Decode(1, 131072, own=True)),
    KernelCase("decode, 7B, B=128, T=16384, 1/16 in blocks of 64", Decode(128, 16384, block=64, chosen=16, apart=True)),
    KernelCase("decode, 8 key/value heads, B=16, T=131072, 1/16 in blocks of 512",
               Decode(16, 131072, 32, 8, block=512, chosen=16)),
    *_both("prompt, 7B, T=65536, 1/16 in blocks of 512, a tile's choices alike",
                    Sparse.sixteenth(65536, 512), shared=1 / 8),
    *_both("prompt, 7B, T=65536, 1/16 in blocks of 512, a tile reads all", Sparse.sixteenth(65536, 512)),
)


def seconds_of(cell: dict[str, Any], chip: Chip) -> tuple[float, float, str]:
  """(predicted, the floor, what the longest kernel takes longest for) of a counted case on a chip's device."""
  kernels = [Kernel(**kernel) for kernel in cell["kernels"]]
  floor = chip.devices * max(cell["products"] / chip.products, cell["moved"] / chip.bandwidth)
  longest = max(kernels, key=lambda kernel: predicted([kernel], chip)).seconds(chip)
  return predicted(kernels, chip), floor, max(longest, key=longest.__getitem__)


def table(cells: list[dict[str, Any]]) -> str:
  """A row for every case: what its kernels move and compute, and on every chip milliseconds and what bounds them."""
  rows = []
  for cell in cells:
    kernels = [Kernel(**kernel) for kernel in cell["kernels"]]
    total = lambda name, unit, of=kernels: f"{sum(getattr(kernel, name) for kernel in of) / unit:,.3g}"
    vmem = max(kernel.vmem for kernel in kernels) / 2**20
    row = [cell["label"], total("steps", 1), total("moved", 1e9), total("products", 1e12), total("elements", 1e9),
           f"{vmem:.1f}"]
    for chip in CHIPS.values():
      seconds, floor, bound = seconds_of(cell, chip)
      row.append(f"{1e3 * seconds:.3g} ({seconds / floor:.2f}, {bound})")
    rows.append(row)
  return markdown_table(["kernels of", "steps", "GB", "TFLOP", "10^9 vector operations", "VMEM, MiB", *CHIPS], rows)
