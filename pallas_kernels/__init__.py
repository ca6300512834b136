"""Kernels with a plain-JAX reference beside each: one folder per operation.

Every public function takes `implementation`: None picks the fastest one that serves the case, a name raises
`NotImplementedError`, with the reason, where it cannot. Every operation has the "xla" implementation; what
kernels there are, and what they gain, is in docs/kernels.md.
"""

from pallas_kernels.decode.api import decode_attention
from pallas_kernels.dilated.api import dilated_attention
from pallas_kernels.implementation import force
from pallas_kernels.scan.api import gated_scan
from pallas_kernels.sparse.api import sparse_attention

__all__ = ["decode_attention", "dilated_attention", "force", "gated_scan", "sparse_attention"]
