"""Decode attention as a Pallas kernel for Hopper GPUs (Mosaic GPU), made to read keys and values once, at copy speed.

A block of one warpgroup takes the query heads of one row that share a key/value head (up to four of them) and streams
the head's cache through shared memory, tile by tile, by asynchronous copies. A query alone is no work for tensor cores:
the products are multiplications and sums in float32 by the ordinary ones.

  * A cache row of a tile lies across 8, 16 or 32 lanes, 16 bytes each, so the warpgroup takes `step` rows at a time. A
    score is a sum over these lanes; nothing else crosses lanes or warps while tiles come in: each of the `step` places
    has a running maximum, sum and output of its own, over the rows that fell to it. They merge once, at the end.
  * The last tile is moved back so that it ends with the cache; rows that the tile before it has had are masked.
    Tiles after the last visible row are not read.
  * Of chosen blocks, a list says where tiles start: the blocks, or equal pieces of them.
  * Where B * K is too small to fill the device, the cache is split over several blocks, and their results are merged.

docs/kernels.md has the byte counts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.softmax import NOTHING, merge_parts
from pallas_kernels.decode.mosaic_gpu_shapes import SHARED_BYTES, Cut, Tuning

Array = jax.Array
Ref = Any
State = tuple[Array, Array, Array]  # of a query, in every place: output [step, H], maximum [step], sum [step]


# A jit of its own: the kernel is lowered once for all layers of a program.
@functools.partial(jax.jit, static_argnames=("tuning", "interpret"))
def decode_attention(q: Array, keys: Array, values: Array, visible: Array, layer: Array | int | None = None,
                     own: tuple[Array, Array] | None = None, blocks: Array | None = None, *,
                     tuning: Tuning | None = None, interpret: Any = None) -> tuple[Array, Array]:
  """As `api.decode_attention`, for what is not `mosaic_gpu.unsupported`.

  Args:
    tuning: how the work is cut; None takes the defaults.
    interpret: parameters of Pallas' GPU interpreter, to run without a GPU.

  Raises:
    ValueError: tiles of `tuning` that do not fit the shared memory of a block.
  """
  batch, kv_heads, rows, width = keys.shape[-4:]
  visible = visible[:, None] if visible.ndim == 2 else visible
  chosen = None if blocks is None else (blocks.shape[2], visible.shape[3])
  cut = Cut(batch, q.shape[1], kv_heads, rows, width, q.dtype, Tuning() if tuning is None else tuning,
            visible.shape[1], chosen)
  tiles = 2 * cut.stages * cut.tile * cut.row_bytes
  if tiles > SHARED_BYTES:
    raise ValueError(f"Tuning: stages={cut.stages} of {cut.tile} rows are {tiles} bytes of keys and values; use fewer,"
                     f" a block has {SHARED_BYTES}.")
  # The layers are rows of the batch to the kernel: it reads its own, where a slice would be a copy.
  keys, values = (x.reshape(-1, *x.shape[-3:]) for x in (keys, values))
  start = jnp.full(1, 0 if layer is None else layer, jnp.int32) * batch
  masks = tile_masks(cut, visible) if blocks is None else _tile_masks_of_blocks(cut, visible, blocks)
  out, lse = _kernel(cut, own is not None, interpret)(q, keys, values, start, *masks, *(own or ()))
  return merge_parts(list(zip(out, lse, strict=True))) if cut.splits > 1 else (out[0], lse[0])


def tile_masks(cut: Cut, visible: Array) -> tuple[Array, Array]:
  """Of visible [B, 1 or K, R]: each tile's rows as 0 and 1, int32 [B, 1 or K, tiles, flags], and the tiles to read.

  A row that stands in two tiles is set in the first. The second result, int32 [B, 1 or K], counts the tiles up to the
  last one with a visible row.
  """
  place = jnp.arange(cut.flags, dtype=jnp.int32)
  first = jnp.arange(cut.tiles, dtype=jnp.int32)[:, None] * cut.tile
  row = cut.starts()[:, None] + place
  new = (row >= first) & (place < cut.copied)
  seen = visible[:, :, jnp.minimum(row, cut.rows - 1)] & new
  last = jnp.max(jnp.where(visible, jnp.arange(cut.rows, dtype=jnp.int32), -1), axis=-1)
  return seen.astype(jnp.int32), last // cut.tile + 1


def _tile_masks_of_blocks(cut: Cut, visible: Array, blocks: Array) -> tuple[Array, Array, Array]:
  """`tile_masks` of the tiles of chosen blocks [B, M, n], visible [B, M, n, S]; and where they start [B, M, tiles]."""
  pieces = visible.shape[3] // cut.tile
  seen = visible.reshape(*blocks.shape[:2], cut.tiles, cut.tile)
  begin = blocks[..., None] * visible.shape[3] + jnp.arange(pieces, dtype=jnp.int32) * cut.tile
  begin = begin.reshape(*blocks.shape[:2], cut.tiles)
  start = jnp.clip(begin, 0, cut.rows - cut.copied)  # the cache may end within a block
  source = jnp.arange(cut.flags, dtype=jnp.int32) - (begin - start)[..., None]
  inside = (source >= 0) & (source < cut.tile) & (jnp.arange(cut.flags, dtype=jnp.int32) < cut.copied)
  seen = jnp.take_along_axis(seen, jnp.clip(source, 0, cut.tile - 1), axis=-1) & inside
  last = jnp.max(jnp.where(seen.any(axis=-1), jnp.arange(1, cut.tiles + 1, dtype=jnp.int32), 0), axis=-1)
  return seen.astype(jnp.int32), last, start


def _kernel(cut: Cut, own: bool, interpret: Any) -> Callable[..., tuple[Array, Array]]:
  """(q, keys, values, first row, masks, tiles to read[, their starts][, own key, own value])
  -> (out [splits, B, N, H], lse [splits, B, N]).

  Row b of the batch has its keys and values in row `first row` + b.
  """
  tile = plgpu.SMEM((cut.stages, cut.tile, cut.width), cut.dtype)
  kernel: Callable[..., tuple[Array, Array]] = plgpu.kernel(
      functools.partial(_block, cut, own, _Arrays.of(cut, interpret)),
      out_type=(jax.ShapeDtypeStruct((cut.splits, cut.batch, cut.heads, cut.width), jnp.float32),
                jax.ShapeDtypeStruct((cut.splits, cut.batch, cut.heads), jnp.float32)),
      scratch_types=dict(
          q_tile=plgpu.SMEM((cut.block_heads, cut.width), cut.dtype), k_tiles=tile, v_tiles=tile,
          mask_tiles=plgpu.SMEM((cut.stages, cut.flags), jnp.int32),
          partial=plgpu.SMEM((3 if cut.dtype == jnp.bfloat16 else 1, cut.step, cut.width), cut.dtype),
          own_tile=plgpu.SMEM((2, 1, cut.width), cut.dtype),
          q_copied=plgpu.Barrier(num_arrivals=3 if own else 1),
          k_copied=plgpu.Barrier(num_arrivals=2, num_barriers=cut.stages),
          v_copied=plgpu.Barrier(num_barriers=cut.stages)),
      grid=(cut.splits, cut.batch * cut.heads // cut.block_heads), grid_names=("split", "heads"),
      compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
      interpret=interpret)
  return kernel


@dataclasses.dataclass(frozen=True)
class _Arrays:
  """How the arrays of a block lie over its threads.

  Attributes:
    rows: [step, H], a row across `lanes` lanes. Reduced over H or over rows it gives [step] and [H].
    columns: [step, H], a column in one lane of every warp.
    layouts: False in interpret mode, which does not know them.
  """

  step: int
  width: int
  rows: Any
  columns: Any
  layouts: bool

  @classmethod
  def of(cls, cut: Cut, interpret: Any) -> _Arrays:
    vector = 16 // jnp.dtype(cut.dtype).itemsize
    across, rows_of_warp = cut.lanes * vector, 32 // cut.lanes
    # Tiles of tiles: warpgroup, warp, lane. A layout must leave out a level that changes nothing.
    if rows_of_warp == 1:
      rows = plgpu.Layout.TILED(plgpu.Tiling(((4, across), (vector,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
    else:
      rows = plgpu.Layout.TILED(plgpu.Tiling(((cut.step, across), (rows_of_warp, across), (vector,))),
                                warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
    piece = min(4, cut.width // 32)
    columns = plgpu.Layout.TILED(plgpu.Tiling(((1, 32 * piece), (piece,))), warp_dims=(plgpu.Replicated(4),),
                                 lane_dims=(-2,), vector_dim=-1)
    return cls(cut.step, cut.width, rows, columns, layouts=interpret is None)

  def as_rows(self, x: Array) -> Array:  # [step, H]
    return self._cast(x, self.rows)

  def per_row(self, x: Array) -> Array:  # [step]
    return self._cast(x, self.rows.reduce(1))

  def per_column(self, x: Array) -> Array:  # [H], as a row is
    return self._cast(x, self.rows.reduce(0))

  def as_columns(self, x: Array) -> Array:  # [step, H]
    return self._cast(x, self.columns)

  def spread(self, x: Array) -> Array:
    """Repeats x [step] along H: [step, H]."""
    return self.as_rows(lax.broadcast_in_dim(x, (self.step, self.width), (0,)))

  def stack(self, x: Array) -> Array:
    """Repeats x [H] along the rows of a step: [step, H]."""
    return self.as_rows(lax.broadcast_in_dim(x, (self.step, self.width), (1,)))

  def _cast(self, x: Array, layout: Any) -> Array:
    return plgpu.layout_cast(x, layout) if self.layouts else x


def _block(cut: Cut, own: bool, arrays: _Arrays, q_ref: Ref, k_ref: Ref, v_ref: Ref, start_ref: Ref, mask_ref: Ref,
           count_ref: Ref, *refs: Ref, q_tile: Ref, k_tiles: Ref, v_tiles: Ref, mask_tiles: Ref, own_tile: Ref,
           partial: Ref, q_copied: Ref, k_copied: Ref, v_copied: Ref) -> None:
  """What one block does: query heads `head` on, of row `row`, over the tiles of one split."""
  *own_refs, out_ref, lse_ref = refs
  tile_starts = own_refs.pop(0) if cut.chosen is not None else None
  split, heads = lax.axis_index("split"), lax.axis_index("heads")
  blocks = cut.heads // cut.block_heads
  row, head = lax.div(heads, jnp.int32(blocks)), lax.rem(heads, jnp.int32(blocks)) * cut.block_heads
  kv_head = lax.div(head, jnp.int32(cut.heads // cut.kv_heads))
  mask_head = lax.div(head, jnp.int32(cut.heads // cut.mask_heads))
  cache_row = start_ref[0] + row
  first = split * cut.tiles_per_split
  count = jnp.minimum(count_ref[row, mask_head] - first, cut.tiles_per_split)

  def place(t: Array) -> tuple[Array, slice | pl.Slice]:  # of tile t of this split: its slot, and its rows in the cache
    if tile_starts is None:
      start = jnp.minimum((first + t) * cut.tile, cut.rows - cut.copied)
    else:
      start = tile_starts[row, mask_head, first + t]
    return lax.rem(t, jnp.int32(cut.stages)), pl.ds(start, cut.copied)

  filled = pl.ds(0, cut.copied)

  def fetch_keys(t: Array) -> None:
    slot, rows = place(t)
    plgpu.copy_gmem_to_smem(k_ref.at[cache_row, kv_head, rows], k_tiles.at[slot, filled], k_copied.at[slot])
    plgpu.copy_gmem_to_smem(mask_ref.at[row, mask_head, first + t], mask_tiles.at[slot], k_copied.at[slot])

  def fetch_values(t: Array) -> None:
    slot, rows = place(t)
    plgpu.copy_gmem_to_smem(v_ref.at[cache_row, kv_head, rows], v_tiles.at[slot, filled], v_copied.at[slot])

  def refill(t: Array, fetch: Callable[[Array], None]) -> None:  # the slot of tile t, which all threads have read
    @pl.when(t + cut.stages < count)
    def _() -> None:
      plgpu.commit_smem()
      fetch(t + cut.stages)

  for t in range(cut.stages):
    for fetch in (fetch_keys, fetch_values):
      pl.when(t < count)(functools.partial(fetch, jnp.int32(t)))
  plgpu.copy_gmem_to_smem(q_ref.at[row, pl.ds(head, cut.block_heads)], q_tile, q_copied)
  for i, own_ref in enumerate(own_refs):
    plgpu.copy_gmem_to_smem(own_ref.at[row, pl.ds(kv_head, 1)], own_tile.at[i], q_copied)
  plgpu.barrier_wait(q_copied)
  # Scores are in base 2, which is what the hardware has.
  queries = [arrays.per_column(q_tile[i].astype(jnp.float32) * (cut.width**-0.5 * math.log2(math.e)))
             for i in range(cut.block_heads)]

  def body(t: Array, state: list[State]) -> list[State]:
    slot, _ = place(t)
    plgpu.barrier_wait(k_copied.at[slot])
    seen, scores = _score(cut, arrays, queries, k_tiles.at[slot], mask_tiles.at[slot])
    refill(t, fetch_keys)
    state, weights = _weigh(arrays, state, seen, scores)
    plgpu.barrier_wait(v_copied.at[slot])
    state = _add_values(arrays, state, seen, weights, v_tiles.at[slot])
    refill(t, fetch_values)
    return state

  def full(place: Callable[[Array], Array], shape: tuple[int, ...], value: Array | float) -> Array:
    return place(jnp.full(shape, value, jnp.float32))

  if own:
    # Each place starts with its share of the own key, all of it in the first split.
    share = jnp.where(split == 0, 1 / cut.step, 0.0)
    key, value = (arrays.stack(arrays.per_column(own_tile[i, 0].astype(jnp.float32))) for i in range(2))
    start = [(value * share, jnp.sum(arrays.stack(q) * key, axis=1), full(arrays.per_row, (cut.step,), share))
             for q in queries]
  else:
    start = [(full(arrays.as_rows, (cut.step, cut.width), 0), full(arrays.per_row, (cut.step,), NOTHING),
              full(arrays.per_row, (cut.step,), 0))] * cut.block_heads
  state = lax.fori_loop(0, count, body, start)
  for i, of_head in enumerate(state):
    _store(arrays, of_head, partial, out_ref.at[split, row, head + i], lse_ref.at[split, row, head + i])


def _score(cut: Cut, arrays: _Arrays, queries: list[Array], k_tile: Ref, mask_tile: Ref
           ) -> tuple[list[Array], list[tuple[Array, ...]]]:
  """Of a tile, in steps of rows: which are seen, bool [step] each, and every query's scores, float32 [step] each."""
  seen, scores = [], []
  for at in range(0, cut.tile, cut.step):
    rows = pl.ds(at, cut.step)
    seen.append(arrays.per_row(mask_tile[rows]) > 0)
    keys = arrays.as_rows(k_tile[rows].astype(jnp.float32))
    scores.append([jnp.where(seen[-1], jnp.sum(arrays.stack(q) * keys, axis=1), NOTHING) for q in queries])
  return seen, list(zip(*scores, strict=True))


