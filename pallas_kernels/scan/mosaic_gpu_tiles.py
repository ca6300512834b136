"""The frame of both directions of `gated_scan` on a Hopper GPU: a recurrence over time, a tile of tokens at a turn.

A block of threads owns one row of the batch and a few channels, and walks over all of time once, so that HBM is read
and written once. Inside a tile, time is cut into `subs` pieces of `steps` tokens: each thread runs the recurrence over
its piece from zero, in registers, and keeps the running product of decays; then the pieces are chained through shared
memory, and the state before a piece, times that product, is added to what the thread holds.

One warpgroup fetches tiles by TMA, a few ahead. The `workers` others take tiles in turn. All that a tile waits for
from the tile before it is one state for each channel, which passes from worker to worker in shared memory; it takes
one multiply-add, because a tile's own product and end state are known before it arrives.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.scan.mosaic_gpu_shapes import SHARED_MEMORY, VECTOR, Operand, Ref, Tuning, shared_bytes

Array = jax.Array

_FETCH_REGISTERS = 40
_LOG2_E = 1.4426950408889634
_WHOLE = (...,) if "idx" in inspect.signature(plgpu.load).parameters else ()  # jax 0.10 wants an index, 0.12 none

# Thread i holds channels 2i and 2i+1 of the flattened [subs, 1, channels]: (tiles, axes over warps, axes over lanes).
_LAYOUTS = {
    32: (((8, 1, 32), (2, 1, 32), (VECTOR,)), (-7,), (-4, -2)),
    64: (((4, 1, 64), (VECTOR,)), (-4,), (-2,)),
    128: (((2, 1, 128), (64,), (VECTOR,)), (-5, -3), (-2,)),
}


class Registers:
  """Arrays [subs, 1, channels] in the registers of a warpgroup, and reads in their layout.

  The axis of size 1 keeps layout inference from choosing a tiling with swizzle for shared memory, which would cut rows
  that are read whole. The interpreter knows no layouts; there all of this is plain indexing.
  """

  def __init__(self, tuning: Tuning, interpret: bool):
    self.shape = (tuning.subs, 1, tuning.channels)
    self.interpret = interpret
    tiles, warps, lanes = _LAYOUTS[tuning.channels]
    self.layout = plgpu.Layout.TILED(plgpu.Tiling(tiles), warps, lanes, -1)

  def read(self, ref: Ref, index: Any, keeps: int | None = None) -> Array:
    """ref[index], which is [subs, 1, channels], or keeps only axis `keeps` of these."""
    values: Array
    if self.interpret:
      values = ref[index]
    else:
      layout = self.layout if keeps is None else self.layout.reduce(tuple({0, 1, 2} - {keeps}))
      # "optimized" would refuse reads where lanes meet in a bank: two of 32 do where a row is 64 bytes.
      values = plgpu.load(ref.at[index], *_WHOLE, layout=layout, optimized=False)
    return values

  def write(self, ref: Ref, x: Array) -> None:
    """ref[...] = x for a whole reference."""
    if self.interpret:
      ref[...] = x
      return

    def store(_: Any, to: Any, values: Any) -> None:
      values.store_untiled(to, optimized=False)

    # `ref[...] = x` would first read what is there.
    plgpu.inline_mgpu(arg_types=(plgpu.RefType(), self.layout))(store)(ref, x)

  def spread(self, x: Array, axis: int) -> Array:
    """[subs, 1, channels] from an array of that one axis."""
    return self._cast(lax.broadcast_in_dim(x, self.shape, (axis,)))

  def _cast(self, x: Array) -> Array:
    return x if self.interpret else plgpu.layout_cast(x, self.layout)

  def full(self, value: float) -> Array:
    return self._cast(jnp.full(self.shape, value, jnp.float32))

  def pieces(self) -> Array:
    """The number of its piece for every element, int32."""
    return self._cast(lax.broadcasted_iota(jnp.int32, self.shape, 0))


def passed(decay: Array, x: Array) -> Array:
  """decay * x; a decay of exactly 0 drops also an x that is not finite. A sum with it stays one multiply-add."""
  return decay * jnp.where(decay == 0, 0.0, x)


def gates(logits: Array) -> tuple[Array, Array]:
  """(sigmoid(logits), sigmoid(-logits)) in float32, from one exponential and one reciprocal square root.

  The smaller of the two is exact to a few units of its last place, the larger is 1 minus it. A division would take
  several times the instructions.
  """
  logits = logits.astype(jnp.float32)
  power = jnp.exp2(jnp.abs(logits) * -_LOG2_E)
  root = lax.rsqrt(1.0 + power)
  small = power * root * root
  large = 1.0 - small
  return jnp.where(logits >= 0, large, small), jnp.where(logits >= 0, small, large)


class Tile:
  """One tile in shared memory, as the two halves of a kernel read it into registers."""

  def __init__(self, registers: Registers, refs: Mapping[str, Ref], slot: Array, steps: int):
    self.steps = steps
    self._registers, self._refs, self._slot = registers, refs, slot

  def has(self, name: str) -> bool:
    return name in self._refs

  def full(self, value: float) -> Array:
    return self._registers.full(value)

  def token(self, name: str, step: int) -> Array:
    """float32 [subs, 1, channels]: token `step` of every piece."""
    return self._registers.read(self._refs[name], (self._slot, slice(None), step)).astype(jnp.float32)

  def piece(self, name: str) -> Array:
    """float32 [subs, 1, channels]: what an operand of pieces holds for each."""
    return self._registers.read(self._refs[name], (self._slot,)).astype(jnp.float32)

  def flag(self, name: str, step: int) -> Array:
    """bool [subs, 1, channels]: the flag of token `step` of every piece."""
    subs = self._registers.shape[0]
    flags = self._registers.read(self._refs[name], (self._slot, 0, pl.ds(step * subs, subs)), keeps=0)
    return self._registers.spread(flags, 0) > 0


@dataclasses.dataclass(frozen=True)
class Local:
  """A tile's recurrence from zero: for each step what multiplies the state that comes in, and the states so far."""

  product: Array                # of all decays of a piece
  ends: Sequence[Array]         # what a piece passes on, for each drive
  products: Sequence[Array]     # for each step
  states: Sequence[Sequence[Array]]  # for each step, for each drive


