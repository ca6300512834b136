"""From which sizes on the kernels for TPUs should be as fast as plain JAX: `pallas_kernels.crossovers.PREDICTED`.

Plain JAX takes at least what its compiled program reads, writes and multiplies; that its parts start one after another
and overlap little is not counted. The kernels take what their roofline says, steps included, and what the compiled
program around them reads and writes. So kernels count as no slower up to a tenth above plain JAX.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from experiments.aot import chips
from experiments.aot.hlo import Program
from experiments.aot.kernel_cases import Spec, bytes_of, data_of, products_of, public
from experiments.aot.roofline import kernels_of, predicted
from pallas_kernels.decode.arg_specs import ArgSpec as Decode
from pallas_kernels.dilated.arg_specs import ArgSpec as Dilated
from pallas_kernels.scan.arg_specs import ArgSpec as Scan
from pallas_kernels.sparse.arg_specs import ArgSpec as Sparse

TIE = 1.1
# Of every operation: from small to large, (size as crossovers.py measures it, arguments).
_OF_TOKEN = 32 * 128
SWEEPS: dict[str, tuple[tuple[int, Spec], ...]] = {
    "gated_scan": tuple((t * _OF_TOKEN, Scan(1, t, 32)) for t in (16, 64, 128, 256, 512, 1024, 4096)),
    "decode_attention": tuple((b * r * _OF_TOKEN, Decode(b, r, own=True)) for b, r in (
        (1, 16), (1, 64), (1, 256), (1, 1024), (8, 256), (8, 1024), (64, 256), (64, 1024))),
    "dilated_attention": tuple((t, Dilated(max(1, 4096 // t), t)) for t in (32, 128, 512, 1024, 2048, 4096)),
    "sparse_attention": tuple((t * t, Sparse.sixteenth(t, 64)) for t in (1024, 2048, 4096, 16384))}


def entry(topology: str, say: Callable[[str], None]) -> tuple[str, dict[str, dict[str, int]]]:
  """(the kind of a topology's devices, its entry): from which size on kernels are no slower."""
  chip, devices = chips.chip_of(topology), chips.devices_of(topology)[:1]
  mesh = jax.make_mesh((1,), ("device",), (jax.sharding.AxisType.Auto,), devices=devices)
  found: dict[str, dict[str, int]] = {}
  for operation, sweep in SWEEPS.items():
    for size, spec in reversed(sweep):
      plain, ours = _seconds(spec, "xla", chip, mesh), _seconds(spec, "pallas_tpu", chip, mesh)
      say(f"{operation} {size}: plain JAX {1e6 * plain:.1f} us, kernels {1e6 * ours:.1f} us")
      if ours > TIE * plain:
        break
      found[operation] = {"pallas_tpu": size}
  return devices[0].device_kind, found


def _seconds(spec: Spec, name: str, chip: chips.Chip, mesh: jax.sharding.Mesh) -> float:
  run, types = public(spec, name)
  place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, jax.P()))
  types = jax.tree.map(place, types)
  compiled = jax.jit(run).lower(*types).compile()
  program = Program(str(compiled.as_text()))
  moved = program.moved() * chip.devices / chip.bandwidth
  if name == "xla":  # what is in VMEM when a step of it begins was read before
    given = bytes_of((types, jax.eval_shape(run, *types))) * chip.devices / chip.bandwidth
    return max(moved, given, products_of(spec) * chip.devices / chip.products)
  kernels = kernels_of(run, *types, data=data_of(spec))
  return predicted(kernels, chip) + moved - program.moved_by_kernels() * chip.devices / chip.bandwidth
