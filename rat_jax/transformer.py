"""The transformer as pure functions on one parameter tree: layers stacked on a leading axis, run by `lax.scan`.

    x = x + out(attention(...) * sigmoid(o));  x = x + mlp(x)      a norm before each branch, or after it

The residual stream, norms, memory, softmax and logits are float32; matrix products and attention run in
`config.dtype`. The layer is that of arXiv 2602.18196, section 3; post-norm, QK-norm and SwiGLU are OLMo 2's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.gated_scan import api as gated_scan
from pallas_kernels.products import einsum_float32
from rat_jax import attention, rope
from rat_jax.axes import Array, Keys, Logits, Params, Queries, State, Stream, Tokens
from rat_jax.config import RATPlusConfig
from rat_jax.layout import Layout, Prompts
from rat_jax.memory import memory
from rat_jax.modes import Mode, layer_runs
from rat_jax.selection import Origin

# What a layer keeps for its gradient beside its input. "products": matrix products with parameters and the memory's
# states; the rest, attention included, is cheaper to make again than to write to a buffer of all layers and to read
# (H100, 1024 tokens).
Remat = Literal["products", "nothing", "everything"]
_KEPT = {"products": jax.checkpoint_policies.save_from_both_policies(
             jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
             jax.checkpoint_policies.save_only_these_names(gated_scan.STATES)),
         "nothing": jax.checkpoint_policies.nothing_saveable,
         "everything": jax.checkpoint_policies.everything_saveable}
_FEW = 4  # layers that are compiled one by one without being asked


class Projections(NamedTuple):
  """What a layer's attention reads of its input, before memory and RoPE; q, k normed where the model does that."""

  q: Queries
  k: Keys
  v: Keys
  gate_logits: Keys | None    # None: no memory
  output_gate: Queries | None  # logits; None: no gate


class Attended(NamedTuple):
  """A layer's queries, keys and values as attention takes them and caches keep them, in `config.dtype`."""

  q: Queries
  k: Keys
  v: Keys


def initializers(config: RATPlusConfig) -> dict[str, Callable[[Array], Any]]:
  """How each top-level entry of the parameter tree is drawn from a key."""
  dtype, rows = jnp.dtype(config.param_dtype), (config.vocab_size, config.embed_dim)
  std = _std(config, fan_in=config.embed_dim)
  entries = {
      "embedding": lambda key: _normal(key, rows, std, dtype),
      "layers": lambda key: _init_layers(config, key),
      "final_norm": lambda key: jnp.ones(config.embed_dim, dtype),
  }
  if not config.tie_embeddings:
    entries["head"] = lambda key: _normal(key, rows, std, dtype)
  return entries


def _std(config: RATPlusConfig, fan_in: int, writes_residual: bool = False) -> float:
  if config.init_std is not None:
    return config.init_std
  return fan_in**-0.5 / ((2 * config.num_layers) ** 0.5 if writes_residual else 1.0)


def _normal(key: Array, shape: tuple[int, ...], std: float, dtype: jnp.dtype) -> Array:
  return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def _init_layers(config: RATPlusConfig, key: Array) -> Params:
  layers, e, n, kv = config.num_layers, config.embed_dim, config.num_heads, config.num_kv_heads
  h, f, dtype = config.head_dim, config.mlp_dim, jnp.dtype(config.param_dtype)
  matrices: dict[str, tuple[int, ...]] = {"query": (e, n, h), "key": (e, kv, h), "value": (e, kv, h), "mlp_in": (e, f)}
  if config.output_gate:
    matrices["output_gate"] = (e, n, h)
  if config.memory:
    matrices["memory_gate"] = (e, kv, h)
  if config.mlp == "swiglu":
    matrices["mlp_gate"] = (e, f)
  stds = {name: _std(config, fan_in=e) for name in matrices}
  for name, shape, fan_in in (("out", (n, h, e), n * h), ("mlp_out", (f, e), f)):
    matrices[name], stds[name] = shape, _std(config, fan_in, writes_residual=True)
  if config.gate_bias is not None:
    stds["memory_gate"] = 0.0
  layer = {name: _normal(k, (layers, *matrices[name]), stds[name], dtype)
           for name, k in zip(matrices, jax.random.split(key, len(matrices)), strict=True)}
  if config.gate_bias is not None:
    layer["memory_gate_bias"] = jnp.full((layers, kv, h), config.gate_bias, dtype)
  norms: dict[str, tuple[int, ...]] = {"attention_norm": (e,), "mlp_norm": (e,)}
  if config.qk_norm:
    norms |= {"query_norm": (n, h), "key_norm": (kv, h)}
  return layer | {name: jnp.ones((layers, *shape), dtype) for name, shape in norms.items()}


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
  """RMSNorm over the axes of `weight`, float32."""
  axes = tuple(range(-weight.ndim, 0))
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.mean(x * x, axes, keepdims=True) + eps) * weight.astype(jnp.float32)


