"""Dilated attention as a Pallas kernel for Hopper GPUs (Mosaic GPU): queries and keys are read where they lie.

A tile is 128 queries of one head, side by side; two warpgroups take 64 each, a third fetches. Their softmax starts with
their own keys, a sum for each, or goes over the tiles that the window reaches; it goes on over the sinks, and then over
tiles of 128 strided keys before the window, of which queries side by side see nearly as many. The warpgroups take
turns: one multiplies while the other weighs. A block takes tile after tile of queries, so that the next ones come in
while it computes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.softmax import NOTHING
from pallas_kernels.devices import MULTIPROCESSORS
from pallas_kernels.pattern import Pattern

Array = jax.Array
Ref = Any
State = tuple[Array, Array, Array]  # of a warpgroup's queries: output [ROWS, H], maximum [ROWS], sum [ROWS]
ROWS, KEYS, GROUPS, STAGES = 64, 128, 2, 2  # queries of a warpgroup, keys of a tile, warpgroups, tiles in flight
TILE = GROUPS * ROWS  # queries of a block at a time
_LOG2_E = math.log2(math.e)  # scores are in base 2, which is what the hardware has


@dataclasses.dataclass(frozen=True)
class Cut:
  """One call; `length` is a multiple of TILE."""

  batch: int
  length: int
  heads: int
  kv_heads: int
  width: int
  pattern: Pattern
  blocks: int

  @property
  def dilation(self) -> int:
    return self.pattern.dilation or 1

  @property
  def first(self) -> int:  # the first strided key that is no sink
    return self.pattern.sinks // self.dilation

  @property
  def own(self) -> int:  # tiles of own keys
    return int(self.pattern.window == 0)

  @property
  def sink_rows(self) -> int:  # a product takes 64 at a time
    return -(-self.pattern.sinks // 64) * 64

  @property
  def besides(self) -> int:  # tiles of own keys and sinks
    return self.own + int(self.pattern.sinks > 0)

  def strided(self, t: Array) -> Array:
    """How many strided keys query t sees before its window, those that are sinks counted."""
    return lax.div(jnp.maximum(t - self.pattern.window, 0), jnp.int32(self.dilation))

  @property
  def query_tiles(self) -> int:
    return self.batch * self.heads * self.length // TILE


class _Work(NamedTuple):
  """A tile of queries of a row and head. All int32 []."""

  batch: Array
  head: Array
  kv_head: Array
  start: Array  # its first query
  near: Array  # the first tile of keys that the window reaches
  near_tiles: Array  # from there to the queries themselves; none without a window
  far_tiles: Array  # tiles of strided keys

  @classmethod
  def of(cls, cut: Cut, tile: Array) -> _Work:
    rest, nth = _divide(tile, cut.length // TILE)  # neighbours share their keys
    batch, head = _divide(rest, cut.heads)
    start = cut.length - (nth + 1) * TILE  # the longest first
    near, far = lax.div(jnp.maximum(start - cut.pattern.window, 0), jnp.int32(KEYS)), jnp.int32(0)
    if cut.pattern.dilation:
      far = lax.div(cut.strided(start + (TILE - 1)) + (KEYS - 1), jnp.int32(KEYS))
    return cls(batch, head, lax.div(head, jnp.int32(cut.heads // cut.kv_heads)), start, near,
               jnp.int32(0) if cut.own else lax.div(start, jnp.int32(KEYS)) + 1 - near, far)


def unsupported(q: Array, k: Array, sinks: int) -> str | None:
  """Why the kernel does not serve these arrays, or None."""
  if q.dtype != jnp.bfloat16 or k.dtype != q.dtype:
    return f"takes bfloat16, q is {q.dtype} and k {k.dtype}"
  if q.shape[-1] not in (64, 128):
    return f"takes heads of 64 or 128, these are {q.shape[-1]}"
  if sinks > KEYS:
    return f"takes up to {KEYS} sinks, not {sinks}"
  return None


# A jit of its own: the kernel is lowered once for all layers of a program.
@functools.partial(jax.jit, static_argnames=("pattern", "blocks", "interpret"))
def forward(q: Array, k: Array, v: Array, pattern: Pattern, blocks: int = MULTIPROCESSORS, interpret: Any = None
            ) -> tuple[Array, Array]:
  """(output [B, T, N, H], log-sum-exp float32 [B, T, N]) under the pattern, of what is not `unsupported`.

  Args:
    blocks: how many are started; one for each multiprocessor.
    interpret: parameters of Pallas' GPU interpreter, to run without a GPU.
  """
  length = q.shape[1]
  if pattern.offset >= length:  # no query is so late that it sees a strided key beyond window and sinks
    pattern = pattern._replace(dilation=None)
  q, k, v = (_fill(x, TILE) for x in (q, k, v))
  b, t, n, h = q.shape
  cut = Cut(b, t, n, k.shape[2], h, pattern, min(blocks, b * n * t // TILE))
  out, lse = _kernel(cut, interpret)(q, k, v, *(_strided(x, pattern.dilation) for x in (k, v)))
  return out[:, :length], jnp.swapaxes(lse, 1, 2)[:, :length]


def _strided(x: Array, dilation: int | None) -> Array:
  """[B, M, R, K, H], of which the last of the R are strided keys or values: where they lie, if they fill tiles."""
  if dilation is None:
    return x[:, :, None]
  if x.shape[1] % (KEYS * dilation) == 0:
    return x.reshape(x.shape[0], -1, dilation, *x.shape[2:])
  return _fill(x[:, dilation - 1::dilation], KEYS)[:, :, None]


def _fill(x: Array, multiple: int) -> Array:
  """[B, T, ...] with zeros after the last token, up to a multiple."""
  return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, 0), (0, 0)))


def _kernel(cut: Cut, interpret: Any) -> Callable[..., tuple[Array, Array]]:
  tiles = plgpu.SMEM((STAGES, KEYS, cut.width), jnp.bfloat16)
  of_all = functools.partial(plgpu.Barrier, num_arrivals=GROUPS)
  kernel: Callable[..., tuple[Array, Array]] = plgpu.kernel(
      functools.partial(_block, cut, interpret is None),
      out_type=(jax.ShapeDtypeStruct((cut.batch, cut.length, cut.heads, cut.width), jnp.bfloat16),
                jax.ShapeDtypeStruct((cut.batch, cut.heads, cut.length), jnp.float32)),
      scratch_types=dict(
          q_tiles=plgpu.SMEM((2, GROUPS, ROWS, cut.width), jnp.bfloat16), k_tiles=tiles, v_tiles=tiles,
          lse_tile=plgpu.SMEM((GROUPS, ROWS), jnp.float32), q_copied=of_all(num_barriers=2),
          k_copied=plgpu.Barrier(num_barriers=STAGES), v_copied=plgpu.Barrier(num_barriers=STAGES),
          q_read=of_all(num_barriers=2), k_read=of_all(num_barriers=STAGES), v_read=of_all(num_barriers=STAGES),
          turn=of_all()),
      grid=(cut.blocks,), grid_names=("block",), num_threads=GROUPS + 1, thread_name="group",
      compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
      interpret=interpret)
  return kernel


def _block(cut: Cut, on_device: bool, q_ref: Ref, k_ref: Ref, v_ref: Ref, k_strided: Ref, v_strided: Ref, out_ref: Ref,
           lse_ref: Ref, **scratch: Ref) -> None:
  """What one block does: every `cut.blocks`-th tile of queries."""
  block, group = lax.axis_index("block"), lax.axis_index("group")
  count = lax.div(cut.query_tiles - block + (cut.blocks - 1), jnp.int32(cut.blocks))
  work: Callable[[Array], _Work] = lambda nth: _Work.of(cut, block + nth * cut.blocks)

  @pl.when(group == GROUPS)
  def _() -> None:
    plgpu.set_max_registers(40, action="decrease")
    _fetch(cut, count, work, q_ref, (k_ref, v_ref), (k_strided, v_strided), **scratch)

  @pl.when(group < GROUPS)
  def _() -> None:
    plgpu.set_max_registers(232, action="increase")
    _compute(cut, on_device, group, count, work, out_ref, lse_ref, **scratch)


def _fetch(cut: Cut, count: Array, work: Callable[[Array], _Work], q_ref: Ref, kv_refs: tuple[Ref, Ref],
           strided_refs: tuple[Ref, Ref], *, q_tiles: Ref, k_tiles: Ref, v_tiles: Ref, q_copied: Ref, k_copied: Ref,
           v_copied: Ref, q_read: Ref, k_read: Ref, v_read: Ref, **_: Ref) -> None:
  """Copies tiles of queries, of their own or near keys, of sinks and of strided keys, each when its place is free."""

  def wait(read: Ref, i: Array, places: int) -> None:  # for the last use of tile i's place
    pl.when(i >= places)(functools.partial(plgpu.barrier_wait, read.at[_place(i, places)]))

  def copy(i: Array, refs: tuple[Ref, Ref], rows: tuple[Any, ...], length: int = KEYS) -> None:
    place = _place(i, STAGES)
    for ref, tiles, copied, read in zip(refs, (k_tiles, v_tiles), (k_copied, v_copied), (k_read, v_read), strict=True):
      wait(read, i, STAGES)
      plgpu.copy_gmem_to_smem(ref.at[rows], tiles.at[place, pl.ds(0, length)], copied.at[place])

  def tile(nth: Array, i: Array) -> Array:
    at, place = work(nth), _place(nth, 2)
    wait(q_read, nth, 2)
    for group in range(GROUPS):
      rows = q_ref.at[at.batch, pl.ds(at.start + group * ROWS, ROWS), at.head]
      plgpu.copy_gmem_to_smem(rows, q_tiles.at[place, group], q_copied.at[place])
    if cut.own:
      copy(i, kv_refs, (at.batch, pl.ds(at.start, KEYS), at.kv_head))
    if cut.pattern.sinks:
      copy(i + cut.own, kv_refs, (at.batch, pl.ds(0, cut.sink_rows), at.kv_head), cut.sink_rows)
    i += cut.besides

    def near(j: Array) -> None:
      copy(i + j, kv_refs, (at.batch, pl.ds((at.near + j) * KEYS, KEYS), at.kv_head))

    def far(j: Array) -> None:
      rows = (at.batch, pl.ds(j * KEYS, KEYS), strided_refs[0].shape[2] - 1, at.kv_head)
      copy(i + at.near_tiles + j, strided_refs, rows)

    pl.loop(0, at.near_tiles)(near)
    pl.loop(0, at.far_tiles)(far)
    return i + at.near_tiles + at.far_tiles

  total = lax.fori_loop(0, count, tile, jnp.int32(0))
  # Whoever waits on a barrier must see all of its phases.
  for read, used, places in ((q_read, count, 2), (k_read, total, STAGES), (v_read, total, STAGES)):
    for back in range(places):
      wait(read, used + back, places)


def _compute(cut: Cut, on_device: bool, group: Array, count: Array, work: Callable[[Array], _Work], out_ref: Ref,
             lse_ref: Ref, *, q_tiles: Ref, k_tiles: Ref, v_tiles: Ref, lse_tile: Ref, q_copied: Ref, k_copied: Ref,
             v_copied: Ref, q_read: Ref, k_read: Ref, v_read: Ref, turn: Ref) -> None:
  """One warpgroup's half of every tile of queries."""

  def cast(x: Array, layout: Any) -> Array:
    return plgpu.layout_cast(x, layout) if on_device else x  # the interpreter of jax 0.10 does not know layouts

  def iota(keys: int, axis: int) -> Array:
    return cast(lax.broadcasted_iota(jnp.int32, (ROWS, keys), axis), plgpu.Layout.WGMMA)

  def wide(x: Array) -> Array:
    return cast(x, plgpu.Layout.WGMMA).astype(jnp.float32)

  product, add_product = (_product, _add_product) if on_device else (_plain_product, _plain_add_product)
  per_row = plgpu.Layout.WGMMA.reduce(1)

  def take_turn() -> None:
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(turn)

  def start_with_own(queries: Ref, i: Array) -> State:
    place, mine = _place(i, STAGES), pl.ds(group * ROWS, ROWS)
    plgpu.barrier_wait(k_copied.at[place])
    plgpu.barrier_wait(v_copied.at[place])
    top = jnp.sum(wide(queries[...]) * wide(k_tiles[place, mine]), axis=1) * (cut.width**-0.5 * _LOG2_E)
    out = wide(v_tiles[place, mine])
    plgpu.commit_smem()  # barriers alone do not order plain reads before the next copy to their place
    plgpu.barrier_arrive(k_read.at[place])
    plgpu.barrier_arrive(v_read.at[place])
    return out, top, cast(jnp.full((ROWS,), 1.0, jnp.float32), per_row)

  def start_with_nothing() -> State:
    out = cast(jnp.full((ROWS, cut.width), 0.0, jnp.float32), plgpu.Layout.WGMMA)
    top, total = (cast(jnp.full((ROWS,), value, jnp.float32), per_row) for value in (NOTHING, 0.0))
    return out, top, total

  def add_keys(queries: Ref, i: Array, state: State, seen: Array | None = None, keys: int = KEYS) -> State:
    place, rows = _place(i, STAGES), pl.ds(0, keys)
    plgpu.barrier_wait(k_copied.at[place])
    scores = product(queries, k_tiles.at[place, rows], take_turn)
    plgpu.barrier_arrive(k_read.at[place])
    (out, top, total), weights = lax.optimization_barrier(_weigh(cut, scores, seen, state))
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(v_copied.at[place])
    plgpu.barrier_wait(turn)
    out = add_product(out, weights, v_tiles.at[place, rows])
    plgpu.barrier_arrive(v_read.at[place])
    return out, top, total

  def tile(nth: Array, i: Array) -> Array:
    at, place = work(nth), _place(nth, 2)
    mine, queries = at.start + group * ROWS, q_tiles.at[place, group]
    plgpu.barrier_wait(q_copied.at[place])
    state = start_with_own(queries, i) if cut.own else start_with_nothing()

    def over(first: Array | int, last: Array | int, i: Array, state: State, seen: Callable[[Array], Array] | None = None
             ) -> State:
      state = lax.fori_loop(first, last, lambda j, state: add_keys(queries, i + j, state, seen and seen(j)), state)
      return state

    def sink() -> Array:
      key = iota(cut.sink_rows, 1)
      return (key < cut.pattern.sinks) & (key < mine + iota(cut.sink_rows, 0) - cut.pattern.window)

    def near(j: Array) -> Array:
      before = mine + iota(KEYS, 0) - (at.near + j) * KEYS - iota(KEYS, 1)
      return (before >= 0) & (before <= cut.pattern.window)

    def far(j: Array) -> Array:
      key = j * KEYS + iota(KEYS, 1)
      token = key * cut.dilation + (cut.dilation - 1)
      return (token < mine + iota(KEYS, 0) - cut.pattern.window) & (key >= cut.first)

    pl.when(group == 1)(take_turn)  # the other multiplies first, and waits once more at the end
    if cut.pattern.sinks:
      state = add_keys(queries, i + cut.own, state, sink(), cut.sink_rows)
    i += cut.besides
    if not cut.own:
      # Between the tiles that the window begins in, for one of the queries, and their own.
      begins = jnp.maximum(at.start + (TILE - 1) - cut.pattern.window, 0)
      whole = jnp.minimum(lax.div(begins + (KEYS - 1), jnp.int32(KEYS)) - at.near, at.near_tiles)
      diagonal = jnp.maximum(at.near_tiles - 1, whole)
      state = over(0, whole, i, state, near)
      state = over(whole, diagonal, i, state)
      state = over(diagonal, at.near_tiles, i, state, near)
    i += at.near_tiles
    if cut.pattern.dilation:
      mixed = jnp.minimum(1, at.far_tiles) if cut.first else 0  # tiles that hold sinks too
      edge = jnp.maximum(lax.div(cut.strided(at.start), jnp.int32(KEYS)), mixed)
      if cut.first:
        state = over(0, mixed, i, state, far)
      state = over(mixed, edge, i, state)
      state = over(edge, at.far_tiles, i, state, far)
    out, top, total = state
    pl.when(group == 0)(functools.partial(plgpu.barrier_arrive, turn))
    plgpu.wait_smem_to_gmem(0)
    lse_tile.at[group][...] = (top + jnp.log(total) * _LOG2_E) * math.log(2)
    queries[...] = (out / lax.broadcast_in_dim(total, out.shape, [0])).astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(queries, out_ref.at[at.batch, pl.ds(mine, ROWS), at.head])
    plgpu.copy_smem_to_gmem(lse_tile.at[group], lse_ref.at[at.batch, at.head, pl.ds(mine, ROWS)])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(q_read.at[place])
    pl.when(group == 0)(functools.partial(plgpu.barrier_wait, turn))
    return i + at.far_tiles

  lax.fori_loop(0, count, tile, jnp.int32(0))
  plgpu.wait_smem_to_gmem(0)