def _weigh(arrays: _Arrays, state: list[State], seen: list[Array], scores: list[tuple[Array, ...]]
           ) -> tuple[list[State], list[list[Array]]]:
  """The state (output, maximum, sum) of every query, moved to the maximum with a tile's scores, and their weights."""
  moved, weights = [], []
  for (out, top, total), of_query in zip(state, scores, strict=True):
    new_top = functools.reduce(jnp.maximum, of_query, top)
    shrink = jnp.exp2(top - new_top)
    weights.append([jnp.where(s, jnp.exp2(x - new_top), 0.0) for s, x in zip(seen, of_query, strict=True)])
    total = functools.reduce(jnp.add, weights[-1], total * shrink)
    moved.append((out * arrays.spread(shrink), new_top, total))
  return moved, weights


def _add_values(arrays: _Arrays, state: list[State], seen: list[Array], weights: list[list[Array]], v_tile: Ref
                ) -> list[State]:
  """The state with a tile's values in the outputs."""
  outs = [out for out, _, _ in state]
  for i, is_seen in enumerate(seen):
    values = arrays.as_rows(v_tile[pl.ds(i * arrays.step, arrays.step)].astype(jnp.float32))
    # A weight of 0 is not enough: what is not visible may hold what is not finite.
    values = jnp.where(arrays.spread(is_seen), values, 0.0)
    outs = [out + arrays.spread(of_query[i]) * values for out, of_query in zip(outs, weights, strict=True)]
  return [(out, top, total) for out, (_, top, total) in zip(outs, state, strict=True)]


