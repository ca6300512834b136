"""Kernels with a plain-JAX reference beside each: one folder per operation.

Every public function takes `implementation`: None picks the fastest one that serves the case, a name raises
`NotImplementedError`, with the reason, where it cannot. Today every operation has the "xla" implementation.
"""

from pallas_kernels.dilated_attention.api import dilated_attention
from pallas_kernels.gated_scan.api import gated_scan

__all__ = ["dilated_attention", "gated_scan"]
