"""`gated_scan` on Hopper GPUs: one pass over HBM forward, one backward; `mosaic_gpu_tiles.py` is the frame of both.

Forward reads logits and inputs and writes outputs. Backward, which needs h_(t-1), reads logits, inputs, outputs and
their cotangents, and writes the cotangents of logits and inputs; outputs in bfloat16 give it h_(t-1) in bfloat16.

Where rows and channels make too few blocks for the GPU, `Tuning.segments` cuts time too: a first pass gives the
product of decays and the end state of every segment, a short scan over segments in plain JAX the state before each.

Lengths and channels that do not fill whole tiles are padded: logits of +inf, which keep the state, and zeros. That
copies all arrays in and out once more, about doubling the bytes moved. Lengths that are a multiple of
`Tuning.segments * Tuning.tile` (128 tokens by default) and channels that are a multiple of `Tuning.channels`
(32) are taken as they lie.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.devices import HOPPER, MULTIPROCESSORS
from pallas_kernels.scan.context import implementation
from pallas_kernels.scan.mosaic_gpu_shapes import SHARED_MEMORY, Operand, Tuning, shared_bytes
from pallas_kernels.scan.mosaic_gpu_tiles import Finish, Frame, Local, Store, Tile, gates, passed
from pallas_kernels.scan.passes import Arrays, between

Array = jax.Array

_STEPS = (16, 8, 4)     # tokens of a piece, the best first
_FEWEST_TILES = 16      # of a segment: fewer would not pay for filling the pipeline


@dataclasses.dataclass(frozen=True)
class MosaicGPU:
  """The passes of the kernel.

  Attributes:
    tuning, backward_tuning: None for `default_tuning`.
    interpret: interpreter parameters to run without a GPU.
  """

  tuning: Tuning | None = None
  backward_tuning: Tuning | None = None
  interpret: Any = None

  def forward(self, gate_logits: Array, inputs: Arrays, state: Arrays, reset: Array | None) -> tuple[Arrays, Arrays]:
    """(all states in the types of the inputs, last state float32 [B, ...]) of every input.

    Raises:
      NotImplementedError: a block would need more shared memory than there is.
    """
    tuning = self.tuning or default_tuning(gate_logits, (gate_logits, *inputs), inputs, len(inputs))
    results: tuple[Arrays, Arrays] = _forward(gate_logits, inputs, state, reset, tuning, self.interpret)
    return results

  def backward(self, gate_logits: Array, inputs: Arrays, state: Arrays, reset: Array | None, states: Arrays,
               d_outputs: Arrays, d_last: Arrays) -> tuple[Array, Arrays, Arrays]:
    """Cotangents of (gate_logits, inputs, state), in their types; `states` are those that `forward` returned.

    Raises:
      NotImplementedError: as `forward`.
    """
    arrays = (gate_logits, *inputs, *states, *d_outputs)
    tuning = self.backward_tuning or default_tuning(gate_logits, arrays, (gate_logits, *inputs), len(inputs))
    cotangents: tuple[Array, Arrays, Arrays] = _backward(gate_logits, inputs, state, reset, states, d_outputs, d_last,
                                                         tuning, self.interpret)
    return cotangents

  def ends(self, gate_logits: Array, inputs: Arrays, reset: Array | None) -> Arrays:
    """As `Passes.ends`."""
    tuning = self.tuning or default_tuning(gate_logits, (gate_logits, *inputs), (), len(inputs))
    found: Arrays = _ends(gate_logits, inputs, reset, tuning, self.interpret)
    return found

  def messages(self, gate_logits: Array, reset: Array | None, d_outputs: Arrays) -> Arrays:
    """As `Passes.messages`."""
    tuning = self.backward_tuning or default_tuning(gate_logits, (gate_logits, *d_outputs), (), len(d_outputs))
    found: Arrays = _messages(gate_logits, reset, d_outputs, tuning, self.interpret)
    return found


def unsupported(gate_logits: Array, inputs: Arrays, *_: Any) -> str | None:
  """Why the kernel does not serve these arrays, or None; its backward pass, which needs the most, decides."""
  outputs = (gate_logits, *inputs)
  if not any(_fits(steps, (*outputs, *inputs, *inputs), outputs, len(inputs)) for steps in _STEPS):
    return f"does not fit {len(inputs)} inputs into the shared memory of a block"
  return None


def default_tuning(like: Array, arrays: Sequence[Array], outputs: Sequence[Array], drives: int) -> Tuning:
  """The largest tile that fits, and segments where blocks would leave most of the GPU idle.

  Args:
    like: any of the arrays [B, T, ...].
    arrays: what is read, in their types.
    outputs: arrays of the types that are written.
    drives: recurrences that share the gate.

  Raises:
    NotImplementedError: no tile fits.
  """
  for steps in _STEPS:
    if _fits(steps, arrays, outputs, drives):
      tuning = Tuning(steps=steps)
      return dataclasses.replace(tuning, segments=_segments(like, tuning))
  raise NotImplementedError(f"{len(arrays)} arrays of types {sorted({str(x.dtype) for x in arrays})} do not fit the"
                            " shared memory of a block; use implementation='xla'.")


def _fits(steps: int, arrays: Sequence[Array], outputs: Sequence[Array], drives: int) -> bool:
  """Whether tiles of so many tokens a piece fit the shared memory of a block; arguments as `default_tuning`."""
  small = [Operand("pieces", jnp.zeros((), jnp.float32))] * (drives + 1)
  return shared_bytes([*(Operand("tokens", x) for x in arrays), *small], [Operand("tokens", x) for x in outputs],
                      drives, Tuning(steps=steps)) <= SHARED_MEMORY


def _segments(like: Array, tuning: Tuning) -> int:
  """A power of two that makes no more blocks than there are multiprocessors and needs no padding.

  Two segments gain little over one, because the inputs are then read twice.
  """
  blocks = like.shape[0] * max(-(-math.prod(like.shape[2:]) // tuning.channels), 1)
  most = min(MULTIPROCESSORS // blocks, like.shape[1] // (tuning.tile * _FEWEST_TILES))
  segments = 1
  while 2 * segments <= most and like.shape[1] % (2 * segments * tuning.tile) == 0:
    segments *= 2
  return segments if segments > 2 else 1


# Under a jit of its own, a kernel is lowered once for all layers of a program, not once for each: it takes seconds.
@functools.partial(jax.jit, static_argnames=("tuning", "interpret"))
def _forward(gate_logits: Array, inputs: Arrays, state: Arrays, reset: Array | None, tuning: Tuning, interpret: Any
             ) -> tuple[Arrays, Arrays]:
  layout = _Layout.of(gate_logits, tuning)
  operands = {"logits": layout.tokens(gate_logits, jnp.inf), **layout.flags(reset),
              **{f"x{i}": layout.tokens(x) for i, x in enumerate(inputs)}}
  outputs = {f"y{i}": layout.like(x) for i, x in enumerate(inputs)}
  drives = range(len(inputs))

  def finish(tile: Tile, part: Local, starts: Sequence[Array], store: Store) -> None:
    del tile
    for step, (product, states) in enumerate(zip(part.products, part.states, strict=True)):
      for i in drives:
        store(f"y{i}", step, states[i] + passed(product, starts[i]))

  results, last = _over_segments("gated_scan", layout, operands, state, outputs, _forwards(drives), finish,
                                 (*operands,), reverse=False, interpret=interpret)
  return tuple(layout.back(y) for y in results.values()), last


@functools.partial(jax.jit, static_argnames=("tuning", "interpret"))
def _ends(gate_logits: Array, inputs: Arrays, reset: Array | None, tuning: Tuning, interpret: Any) -> Arrays:
  layout = _Layout.of(gate_logits, tuning)
  operands = {"logits": layout.tokens(gate_logits, jnp.inf), **layout.flags(reset),
              **{f"x{i}": layout.tokens(x) for i, x in enumerate(inputs)}}
  found = _of_segments("gated_scan", layout, operands, len(inputs), _forwards(range(len(inputs))), reverse=False,
                       interpret=interpret)
  return _of_all_segments(layout, found, reverse=False)


def _forwards(drives: range) -> Callable[[Tile], Local]:
  """The forward recurrence inside a tile."""

  def local(tile: Tile) -> Local:
    products: list[Array] = []
    states: list[list[Array]] = []
    for step in range(tile.steps):
      decay, write, _ = _coefficients(tile, step)
      written = [write * tile.token(f"x{i}", step) for i in drives]
      if step:
        products.append(passed(decay, products[-1]))
        states.append([passed(decay, old) + new for old, new in zip(states[-1], written, strict=True)])
      else:
        products.append(decay)
        states.append(written)
    return Local(products[-1], states[-1], products, states)

  return local


@functools.partial(jax.jit, static_argnames=("tuning", "interpret"))
def _backward(gate_logits: Array, inputs: Arrays, state: Arrays, reset: Array | None, outputs: Arrays,
              d_outputs: Arrays, d_last: Arrays, tuning: Tuning, interpret: Any) -> tuple[Array, Arrays, Arrays]:
  """What runs backwards is not dL/dh_t but the message decay_t * dL/dh_t that token t sends to t - 1: it enters at the
  last token as the cotangent of the last state and leaves at the first as that of the first one."""
  layout = _Layout.of(gate_logits, tuning)
  drives = range(len(inputs))
  operands = {"logits": layout.tokens(gate_logits, jnp.inf), **layout.flags(reset)}
  for i, (x, h, d, first) in enumerate(zip(inputs, outputs, d_outputs, state, strict=True)):
    operands |= {f"x{i}": layout.tokens(x), f"h{i}": layout.tokens(h), f"d{i}": layout.tokens(d),
                 f"before{i}": layout.befores(h, first)}
  results = {"d_logits": layout.like(gate_logits), **{f"d_x{i}": layout.like(x) for i, x in enumerate(inputs)}}

  def finish(tile: Tile, part: Local, starts: Sequence[Array], store: Store) -> None:
    for step in range(tile.steps):
      decay, write, slope = _coefficients(tile, step)
      terms = []
      for i in drives:
        d_h = part.states[step][i] + passed(part.products[step], starts[i])
        past = tile.token(f"h{i}", step - 1) if step else tile.piece(f"before{i}")
        # After a reset the gate no longer multiplies the past, so the past is no part of its gradient either.
        terms.append(d_h * slope * (jnp.where(decay == 0, 0.0, past) - tile.token(f"x{i}", step)))
        store(f"d_x{i}", step, write * d_h)
      store("d_logits", step, sum(terms[1:], terms[0]))

  summarised = [name for name in operands if name in ("logits", "reset") or name in {f"d{i}" for i in drives}]
  cotangents, d_state = _over_segments("gated_scan_backward", layout, operands, d_last, results, _backwards(drives),
                                       finish, summarised, reverse=True, interpret=interpret)
  d_logits, *d_inputs = (layout.back(x) for x in cotangents.values())
  return d_logits, tuple(d_inputs), d_state


@functools.partial(jax.jit, static_argnames=("tuning", "interpret"))
def _messages(gate_logits: Array, reset: Array | None, d_outputs: Arrays, tuning: Tuning, interpret: Any) -> Arrays:
  layout = _Layout.of(gate_logits, tuning)
  operands = {"logits": layout.tokens(gate_logits, jnp.inf), **layout.flags(reset),
              **{f"d{i}": layout.tokens(d) for i, d in enumerate(d_outputs)}}
  found = _of_segments("gated_scan_backward", layout, operands, len(d_outputs), _backwards(range(len(d_outputs))),
                       reverse=True, interpret=interpret)
  return _of_all_segments(layout, found, reverse=True)


def _backwards(drives: range) -> Callable[[Tile], Local]:
  """The backward recurrence inside a tile, of messages."""

  def local(tile: Tile) -> Local:
    products, states = [tile.full(1.0)], [[tile.token(f"d{i}", tile.steps - 1) for i in drives]]
    for step in reversed(range(tile.steps)):
      decay, _, _ = _coefficients(tile, step)
      message = [passed(decay, d_h) for d_h in states[-1]]
      products.append(passed(decay, products[-1]))
      if step:
        states.append([tile.token(f"d{i}", step - 1) + m for i, m in zip(drives, message, strict=True)])
    return Local(products[-1], message, products[-2::-1], states[::-1])

  return local


def _coefficients(tile: Tile, step: int) -> tuple[Array, Array, Array]:
  """(decay, write, slope) of token `step` of every piece; slope is d sigmoid / d logit, whatever was reset."""
  decay, write = gates(tile.token("logits", step))
  slope = decay * write
  if tile.has("reset"):
    decay = jnp.where(tile.flag("reset", step), 0.0, decay)
  return decay, write, slope


@dataclasses.dataclass(frozen=True)
class _Layout:
  """[B, T, ...] arrays as rows of whole tiles: B * segments rows, time in pieces, trailing axes as channels."""

  shape: tuple[int, ...]
  tuning: Tuning

  @classmethod
  def of(cls, like: Array, tuning: Tuning) -> _Layout:
    """`tuning` with no more segments than there are tiles."""
    segments = max(min(tuning.segments, -(-like.shape[1] // tuning.tile)), 1)
    return cls(like.shape, dataclasses.replace(tuning, segments=segments))

  @property
  def rows(self) -> int:
    return self.shape[0] * self.tuning.segments

  @property
  def length(self) -> int:
    """Tokens of one row of the batch, with padding."""
    whole = self.tuning.segments * self.tuning.tile
    return max(-(-self.shape[1] // whole), 1) * whole

  @property
  def channels(self) -> int:
    """How many channels a row of the work has, with padding."""
    block = self.tuning.channels
    return max(-(-math.prod(self.shape[2:]) // block), 1) * block

  def tokens(self, x: Array, fill: float = 0.0) -> Operand:
    return Operand("tokens", self._padded(x, fill).reshape(self._tokens_shape))

  def like(self, x: Array) -> Operand:
    return Operand("tokens", jax.ShapeDtypeStruct(self._tokens_shape, x.dtype))

  @property
  def _tokens_shape(self) -> tuple[int, ...]:
    return (self.rows, self.length // self.tuning.segments // self.tuning.steps, self.tuning.steps, 1,
            self.channels)

  def _padded(self, x: Array, fill: float) -> Array:
    flat = x.reshape(*x.shape[:2], -1)
    tokens, channels = self.length - flat.shape[1], self.channels - flat.shape[2]
    return jnp.pad(flat, ((0, 0), (0, tokens), (0, channels)), constant_values=fill) if tokens or channels else flat

  def flags(self, reset: Array | None) -> dict[str, Operand]:
    if reset is None:
      return {}
    flags = jnp.pad(reset.astype(jnp.float32), ((0, 0), (0, self.length - reset.shape[1])))
    subs, steps = self.tuning.subs, self.tuning.steps
    flags = flags.reshape(self.rows, -1, subs, steps).swapaxes(2, 3)
    return {"reset": Operand("flags", flags.reshape(self.rows, -1, 1, steps * subs))}

  def befores(self, h: Array, first: Array) -> Operand:
    """The state before every piece, float32."""
    steps = self.tuning.steps
    ends = jnp.concatenate([first[:, None].astype(jnp.float32), h[:, steps - 1::steps].astype(jnp.float32)], axis=1)
    ends = ends.reshape(*ends.shape[:2], -1)[:, :self.length // steps]
    missing = (self.length // steps - ends.shape[1], self.channels - ends.shape[2])
    ends = jnp.pad(ends, ((0, 0), (0, missing[0]), (0, missing[1])))
    return Operand("pieces", ends.reshape(self.rows, -1, 1, self.channels))

  def state(self, state: Sequence[Array]) -> Array:
    """The states of all drives in one array, float32 [drives, B, channels]."""
    stacked = jnp.stack([x.reshape(self.shape[0], -1) for x in state])
    return jnp.pad(stacked, ((0, 0), (0, 0), (0, self.channels - stacked.shape[2])))

  def state_back(self, state: Array) -> Arrays:
    size = math.prod(self.shape[2:])
    return tuple(x[:, :size].reshape(self.shape[0], *self.shape[2:]) for x in state)

  def back(self, x: Array) -> Array:
    """An output in the shape of the arguments."""
    whole = x.reshape(self.shape[0], self.length, self.channels)
    return whole[:, :self.shape[1], :math.prod(self.shape[2:])].reshape(self.shape)


def _over_segments(
    name: str, layout: _Layout, operands: Mapping[str, Operand], state: Sequence[Array],
    outputs: Mapping[str, Operand], local: Callable[[Tile], Local], finish: Finish, summarised: Sequence[str], *,
    reverse: bool, interpret: Any,
) -> tuple[dict[str, Array], Arrays]:
  """Runs a recurrence over all of time, segments side by side; `summarised` are the operands that `local` reads.

  Returns:
    (outputs, state that goes out: float32 [B, ...] each).
  """
  first = layout.state(state)
  batch, segments = layout.shape[0], layout.tuning.segments
  if segments > 1:
    ends = _of_segments(name, layout, {x: operands[x] for x in summarised}, len(state), local, reverse=reverse,
                        interpret=interpret)
    first = jnp.stack(between(ends, tuple(first), reverse=reverse)[0])
  frame = Frame(name, operands, first.reshape(len(state), layout.rows, layout.channels), outputs, layout.tuning,
                local, finish, reverse=reverse, interpret=interpret)
  results, last = frame.run()
  last = last.reshape(len(state), batch, segments, layout.channels)
  return results, layout.state_back(last[:, :, 0 if reverse else -1])


def _of_segments(name: str, layout: _Layout, operands: Mapping[str, Operand], drives: int,
                 local: Callable[[Tile], Local], *, reverse: bool, interpret: Any) -> Array:
  """[drives + 1, B, segments, C]: what every segment makes of a state of zero, then its product of decays."""
  zeros = jnp.zeros((drives, layout.rows, layout.channels), jnp.float32)
  _, ends = Frame(name + "_segments", operands, zeros, {}, layout.tuning, local, None, reverse=reverse,
                  interpret=interpret).run()
  return ends.reshape(-1, layout.shape[0], layout.tuning.segments, layout.channels)


def _of_all_segments(layout: _Layout, ends: Array, *, reverse: bool) -> Arrays:
  """What all segments of `_of_segments` make of a state of zero, and the product of all decays: [B, ...] each."""
  zeros = tuple(jnp.zeros_like(ends[0, :, 0]) for _ in range(ends.shape[0] - 1))
  _, last = between(ends, zeros, reverse=reverse)
  return layout.state_back(jnp.stack([*last, jnp.prod(ends[-1], axis=1)]))


IMPLEMENTATION = implementation(MosaicGPU(), unsupported=unsupported, runs_on=HOPPER)
