"""The transformer as pure functions on one parameter tree: layers stacked on a leading axis, run by `lax.scan`.

    x = x + out(attention(...) * sigmoid(o));  x = x + mlp(x)      a norm before each branch, or after it

The residual stream, norms, memory, softmax and logits are float32; matrix products and attention run in
`config.dtype`. The layer is that of arXiv 2602.18196, section 3; post-norm, QK-norm and SwiGLU are OLMo 2's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import devices
from pallas_kernels.products import einsum_float32
from pallas_kernels.scan import api as gated_scan
from rat_jax import rope
from rat_jax.attention import over_context
from rat_jax.attention.terms import Heads, Origin, Placement
from rat_jax.axes import Array, Keys, Logits, Params, Queries, State, Stream, Tokens
from rat_jax.batch import Batch
from rat_jax.config import RATPlusConfig
from rat_jax.decay import memory
from rat_jax.modes import Mode
from rat_jax.parallel import constrain, vocabulary
from rat_jax.plan import Run, layer_runs

# What a layer keeps for its gradient beside its input. "products": matrix products with parameters and the memory's
# states; the rest, attention included, is cheaper to make again than to write to a buffer of all layers and to read
# (H100, 1024 tokens).
Remat = Literal["products", "nothing", "everything"]
_KEPT = {"products": jax.checkpoint_policies.save_from_both_policies(
             jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
             jax.checkpoint_policies.save_only_these_names(gated_scan.STATES)),
         "nothing": jax.checkpoint_policies.nothing_saveable,
         "everything": jax.checkpoint_policies.everything_saveable}
_BIASED = ("query", "key", "value")  # projections that `attention_bias` is of
_UNROLL_UP_TO = 4  # on GPU and TPU, unroll by default up to this many layers


class Projections(NamedTuple):
  """What a layer's attention reads of its input, before memory and RoPE; q, k normed where the model does that."""

  q: Queries
  k: Keys
  v: Keys
  gate_logits: Keys | None    # None: no memory
  output_gate: Queries | None  # logits; None: no gate


@dataclasses.dataclass(frozen=True)
class Sources:
  """Which keys queries choose by, and which keys and values they attend to: with the memory or without it.

  Other than the default it is the 2x2 experiment of arXiv 2605.28640, which separates the two ways in which the memory
  may help query-aware sparsity: better choices, and kept tokens that carry what was skipped. Prompts in a dense or
  position-only form attend as `attend_to` says too.
  """

  select_from: Literal["memory", "plain"] = "memory"
  attend_to: Literal["memory", "plain"] = "memory"

  def check(self, config: RATPlusConfig) -> None:
    """Raises ValueError for what is neither "memory" nor "plain", and a model without a memory to leave out."""
    for name, value in dataclasses.asdict(self).items():
      if value not in ("memory", "plain"):
        raise ValueError(f"{name}={value!r} is unknown; use \"memory\" or \"plain\".")
    if self != Sources() and not config.memory:
      raise ValueError(f"select_from={self.select_from!r}, attend_to={self.attend_to!r} with memory=False: there is no"
                       " memory to leave out.")


def initializers(config: RATPlusConfig) -> dict[str, Callable[[Array], Array | Params]]:
  """How each top-level entry of the parameter tree is drawn from a key."""
  dtype, rows = jnp.dtype(config.param_dtype), (config.vocab_size, config.embed_dim)
  std = _std(config, fan_in=config.embed_dim)
  entries: dict[str, Callable[[Array], Array | Params]] = {
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
  std: float = fan_in**-0.5 / ((2 * config.num_layers) ** 0.5 if writes_residual else 1.0)
  return std


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
  if config.attention_bias:
    layer |= {f"{name}_bias": jnp.zeros((layers, *matrices[name][1:]), dtype) for name in _BIASED}
  norms: dict[str, tuple[int, ...]] = {"attention_norm": (e,), "mlp_norm": (e,)}
  if config.qk_norm:
    norms |= {"query_norm": (h,), "key_norm": (h,)} if config.qk_norm == "head" else {
        "query_norm": (n, h), "key_norm": (kv, h)}
  return layer | {name: jnp.ones((layers, *shape), dtype) for name, shape in norms.items()}


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
  """RMSNorm over the axes of `weight`, float32."""
  axes = tuple(range(-weight.ndim, 0))
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.mean(x * x, axes, keepdims=True) + eps) * weight.astype(jnp.float32)


