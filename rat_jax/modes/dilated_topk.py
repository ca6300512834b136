"""Dilation x top-k: the representatives of all blocks of D, and the best blocks in full (arXiv 2602.18196).

The union of Dilated(D, window, sinks) and a selection of blocks of D tokens.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from rat_jax.axes import Array, Keys, Positions
from rat_jax.modes.base import Mode
from rat_jax.modes.block_mode import BlockMode
from rat_jax.modes.dilated import Dilated
from rat_jax.modes.moba import Mean
from rat_jax.modes.quest import MinMax
from rat_jax.modes.selecting import of_share
from rat_jax.selection.summary import Product, Summaries, Summary


class Representative(Summary):
  """The last key of the block: after the memory it carries what the block held. It lies among a cache's keys."""

  cached = False

  def of_keys(self, k: Keys) -> Summaries:
    return (k,)

  def join(self, earlier: Summaries, later: Summaries) -> Summaries:
    return later

  def running(self, block: int, k: Keys, positions: Positions | None = None, before: Summaries | None = None
              ) -> Summaries:
    return (k,)

  def score(self, product: Product, q: Array, summaries: Summaries, count: Array | int) -> Array:
    return product(q, summaries[0])


_SUMMARIES = {"representative": Representative(), "minmax": MinMax(), "mean": Mean()}


@dataclasses.dataclass(frozen=True, eq=False)
class DilatedTopK(BlockMode):
  """Reads what Dilated(dilation, window, sinks) does, and `top_k` blocks of `dilation` tokens in full.

  Attributes:
    dilation: D, the distance of the representatives and the size of a block.
    top_k: blocks in full, the query's own included (up to the query); a float in (0, 1] is a share of the tokens.
    window, sinks: as in Dilated; they and the representatives come on top and do not count.
    score: by the block's representative (its last key; the query's own token in its own block), by min and max, or
      by the mean of its keys.
    dense_layers: layers that stay dense.

  The cache is full: this saves reads, not storage. Raises ValueError as Dilated and MoBA do.
  """

  name: ClassVar[str] = "dilated_topk"
  dilation: int
  top_k: int | float
  window: int = 0
  sinks: int = 0
  score: Literal["representative", "minmax", "mean"] = "representative"
  dense_layers: tuple[int, ...] = ()

  def __post_init__(self) -> None:
    self._settle_int("dilation", least=1, fix="use at least 1 token")
    self._settle_int("window", least=0, fix="use 0 (the query's own token) or more tokens before it")
    self._settle_int("sinks", least=0, fix="use 0 or more first tokens")
    self._settle_budget("top_k", 1, "the own block is forced and counts")
    self._settle_choice("score", tuple(_SUMMARIES))
    self._settle_options()
    if self.also is not None:
      raise ValueError(f"DilatedTopK: also={self.also}; its own rule is Dilated(dilation, window, sinks).")

  @property
  def block(self) -> int:  # type: ignore[override]  # in other modes it is a field, so no property of the base
    return self.dilation

  @property
  def summary(self) -> Summary:
    return _SUMMARIES[self.score]

  @property
  def rule(self) -> Mode:
    return Dilated(self.dilation, self.window, self.sinks)

  def blocks_at(self, length: int) -> int:
    return of_share(self.top_k, length, self.block)
