"""The operations that `bench_ops` times: their shapes, floors, inputs, implementations, and what they must give."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import pallas_kernels
import rat_jax
from experiments.bench import times
from experiments.bench.times import Speeds, Work
from experiments.bench.torch_reference import ROPE_BASE
from pallas_kernels.attention import reference as attention_reference, softmax
from pallas_kernels.decode import arg_specs as decode_specs
from pallas_kernels.dilated import arg_specs as dilated_specs
from pallas_kernels.pattern import Pattern
from pallas_kernels.scan import arg_specs as scan_specs, reference as scan_reference
from pallas_kernels.sparse import arg_specs as sparse_specs, reference as sparse_reference
from rat_jax import rope
from rat_jax.attention.terms import Heads, Held, Origin
from rat_jax.modes import Quest
from rat_jax.selection.summary import Summaries

FLASH = "flash"  # dense attention by jax's kernel for TPUs
CHECKED = 64  # queries, or rows, whose result is compared with the reference


class Size(NamedTuple):
  """What all cases of a run have alike."""

  n: int   # query heads
  kv: int  # key/value heads
  h: int   # the width of one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(times.Settings):
  """Of a command that times operations."""

  heads: int
  kv_heads: int | None
  head_dim: int

  @property
  def size(self) -> Size:
    return Size(self.heads, self.kv_heads or self.heads, self.head_dim)


def define_flags() -> None:
  times.define_flags()
  flags.DEFINE_integer("heads", 32, "Query heads N.", lower_bound=1)
  flags.DEFINE_integer("kv_heads", None, "Key/value heads K. Default: as many.", lower_bound=1)
  flags.DEFINE_integer("head_dim", 128, "Head width H.", lower_bound=1)


@dataclasses.dataclass(frozen=True)
class Case:
  """One operation at one shape."""

  op: str
  length: int
  batch: int = 1
  dilation: int = 1  # 1 is dense
  window: int = 0
  sinks: int = 0
  block: int = 0  # of a decode step by Quest over a full cache, or of sparse attention, at a budget of 1/16
  gradient: bool = False  # with that of a random cotangent, by all inputs

  @property
  def is_dense(self) -> bool:
    return self.op != "scan" and self.dilation == 1 and not self.block

  @property
  def mode(self) -> Quest:
    return Quest(1 / 16, self.block, keep_first=False)

  @property
  def rows(self) -> int:
    """Cache rows that a decode step reads."""
    if self.block:
      return self.length // 16
    return self.length if self.dilation == 1 else self.sinks + self.window + 1 + self.length // self.dilation

  @classmethod
  def of(cls, spec: scan_specs.ArgSpec | dilated_specs.ArgSpec | decode_specs.ArgSpec | sparse_specs.ArgSpec) -> Case:
    """The case of an operation's arguments, but for their heads, which are the run's."""
    if isinstance(spec, sparse_specs.ArgSpec):
      return cls("sparse", spec.length, spec.batch, block=spec.block)
    if isinstance(spec, scan_specs.ArgSpec):
      return cls("scan", spec.length, spec.batch)
    if isinstance(spec, dilated_specs.ArgSpec):
      return cls("prefill", spec.length, spec.batch, spec.pattern.dilation or 1, spec.pattern.window,
                 spec.pattern.sinks)
    if spec.block:
      return cls("decode", spec.rows, spec.batch, block=spec.block)
    return cls("decode", (spec.rows - 1) * spec.dilation, spec.batch, spec.dilation)

  def __str__(self) -> str:
    pattern = f", D={self.dilation}, W={self.window}, S={self.sinks}" if self.op != "scan" else ""
    if self.block and self.op == "sparse":
      pattern = f", 1/16 in blocks of {self.block}"
    elif self.block:
      pattern = f", Quest 1/16, blocks of {self.block}"
    return f"{self.op}{' and gradient' * self.gradient} T={self.length}, B={self.batch}{pattern}"


def standard(op: str, gradient: bool) -> list[Case]:
  """The cases of the operations' arg_specs that are timed, dense attention before the first of its length and batch."""
  specs = {"scan": scan_specs, "prefill": dilated_specs, "decode": decode_specs, "sparse": sparse_specs}[op]
  names = specs.TIMED_GRADIENTS if gradient else specs.TIMED
  found: list[Case] = []
  for case in (Case.of(specs.ARG_SPECS[name]) for name in names):
    dense = Case(op, case.length, case.batch)
    found += [case] if op == "scan" or dense in found else [dense, case]
  return found


