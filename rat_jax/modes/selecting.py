"""What the modes that choose keys by what they hold share: their options, and budgets that are shares."""

from __future__ import annotations

import dataclasses
import functools
import numbers
import typing
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any, ClassVar, Literal

import numpy as np

from rat_jax.attention.terms import Heads, Origin, Placement
from rat_jax.axes import Array
from rat_jax.batch import Batch
from rat_jax.modes.base import Mode
from rat_jax.modes.dense import Dense


@dataclasses.dataclass(frozen=True, eq=False)
class SelectingMode(Mode):
  """The base class of the modes that choose keys by what they hold, with the options of all of them.

  Attributes:
    group: "head" chooses for every query head, "kv" once for the query heads of a key/value head.
    selector: "score" is the method's own; "random" and "oracle" (true attention mass) replace the score alone.
    seed: of the random selector.
  """

  _: dataclasses.KW_ONLY
  group: Literal["head", "kv"] = "head"
  selector: Literal["score", "random", "oracle"] = "score"
  seed: int = 0

  chooses: ClassVar[bool] = True

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
  def draws(self) -> bool:
    return self.selector == "random"

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
    without: dict[str, Any] = {"dense_layers": ()}  # a field of the mode, not of this base
    return dataclasses.replace(self, **without) if self.dense_layers else self

  def choices(self, heads: Heads, batch: Batch, origin: Origin) -> Any:
    return self.select(heads, Placement.of(batch), origin)

  def keys_read(self, heads: Heads, at: Placement, origin: Origin) -> Array:
    tokens: Array = self.select(heads, at, origin).tokens
    return tokens

  def sees(self, t: Array, s: Array) -> Array:
    raise ValueError(f"{type(self).__name__} reads what the query chooses, so `visible` cannot say; use `select`,"
                     " or for SnapKV `compress`.")


def of_share(budget: int | float, length: int, block: int = 1) -> int:
  """How many blocks a budget is: an integer as it is, a share as ceil(share * length / block) of its decimal digits."""
  if not isinstance(budget, float):
    return budget
  exact = _exact(budget)
  return -(-exact.numerator * length // (exact.denominator * block))


@functools.lru_cache(maxsize=256)
def by_length(count: Callable[[Any, int], int], mode: SelectingMode, lengths: range) -> np.ndarray:
  """int32 [lengths]: `count` of the mode at every length, for compiled programs to look up."""
  return np.array([count(mode, length) for length in lengths], np.int32)


@functools.lru_cache(maxsize=256)
def _exact(share: float) -> Fraction:
  return Fraction(str(share))