def _store(arrays: _Arrays, state: State, partial: Ref, out_ref: Ref, lse_ref: Ref) -> None:
  """Merges the places of a query's state and writes output and log-sum-exp."""
  out, tops, totals = state
  top = jnp.max(tops)
  weights = jnp.exp2(tops - top)
  total = jnp.sum(totals * weights)
  empty = total == 0
  total = jnp.where(empty, 1.0, total)
  # Through shared memory, since this sum crosses warps and lanes.
  for i, term in enumerate(_terms(out * arrays.spread(weights), partial.dtype)):
    partial[i] = arrays.as_rows(term)
  sums = [jnp.sum(arrays.as_columns(partial[i].astype(jnp.float32)), axis=0) for i in range(partial.shape[0])]
  out_ref[...] = functools.reduce(jnp.add, sums) / total
  lse_ref[...] = jnp.where(empty, NOTHING, (top + jnp.log2(total)) * math.log(2))


def _terms(x: Array, dtype: Any) -> list[Array]:
  """Terms of a type whose sum is x, float32: in bfloat16 three, of 8 bits each.

  A thread stores its part of an array at a time, and the part of a row that is 16 bytes of bfloat16 would be 32 of
  float32, more than a store takes.
  """
  if dtype == jnp.float32:
    return [x]
  terms = []
  for _ in range(3):
    bits = lax.bitcast_convert_type(x, jnp.int32)
    term = lax.bitcast_convert_type(bits & jnp.int32(-65536), jnp.float32)  # the 16 bits that bfloat16 has
    terms.append(term.astype(dtype))
    x = x - term
  return terms
