"""Dilated attention as a Pallas kernel for Hopper GPUs (Mosaic GPU): queries and keys are read where they lie.

The queries of one head and one position mod D, 128 of them, are a tile; two warpgroups take 64 each, a third fetches.
Their softmax starts with their own keys, a sum for each, goes over the sinks, and then over tiles of 128 strided keys,
which to these queries are plain causal attention (see folded.py). A copy takes the rows of a tile at a distance of D
tokens, so nothing is folded beforehand. The warpgroups take turns: one multiplies while the other weighs. A block takes
tile after tile of queries, so that the next ones come in while it computes.

For a window of 0; a longer one is a part of its own (folded.py).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import MULTIPROCESSORS
from pallas_kernels.softmax import NOTHING

Array = jax.Array
ROWS, KEYS, GROUPS, STAGES = 64, 128, 2, 2  # queries of a warpgroup, keys of a tile, warpgroups, tiles in flight
TILE = GROUPS * ROWS  # queries of a block at a time
_LOG2_E = math.log2(math.e)  # scores are in base 2, which is what the hardware has


@dataclasses.dataclass(frozen=True)
class Cut:
  """One call."""

  batch: int
  length: int
  heads: int
  kv_heads: int
  width: int
  dilation: int
  window: int
  sinks: int
  blocks: int

  @property
  def steps(self) -> int:  # queries of one residue
    return self.length // self.dilation

  @property
  def first(self) -> int:  # the first strided key that is no sink
    return self.sinks // self.dilation

  @property
  def own(self) -> int:  # tiles of own keys
    return int(self.window == 0)

  @property
  def sink_rows(self) -> int:  # a product takes 64 at a time
    return -(-self.sinks // 64) * 64

  @property
  def besides(self) -> int:  # tiles before the strided ones
    return self.own + int(self.sinks > 0)

  @property
  def query_tiles(self) -> int:
    return self.batch * self.heads * self.length // TILE


class _Work(NamedTuple):
  """A tile of queries: numbers `start` on of those of a row, head and residue. All int32 []."""

  batch: Array
  head: Array
  kv_head: Array
  residue: Array
  start: Array
  shift: Array  # query number m sees the strided keys up to m + shift - 1
  key_tiles: Array  # tiles of strided keys

  @classmethod
  def of(cls, cut: Cut, tile: Array) -> _Work:
    rest, residue = _divide(tile, cut.dilation)  # neighbours share their keys
    rest, head = _divide(rest, cut.heads)
    rest, batch = _divide(rest, cut.batch)
    start = (cut.steps // TILE - 1 - rest) * TILE  # the longest first
    whole = -(-cut.window // cut.dilation)
    shift = lax.div(residue + (whole * cut.dilation - cut.window), jnp.int32(cut.dilation)) - whole
    last = jnp.maximum(start + (TILE - 1) + shift, 0)
    return cls(batch, head, lax.div(head, jnp.int32(cut.heads // cut.kv_heads)), residue, start, shift,
               lax.div(last + (KEYS - 1), jnp.int32(KEYS)))


def unsupported(q: Array, k: Array, dilation: int | None, sinks: int) -> str | None:
  """Why the kernel does not serve these arrays, or None."""
  if q.dtype != jnp.bfloat16 or k.dtype != q.dtype:
    return f"takes bfloat16, q is {q.dtype} and k {k.dtype}"
  if q.shape[-1] not in (64, 128):
    return f"takes heads of 64 or 128, these are {q.shape[-1]}"
  if dilation is None or q.shape[1] % (dilation * TILE):
    return f"takes lengths that are multiples of {TILE} times the dilation, not T={q.shape[1]} at D={dilation}"
  if sinks > KEYS:
    return f"takes up to {KEYS} sinks, not {sinks}"
  return None


# A jit of its own: the kernel is lowered once for all layers of a program.
@functools.partial(jax.jit, static_argnames=("dilation", "window", "sinks", "blocks", "interpret"))
def forward(q: Array, k: Array, v: Array, dilation: int, window: int, sinks: int, blocks: int = MULTIPROCESSORS,
            interpret: Any = None) -> tuple[Array, Array]:
  """Attention of q [B, T, N, H] to strided keys and sinks beyond the window and, where that is 0, to the own keys.

  Returns the output in q's type and its log-sum-exp, float32 [B, T, N].
  """
  b, t, n, h = q.shape
  cut = Cut(b, t, n, k.shape[2], h, dilation, window, sinks, min(blocks, b * n * t // TILE))
  by_residue = lambda x: x.reshape(b, cut.steps, dilation, *x.shape[2:])
  out, lse = _kernel(cut, interpret)(by_residue(q), by_residue(k), by_residue(v), k, v)
  return out.reshape(q.shape), lse.transpose(0, 3, 2, 1).reshape(b, t, n)


def _kernel(cut: Cut, interpret: Any):
  tiles = plgpu.SMEM((STAGES, KEYS, cut.width), jnp.bfloat16)
  of_all = functools.partial(plgpu.Barrier, num_arrivals=GROUPS)
  return plgpu.kernel(
      functools.partial(_block, cut, interpret is None),
      out_type=(jax.ShapeDtypeStruct((cut.batch, cut.steps, cut.dilation, cut.heads, cut.width), jnp.bfloat16),
                jax.ShapeDtypeStruct((cut.batch, cut.heads, cut.dilation, cut.steps), jnp.float32)),
      scratch_types=dict(
          q_tiles=plgpu.SMEM((2, GROUPS, ROWS, cut.width), jnp.bfloat16), k_tiles=tiles, v_tiles=tiles,
          lse_tile=plgpu.SMEM((GROUPS, ROWS), jnp.float32), q_copied=of_all(num_barriers=2),
          k_copied=plgpu.Barrier(num_barriers=STAGES), v_copied=plgpu.Barrier(num_barriers=STAGES),
          q_read=of_all(num_barriers=2), k_read=of_all(num_barriers=STAGES), v_read=of_all(num_barriers=STAGES),
          turn=of_all()),
      grid=(cut.blocks,), grid_names=("block",), num_threads=GROUPS + 1, thread_name="group",
      compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
      interpret=interpret)


def _block(cut: Cut, on_device: bool, q_ref, k_ref, v_ref, k_tokens, v_tokens, out_ref, lse_ref, **scratch):
  """What one block does: every `cut.blocks`-th tile of queries."""
  block, group = lax.axis_index("block"), lax.axis_index("group")
  count = lax.div(cut.query_tiles - block + (cut.blocks - 1), jnp.int32(cut.blocks))
  work = lambda nth: _Work.of(cut, block + nth * cut.blocks)

  @pl.when(group == GROUPS)
  def _():
    plgpu.set_max_registers(40, action="decrease")
    _fetch(cut, count, work, q_ref, (k_ref, v_ref), (k_tokens, v_tokens), **scratch)

  @pl.when(group < GROUPS)
  def _():
    plgpu.set_max_registers(232, action="increase")
    _compute(cut, on_device, group, count, work, out_ref, lse_ref, **scratch)


def _fetch(cut: Cut, count, work, q_ref, kv_refs, token_refs, *, q_tiles, k_tiles, v_tiles, q_copied, k_copied,
           v_copied, q_read, k_read, v_read, **_):
  """Copies tiles of queries, of their own keys, of sinks and of strided keys, each when its place is free."""

  def wait(read, i, places):  # for the last use of tile i's place
    pl.when(i >= places)(functools.partial(plgpu.barrier_wait, read.at[_place(i, places)]))

  def copy(i, refs, rows, length=KEYS):
    place = _place(i, STAGES)
    for ref, tiles, copied, read in zip(refs, (k_tiles, v_tiles), (k_copied, v_copied), (k_read, v_read), strict=True):
      wait(read, i, STAGES)
      plgpu.copy_gmem_to_smem(ref.at[rows], tiles.at[place, pl.ds(0, length)], copied.at[place])

  def tile(nth, i):
    at, place = work(nth), _place(nth, 2)
    wait(q_read, nth, 2)
    for group in range(GROUPS):
      rows = q_ref.at[at.batch, pl.ds(at.start + group * ROWS, ROWS), at.residue, at.head]
      plgpu.copy_gmem_to_smem(rows, q_tiles.at[place, group], q_copied.at[place])
    if cut.own:
      copy(i, kv_refs, (at.batch, pl.ds(at.start, KEYS), at.residue, at.kv_head))
    if cut.sinks:
      copy(i + cut.own, token_refs, (at.batch, pl.ds(0, cut.sink_rows), at.kv_head), cut.sink_rows)

    @pl.loop(0, at.key_tiles)
    def _(j):
      rows = (at.batch, pl.ds(j * KEYS, KEYS), cut.dilation - 1, at.kv_head)
      copy(i + cut.besides + j, kv_refs, rows)

    return i + cut.besides + at.key_tiles

  total = lax.fori_loop(0, count, tile, jnp.int32(0))
  # Whoever waits on a barrier must see all of its phases.
  for read, used, places in ((q_read, count, 2), (k_read, total, STAGES), (v_read, total, STAGES)):
    for back in range(places):
      wait(read, used + back, places)


def _compute(cut: Cut, on_device: bool, group, count, work, out_ref, lse_ref, *, q_tiles, k_tiles, v_tiles, lse_tile,
             q_copied, k_copied, v_copied, q_read, k_read, v_read, turn):
  """One warpgroup's half of every tile of queries."""
  cast = plgpu.layout_cast if on_device else lambda x, _: x  # the interpreter of jax 0.10 does not know layouts
  product, add_product = (_product, _add_product) if on_device else (_plain_product, _plain_add_product)
  per_row = plgpu.Layout.WGMMA.reduce(1)
  iota = lambda keys, axis: cast(lax.broadcasted_iota(jnp.int32, (ROWS, keys), axis), plgpu.Layout.WGMMA)
  wide = lambda x: cast(x, plgpu.Layout.WGMMA).astype(jnp.float32)

  def take_turn():
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(turn)

  def start_with_own(queries, i):
    place, mine = _place(i, STAGES), pl.ds(group * ROWS, ROWS)
    plgpu.barrier_wait(k_copied.at[place])
    top = jnp.sum(wide(queries[...]) * wide(k_tiles[place, mine]), axis=1) * (cut.width**-0.5 * _LOG2_E)
    plgpu.barrier_arrive(k_read.at[place])
    plgpu.barrier_wait(v_copied.at[place])
    out = wide(v_tiles[place, mine])
    plgpu.barrier_arrive(v_read.at[place])
    return out, top, cast(jnp.full((ROWS,), 1.0, jnp.float32), per_row)

  def start_with_nothing():
    return (cast(jnp.full((ROWS, cut.width), 0.0, jnp.float32), plgpu.Layout.WGMMA),
            *(cast(jnp.full((ROWS,), value, jnp.float32), per_row) for value in (NOTHING, 0.0)))

  def add_sinks(queries, i, before, state):  # `before`: tokens before the window, of each row
    place, sink, rows = _place(i, STAGES), iota(cut.sink_rows, 1), pl.ds(0, cut.sink_rows)
    plgpu.barrier_wait(k_copied.at[place])
    scores = product(queries, k_tiles.at[place, rows])
    plgpu.barrier_arrive(k_read.at[place])
    (out, *rest), weights = _weigh(cut, scores, (sink < cut.sinks) & (sink < before), state)
    plgpu.barrier_wait(v_copied.at[place])
    out = add_product(out, weights, v_tiles.at[place, rows])
    plgpu.barrier_arrive(v_read.at[place])
    return out, *rest

  def add_keys(queries, i, state, seen=None):
    place = _place(i, STAGES)
    plgpu.barrier_wait(k_copied.at[place])
    scores = product(queries, k_tiles.at[place], take_turn)
    plgpu.barrier_arrive(k_read.at[place])
    state = _weigh(cut, scores, seen, state)
    (out, *rest), weights = lax.optimization_barrier(state)
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(v_copied.at[place])
    plgpu.barrier_wait(turn)
    out = add_product(out, weights, v_tiles.at[place])
    plgpu.barrier_arrive(v_read.at[place])
    return out, *rest

  def tile(nth, i):
    at, place = work(nth), _place(nth, 2)
    mine, queries = at.start + group * ROWS, q_tiles.at[place, group]
    plgpu.barrier_wait(q_copied.at[place])
    state = start_with_own(queries, i) if cut.own else start_with_nothing()
    if cut.sinks:
      before = (mine + iota(cut.sink_rows, 0)) * cut.dilation + at.residue - cut.window
      state = add_sinks(queries, i + cut.own, before, state)

    def inner(j, state):
      return add_keys(queries, i + cut.besides + j, state)

    def edge(j, state):
      row, key = iota(KEYS, 0), j * KEYS + iota(KEYS, 1)
      return add_keys(queries, i + cut.besides + j, state, (key < mine + row + at.shift) & (key >= cut.first))

    pl.when(group == 1)(take_turn)  # the other multiplies first, and waits once more at the end
    start = jnp.minimum(1, at.key_tiles) if cut.first else 0  # the first tile holds sinks too
    whole = jnp.maximum(lax.div(jnp.maximum(at.start + at.shift, 0), jnp.int32(KEYS)), start)
    if cut.first:
      state = lax.fori_loop(0, start, edge, state)
    state = lax.fori_loop(start, whole, inner, state)
    out, top, total = lax.fori_loop(whole, at.key_tiles, edge, state)
    pl.when(group == 0)(functools.partial(plgpu.barrier_arrive, turn))
    nothing = total == 0
    total = jnp.where(nothing, 1.0, total)
    plgpu.wait_smem_to_gmem(0)
    lse_tile.at[group][...] = jnp.where(nothing, NOTHING, (top + jnp.log(total) * _LOG2_E) * math.log(2))
    queries[...] = (out / lax.broadcast_in_dim(total, out.shape, [0])).astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(queries, out_ref.at[at.batch, pl.ds(mine, ROWS), at.residue, at.head])
    plgpu.copy_smem_to_gmem(lse_tile.at[group], lse_ref.at[at.batch, at.head, at.residue, pl.ds(mine, ROWS)])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(q_read.at[place])
    pl.when(group == 0)(functools.partial(plgpu.barrier_wait, turn))
    return i + cut.besides + at.key_tiles

  lax.fori_loop(0, count, tile, jnp.int32(0))
  plgpu.wait_smem_to_gmem(0)


