"""Kernels with a plain-JAX reference beside each: one folder per operation.

Every public function takes `implementation`: None picks the fastest one that serves the case, a name raises
`NotImplementedError`, with the reason, where it cannot. Every operation has the "xla" implementation; what
kernels there are, and what they gain, is in docs/kernels.md.
"""

from pallas_kernels.decode_attention.api import decode_attention
from pallas_kernels.dilated_attention.api import dilated_attention
from pallas_kernels.gated_scan.api import gated_scan

__all__ = ["decode_attention", "dilated_attention", "gated_scan"]
