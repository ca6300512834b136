"""Causal attention by cuDNN, its log-sum-exp in float32 and its gradient under a log-sum-exp from outside.

`jax.nn.dot_product_attention` rounds the log-sum-exp to the queries' type and drops its cotangent. The primitives
beneath it do neither; they are no public interface of jax, and this file is the only one that knows them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused

from pallas_kernels import softmax

Array = jax.Array
MAX_WIDTH = 128  # of a head


Seen = Callable[[], Array]  # makes bool [T, T]: which keys a query sees of those before it


def forward(q: Array, k: Array, v: Array, window: int | None, seen: Seen | None = None) -> softmax.Part:
  """As `folded.Causal.forward`, of the keys that are `seen`."""
  def attend(q, k, v):
    return fused._dot_product_attention_fwd_p_wrapper.bind(
        q, k, v, *_others(q, seen), is_training=True, **_settings(q, window, seen))

  out, lse = _by_batch(attend)(q, k, v)
  return out, jnp.moveaxis(lse, 1, 2)


def backward(q: Array, k: Array, v: Array, window: int | None, out: Array, lse: Array, d_out: Array,
             seen: Seen | None = None) -> tuple[Array, Array, Array]:
  """As `folded.Causal.backward`, of the keys that are `seen`."""
  def pull(q, k, v, lse, out, d_out):
    return fused._dot_product_attention_bwd_p_wrapper.bind(
        q, k, v, *_others(q, seen), lse, out, d_out, **_settings(q, window, seen))

  return _by_batch(pull)(q, k, v, jnp.moveaxis(lse, 2, 1), out, d_out)


def _by_batch(f: Callable) -> Callable:
  """f of arrays [B, ...], of which `jax.vmap` makes more rows; the primitives' own rules take leading axes alone."""
  mapped = jax.custom_batching.custom_vmap(f)

  @mapped.def_vmap
  def _(size, is_mapped, *arrays):
    every = (x if one else jnp.broadcast_to(x, (size, *x.shape)) for x, one in zip(arrays, is_mapped, strict=True))
    outs = mapped(*(x.reshape(-1, *x.shape[2:]) for x in every))
    return [x.reshape(size, -1, *x.shape[1:]) for x in outs], [True] * len(outs)

  return mapped


def unsupported(q: Array, k: Array) -> str | None:
  """Why cuDNN does not serve these arrays, or None."""
  if q.dtype not in (jnp.bfloat16, jnp.float16) or k.dtype != q.dtype:
    return f"takes bfloat16 or float16, q is {q.dtype} and k {k.dtype}"
  if q.shape[-1] % 8 or q.shape[-1] > MAX_WIDTH:
    return f"takes heads of a multiple of 8 up to {MAX_WIDTH} wide, these are {q.shape[-1]}"
  return None


def _others(q: Array, seen: Seen | None) -> list[Array]:
  """The bias, by which a mask is said, and lengths, offsets and page tables, which are not there."""
  nothing = jnp.zeros(0, q.dtype)
  if seen is None:
    return [nothing] * 7
  bias = jnp.where(seen(), jnp.zeros((), q.dtype), fused.get_large_negative_number(q.dtype))
  return [bias[None, None], *[nothing] * 6]


def _settings(q: Array, window: int | None, seen: Seen | None) -> dict[str, Any]:
  has_bias, bias_has_gradient = seen is not None, False
  return {"scale": q.shape[-1]**-0.5, "seed": 0, "dropout_rate": 0.0, "variadic_args": (has_bias, bias_has_gradient),
          "mask_type": fused.MaskType.CAUSAL, "layout": fused.AttentionLayout.BTNH.value,
          "sliding_window_length": None if window is None else window + 1}