def _product(subscripts: str, x: Array, matrix: Array, product: Callable[..., Array] = jnp.einsum) -> Array:
  """The product of tokens x [B, T, ...] with a matrix, in x's type."""
  matrix = matrix.astype(x.dtype)
  if x.shape[:2] == (1, 1) and jax.default_backend() == "gpu":
    # Of a single row XLA makes no matrix product, but sums over products that it writes to memory first.
    return product(subscripts, jnp.concatenate([x, x], axis=1), matrix)[:, :1]
  return product(subscripts, x, matrix)


def embed(params: Params, tokens: Tokens) -> Stream:
  """The residual stream's start, float32 [B, T, E]."""
  return jnp.asarray(params["embedding"])[tokens].astype(jnp.float32)


def project(config: RATPlusConfig, p: Params, x: Stream) -> Projections:
  """The projections of one layer (`p`: its parameters, no layer axis) of the stream x, in `config.dtype`."""
  dtype = jnp.dtype(config.dtype)
  x = rms_norm(x, p["attention_norm"], config.norm_eps) if config.norm_placement == "pre" else x
  x = x.astype(dtype)

  def heads(name):
    return _product("bte,enh->btnh", x, p[name])

  q, k = heads("query"), heads("key")
  if config.qk_norm:
    q = rms_norm(q, p["query_norm"], config.norm_eps).astype(dtype)
    k = rms_norm(k, p["key_norm"], config.norm_eps).astype(dtype)
  gate_logits = None
  if config.memory:
    gate_logits = heads("memory_gate")
    if config.gate_bias is not None:
      gate_logits = gate_logits.astype(jnp.float32) + p["memory_gate_bias"].astype(jnp.float32)
  return Projections(q, k, heads("value"), gate_logits, heads("output_gate") if config.output_gate else None)


def remember(config: RATPlusConfig, at: Projections, layout: Layout, state: State | None
             ) -> tuple[Attended, State | None]:
  """Memory, then RoPE; and the memory's state. Without a memory, keys and values are what was projected."""
  k, v = at.k, at.v
  if at.gate_logits is not None:
    k, v, state = memory(at.gate_logits, k, v, state, segment_ids=layout.segment_ids)
  dtype = jnp.dtype(config.dtype)
  q = rope.rotate(at.q, layout.positions, config.rope_base)
  k = rope.rotate(k, layout.positions, config.rope_base)
  return Attended(q.astype(dtype), k.astype(dtype), v.astype(dtype)), state


def attention_branch(config: RATPlusConfig, p: Params, x: Stream, y: Queries, output_gate: Queries | None) -> Stream:
  """The stream after attention's output y [B, T, N, H] was gated, projected and added."""
  dtype = jnp.dtype(config.dtype)
  y = y.astype(dtype)
  if output_gate is not None:
    y *= jax.nn.sigmoid(output_gate)
  y = _product("btnh,nhe->bte", y, p["out"], einsum_float32)
  if config.norm_placement == "post":
    y = rms_norm(y, p["attention_norm"], config.norm_eps)
  return x + y


