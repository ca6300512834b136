"""What the modes that choose blocks of keys by the query share: their options, budgets and forced blocks.

Such a mode is a file with its fields and three answers:
  statistic            what a block keeps of its keys, to be scored by it (`rat_jax.selection.STATISTICS`)
  blocks_at(length)    how many blocks the query reads that has `length` tokens up to itself, forced ones included
  rule                 a position-only mode that it reads besides, or None
`rat_jax.selection` scores, forces and picks, for all of them alike.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
import typing
from collections.abc import Iterable
from fractions import Fraction
from typing import Literal

import jax
import numpy as np

from rat_jax.modes.base import Mode
from rat_jax.modes.dense import Dense


@dataclasses.dataclass(frozen=True, eq=False)
class SelectingMode(Mode):
  """Options of every mode that chooses keys by what they hold.

  Attributes:
    group: "head" chooses for every query head, "kv" once for the query heads of a key/value head.
    selector: "score" is the method's own; "random" and "oracle" (true attention mass) replace the score alone.
    seed: of the random selector.
  """

  _: dataclasses.KW_ONLY
  group: Literal["head", "kv"] = "head"
  selector: Literal["score", "random", "oracle"] = "score"
  seed: int = 0

  # No annotation: a mode's own fields of these names keep their place in its order.
  dense_layers = typing.cast(tuple[int, ...], ())

  def _settle_options(self) -> None:
    self._settle_choice("group", ("head", "kv"))
    self._settle_choice("selector", ("score", "random", "oracle"))
    self._settle_int("seed", least=0, fix="use an integer of at least 0")
    layers = tuple(self.dense_layers) if isinstance(self.dense_layers, Iterable) else (None,)
    if not all(isinstance(i, numbers.Integral) and not isinstance(i, bool) for i in layers):
      raise ValueError(f"{type(self).__name__}: dense_layers={self.dense_layers!r}; give a tuple of layer numbers.")
    object.__setattr__(self, "dense_layers", tuple(sorted({int(i) for i in layers})))

  @property
  def prompt_form(self) -> Mode:
    return Dense()

  def of_layer(self, layer: int, num_layers: int) -> Mode:
    for i in self.dense_layers:
      if not -num_layers <= i < num_layers:
        raise ValueError(f"{type(self).__name__}: dense_layers={self.dense_layers} with num_layers={num_layers}; use"
                         f" {-num_layers}..{num_layers - 1}.")
    dense = {i % num_layers for i in self.dense_layers}
    return Dense() if layer in dense else self.without_dense_layers()

  def without_dense_layers(self) -> Mode:
    return dataclasses.replace(self, dense_layers=()) if self.dense_layers else self  # type: ignore[call-arg]

  def sees(self, t: jax.Array, s: jax.Array) -> jax.Array:
    raise ValueError(f"{type(self).__name__} reads what the query chooses, so `visible` cannot say; use `select`,"
                     " or for SnapKV `compress`.")


@dataclasses.dataclass(frozen=True, eq=False)
class BlockMode(SelectingMode):
  """Base of the modes that read whole blocks: block p is positions p * block .. (p+1) * block - 1."""

  also: Mode | None = dataclasses.field(default=None, kw_only=True)  # `mode | self` sets it

  statistic = ""
  forces_own = True  # the query's own block is always read, and counts
  block = 0          # tokens in a block
  keep_first = False  # so is the first block

  @property
  def rule(self) -> Mode | None:
    """A position-only mode whose keys are read besides the chosen blocks, and do not count."""
    return self.also

  def __ror__(self, other: Mode) -> Mode:
    """`StreamingLLM(64) | Quest(1024)`: the union of a position-only mode and a selection, in one softmax."""
    if self.also is not None:
      raise ValueError(f"{other} | {self}: it has also={self.also} already; join the two rules in one mode.")
    return dataclasses.replace(self, also=other)

  def _settle_options(self) -> None:
    super()._settle_options()
    position_only = isinstance(self.also, Mode) and not isinstance(self.also, SelectingMode) and not hasattr(
        self.also, "modes")  # of one layer and of all heads
    if self.also is not None and not position_only:
      raise ValueError(f"{type(self).__name__}: also={self.also!r}; give a position-only mode such as StreamingLLM(8).")

  def blocks_at(self, length: int) -> int:
    """Blocks that the query at position length-1 reads, before what is forced and what there is."""
    raise NotImplementedError

  def forced_at(self, length: int) -> int:
    """How many blocks are forced for the query at position length-1."""
    in_first = length <= self.block
    return int(self.forces_own) + int(self.keep_first and not (in_first and self.forces_own))


def blocks_of(budget: int | float, length: int, block: int) -> int:
  """A number of blocks as it is; a share as ceil(share * length / block), exactly: it is the decimal that it shows."""
  if not isinstance(budget, float):
    return budget
  exact = _exact(budget)
  return -(-exact.numerator * length // (exact.denominator * block))


@functools.lru_cache(maxsize=256)
def _exact(share: float) -> Fraction:
  return Fraction(str(share))


@functools.lru_cache(maxsize=256)
def block_counts(mode: BlockMode, max_length: int) -> np.ndarray:
  """int32 [max_length]: how many blocks the query at each position reads, as far as there are so many."""
  return np.array([max(mode.blocks_at(n), mode.forced_at(n)) for n in range(1, max_length + 1)], np.int32)
