"""The TPU kernels of `gated_scan`.

A program of the grid has a tile [groups, tokens, LANES]; time is the innermost axis, and the state of the tokens
before is carried in VMEM. The tokens of a tile are cut into eight pieces, which are the eight sublanes of a register:
a step takes one token of each piece, and all groups and lanes, so that many recurrences run side by side. At the end
of the tile the states that enter the pieces follow one from another, and are added: h = local + product * entering.

What runs backwards is not dL/dh_t but the message decay_t * dL/dh_t that token t sends to t - 1: it enters at the last
token as the cotangent of the last state and leaves at the first one as that of the first state.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.scan.passes import Arrays, passed
from pallas_kernels.tpu import LANES, params

Array = jax.Array
Ref = Any
PIECES = 8      # the sublanes of a register of 32-bit numbers
_BEFORE = 16    # tokens of the block that holds the one before a tile: the sublanes of a register of bfloat16
_UNROLLED = 4   # steps that a turn of the loop takes


@dataclasses.dataclass(frozen=True)
class Tuning:
  """A tile: how many groups of channels it has, and tokens."""

  groups: int
  tokens: int

  def __post_init__(self) -> None:
    if self.tokens % (PIECES * _BEFORE):
      raise ValueError(f"tokens={self.tokens}; a tile has a multiple of {PIECES * _BEFORE}.")

  @property
  def steps(self) -> int:
    """Tokens of a piece."""
    return self.tokens // PIECES


def forward(gate_logits: Array, inputs: Arrays, state: Arrays, reset: Array | None, tuning: Tuning, interpret: Any
            ) -> tuple[Arrays, Arrays]:
  """(states like the inputs, last states) of [B, X, T, LANES], states [B, X, 1, LANES], reset int32 [B, 1, T]."""
  call = _Call(gate_logits, reset, tuning, reverse=False)
  results = call.run(functools.partial(_forward, call), [*inputs], [*state], [*inputs], len(inputs),
                     len(inputs), "gated_scan", interpret)
  return tuple(results[:len(inputs)]), tuple(results[len(inputs):])


def backward(gate_logits: Array, inputs: Arrays, state: Arrays, reset: Array | None, states: Arrays, d_outputs: Arrays,
             d_last: Arrays, tuning: Tuning, interpret: Any) -> tuple[Array, Arrays, Arrays]:
  """Cotangents of (gate_logits, inputs, state)."""
  call = _Call(gate_logits, reset, tuning, reverse=True)
  d_logits, *rest = call.run(
      functools.partial(_backward, call), [*inputs, *states, *d_outputs], [*d_last, *state], [gate_logits, *inputs],
      len(inputs), len(inputs), "gated_scan_backward", interpret, befores=states)
  return d_logits, tuple(rest[:len(inputs)]), tuple(rest[len(inputs):])


def summed(gate_logits: Array, arrays: Arrays, reset: Array | None, reverse: bool, tuning: Tuning, interpret: Any
           ) -> Arrays:
  """What is left of a sequence [B, X, 1, LANES]: of every array the last state from zero, then the product of decays.

  With `reverse` the arrays are cotangents of states, and what is left are messages to the token before the first.
  """
  call = _Call(gate_logits, reset, tuning, reverse)
  results: Arrays = tuple(call.run(functools.partial(_summed, call), [*arrays], [], [], len(arrays),
                                   len(arrays) + 1, "gated_scan_sums", interpret))
  return results


@dataclasses.dataclass(frozen=True)
class _Refs:
  """What a kernel gets, by what it is; of every input one, in the tuples."""

  logits: Ref
  reset: Ref | None
  tokens: Sequence[Ref]
  befores: Sequence[Ref]
  states: Sequence[Ref]
  outputs: Sequence[Ref]
  lasts: Sequence[Ref]
  decay: Ref
  drives: Sequence[Ref]
  carries: Sequence[Ref]


@dataclasses.dataclass(frozen=True)
class _Call:
  """What the three kernels share: their grid, their blocks, and the recurrence inside a tile."""

  gate_logits: Any
  reset: Any
  tuning: Tuning
  reverse: bool

  def run(self, body: Callable[[_Refs], None], tokens: list[Array], states: list[Array], outputs: list[Array],
          drives: int, lasts: int, name: str, interpret: Any, befores: Sequence[Array] = ()) -> Sequence[Array]:
    """The kernel's results: one like each of `outputs`, and `lasts` states, of `drives` recurrences.

    Args:
      tokens: arrays of which the kernel gets its tile; befores: those of which it gets the tokens before its tile.
      states: [B, X, 1, LANES].
    """
    b, x, t, _ = self.gate_logits.shape
    cut = self.tuning
    grid = (b, x // cut.groups, t // cut.tokens)

    def time(i: Array) -> Array:
      return grid[2] - 1 - i if self.reverse else i

    of_tokens = pl.BlockSpec((1, cut.groups, cut.tokens, LANES), lambda b, x, i: (b, x, time(i), 0))
    of_state = pl.BlockSpec((1, cut.groups, 1, LANES), lambda b, x, i: (b, x, 0, 0))
    before = pl.BlockSpec((1, cut.groups, _BEFORE, LANES), lambda b, x, i: (
        b, x, jnp.maximum(time(i) * (cut.tokens // _BEFORE) - 1, 0), 0))
    flags = [] if self.reset is None else [self.reset]
    tile = pltpu.VMEM((cut.groups, cut.tokens, LANES), jnp.float32)
    carry = pltpu.VMEM((cut.groups, 1, LANES), jnp.float32)
    counts = (1, len(flags), len(tokens), len(befores), len(states), len(outputs), lasts, 1, drives, lasts)

    def kernel(*refs: Ref) -> None:
      ends = list(itertools.accumulate(counts))
      (logits,), reset, tokens, befores, states, outputs, lasts, (decay,), drives, carries = (
          refs[end - count:end] for end, count in zip(ends, counts, strict=True))
      body(_Refs(logits, reset[0] if reset else None, tokens, befores, states, outputs, lasts, decay, drives, carries))

    type_of_state = jax.ShapeDtypeStruct((b, x, 1, LANES), jnp.float32)
    results: Sequence[Array] = pl.pallas_call(
        kernel, name=name, grid=grid, interpret=interpret or False,
        in_specs=[of_tokens, *[pl.BlockSpec((1, 1, cut.tokens), lambda b, x, i: (b, 0, time(i)))] * len(flags),
                  *[of_tokens] * len(tokens), *[before] * len(befores), *[of_state] * len(states)],
        out_specs=[*[of_tokens] * len(outputs), *[of_state] * lasts],
        out_shape=[*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs), *[type_of_state] * lasts],
        scratch_shapes=[tile, *[tile] * drives, *[carry] * lasts],
        compiler_params=params("parallel", "parallel", "arbitrary"),
    )(self.gate_logits, *flags, *tokens, *befores, *states)
    return results

  def is_first(self) -> Array:
    """Whether the tile is the first one of the kernel's time, which is the last one of a row when that is reversed."""
    return pl.program_id(2) == 0

  def is_last(self) -> Array:
    return pl.program_id(2) == pl.num_programs(2) - 1

  def coefficients(self, refs: _Refs) -> tuple[Array, Array, Array]:
    """(decay, write, gate) of the tile, float32 [groups, tokens, LANES]."""
    logits = refs.logits[0].astype(jnp.float32)
    small = jnp.exp(-jnp.abs(logits))
    larger = 1.0 / (1.0 + small)
    smaller = small * larger
    gate, write = jnp.where(logits >= 0, larger, smaller), jnp.where(logits >= 0, smaller, larger)
    if refs.reset is None:
      return gate, write, gate
    flags = jnp.broadcast_to(refs.reset[0], (LANES, self.tuning.tokens)).T[None]
    return jnp.where(flags != 0, 0.0, gate), write, gate

  def recur(self, refs: _Refs) -> tuple[Array, list[Array]]:
    """Runs the recurrence over every piece from zero: (its product of decays, what leaves it) [groups, PIECES, LANES].

    `refs.decay` and `refs.drives` hold decays and drives, or cotangents, of the tokens, and afterwards the products of
    decays and the states. Backwards these are what a token has of all messages, without its own decay.
    """
    shape = (self.tuning.groups, PIECES, LANES)
    steps = self.tuning.steps

    def step(turn: Array, carried: tuple[Array, ...]) -> tuple[Array, ...]:
      product, *states = carried
      for i in range(_UNROLLED):
        at = turn * _UNROLLED + i
        rows = (slice(None), pl.ds(steps - 1 - at if self.reverse else at, PIECES, stride=steps), slice(None))
        decay = refs.decay[rows]
        drives = [drive[rows] for drive in refs.drives]
        if self.reverse:
          here = [drive + state for drive, state in zip(drives, states, strict=True)]
          refs.decay[rows] = product
          product, states = decay * product, [passed(decay, x) for x in here]
        else:
          product = decay * product
          here = states = [drive + passed(decay, state) for drive, state in zip(drives, states, strict=True)]
          refs.decay[rows] = product
        for drive, x in zip(refs.drives, here, strict=True):
          drive[rows] = x
      return product, *states

    first = (jnp.ones(shape, jnp.float32), *[jnp.zeros(shape, jnp.float32) for _ in refs.drives])
    product, *states = jax.lax.fori_loop(0, steps // _UNROLLED, step, first)
    return product, states

  def entering(self, product: Array, left: Array, carry: Array) -> tuple[list[Array], Array]:
    """What enters every piece, in the order of tokens, and what leaves the tile, [groups, 1, LANES] each."""
    enters = []
    for piece in reversed(range(PIECES)) if self.reverse else range(PIECES):
      enters.append(carry)
      carry = left[:, piece:piece + 1] + passed(product[:, piece:piece + 1], carry)
    return enters[::-1] if self.reverse else enters, carry

  def pieces(self) -> list[tuple[slice, slice, slice]]:
    """Where the pieces lie in a tile."""
    return [(slice(None), slice(i * self.tuning.steps, (i + 1) * self.tuning.steps), slice(None))
            for i in range(PIECES)]


def _forward(call: _Call, refs: _Refs) -> None:
  @pl.when(call.is_first())
  def begin() -> None:
    for carry, state in zip(refs.carries, refs.states, strict=True):
      carry[...] = state[0]

  decay, write, _ = call.coefficients(refs)
  refs.decay[...] = decay
  for drive, x in zip(refs.drives, refs.tokens, strict=True):
    drive[...] = write * x[0].astype(jnp.float32)
  product, left = call.recur(refs)
  for carry, drive, out, last, end in zip(refs.carries, refs.drives, refs.outputs, refs.lasts, left, strict=True):
    enters, carried = call.entering(product, end, carry[...])
    carry[...] = carried
    for rows, enter in zip(call.pieces(), enters, strict=True):
      out[0, *rows] = (drive[rows] + passed(refs.decay[rows], enter)).astype(out.dtype)
    last[0] = carried


def _backward(call: _Call, refs: _Refs) -> None:
  count = len(refs.drives)
  inputs, states, cotangents = (refs.tokens[i * count:(i + 1) * count] for i in range(3))
  d_last, firsts = refs.states[:count], refs.states[count:]

  @pl.when(call.is_first())
  def begin() -> None:
    for carry, state in zip(refs.carries, d_last, strict=True):
      carry[...] = state[0]

  decay, write, gate = call.coefficients(refs)
  refs.decay[...] = decay
  for drive, d in zip(refs.drives, cotangents, strict=True):
    drive[...] = d[0].astype(jnp.float32)
  product, left = call.recur(refs)
  for carry, drive, last, end in zip(refs.carries, refs.drives, refs.lasts, left, strict=True):
    enters, carried = call.entering(product, end, carry[...])
    carry[...] = carried
    for rows, enter in zip(call.pieces(), enters, strict=True):
      drive[rows] += passed(refs.decay[rows], enter)
    last[0] = carried

  d_logits, *d_inputs = refs.outputs
  slope = gate * write
  total = jnp.zeros_like(slope)
  for drive, x, h, before, first, d_input in zip(refs.drives, inputs, states, refs.befores, firsts, d_inputs,
                                                 strict=True):
    earlier = jnp.where(call.is_last(), first[0], before[0, :, -1:].astype(jnp.float32))
    past = jnp.concatenate([earlier, h[0].astype(jnp.float32)[:, :-1]], axis=1)
    # After a reset the gate no longer multiplies the past, so the past is no part of its gradient either.
    past = jnp.where(decay == 0, 0.0, past)
    total += drive[...] * slope * (past - x[0].astype(jnp.float32))
    d_input[0] = (write * drive[...]).astype(d_input.dtype)
  d_logits[0] = total.astype(d_logits.dtype)


def _summed(call: _Call, refs: _Refs) -> None:
  *carries, total = refs.carries

  @pl.when(call.is_first())
  def begin() -> None:
    for carry in carries:
      carry[...] = jnp.zeros_like(carry)
    total[...] = jnp.ones_like(total)

  decay, write, _ = call.coefficients(refs)
  refs.decay[...] = decay
  for drive, x in zip(refs.drives, refs.tokens, strict=True):
    drive[...] = x[0].astype(jnp.float32) if call.reverse else write * x[0].astype(jnp.float32)
  product, left = call.recur(refs)
  for carry, end in zip(carries, left, strict=True):
    carry[...] = call.entering(product, end, carry[...])[1]
  for piece in range(PIECES):
    total[...] *= product[:, piece:piece + 1]
  for last, carry in zip(refs.lasts, refs.carries, strict=True):
    last[0] = carry[...]