def mlp_branch(config: RATPlusConfig, p: Params, x: Stream) -> Stream:
  """The stream after the MLP was added."""
  dtype = jnp.dtype(config.dtype)
  y = rms_norm(x, p["mlp_norm"], config.norm_eps) if config.norm_placement == "pre" else x
  y = y.astype(dtype)
  hidden = _product("bte,ef->btf", y, p["mlp_in"])
  # Activations are computed in float32 and rounded once, as in PyTorch; XLA then makes one kernel of them on a GPU.
  if config.mlp == "swiglu":
    gate = _product("bte,ef->btf", y, p["mlp_gate"])
    hidden *= jax.nn.silu(gate.astype(jnp.float32)).astype(dtype)
  else:
    hidden = jax.nn.gelu(hidden.astype(jnp.float32), approximate=False).astype(dtype)
  y = _product("btf,fe->bte", hidden, p["mlp_out"], einsum_float32)
  if config.norm_placement == "post":
    y = rms_norm(y, p["mlp_norm"], config.norm_eps)
  return x + y


def block(config: RATPlusConfig, p: Params, x: Stream, layout: Layout, state: State | None,
          attend: Callable[[Attended], Array]) -> tuple[Stream, State | None, Attended]:
  """One layer: the stream x through attention, as `attend` does it, and MLP.

  Returns the stream, the memory's state after the last token, and what attention was given (for a cache).
  """
  projections = project(config, p, x)
  at, state = remember(config, projections, layout, state)
  x = attention_branch(config, p, x, attend(at), projections.output_gate)
  return mlp_branch(config, p, x), state, at


def layers_of(params: Params, start: int, stop: int) -> Params:
  """The stacked parameters of layers start .. stop-1."""
  return jax.tree.map(lambda a: a[start:stop], params["layers"])


def unrolled(layers: int, asked: bool) -> bool:
  """Whether to compile layers one by one rather than as a loop: when asked, and few layers on a GPU or TPU.

  On a GPU a loop copies each layer's matrices out of their stack, and for gradients fills and reads stacks of what all
  layers keep.
  """
  return asked or (layers <= _FEW and jax.default_backend() != "cpu")


def hidden_states(config: RATPlusConfig, params: Params, tokens: Tokens, mode: Mode, layout: Layout, *,
                  row_ids: Array, prompts: Prompts | None = None, prefill_mode: Mode | None = None,
                  remat: Remat = "products", unroll: bool = False) -> Stream:
  """The stream [B, T, E] of a whole sequence after the last layer, before the final norm.

  Raises ValueError for an unknown `remat`.
  """
  if remat not in _KEPT:
    raise ValueError(f"remat={remat!r} is unknown; use one of {tuple(_KEPT)}.")
  x = embed(params, tokens)
  for run in layer_runs(mode, config.num_layers, prefill_mode):

    def layer(x, at_layer, run=run):
      p, index = at_layer
      x, _, _ = block(config, p, x, layout, None, lambda at: attention.attend_layer(
          at.q, at.k, at.v, run, layout, prompts, Origin(row_ids, index)))
      return x, None

    # Of a few layers written out XLA may keep what it likes; of many it would keep everything.
    x, _ = jax.lax.scan(jax.checkpoint(layer, policy=_KEPT[remat], prevent_cse=unroll), x,
                        (layers_of(params, run.start, run.stop), jnp.arange(run.start, run.stop)),
                        unroll=unrolled(run.stop - run.start, unroll))
  return x


def logits(config: RATPlusConfig, params: Params, x: Stream) -> Logits:
  """The logits of a stream [..., E]: final norm and head; float32 [..., V]."""
  dtype = jnp.dtype(config.dtype)
  x = rms_norm(x, params["final_norm"], config.norm_eps).astype(dtype)
  head = params["embedding" if config.tie_embeddings else "head"].astype(dtype)
  return einsum_float32("...e,ve->...v", x, head)