def _product(subscripts: str, x: Array, matrix: Array, product: Callable[..., Array] = jnp.einsum) -> Array:
  """The product of tokens x [B, T, ...] with a matrix, in x's type."""
  matrix = matrix.astype(x.dtype)
  if x.shape[:2] == (1, 1) and devices.platform_of(matrix) == "gpu":
    # Of a single row XLA makes no matrix product, but sums over products that it writes to memory first.
    return product(subscripts, jnp.concatenate([x, x], axis=1), matrix)[:, :1]
  return product(subscripts, x, matrix)


def embed(params: Params, tokens: Tokens) -> Stream:
  """The residual stream's start, float32 [B, T, E]."""
  return constrain.stream(vocabulary.look_up(jnp.asarray(params["embedding"]), tokens))


def project(config: RATPlusConfig, p: Params, x: Stream) -> Projections:
  """The projections of one layer (`p`: its parameters, no layer axis) of the stream x, in `config.dtype`."""
  dtype = jnp.dtype(config.dtype)
  x = rms_norm(x, p["attention_norm"], config.norm_eps) if config.norm_placement == "pre" else x
  x = x.astype(dtype)

  def heads(name: str) -> Array:
    made = _product("bte,enh->btnh", x, p[name])
    biased = config.attention_bias and name in _BIASED
    return made + p[f"{name}_bias"].astype(dtype) if biased else made

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


def remember(config: RATPlusConfig, projections: Projections, batch: Batch, state: State | None, number: Array,
             sources: Sources = Sources()) -> tuple[Heads, State | None]:
  """Memory, then RoPE: what attention is given in the layer of this number, and the memory's state.

  Without a memory, keys and values are what was projected.
  """
  plain = (projections.k, projections.v)
  kinds = {"memory": plain, "plain": plain}
  if projections.gate_logits is not None:
    k, v, state = memory(projections.gate_logits, *plain, state, segment_ids=batch.segment_ids)
    kinds["memory"] = (k, v)
  dtype = jnp.dtype(config.dtype)

  def rotated(x: Array) -> Array:
    turned = rope.rotate(x, batch.positions, config.rope_base, config.rope_scaling).astype(dtype)
    if not config.no_rope_layers:
      return turned
    return jnp.where(jnp.isin(number, jnp.asarray(config.no_rope_layers)), x.astype(dtype), turned)

  k, v = kinds[sources.attend_to]
  chosen_by = None if sources.select_from == sources.attend_to else rotated(kinds[sources.select_from][0])
  return Heads(rotated(projections.q), rotated(k), v.astype(dtype), chosen_by), state


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


class AtLayer(NamedTuple):
  """What `walk` hands to a layer: its run, its number int32 [], its parameters, and what is carried for it."""

  run: Run
  number: Array
  params: Params
  carried: Any


def block(config: RATPlusConfig, at: AtLayer, x: Stream, batch: Batch, state: State | None,
          attend: Callable[[Heads], Array], sources: Sources = Sources()) -> tuple[Stream, State | None, Heads]:
  """One layer: the stream x through attention, as `attend` does it, and MLP.

  Returns the stream, the memory's state after the last token, and what attention was given (for a cache).
  """
  projections = project(config, at.params, x)
  heads, state = remember(config, projections, batch, state, at.number, sources)
  x = attention_branch(config, at.params, x, attend(heads), projections.output_gate)
  return mlp_branch(config, at.params, x), state, heads


def walk(params: Params, runs: Sequence[Run], x: Stream, layer: Callable[[Stream, AtLayer], tuple[Stream, Any]],
         carried: Any = None, *, unroll: bool = False, remat: Remat | None = None) -> tuple[Stream, list[Any]]:
  """The stream through all layers, a loop for each run of equal layers. Whoever walks the layers walks here.

  Args:
    layer: (stream, what it is given) -> (stream, a pytree of what it makes besides).
    carried: a pytree of arrays [L, ...] that layers get their part of.
    unroll: compiles layers one by one even if they are many.
    remat: what a layer keeps for its gradient; None says nothing of it.

  Returns:
    (stream, what the layers of each run made besides: [layers of the run, ...] each).
  """
  made = []
  for run in runs:

    def body(x: Stream, of_layer: tuple[Array, Params, Any], run: Run = run) -> tuple[Stream, Any]:
      x, besides = layer(x, AtLayer(run, *of_layer))
      return constrain.stream(x), besides

    # Of a few layers written out XLA may keep what it likes; of many it would keep everything.
    body = body if remat is None else jax.checkpoint(body, policy=_KEPT[remat], prevent_cse=unroll)
    numbers = jnp.arange(run.start, run.stop, dtype=jnp.int32)
    of_layers = (numbers, layers_of(params["layers"], run), layers_of(carried, run))
    x, besides = jax.lax.scan(body, x, of_layers, unroll=unrolled(params, run.stop - run.start, unroll))
    made.append(besides)
  return x, made


