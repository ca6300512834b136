"""MoBA: blocks of keys by the mean of their keys (Lu et al., arXiv 2502.13189), in prompts and in decoding."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from rat_jax.axes import Array, Keys
from rat_jax.modes.base import Mode
from rat_jax.modes.block_mode import BlockMode
from rat_jax.modes.selecting import of_share
from rat_jax.selection.summary import Product, Summaries, Summary


class Mean(Summary):
  """The mean of the keys, kept as their sum."""

  def of_keys(self, k: Keys) -> Summaries:
    return (k.astype(jnp.float32),)

  def join(self, earlier: Summaries, later: Summaries) -> Summaries:
    return (earlier[0] + later[0],)

  def score(self, product: Product, q: Array, summaries: Summaries, count: Array | int) -> Array:
    return product(q, summaries[0]) / count


@dataclasses.dataclass(frozen=True, eq=False)
class MoBA(BlockMode):
  """Reads the `top_k` best blocks by q . mean(keys). The defaults are those of arXiv 2605.28640.

  Attributes:
    top_k: blocks, the query's own and the first one included; a float in (0, 1] is a share of the tokens so far.
    block: tokens in a block.
    keep_first: the first block is always read, and counts.
    dense_layers: layers that stay dense; negative ones count from the end.

  Prompts run under the mode itself. Raises ValueError for a budget below the forced blocks or a share outside (0, 1].
  """

  name: ClassVar[str] = "moba"
  summary = Mean()
  top_k: int | float
  block: int = 64
  keep_first: bool = True
  dense_layers: tuple[int, ...] = ()

  def __post_init__(self) -> None:
    self._settle_int("block", least=1, fix="use at least 1 token")
    self._settle_bool("keep_first")
    self._settle_budget("top_k", 1 + self.keep_first, "the own block is forced, and with keep_first the first one")
    self._settle_options()

  @classmethod
  def upstream(cls, top_k: int, block: int = 4096) -> MoBA:
    """MoBA as its authors run it: no first block forced, the last three layers dense.

    upstream(1) reads the own block alone, as `moba_naive` does (their `moba_efficient` is dense there).
    """
    return cls(top_k, block, keep_first=False, dense_layers=(-3, -2, -1))

  @property
  def prompt_form(self) -> Mode:
    return self.without_dense_layers()

  def blocks_at(self, length: int) -> int:
    return of_share(self.top_k, length, self.block)
