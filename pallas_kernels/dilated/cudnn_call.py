"""Causal attention by cuDNN, its log-sum-exp in float32 and its gradient under a log-sum-exp from outside.

`jax.nn.dot_product_attention` rounds the log-sum-exp to the queries' type and drops its cotangent. XLA's own calls of
cuDNN do neither. This file is the only one that knows them: their names, the order of their arrays and their settings,
as `jax.nn.dot_product_attention` gives them to XLA. `jax.ffi.ffi_call` is the public way to make such a call.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import softmax

Array = jax.Array
MAX_WIDTH = 128  # of a head
_HIDDEN = {"bfloat16": -2.0**41, "float16": -2.0**15}  # of a key that is not seen; cuDNN subtracts two such biases


Seen = Callable[[], Array]  # makes bool [T, T]: which keys a query sees of those before it
Products = dict[str, tuple[int, int, tuple[int, int], tuple[int, int]]]


def forward(q: Array, k: Array, v: Array, window: int | None, seen: Seen | None = None) -> softmax.Part:
  """As `folding.Causal.forward`, of the keys that are `seen`."""
  def attend(q: Array, k: Array, v: Array) -> list[Array]:
    b, t, n, _ = q.shape
    return _call("__cudnn$fmha" + ("ScaleBiasSoftmax" if seen else "Softmax"), _FORWARD_PRODUCTS, window,
                 [q, k, v, *_bias(q, seen)], [q, jax.ShapeDtypeStruct((b, n, t), jnp.float32)])

  out, lse = _by_batch(attend)(q, k, v)
  return out, jnp.moveaxis(lse, 1, 2)


def backward(q: Array, k: Array, v: Array, window: int | None, out: Array, lse: Array, d_out: Array,
             seen: Seen | None = None) -> tuple[Array, Array, Array]:
  """As `folding.Causal.backward`, of the keys that are `seen`."""
  def pull(q: Array, k: Array, v: Array, lse: Array, out: Array, d_out: Array) -> list[Array]:
    return _call("__cudnn$fmha" + ("ScaleBiasSoftmaxBackward" if seen else "SoftmaxBackward"), _BACKWARD_PRODUCTS,
                 window, [q, k, v, lse, d_out, *_bias(q, seen), out], [q, k, v])

  d_q, d_k, d_v = _by_batch(pull)(q, k, v, jnp.moveaxis(lse, 2, 1), out, d_out)
  return d_q, d_k, d_v


def unsupported(q: Array, k: Array, v: Array, segment_ids: Array | None, **_: Any) -> str | None:
  """Why cuDNN does not serve these arguments of dilated attention, or None."""
  del v
  if segment_ids is not None:
    return "takes no packed rows: positions restart there, so they do not fold"
  if q.dtype not in (jnp.bfloat16, jnp.float16) or k.dtype != q.dtype:
    return f"takes bfloat16 or float16, q is {q.dtype} and k {k.dtype}"
  if q.shape[-1] % 8 or q.shape[-1] > MAX_WIDTH:
    return f"takes heads of a multiple of 8 up to {MAX_WIDTH} wide, these are {q.shape[-1]}"
  return _of_this_jax()


def _of_this_jax() -> str | None:
  """Why this jax cannot make the calls, or None. The arguments are public, but jax promises no old kind of call."""
  call = getattr(getattr(jax, "ffi", None), "ffi_call", None)
  known = inspect.signature(call).parameters if call else {}
  if missing := [name for name in ("custom_call_api_version", "legacy_backend_config") if name not in known]:
    return (f"needs jax.ffi.ffi_call with {' and '.join(missing)}, which jax {jax.__version__} does not have; install"
            " a jax from 0.10.2 to 0.12, or use implementation='xla'")
  return None


def _by_batch(f: Callable[..., list[Array]]) -> Callable[..., list[Array]]:
  """f of arrays [B, ...], of which `jax.vmap` makes more rows; a call of cuDNN takes one leading axis."""
  mapped = jax.custom_batching.custom_vmap(f)

  @mapped.def_vmap
  def _(size: int, is_mapped: Sequence[bool], *arrays: Array) -> tuple[list[Array], list[bool]]:
    every = (x if one else jnp.broadcast_to(x, (size, *x.shape)) for x, one in zip(arrays, is_mapped, strict=True))
    outs = mapped(*(x.reshape(-1, *x.shape[2:]) for x in every))
    return [x.reshape(size, -1, *x.shape[1:]) for x in outs], [True] * len(outs)

  return mapped


def _bias(q: Array, seen: Seen | None) -> list[Array]:
  """The bias [1, 1, T, T] by which cuDNN is told a mask."""
  if seen is None:
    return []
  return [jnp.where(seen(), 0, jnp.asarray(_HIDDEN[q.dtype.name], q.dtype))[None, None]]


# The contracted and the batch axes of the products, of queries and keys [B, T, N, H] and scores [B, N, T, S].
_FORWARD_PRODUCTS: Products = {"bmm1": (3, 3, (0, 2), (0, 2)), "bmm2": (3, 1, (0, 1), (0, 2))}
_BACKWARD_PRODUCTS: Products = {
    "bmm1_grad_gemm1": (2, 1, (0, 1), (0, 2)), "bmm1_grad_gemm2": (3, 1, (0, 1), (0, 2)),
    "bmm2_grad_gemm1": (2, 1, (0, 1), (0, 2)), "bmm2_grad_gemm2": (3, 3, (0, 2), (0, 2))}


def _call(target: str, products: Products, window: int | None, arrays: Sequence[Array],
          results: Sequence[Array | jax.ShapeDtypeStruct]) -> list[Array]:
  """The results of XLA's call `target`, causal: arrays of the shapes and types of `results`.

  Heads come before tokens in what XLA is told of a result, and after them in memory, as in [B, T, N, H].
  """
  def told(axes: Sequence[int]) -> tuple[int, ...]:
    return (axes[0], axes[2], axes[1], axes[3]) if len(axes) == 4 else tuple(axes)

  room = jax.ShapeDtypeStruct((0,), jnp.uint8)  # XLA makes it as large as cuDNN wants it
  *made, _ = jax.ffi.ffi_call(
      target, [*(jax.ShapeDtypeStruct(told(x.shape), x.dtype) for x in results), room], vmap_method="sequential",
      output_layouts=[*(told(range(x.ndim)) for x in results), (0,)], custom_call_api_version=2,
      legacy_backend_config=_settings(arrays[0], arrays[1], products, window))(*arrays)
  return [jnp.transpose(x, told(range(x.ndim))) for x in made]


def _settings(q: Array, k: Array, products: Products, window: int | None) -> str:
  axes = {f"{name}_dot_dimension_numbers": {
      "lhs_contracting_dimensions": [str(left)], "rhs_contracting_dimensions": [str(right)],
      "lhs_batch_dimensions": [str(axis) for axis in of_left], "rhs_batch_dimensions": [str(axis) for axis in of_right],
  } for name, (left, right, of_left, of_right) in products.items()}
  scores = {
      "element_type": "BF16" if q.dtype == jnp.bfloat16 else "F16",
      "dimensions": [str(size) for size in (q.shape[0], q.shape[2], q.shape[1], k.shape[1])], "tuple_shapes": [],
      "layout": {"dim_level_types": [], "dim_unique": [], "dim_ordered": [], "minor_to_major": ["3", "2", "1", "0"],
                 "tiles": [], "element_size_in_bits": "0", "memory_space": "0",
                 "index_primitive_type": "PRIMITIVE_TYPE_INVALID", "pointer_primitive_type": "PRIMITIVE_TYPE_INVALID",
                 "dynamic_shape_metadata_prefix_bytes": "0"},
      "is_dynamic_dimension": [False] * 4}
  return json.dumps({"operation_queue_id": "0", "cudnn_fmha_backend_config": {
      "algorithm": {"algo_id": "0", "math_type": "TENSOR_OP_MATH", "tuning_knobs": {"17": "1", "24": "0"},
                    "is_cudnn_frontend": True, "workspace_size": "0"},
      "fmha_scale": q.shape[-1]**-0.5, "intermediate_tensor_shape": scores, "is_flash_attention": True,
      "mask_type": "CAUSAL", **axes, "dropout_rate": 0.0, "seed": 0,
      "sliding_window_length": 0 if window is None else window + 1, "max_seg_per_batch": 1,
      "is_paged_attention": False}})
