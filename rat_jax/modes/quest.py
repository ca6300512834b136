"""Quest: blocks of keys by an upper bound of their scores (Tang et al., arXiv 2406.10774).

A block keeps the smallest and the largest key of every channel; its score is the largest q . k that a key between them
could have. The query's own block is always read, and by default the first one.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp

from rat_jax.axes import Array, Keys
from rat_jax.modes.block_mode import BlockMode
from rat_jax.modes.selecting import of_share
from rat_jax.selection.summary import Product, Summaries, Summary


class MinMax(Summary):
  """The smallest and the largest key of every channel: an upper bound of q . k."""

  def of_keys(self, k: Keys) -> Summaries:
    return k, k

  def join(self, earlier: Summaries, later: Summaries) -> Summaries:
    return jnp.minimum(earlier[0], later[0]), jnp.maximum(earlier[1], later[1])

  def score(self, product: Product, q: Array, summaries: Summaries, count: Array | int) -> Array:
    """sum_d max(q_d min_d, q_d max_d): positive channels meet the maximum, negative ones the minimum."""
    del count
    smallest, largest = summaries
    return product(jnp.maximum(q, 0), largest) + product(jnp.minimum(q, 0), smallest)


@dataclasses.dataclass(frozen=True, eq=False)
class Quest(BlockMode):
  """Reads the best blocks by min and max of their keys. The defaults are those of arXiv 2605.28640.

  Attributes:
    budget: tokens, forced blocks included: n tokens are ceil(n / block) blocks; a float in (0, 1] is the share of
      the tokens so far.
    block: tokens in a block.
    keep_first: the first block is always read, and counts.
    dense_layers: layers that stay dense; negative ones count from the end.
    rounding: "up" as above; "kernel" and "eval" as the original code does (`upstream`).

  Raises ValueError for a budget below the forced blocks or a share outside (0, 1].
  """

  name: ClassVar[str] = "quest"
  summary = MinMax()
  budget: int | float
  block: int = 64
  keep_first: bool = True
  dense_layers: tuple[int, ...] = ()
  rounding: Literal["up", "kernel", "eval"] = dataclasses.field(default="up", kw_only=True)

  def __post_init__(self) -> None:
    self._settle_int("block", least=1, fix="use at least 1 token")
    self._settle_bool("keep_first")
    self._settle_choice("rounding", ("up", "kernel", "eval"))
    least = 1 if self.rounding == "eval" else self.block * (1 + self.keep_first)
    if self.rounding == "up":
      least -= self.block - 1
    self._settle_budget("budget", least, f"the forced blocks take {1 + self.keep_first} blocks of {self.block}")
    if self.rounding != "up" and isinstance(self.budget, float):
      raise ValueError(f"Quest: budget={self.budget} with rounding={self.rounding!r}; the original code takes tokens.")
    self._settle_options()

  @classmethod
  def upstream(cls, budget: int, page: int = 16, path: Literal["kernel", "eval"] = "kernel") -> Quest:
    """Quest as its authors' code has it: budgets round down, no first page is forced, two dense layers.

    path="kernel" (their CUDA path): budget // page pages, the own one forced. path="eval" (their evaluation):
    max(3, min(T, budget) // page) pages and none forced, so that a page is dropped although everything fits when T
    is no multiple of the page, and the newest token can be left out.
    """
    return cls(budget, page, keep_first=False, dense_layers=(0, 1), rounding=path)

  @property
  def forces_own(self) -> bool:
    return self.rounding != "eval"

  def blocks_at(self, length: int) -> int:
    if isinstance(self.budget, float):
      return of_share(self.budget, length, self.block)
    if self.rounding == "eval":
      return max(3, min(length, self.budget) // self.block)
    return self.budget // self.block if self.rounding == "kernel" else -(-self.budget // self.block)