def keys_of_pattern(pattern: Pattern, length: int) -> int:
  """How many keys all queries of a row read under a pattern."""
  d, window, sinks = pattern
  reach = np.arange(1, length + 1)
  if d == 1:
    return int(reach.sum())
  counts = np.minimum(window + 1 + sinks, reach)
  if d:
    counts = counts + np.maximum(np.maximum(reach - 1 - window, 0) // d - np.minimum(sinks, reach) // d, 0)
  return int(counts.sum())


def keys_of_blocks(rows: int, block: int, length: int) -> int:
  """How many keys they read that choose so many rows of blocks: the own block up to the query, and whole ones."""
  reach = np.arange(1, length + 1)
  return int(np.minimum(reach, rows - block + (reach - 1) % block + 1).sum())


def work(case: Case, size: Size) -> Work:
  """Bytes and operations of a case: of the memory its inputs and outputs, of a decode step the rows that it reads.

  The bytes of a dilated prefill are its memory's: attention moves its own while it computes. A backward pass moves
  twice what the forward pass does, and attention's takes 2.5 times the products.
  """
  n, kv, h = size
  if case.op == "decode":
    summaries = case.length // case.block if case.block else 0  # two rows of a block, as keys and values of a token
    return Work(4 * case.batch * kv * (case.rows + summaries) * h, 4 * case.batch * n * case.rows * h)
  arrays, counts = (2 * (n + kv) if case.is_dense or case.block else 5 * kv), 0
  if case.op != "scan" and case.block:
    counts = keys_of_blocks(case.rows, case.block, case.length)
  elif case.op != "scan":
    counts = keys_of_pattern(Pattern(case.dilation, case.window, case.sinks), case.length)
  moved, computed = 2.0 * case.batch * case.length * arrays * h, 4.0 * case.batch * n * h * counts
  return Work(3 * moved, 3.5 * computed) if case.gradient else Work(moved, computed)


def floor(case: Case, size: Size, speeds: Speeds) -> float:
  """Seconds that bytes (at the speed of reads in decoding, else of copies) and operations take at least."""
  of = work(case, size)
  moved, computed = of.bytes / (speeds.reads if case.op == "decode" else speeds.copy), of.flops / speeds.product
  # A dilated prefill is the memory, which moves, and then attention, which computes.
  return moved + computed if case.op == "prefill" and not case.is_dense else max(moved, computed)


def heads_first(case: Case, implementation: str | None) -> bool:
  """Whether a cache is [B, K, R, H] and not [B, R, K, H]: every kernel gets the order of axes that it reads fastest."""
  return not case.is_dense or implementation == "mosaic_gpu"


def draw(case: Case, size: Size, seed: int, implementation: str | None = None) -> dict[str, Any]:
  """Fresh random inputs, bfloat16, for an implementation."""
  n, kv, h = size
  key = jax.random.fold_in(jax.random.key(seed), time.time_ns() % (1 << 31))

  def normal(i, *shape):
    return jax.random.normal(jax.random.fold_in(key, i), shape, jnp.bfloat16)

  if case.op == "decode":
    held = case.length if case.block else case.rows
    shape = (case.batch, kv, held, h) if heads_first(case, implementation) else (case.batch, held, kv, h)
    made = {"q": normal(0, case.batch, 1, n, h), "keys": normal(1, *shape), "values": normal(2, *shape)}
    if case.block:
      made["summaries"] = jax.jit(functools.partial(_summaries, case))(made["keys"])
    if not case.is_dense:
      new = (case.batch, 1, kv, h)
      state = tuple(normal(i, case.batch, kv, h).astype(jnp.float32) for i in (6, 7))
      made |= {"gate": normal(3, *new), "k": normal(4, *new), "v": normal(5, *new), "state": state}
    return made
  shape = (case.batch, case.length, kv, h)
  made = {"k": normal(1, *shape), "v": normal(2, *shape)}
  if case.block:
    made["blocks"], made["valid"] = _choose(case, n, key)
  elif not case.is_dense:
    made["gate"] = 2 * normal(3, *shape) + 2
  if case.op != "scan":
    made["q"] = normal(0, case.batch, case.length, n, h)
  if case.gradient:
    made["cotangent"] = normal(6, *made["q"].shape) if "q" in made else (normal(6, *shape), normal(7, *shape))
  return made


def _choose(case: Case, n: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(blocks, valid) of sparse attention: every query's own block, and others over all that it has before that."""
  count = case.rows // case.block
  own = (jnp.arange(case.length) // case.block)[None, :, None, None]
  nth = jnp.arange(count - 1) + jax.random.uniform(key, (case.batch, case.length, n, count - 1))
  others = jnp.floor(nth * own / max(count - 1, 1)).astype(jnp.int32)
  blocks = jnp.concatenate([others, jnp.broadcast_to(own, (*others.shape[:3], 1))], axis=3)
  return blocks, jnp.ones(blocks.shape, bool)


def build(case: Case, implementation: str) -> Callable[..., Any]:
  """The function of `draw`'s arrays that is timed; with gradients (values, gradients by name)."""
  dense: Any = _flash if (implementation or "").endswith(FLASH) else jax.nn.dot_product_attention

  def scan(gate, k, v):
    return pallas_kernels.gated_scan(gate, (k, v), implementation=implementation)[0]

  def decode(q, keys, values, gate=None, k=None, v=None, state=None, summaries=None):
    """Of a sparse case with the memory's step, RoPE, and the new token's own key."""
    if case.is_dense and not heads_first(case, implementation):
      return dense(q, keys, values, implementation=implementation)
    seen = jnp.ones((case.batch, case.rows), bool)
    if case.is_dense:
      out, _ = pallas_kernels.decode_attention(q[:, 0], keys, values, seen, implementation=implementation)
      return out[:, None].astype(q.dtype)
    (k, v), state = pallas_kernels.gated_scan(gate, (k, v), state)
    at = jnp.full((case.batch, 1), case.length - 1, jnp.int32)
    q, k = (rope.rotate(x, at, ROPE_BASE).astype(jnp.bfloat16) for x in (q, k))
    if case.block:
      rows = jnp.broadcast_to(jnp.arange(case.length), (case.batch, case.length))
      held = Held(keys[None], values[None], jnp.int32(0), rows, at[:, 0], case.length, summaries)
      with pallas_kernels.force(implementation):
        out = case.mode.attend_cached(Heads(q, k, v), held, at, Origin(at[:, 0], 0))
      return out.astype(q.dtype), state
    own = (k[:, 0], v[:, 0])
    out, _ = pallas_kernels.decode_attention(q[:, 0], keys, values, seen, own=own, implementation=implementation)
    return out[:, None].astype(q.dtype), state

  def prefill(q, k, v, gate=None):
    of_scan, of_attention = implementation.split(", ")
    at = jnp.arange(case.length, dtype=jnp.int32)[None]
    if case.dilation > 1:
      (k, v), _ = pallas_kernels.gated_scan(gate, (k, v), implementation=of_scan)
    q, k = (rope.rotate(x, at, ROPE_BASE).astype(jnp.bfloat16) for x in (q, k))
    if case.dilation == 1:
      return dense(q, k, v, is_causal=True, implementation=of_attention)
    return pallas_kernels.dilated_attention(q, k, v, dilation=case.dilation, window=case.window, sinks=case.sinks,
                                            implementation=of_attention)

  def sparse(q, k, v, blocks=None, valid=None):
    if case.is_dense:
      return dense(q, k, v, is_causal=True, implementation=implementation.split(", ")[-1])
    out, _ = pallas_kernels.sparse_attention(q, k, v, blocks, valid, block=case.block, implementation=implementation)
    return out.astype(q.dtype)

  functions: dict[str, Callable[..., Any]] = {"scan": scan, "decode": decode, "prefill": prefill, "sparse": sparse}
  return functools.partial(with_gradients, functions[case.op]) if case.gradient else functions[case.op]


def _flash(q, k, v, is_causal, implementation):
  """jax's own kernel for TPUs; grouped heads as copies."""
  from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

  del implementation
  k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
  out = flash_attention(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v)), causal=is_causal, sm_scale=q.shape[3]**-0.5)
  return jnp.swapaxes(out, 1, 2)


def with_gradients(f: Callable[..., Any], cotangent: Any, **made: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
  values, pull = jax.vjp(lambda made: f(**made), made)
  return values, pull(cotangent)[0]


def check(case: Case, size: Size, implementation: str, made: dict[str, Any], result: Any) -> float:
  """The largest error, as a share of the largest entry. Raises ValueError above that of bfloat16.

  Values are compared on some queries or rows, gradients on two key/value heads of all tokens.
  """
  if case.gradient:
    return _check_gradients(case, size.kv, made, result)
  if case.op == "scan":
    outs, pairs = result, []
    for first in {0, max(0, case.length - 4096)}:  # the beginning, and the end from the state before it
      some = slice(first, first + 4096)
      wide = {name: x[:, some].astype(jnp.float32) for name, x in made.items()}
      state = tuple((out[:, first - 1] if first else 0 * out[:, 0]).astype(jnp.float32) for out in outs)
      expected, _ = jax.jit(scan_reference.gated_scan)(wide["gate"], (wide["k"], wide["v"]), state, None)
      pairs += [(out[:, some], one) for out, one in zip(outs, expected, strict=True)]
  elif case.op == "decode":
    rows = CHECKED // 8 if case.block or case.is_dense else CHECKED  # of a full cache more take too much memory
    few, out = jax.tree.map(lambda x: x[:rows], made), result if case.is_dense else result[0]
    reference = functools.partial(_decode_reference, case, heads_first(case, implementation))
    pairs = [(out[:rows], jax.jit(reference)(**few))]
  else:
    at = jnp.sort(jax.random.choice(jax.random.key(1), case.length, (min(CHECKED, case.length),), replace=False))
    n, kv, few = size.n, size.kv, min(2, size.kv)  # key/value heads
    made = {name: x[:, :, :few if name in ("gate", "k", "v") else few * n // kv] for name, x in made.items()}
    pairs = [(result[:, at, :few * n // kv], jax.jit(functools.partial(_reference, case))(made, at))]
  return _worst(case, pairs, 2e-2)


def _worst(case: Case, pairs: Sequence[tuple[jax.Array, jax.Array]], bound: float) -> float:
  errors = []
  for ours, theirs in pairs:
    ours, theirs = jnp.asarray(ours, jnp.float32), jnp.asarray(theirs, jnp.float32)
    errors.append(float(jnp.max(jnp.abs(ours - theirs)) / jnp.max(jnp.abs(theirs))))
  worst = float(np.max(errors))  # unlike Python's max, NaN where one is
  if not worst < bound:
    raise ValueError(f"{case}: the result is off by {worst:.2g} of its largest entry; it is not timed.")
  return worst


def _check_gradients(case: Case, kv: int, made: dict[str, Any], result: Any) -> float:
  """`check` of values and gradients: heads do not see each other, so plain JAX, in float32, need do two of them."""

  def few(arrays):
    def first_and_last(x):  # [B, T, K or N, H]
      groups = x.reshape(*x.shape[:2], kv, -1, x.shape[3])[:, :, np.unique([0, kv - 1])]
      return groups.reshape(*x.shape[:2], -1, x.shape[3]).astype(jnp.float32)
    return jax.tree.map(first_and_last, arrays)

  with jax.default_matmul_precision("highest"):
    expected = jax.jit(lambda made: with_gradients(functools.partial(_whole_reference, case), **few(made)))(made)
  finite = jax.jit(lambda result: jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(result)]).all())(result)
  if not finite:
    raise ValueError(f"{case}: the result is not finite; it is not timed.")
  return _worst(case, list(zip(*map(jax.tree.leaves, (jax.jit(few)(result), expected)), strict=True)), 5e-2)


def _whole_reference(case: Case, k, v, gate=None, q=None) -> Any:
  """The scan, or the attention of all queries, by plain JAX in chunks, in the inputs' type."""
  if gate is not None:
    (k, v), _ = pallas_kernels.gated_scan(gate, (k, v), implementation="xla")
  if q is None:
    return k, v
  at = jnp.arange(case.length, dtype=jnp.int32)[None]
  q, k = rope.rotate(q, at, ROPE_BASE), rope.rotate(k, at, ROPE_BASE)
  return pallas_kernels.dilated_attention(q, k, v, dilation=case.dilation, window=case.window, sinks=case.sinks,
                                          implementation="xla")


def _summaries(case: Case, keys) -> Summaries:
  blocks = keys.reshape(*keys.shape[:2], -1, case.block, keys.shape[3])
  return blocks.min(axis=3), blocks.max(axis=3)


def _decode_reference(case: Case, by_head: bool, q, keys, values, gate=None, k=None, v=None, state=None,
                      summaries=None) -> jax.Array:
  """One softmax over the cache (`by_head`: [B, K, R, H]) and the new token, in float32."""
  seen = jnp.ones((1, 1, 1, 1), bool)
  if by_head and case.is_dense:
    keys, values = jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2)
  if not case.is_dense:
    (k, v), _ = scan_reference.gated_scan(gate, (k, v), state)
    at = jnp.full((q.shape[0], 1), case.length - 1, jnp.int32)
    q, k = (rope.rotate(x, at, ROPE_BASE).astype(jnp.bfloat16) for x in (q, k.astype(jnp.bfloat16)))
    if case.block:
      keys, values = keys[:, :, :-1], values[:, :, :-1]  # a full cache has a row for the new token
    keys, values = (jnp.concatenate([jnp.swapaxes(old, 1, 2), new.astype(jnp.bfloat16)], axis=1)
                    for old, new in ((keys, k), (values, v)))
  if case.block:
    chosen = rat_jax.select(q, keys, case.mode)
    return pallas_kernels.sparse_attention(q, keys, values, chosen.blocks, chosen.valid, block=case.block,
                                           implementation="xla")[0]
  return softmax.attend_part(q, keys, values, seen)[0]


def _reference(case: Case, made: dict[str, jax.Array], at: jax.Array) -> jax.Array:
  """Attention of the queries `at` alone, over the memory by its plain form."""
  k, v, positions = made["k"], made["v"], jnp.arange(case.length, dtype=jnp.int32)
  if case.op == "sparse":
    q, at = made["q"][:, at], jnp.broadcast_to(at, (case.batch, at.size))
    if case.is_dense:
      return attention_reference.attend(q, k, v, (positions <= at[..., None])[:, None])[0]
    return sparse_reference.sparse_attention(q, k, v, *(jnp.take_along_axis(
        made[name], at[:, :, None, None], axis=1) for name in ("blocks", "valid")), block=case.block, q_positions=at)[0]
  if case.dilation > 1:
    (k, v), _ = pallas_kernels.gated_scan(made["gate"], (k, v), implementation="xla")
  q = rope.rotate(made["q"][:, at], at[None], ROPE_BASE).astype(jnp.bfloat16)
  k = rope.rotate(k, positions[None], ROPE_BASE).astype(jnp.bfloat16)
  seen = positions <= at[:, None]
  if case.dilation > 1:
    seen &= Pattern(case.dilation, case.window, case.sinks).sees(at[:, None], positions)
  return softmax.attend_part(q, k, v, seen[None, None])[0]
