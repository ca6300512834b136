"""Dilated attention as a Pallas kernel for Hopper GPUs (Mosaic GPU): queries and keys are read where they lie.

The queries of one head and one position mod D, 128 of them, are a tile; two warpgroups take 64 each, a third fetches.
What they see is a sequence of tiles of 128 keys: their own (the diagonal of a tile), the first tokens (of which the
sinks count), and the strided keys, which to these queries are plain causal attention (see folded.py). A copy takes the
rows of a tile at a distance of D tokens, so nothing is folded beforehand. One softmax runs over all of it.

For a window of 0; a longer one is a part of its own (folded.py).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.softmax import NOTHING

Array = jax.Array
ROWS, KEYS, GROUPS, STAGES = 64, 128, 2, 2  # queries of a warpgroup, keys of a tile, warpgroups, tiles in flight
TILE = GROUPS * ROWS


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

  @property
  def steps(self) -> int:  # queries of one residue
    return self.length // self.dilation

  @property
  def first(self) -> int:  # the first strided key that is no sink
    return self.sinks // self.dilation

  @property
  def own(self) -> bool:
    return self.window == 0

  @property
  def besides(self) -> int:  # tiles before the strided ones
    return self.own + (self.sinks > 0)


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


def forward(q: Array, k: Array, v: Array, dilation: int, window: int, sinks: int, interpret: Any = None
            ) -> tuple[Array, Array]:
  """Attention of q [B, T, N, H] to strided keys and sinks beyond the window and, where that is 0, to the own keys.

  Returns the output in q's type and its log-sum-exp, float32 [B, T, N].
  """
  b, t, n, h = q.shape
  cut = Cut(b, t, n, k.shape[2], h, dilation, window, sinks)
  by_residue = lambda x: x.reshape(b, cut.steps, dilation, *x.shape[2:])
  out, lse = _kernel(cut, interpret)(by_residue(q), by_residue(k), by_residue(v), k, v)
  return out.reshape(q.shape), lse.transpose(0, 3, 2, 1).reshape(b, t, n)


def _kernel(cut: Cut, interpret: Any):
  tiles = plgpu.SMEM((STAGES, KEYS, cut.width), jnp.bfloat16)
  return plgpu.kernel(
      functools.partial(_block, cut, interpret is None),
      out_type=(jax.ShapeDtypeStruct((cut.batch, cut.steps, cut.dilation, cut.heads, cut.width), jnp.bfloat16),
                jax.ShapeDtypeStruct((cut.batch, cut.heads, cut.dilation, cut.steps), jnp.float32)),
      scratch_types=dict(
          q_tile=plgpu.SMEM((GROUPS, ROWS, cut.width), jnp.bfloat16), k_tiles=tiles,
          v_tiles=tiles, lse_tile=plgpu.SMEM((GROUPS, ROWS), jnp.float32), q_copied=plgpu.Barrier(num_barriers=GROUPS),
          k_copied=plgpu.Barrier(num_barriers=STAGES), v_copied=plgpu.Barrier(num_barriers=STAGES),
          k_read=plgpu.Barrier(num_arrivals=GROUPS, num_barriers=STAGES),
          v_read=plgpu.Barrier(num_arrivals=GROUPS, num_barriers=STAGES)),
      grid=(cut.batch, cut.steps // TILE, cut.heads * cut.dilation), grid_names=("batch", "tile", "heads"),
      num_threads=GROUPS + 1, thread_name="group",
      compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
      interpret=interpret)


def _block(cut: Cut, on_device: bool, q_ref, k_ref, v_ref, k_tokens, v_tokens, out_ref, lse_ref, *, q_tile, k_tiles,
           v_tiles, lse_tile, q_copied, k_copied, v_copied, k_read, v_read):
  """A tile of queries: `start` on, of one head and residue."""
  i32 = jnp.int32
  batch, heads, group = lax.axis_index("batch"), lax.axis_index("heads"), lax.axis_index("group")
  head, residue = lax.div(heads, i32(cut.dilation)), lax.rem(heads, i32(cut.dilation))
  kv_head = lax.div(head, i32(cut.heads // cut.kv_heads))
  start = (cut.steps // TILE - 1 - lax.axis_index("tile")) * TILE  # the longest first
  # Query number m of the residue sees strided keys first .. m + shift - 1.
  whole = -(-cut.window // cut.dilation)
  shift = lax.div(residue + (whole * cut.dilation - cut.window), i32(cut.dilation)) - whole
  visible = lambda m: jnp.maximum(m + shift - cut.first, 0)
  count = lax.div(visible(start + TILE - 1) + (KEYS - 1), i32(KEYS))
  begin = lambda at: jnp.minimum(cut.first + at * KEYS, cut.steps - KEYS)

  @pl.when(group == GROUPS)
  def _fetch():
    plgpu.set_max_registers(40, action="decrease")

    def copy(i, slot, of_k, of_v, wait):
      for ref, tiles, copied, read in ((of_k, k_tiles, k_copied, k_read), (of_v, v_tiles, v_copied, v_read)):
        if wait:
          pl.when(i >= STAGES)(functools.partial(plgpu.barrier_wait, read.at[slot]))
        plgpu.copy_gmem_to_smem(ref, tiles.at[slot], copied.at[slot])

    if cut.own:
      rows = (batch, pl.ds(start, TILE), residue, kv_head)
      copy(0, 0, k_ref.at[rows], v_ref.at[rows], wait=False)
    if cut.sinks:
      tokens = (batch, pl.ds(0, KEYS), kv_head)
      copy(cut.besides - 1, cut.besides - 1, k_tokens.at[tokens], v_tokens.at[tokens], wait=False)

    @pl.loop(0, count)
    def _(at):
      i = at + cut.besides
      rows = (batch, pl.ds(begin(at), KEYS), cut.dilation - 1, kv_head)
      copy(i, lax.rem(i, i32(STAGES)), k_ref.at[rows], v_ref.at[rows], wait=True)

    for back in range(STAGES):  # whoever waits on a barrier must see all of its phases
      last = count + (cut.besides - 1 - back)

      @pl.when(last >= 0)
      def _(last=last):
        for read in (k_read, v_read):
          plgpu.barrier_wait(read.at[lax.rem(last, i32(STAGES))])

  @pl.when(group < GROUPS)
  def _compute():
    plgpu.set_max_registers(232, action="increase")
    mine = start + group * ROWS
    queries = q_tile.at[group]
    plgpu.copy_gmem_to_smem(q_ref.at[batch, pl.ds(mine, ROWS), residue, head], queries, q_copied.at[group])
    plgpu.barrier_wait(q_copied.at[group])
    cast = plgpu.layout_cast if on_device else lambda x, _: x  # the interpreter of jax 0.10 does not know layouts
    iota = lambda axis: cast(lax.broadcasted_iota(jnp.int32, (ROWS, KEYS), axis), plgpu.Layout.WGMMA)

    def step(i, state, seen=None):
      out, top, total = state
      slot = lax.rem(jnp.asarray(i, jnp.int32), i32(STAGES))
      plgpu.barrier_wait(k_copied.at[slot])

      scores = _product(queries, k_tiles.at[slot], KEYS, True, on_device)
      plgpu.barrier_arrive(k_read.at[slot])
      scores *= cut.width**-0.5 * math.log2(math.e)
      mask = None if seen is None else seen(iota(0), iota(1))
      if mask is not None:
        scores = jnp.where(mask, scores, NOTHING)
      new_top = jnp.maximum(top, scores.max(axis=1))
      shrink = jnp.exp2(top - new_top)
      weights = jnp.exp2(scores - lax.broadcast_in_dim(new_top, scores.shape, [0]))
      if mask is not None:
        weights = jnp.where(mask, weights, 0.0)
      total = total * shrink + weights.sum(axis=1)
      weights = weights.astype(jnp.bfloat16)
      plgpu.barrier_wait(v_copied.at[slot])
      added = _product(weights, v_tiles.at[slot], cut.width, False, on_device)
      plgpu.barrier_arrive(v_read.at[slot])
      return out * lax.broadcast_in_dim(shrink, out.shape, [0]) + added, new_top, total

    full = lambda shape, value, layout: cast(jnp.full(shape, value, jnp.float32), layout)
    per_row = plgpu.Layout.WGMMA.reduce(1)
    state = (full((ROWS, cut.width), 0, plgpu.Layout.WGMMA), full((ROWS,), NOTHING, per_row), full((ROWS,), 0, per_row))
    if cut.own:
      state = step(0, state, lambda row, col: col == row + group * ROWS)
    if cut.sinks:
      before = lambda row: (mine + row) * cut.dilation + residue - cut.window
      state = step(cut.besides - 1, state, lambda row, col: (col < cut.sinks) & (col < before(row)))
    whole_tiles = jnp.minimum(lax.div(visible(start), i32(KEYS)), count)
    state = lax.fori_loop(0, whole_tiles, lambda at, state: step(at + cut.besides, state), state)

    def edge(at, state):
      new = cut.first + at * KEYS - begin(at)  # the last tile is moved back to end with the keys
      return step(at + cut.besides, state, lambda row, col: (begin(at) + col < mine + row + shift) & (col >= new))

    state = lax.fori_loop(whole_tiles, count, edge, state)
    out, top, total = state
    nothing = total == 0
    total = jnp.where(nothing, 1.0, total)
    lse_tile.at[group][...] = jnp.where(nothing, NOTHING, (top + jnp.log(total) * math.log2(math.e)) * math.log(2))
    queries[...] = (out / lax.broadcast_in_dim(total, out.shape, [0])).astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(queries, out_ref.at[batch, pl.ds(mine, ROWS), residue, head])
    plgpu.copy_smem_to_gmem(lse_tile.at[group], lse_ref.at[batch, head, residue, pl.ds(mine, ROWS)])
    plgpu.wait_smem_to_gmem(0)


def _product(a, tile, width: int, transposed: bool, on_device: bool) -> Array:
  """a [ROWS, X], an array or in shared memory, times a tile in shared memory; float32 [ROWS, width]."""
  if not on_device:  # the interpreter multiplies no arrays and nothing transposed
    return lax.dot_general(a[...], tile[...], (((1,), (1 if transposed else 0,)), ((), ())),
                           preferred_element_type=jnp.float32)

  def multiply(sum_ref):
    plgpu.wgmma(sum_ref, a, tile.transpose((1, 0)) if transposed else tile)
    return sum_ref[...]

  return pl.run_scoped(multiply, plgpu.ACC((ROWS, width), jnp.float32))