def _weigh(cut: Cut, scores: Array, seen: Array | None, state: State) -> tuple[State, Array]:
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


def _product(queries: Ref, keys: Ref, meanwhile: Callable[[], None] = lambda: None) -> Array:
  """Queries [ROWS, H] times keys [X, H], both in shared memory: float32 [ROWS, X]."""

  def multiply(sum_ref: Ref) -> Array:
    plgpu.wgmma(sum_ref, queries, keys.transpose((1, 0)))
    meanwhile()
    products: Array = sum_ref[...]
    return products

  summed: Array = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((queries.shape[0], keys.shape[0]), jnp.float32))
  return summed


def _add_product(out: Array, weights: Array, values: Ref) -> Array:
  """out [ROWS, H] + weights [ROWS, X] times values [X, H] in shared memory."""
  add = pl.run_state(lambda sum_ref: plgpu.wgmma(sum_ref, weights, values))
  summed: Array = add(plgpu.WGMMAAccumulatorRef.init(out))
  return summed


# Stand-ins of wgmma for the interpreter. wgmma reads as asynchronous copies write; plain reads must be ordered before
# those by a fence.


def _plain_product(queries: Ref, keys: Ref, meanwhile: Callable[[], None] = lambda: None) -> Array:
  meanwhile()
  scores = lax.dot_general(queries[...], keys[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
  plgpu.commit_smem()
  return scores


def _plain_add_product(out: Array, weights: Array, values: Ref) -> Array:
  out += jnp.dot(weights, values[...], preferred_element_type=jnp.float32)
  plgpu.commit_smem()
  return out