Store = Callable[[str, int, Array], None]
Finish = Callable[[Tile, Local, Sequence[Array], Store], None]


class Frame:
  """The kernel around `local` and `finish`: fetching, taking turns, chaining pieces and tiles, writing.

  Args:
    name: of the kernel, for profiles.
    operands: what passes tile by tile, by name; the first is of kind "tokens".
    state: float32 [drives, N, C], what comes in at the first token (`reverse`: at the last).
    outputs: what comes out, by name, as types of kind "tokens".
    local: the recurrence over a tile from zero.
    finish: writes the outputs, given the states before every piece of the tile, one [subs, 1, channels] for each drive,
      and a function that stores [subs, 1, channels] as one token of one output. None where there are no outputs.
    reverse: from the last token to the first.
    interpret: `plgpu.InterpretParams`, or None.

  Raises:
    NotImplementedError: a block would need more shared memory than there is.
  """

  def __init__(self, name: str, operands: Mapping[str, Operand], state: Array, outputs: Mapping[str, Operand],
               tuning: Tuning, local: Callable[[Tile], Local], finish: Finish | None, *, reverse: bool,
               interpret: Any):
    needed = shared_bytes([*operands.values()], [*outputs.values()], state.shape[0], tuning)
    if needed > SHARED_MEMORY:
      raise NotImplementedError(
          f"{name} with {tuning} needs {needed} bytes of shared memory for {len(operands)} arrays, a block has"
          f" {SHARED_MEMORY}; take fewer steps or stages, or implementation='xla'.")
    self.name, self.operands, self.state, self.outputs = name, operands, state, outputs
    self.tuning, self.local, self.finish = tuning, local, finish
    self.reverse, self.interpret = reverse, interpret
    self.drives, self.rows, self.channels = state.shape
    self.tiles = next(iter(operands.values())).array.shape[1] // tuning.subs
    self.carries = self.drives + (finish is None)  # without outputs, the product of decays is carried along
    self.registers = Registers(tuning, bool(interpret))

  def run(self) -> tuple[dict[str, Array], Array]:
    """(outputs, state): the state that goes out, float32 [drives, N, C]; without outputs, the product of all decays
    follows it as one more drive."""
    tuning, workers = self.tuning, self.tuning.workers
    states = self.registers.shape
    scratch: dict[str, Any] = dict(
        tiles={name: plgpu.SMEM((tuning.stages, *x.tile_shape(tuning)), x.array.dtype)
               for name, x in self.operands.items()},
        out={name: plgpu.SMEM((workers, *x.tile_shape(tuning)), x.array.dtype) for name, x in self.outputs.items()},
        pieces=plgpu.SMEM((workers, 1 + self.drives, *states), jnp.float32),
        carry=plgpu.SMEM((max(workers, 2), self.carries, *states), jnp.float32),
        full=plgpu.Barrier(num_arrivals=len(self.operands), num_barriers=tuning.stages),
        free=plgpu.Barrier(num_barriers=tuning.stages),
        ready=plgpu.Barrier(num_barriers=workers))
    kernel = plgpu.kernel(
        self._body,
        out_type=(*(jax.ShapeDtypeStruct(x.array.shape, x.array.dtype) for x in self.outputs.values()),
                  jax.ShapeDtypeStruct((self.carries, self.rows, self.channels), jnp.float32)),
        scratch_types=(scratch,),
        grid=(self.rows, self.channels // tuning.channels), grid_names=("rows", "blocks"),
        num_threads=workers + 1, thread_name="worker", kernel_name=self.name, interpret=self.interpret,
        # Every store to shared memory is followed by `commit_smem` before another thread reads it.
        # Threads are lowered one by one: layouts stand here, and to infer them for a warpgroup takes several seconds.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True,
                                             lowering_semantics=plgpu.LoweringSemantics.Lane))
    *outputs, last = kernel(*(x.array for x in self.operands.values()), self.state)
    return dict(zip(self.outputs, outputs, strict=True)), last

  def _body(self, *refs: Ref) -> None:
    n, m = len(self.operands), len(self.outputs)
    self._block(dict(zip(self.operands, refs[:n], strict=True)), refs[n],
                dict(zip(self.outputs, refs[n + 1:n + 1 + m], strict=True)), *refs[n + 1 + m:])

  def _block(self, sources: Mapping[str, Ref], state: Ref, targets: Mapping[str, Ref], last: Ref,
             scratch: Mapping[str, Any]) -> None:
    """What one block of threads does. The grid is made of (row, block of channels), channels fastest."""
    workers, worker = self.tuning.workers, lax.axis_index("worker")

    @pl.when(worker == workers)
    def _fetching() -> None:
      plgpu.set_max_registers(_FETCH_REGISTERS, action="decrease")
      self._fetch_all(sources, scratch)

    @pl.when(worker < workers)
    def _computing() -> None:
      plgpu.set_max_registers(_registers(workers), action="increase")
      pl.when(worker == 0)(lambda: self._bring_in(state, scratch))

      @pl.loop(jnp.int32(0), lax.div(self.tiles - worker + (workers - 1), jnp.int32(workers)))
      def _turns(turn: Array) -> None:
        self._take(turn * workers + worker, worker, targets, last, scratch)

      plgpu.wait_smem_to_gmem(0)

  def _fetch_all(self, sources: Mapping[str, Ref], scratch: Mapping[str, Any]) -> None:
    stages, row, block = self.tuning.stages, lax.axis_index("rows"), lax.axis_index("blocks")
    ahead = min(stages, self.tiles)

    def fetch(turn: Array) -> None:
      slot = lax.rem(turn, jnp.int32(stages))
      for name, operand in self.operands.items():
        plgpu.copy_gmem_to_smem(operand.tile_of(sources[name], row, self._time(turn), block, self.tuning),
                                scratch["tiles"][name].at[slot], scratch["full"].at[slot])

    for turn in range(ahead):
      fetch(jnp.int32(turn))

    @pl.loop(jnp.int32(ahead), jnp.int32(self.tiles))
    def _refill(turn: Array) -> None:
      plgpu.barrier_wait(scratch["free"].at[lax.rem(turn, jnp.int32(stages))])
      fetch(turn)

    for turn in range(self.tiles - ahead, self.tiles):
      plgpu.barrier_wait(scratch["free"].at[turn % stages])

  def _time(self, turn: Array) -> Array:
    return self.tiles - 1 - turn if self.reverse else turn

  def _bring_in(self, state: Ref, scratch: Mapping[str, Any]) -> None:
    """The state that comes in becomes what the first tile finds."""
    first, row = scratch["carry"].at[0], lax.axis_index("rows")
    for i in range(self.drives):
      came = self.registers.read(state, (i, row, self._channels()), keeps=2)
      self.registers.write(first.at[i], self.registers.spread(came, 2))
    if self.finish is None:
      self.registers.write(first.at[self.drives], self.registers.full(1.0))
    plgpu.commit_smem()
    plgpu.barrier_arrive(scratch["ready"].at[0])

  def _channels(self) -> Any:
    return pl.ds(lax.axis_index("blocks") * self.tuning.channels, self.tuning.channels)

  def _take(self, turn: Array, worker: Array, targets: Mapping[str, Ref], last: Ref,
            scratch: Mapping[str, Any]) -> None:
    """One tile, from its arrival in shared memory to its leaving it."""
    slot = lax.rem(turn, jnp.int32(self.tuning.stages))
    tile = Tile(self.registers, scratch["tiles"], slot, self.tuning.steps)
    plgpu.barrier_wait(scratch["full"].at[slot])
    part = self.local(tile)
    if self.finish is None:
      plgpu.barrier_arrive(scratch["free"].at[slot])
    before, whole = self._chain(part, scratch["pieces"].at[worker])
    carry = self._hand_on(turn, whole, last, scratch)
    if self.finish is None:
      return
    starts = [end + passed(before[0], self.registers.spread(x, 2)) for end, x in zip(before[1:], carry, strict=True)]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # this worker's last tile must have left
    staged = {name: x.at[worker] for name, x in scratch["out"].items()}

    def store(name: str, step: int, x: Array) -> None:
      self.registers.write(staged[name].at[:, step], x.astype(staged[name].dtype))

    self.finish(tile, part, starts, store)
    plgpu.barrier_arrive(scratch["free"].at[slot])
    plgpu.commit_smem()
    row, block = lax.axis_index("rows"), lax.axis_index("blocks")
    for name, operand in self.outputs.items():
      plgpu.copy_smem_to_gmem(staged[name], operand.tile_of(targets[name], row, self._time(turn), block, self.tuning))

  def _chain(self, part: Local, pieces: Ref) -> tuple[list[Array], list[Array]]:
    """[product of decays, end of each drive], from zero: of all pieces before each piece, and of the whole tile."""
    registers = self.registers
    for i, x in enumerate((part.product, *part.ends)):
      registers.write(pieces.at[i], x)
    plgpu.commit_smem()
    number = registers.pieces()
    before = [registers.full(1.0)] + [registers.full(0.0) for _ in part.ends]
    whole: list[Array] = []
    for sub in reversed(range(self.tuning.subs)) if self.reverse else range(self.tuning.subs):
      piece = [registers.read(pieces, (i, sub, 0), keeps=2) for i in range(1 + self.drives)]
      if not whole:
        whole = piece
        continue
      before = [jnp.where(number == sub, registers.spread(x, 2), old) for x, old in zip(whole, before, strict=True)]
      whole = [passed(piece[0], whole[0]),
               *(passed(piece[0], x) + end for x, end in zip(whole[1:], piece[1:], strict=True))]
    return before, whole

  def _hand_on(self, turn: Array, whole: Sequence[Array], last: Ref, scratch: Mapping[str, Any]) -> list[Array]:
    """Waits for the state before this tile, passes on the one after it, returns the former."""
    registers, workers = self.registers, jnp.int32(self.tuning.workers)
    slots = jnp.int32(max(self.tuning.workers, 2))
    here, onward = scratch["carry"].at[lax.rem(turn, slots)], scratch["carry"].at[lax.rem(turn + 1, slots)]
    plgpu.barrier_wait(scratch["ready"].at[lax.rem(turn, workers)])
    carry = [registers.read(here, (i, 0, 0), keeps=2) for i in range(self.carries)]
    for i, x in enumerate(carry):
      after = passed(whole[0], x)
      after = after + whole[1 + i] if i < self.drives else after
      registers.write(onward.at[i], registers.spread(after, 2))
    plgpu.commit_smem()

    @pl.when(turn < self.tiles - 1)
    def _to_the_next_worker() -> None:
      plgpu.barrier_arrive(scratch["ready"].at[lax.rem(turn + 1, workers)])

    @pl.when(turn == self.tiles - 1)
    def _out() -> None:
      for i in range(self.carries):
        plgpu.copy_smem_to_gmem(onward.at[i, 0, 0], last.at[i, lax.axis_index("rows"), self._channels()])

    return carry[:self.drives]


def _registers(workers: int) -> int:
  """Registers of a computing thread: what the fetching warpgroup leaves of a multiprocessor's 65536, in eights."""
  return min(240, (512 - _FETCH_REGISTERS) // workers // 8 * 8)