def _weigh(cut: Cut, scores: Array, seen: Array | None, state):
  """The state (output, maximum, sum) moved to the maximum with new scores, and their weights."""
  (out, top, total), scale = state, cut.width**-0.5 * _LOG2_E
  if seen is not None:
    scores = jnp.where(seen, scores, NOTHING)
  new_top = jnp.maximum(top, scores.max(axis=1) * scale)
  shrink = jnp.exp2(top - new_top)
  weights = jnp.exp2(scores * scale - lax.broadcast_in_dim(new_top, scores.shape, [0]))
  if seen is not None:
    weights = jnp.where(seen, weights, 0.0)
  total = total * shrink + weights.sum(axis=1)
  return (out * lax.broadcast_in_dim(shrink, out.shape, [0]), new_top, total), weights.astype(jnp.bfloat16)


def _place(i: Array, places: int) -> Array:
  return lax.rem(i, jnp.int32(places))


def _divide(x: Array, by: int) -> tuple[Array, Array]:
  return lax.div(x, jnp.int32(by)), lax.rem(x, jnp.int32(by))


def _product(queries, keys, meanwhile=lambda: None) -> Array:
  """Queries [ROWS, H] times keys [X, H], both in shared memory: float32 [ROWS, X]."""

  def multiply(sum_ref):
    plgpu.wgmma(sum_ref, queries, keys.transpose((1, 0)))
    meanwhile()
    return sum_ref[...]

  return pl.run_scoped(multiply, plgpu.ACC((queries.shape[0], keys.shape[0]), jnp.float32))


def _add_product(out: Array, weights: Array, values) -> Array:
  """out [ROWS, H] + weights [ROWS, X] times values [X, H] in shared memory."""
  return pl.run_state(lambda sum_ref: plgpu.wgmma(sum_ref, weights, values))(plgpu.ACC.init(out))


def _plain_product(queries, keys, meanwhile=lambda: None) -> Array:
  meanwhile()
  return lax.dot_general(queries[...], keys[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _plain_add_product(out: Array, weights: Array, values) -> Array:
  return out + jnp.dot(weights, values[...], preferred_element_type=jnp.float32)
