"""Dilated attention folded into causal attention (folding.py), which cuDNN computes."""

from __future__ import annotations

import jax

from pallas_kernels.devices import AMPERE
from pallas_kernels.dilated import cudnn_call, folding
from pallas_kernels.implementation import Implementation
from pallas_kernels.pattern import Pattern

Array = jax.Array


def run(q: Array, k: Array, v: Array, segment_ids: None, *, pattern: Pattern) -> Array:
  """As `api.dilated_attention`, of what is not `cudnn_call.unsupported`."""
  del segment_ids
  return folding.dilated_attention(q, k, v, pattern, cudnn_call)


IMPLEMENTATION = Implementation(run, cudnn_call.unsupported, AMPERE, independent="BNK")
