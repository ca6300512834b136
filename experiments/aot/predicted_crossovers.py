"""From which sizes on the kernels for TPUs should be as fast as plain JAX: `pallas_kernels.crossovers.PREDICTED`.

Plain JAX takes at least what its compiled program reads, writes and multiplies. That its parts start one after another,
overlap little and gather rows slowly is not counted. The kernels take what their roofline says, steps included, and
what the compiled program around them reads and writes. So kernels count as no slower up to a tenth above plain JAX.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from experiments.aot import chips
from experiments.aot.hlo import Program
from experiments.aot.kernel_cases import Spec, data_of, moved_of, products_of, public
from experiments.aot.kernel_programs import traced_kernel
from experiments.aot.roofline import kernels_in, predicted
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
    "decode_attention_blocks": tuple((b * n * 64 * _OF_TOKEN, Decode(b, 16384, block=64, chosen=n, apart=True))
                                     for b, n in ((1, 1), (1, 4), (1, 16), (8, 4), (8, 16), (32, 16))),
    "dilated_attention": tuple((t, Dilated(max(1, 4096 // t), t)) for t in (32, 128, 512, 1024, 2048, 4096)),
    "sparse_attention": tuple((t * t, Sparse.sixteenth(t, 64)) for t in (1024, 2048, 4096, 16384))}


def entry(topology: str, say: Callable[[str], None]) -> tuple[str, dict[str, dict[str, int]]]:
  """(the kind of a topology's devices, its entry): from which size on kernels are no slower."""
  chip = chips.chip_of(topology)
  found: dict[str, dict[str, int]] = {}
  for operation, sweep in SWEEPS.items():
    for size, spec in reversed(sweep):
      plain, ours = _seconds(spec, "xla", chip, topology), _seconds(spec, "pallas_tpu", chip, topology)
      say(f"{operation} {size}: plain JAX {1e6 * plain:.1f} us, kernels {1e6 * ours:.1f} us")
      if ours > TIE * plain:
        break
      found[operation] = {"pallas_tpu": size}
  return chip.kind, found


def _seconds(spec: Spec, name: str, chip: chips.Chip, topology: str) -> float:
  run, types = public(spec, "xla")
  traced = traced_kernel(spec, topology, name=name)
  program = Program(str(traced.lower().compile().as_text()))
  of_bytes = chip.devices / chip.bandwidth
  if name != "xla":
    around = program.moved() - program.moved_by_kernels()
    return predicted(kernels_in(traced.jaxpr.jaxpr, data_of(spec)), chip) + around * of_bytes
  given = moved_of(spec, types, jax.eval_shape(run, *types))  # what is in VMEM when a step of it begins was read before
  return max(max(program.moved(), given) * of_bytes, products_of(spec) * chip.devices / chip.products)
