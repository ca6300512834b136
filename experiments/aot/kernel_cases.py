"""The kernels whose work on TPUs is counted and predicted: shapes of layers of 1 and of 7 billion parameters."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels
from experiments.aot.chips import CHIPS, Chip, programs_for
from experiments.aot.roofline import Data, Kernel, kernels_of, predicted
from experiments.bench import times
from experiments.bench.cases import keys_of_blocks, keys_of_pattern
from experiments.shared import device
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
    return products_of(self.spec) * (_BACKWARD if self.gradient else 1)

  def counted(self) -> dict[str, Any]:
    """Plain JSON: the case, the bytes and operations that it cannot do without, and its kernels."""
    run, types = public(self.spec)
    with programs_for("TPU v5", "tpu"):
      results, data = jax.eval_shape(run, *types), data_of(self.spec, self.shared)
      kernels = kernels_of(run, *types, data=data)
      if self.gradient:
        kernels = kernels_of(functools.partial(with_gradient, run), types, data=data)[len(kernels):]
    moved = moved_of(self.spec, types, results)
    if self.gradient:  # cotangents are like the results, gradients like the first arguments
      moved += bytes_of(types[:3])
    return {"label": self.label, "moved": moved, "products": self.products,
            "kernels": [dataclasses.asdict(kernel) for kernel in kernels]}


def timed(case: KernelCase, seed: int = 0) -> tuple[float, float | None]:
  """Seconds on this device (of the kernels, of plain JAX; None where it has too little memory for that)."""
  run, types = public(case.spec)
  arguments = jax.jit(functools.partial(_drawn, case, types))(jax.random.key(seed))
  found: list[float | None] = []
  for name in ("pallas_tpu", "xla"):
    run, _ = public(case.spec, name)
    try:
      found.append(_seconds_of_gradient(run, arguments) if case.gradient else times.median_seconds(
          jax.jit(run).lower(*arguments).compile(), *arguments))
    except jax.errors.JaxRuntimeError as error:
      if name == "pallas_tpu" or not device.out_of_memory(error):
        raise
      found.append(None)
  assert found[0] is not None
  return found[0], found[1]


def _seconds_of_gradient(run: Callable[..., Any], arguments: Any) -> float:
  """Of the backward pass alone, by the first three arguments."""
  values, pull = jax.jit(lambda *given: jax.vjp(lambda *first: run(*first, *given[3:]), *given[:3]))(*arguments)
  backward = jax.jit(lambda pull, cotangents: pull(cotangents))
  return times.median_seconds(backward.lower(pull, values).compile(), pull, values)


def _drawn(case: KernelCase, types: Any, key: jax.Array) -> Any:
  """Normal numbers, every row and every choice valid, and blocks up to the query's own, which tiles may share."""
  spec = case.spec

  def draw(i: int, x: jax.ShapeDtypeStruct) -> jax.Array:
    if x.dtype == jnp.bool_:
      return jnp.ones(x.shape, jnp.bool_)
    if x.dtype != jnp.int32:
      return jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
    if isinstance(spec, Decode):
      return jax.random.randint(jax.random.fold_in(key, i), x.shape, 0, spec.rows // spec.block)
    assert isinstance(spec, Sparse)
    tile = spec.block if case.shared < 1 else 1  # queries that choose alike
    own = jnp.arange(x.shape[1]) // spec.block
    part = jax.random.uniform(jax.random.fold_in(key, i), (x.shape[0], -(-x.shape[1] // tile), *x.shape[2:]))
    chosen = jnp.repeat(part, tile, axis=1)[:, :x.shape[1]] * own[:, None, None]
    return chosen.astype(jnp.int32).at[..., 0].set(own[:, None])

  leaves, tree = jax.tree.flatten(types)
  return jax.tree.unflatten(tree, [draw(i, x) for i, x in enumerate(leaves)])


def data_of(spec: Spec, shared: float = 1.0) -> dict[str, Data]:
  """Of sparse attention, how many blocks a tile of queries reads: half of what it could, as half lies before it.

  One of them is its own, the others are read whole or not at all.
  """
  if not isinstance(spec, Sparse):
    return {}
  q, k, _, chosen, _ = spec.types()
  plan = sparse_tpu.plan_of(q.shape, k.shape, chosen.shape[2], spec.block, spec.rule)
  _, size = sparse_tpu.parts_of(plan, q.shape[1], q.shape[3])
  blocks, tiles = (max(round(shared * n / 2), 1) for n in (k.shape[1] / plan.block, size / plan.tile))
  whole = 1 - 1 / blocks
  return {"sparse_attention": Data(blocks, whole), "sparse_attention_backward": Data(tiles, whole)}


def public(spec: Spec, name: str = "pallas_tpu") -> tuple[Callable[..., Any], tuple[Any, ...]]:
  """(the operation of a spec by an implementation, the types of its arguments)."""
  kernels: Any = dict(implementation=name)
  if isinstance(spec, Scan):
    return functools.partial(pallas_kernels.gated_scan, **kernels), spec.types()[:4 if spec.reset else 3]
  if isinstance(spec, Dilated):
    return functools.partial(pallas_kernels.dilated_attention, **spec.pattern._asdict(), **kernels), spec.types()
  if isinstance(spec, Sparse):
    return functools.partial(pallas_kernels.sparse_attention, block=spec.block, rule=spec.rule, **kernels), spec.types()
  optional = spec.optional_types()

  def decode(q: Any, keys: Any, values: Any, visible: Any, more: dict[str, Any]) -> Any:
    return pallas_kernels.decode_attention(q, keys, values, visible, **more, **kernels)

  return decode, (*spec.types(), optional)


def with_gradient(run: Callable[..., Any], types: tuple[Any, ...]) -> Any:
  """(the results, the gradients by the first three arguments)."""
  values, pull = jax.vjp(lambda *given: run(*given, *types[3:]), *types[:3])
  return values, pull(values)


def bytes_of(tree: Any) -> float:
  return float(sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def moved_of(spec: Spec, types: tuple[Any, ...], results: Any) -> float:
  """Bytes of the arguments that an operation must read, and of its results."""
  moved = bytes_of((types, results))
  if isinstance(spec, Decode) and spec.block:
    choosers = spec.heads if spec.apart else spec.kv_heads
    read = choosers * spec.chosen * spec.block / (spec.kv_heads * spec.rows)
    moved -= (1 - read) * bytes_of(types[1:3])
  return moved


def products_of(spec: Spec) -> float:
  """Operations of matrix products that an operation's results need."""
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


def measured_table(cells: list[dict[str, Any]], seconds: dict[str, tuple[float, float | None]], chip: Chip) -> str:
  """A row for every case that was timed: measured beside predicted, in milliseconds."""
  rows = []
  for cell in cells:
    if cell["label"] in seconds:
      predicted_seconds, floor, bound = seconds_of(cell, chip)
      ours, plain = seconds[cell["label"]]
      rows.append([cell["label"], *(f"{1e3 * x:.3g}" for x in (ours, predicted_seconds, floor)), bound,
                   "out of memory" if plain is None else f"{1e3 * plain:.3g}"])
  return markdown_table(["kernels of", "ms", "predicted", "floor", "bound", "plain JAX"], rows)


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