def layers_of(stacked: Any, run: Run) -> Any:
  """The part of arrays [L, ...] that the layers of a run have."""
  return jax.tree.map(lambda a: a[run.start:run.stop], stacked)


def unrolled(params: Params, layers: int, asked: bool) -> bool:
  """Whether to compile layers one by one rather than as a loop: when asked, and few layers on a GPU or TPU.

  On a GPU a loop copies each layer's matrices out of their stack, and for gradients fills and reads stacks of what all
  layers keep.
  """
  return asked or (layers <= _UNROLL_UP_TO and devices.platform_of(params["embedding"]) != "cpu")


@dataclasses.dataclass(frozen=True)
class Forward:
  """How whole sequences run: static, so that a compiled program depends on it.

  Attributes:
    mode: of every token but the prompt's; prefill_mode: overrides its form of the prompt.
    sources: the 2x2 experiment.
    remat, unroll: how gradients are computed; see `rat_jax.train_step`.
  """

  mode: Mode
  prefill_mode: Mode | None = None
  sources: Sources = Sources()
  remat: Remat = "products"
  unroll: bool = False

  def check(self, config: RATPlusConfig) -> None:
    """Raises ValueError for choices that are unknown."""
    self.sources.check(config)
    check_gradients(self.remat, self.unroll)


def check_gradients(remat: object, unroll: object) -> None:
  """Raises ValueError for an unknown `remat`, and an `unroll` that is neither True nor False."""
  if remat not in tuple(_KEPT):
    raise ValueError(f"remat={remat!r} is unknown; use one of {tuple(_KEPT)}.")
  if not isinstance(unroll, bool):
    raise ValueError(f"unroll={unroll!r}; use True or False.")


@functools.partial(jax.jit, static_argnums=(0, 1))
def hidden_states(config: RATPlusConfig, how: Forward, params: Params, batch: Batch) -> Stream:
  """The stream [B, T, E] of whole sequences after the last layer, before the final norm."""

  def layer(x: Stream, at: AtLayer) -> tuple[Stream, None]:
    origin = Origin(batch.row_ids, at.number)
    x, _, _ = block(config, at, x, batch, None, lambda heads: attend(heads, at.run, batch, origin), how.sources)
    return x, None

  runs = layer_runs(how.mode, config.num_layers, how.prefill_mode)
  x, _ = walk(params, runs, embed(params, batch.tokens), layer, unroll=how.unroll, remat=how.remat)
  return x


def attend(heads: Heads, run: Run, batch: Batch, origin: Origin) -> Array:
  """Attention of whole sequences in a layer of `run`: prompts in their form, later queries as steps of the mode.

  Without prompts every query is a step. [B, T, N, H] in q's type.
  """
  if batch.prompts is None or run.form == run.mode:
    return over_context.attend(run.mode, heads, Placement.of(batch), origin)
  first = batch.first_step
  prompt = over_context.attend(run.form, heads, Placement.of(batch), origin)
  steps = run.mode.attend_after_prompt(heads, batch, origin)
  in_prompt = batch.positions[:, first:] < batch.prompts[:, None]
  steps = jnp.where(in_prompt[:, :, None, None], prompt[:, first:], steps.astype(heads.q.dtype))
  return jnp.concatenate([prompt[:, :first], steps], axis=1)


@functools.partial(jax.jit, static_argnums=0)
def logits(config: RATPlusConfig, params: Params, x: Stream) -> Logits:
  """The logits of a stream [..., E]: final norm and head; float32 [..., V]."""
  return words(final(config, params["final_norm"], x), head(config, params))


def head(config: RATPlusConfig, params: Params) -> Array:
  """The matrix [V, E] from the stream to logits, in `config.dtype`."""
  matrix: Array = params["embedding" if config.tie_embeddings else "head"].astype(jnp.dtype(config.dtype))
  return matrix


def final(config: RATPlusConfig, norm: Array, x: Stream) -> Stream:
  """The stream after the final norm, in `config.dtype`."""
  return rms_norm(x, norm, config.norm_eps).astype(jnp.dtype(config.dtype))


def words(x: Stream, head: Array) -> Logits:
  """The logits float32 [..., V] of a stream after the final norm."""
  return einsum_float32("...e,ve->...v", x, head)
