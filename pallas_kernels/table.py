"""Which implementations every operation has: a new one is a file of its own, and a line here."""

from __future__ import annotations

# {operation: {implementation: the module that holds it, as IMPLEMENTATION}}; imported when it is used, because not
# every installation has all of them.
IMPLEMENTATIONS: dict[str, dict[str, str]] = {
    "gated_scan": {
        "xla": "pallas_kernels.scan.xla",
        "mosaic_gpu": "pallas_kernels.scan.mosaic_gpu",
        "pallas_tpu": "pallas_kernels.scan.pallas_tpu"},
    "dilated_attention": {
        "xla": "pallas_kernels.dilated.xla",
        "cudnn": "pallas_kernels.dilated.cudnn",
        "cudnn_masked": "pallas_kernels.dilated.cudnn_masked",
        "mosaic_gpu": "pallas_kernels.dilated.mosaic_gpu",
        "pallas_tpu": "pallas_kernels.dilated.pallas_tpu"},
    "decode_attention": {
        "xla": "pallas_kernels.decode.xla",
        "mosaic_gpu": "pallas_kernels.decode.mosaic_gpu",
        "pallas_tpu": "pallas_kernels.decode.pallas_tpu"},
    "sparse_attention": {
        "xla": "pallas_kernels.sparse.xla",
        "pallas_tpu": "pallas_kernels.sparse.pallas_tpu"},
}
# What may be named for any operation; one that does not have it says so.
NAMES = ("xla", "mosaic_gpu", "cudnn", "cudnn_masked", "pallas_tpu")


def known_names() -> tuple[str, ...]:
  """Every name that an implementation may have: those above, and what else was added to the table."""
  return tuple(dict.fromkeys([*NAMES, *(name for of_operation in IMPLEMENTATIONS.values() for name in of_operation)]))
