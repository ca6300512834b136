"""Decode attention by a kernel for Hopper GPUs (mosaic_gpu_kernel.py); its gradient is that of plain JAX."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention.softmax import Part
from pallas_kernels.decode import mosaic_gpu_kernel, xla
from pallas_kernels.decode.context import implementation
from pallas_kernels.decode.mosaic_gpu_shapes import WIDTHS, Cut, Tuning
from pallas_kernels.devices import HOPPER

Array = jax.Array


@jax.custom_vjp
def run(q: Array, keys: Array, values: Array, visible: Array, layer: Array | int | None,
        own: tuple[Array, Array] | None, blocks: Array | None) -> tuple[Array, Array]:
  """As `api.decode_attention`, of what is not `unsupported`."""
  part: Part = mosaic_gpu_kernel.decode_attention(q, keys, values, visible, layer, own, blocks)
  return part


def _forward(*arguments: Any) -> tuple[Part, tuple[Any, ...]]:
  return run(*arguments), arguments


def _backward(arguments: tuple[Any, ...], cotangents: Part) -> tuple[Any, ...]:
  return xla.cotangents(arguments, cotangents)


run.defvjp(_forward, _backward)


def unsupported(q: Array, keys: Array, values: Array, visible: Array, layer: Array | int | None,
                own: tuple[Array, Array] | None, blocks: Array | None) -> str | None:
  """Why the kernel does not serve these arguments, or None."""
  del values, layer, own
  if q.dtype not in (jnp.bfloat16, jnp.float32):
    return f"takes bfloat16 or float32, not {q.dtype}"
  if keys.shape[-1] not in WIDTHS:
    return f"takes heads of H in {WIDTHS}, not {keys.shape[-1]}"
  step = Cut(1, 1, 1, 1, keys.shape[-1], q.dtype, Tuning()).step
  if blocks is not None and visible.shape[3] % step:
    return f"takes blocks of a multiple of {step} rows at H={keys.shape[-1]} and {q.dtype}, not of {visible.shape[3]}"
  return None


IMPLEMENTATION = implementation(run, unsupported=unsupported, runs_on=HOPPER)
