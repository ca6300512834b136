"""TopK: the best single keys of every query by their true score, the upper bound of what choosing keys can reach.

It scores all keys, so it saves no time. Papers on sparse attention draw it beside methods that estimate scores, such as
Quest: what a method loses to TopK it loses by its estimate, what TopK loses to dense attention it loses by the budget.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import softmax
from pallas_kernels.attention.masks import to_groups
from pallas_kernels.pattern import Pattern, seen
from rat_jax.attention.terms import Heads, Held, Origin, Placement
from rat_jax.axes import Array, Keys, Mask, Positions, Queries
from rat_jax.modes.selecting import SelectingMode, by_length, of_share
from rat_jax.selection import scores as scoring
from rat_jax.selection.attention import joined
from rat_jax.selection.choice import Selection


@dataclasses.dataclass(frozen=True, eq=False)
class TopK(SelectingMode):
  """Reads the keys with the largest q . k; prompts are dense, and the cache is full.

  Attributes:
    budget: keys, those of the window and the sinks included; a float in (0, 1] is a share of the keys so far, rounded
      up. Ties go to the lower index.
    window, sinks: the `window` tokens before the query and itself, and the first `sinks`, are always read, and count.
    dense_layers: layers that stay dense; negative ones count from the end.

  The oracle is the score itself. Raises ValueError for a budget below window + 1 + sinks or a share outside (0, 1].
  """

  name: ClassVar[str] = "topk"
  budget: int | float
  window: int = 0
  sinks: int = 0
  dense_layers: tuple[int, ...] = ()

  def __post_init__(self) -> None:
    self._settle_int("window", least=0, fix="use 0 (the query's own token) or more tokens before it")
    self._settle_int("sinks", least=0, fix="use 0 or more first tokens")
    self._settle_budget("budget", self.window + 1 + self.sinks, "window + 1 + sinks are always read and count")
    self._settle_options()

  # What is chosen.

  @property
  def forced(self) -> Pattern:
    """The keys that every query reads whatever their scores: the window and the sinks."""
    return Pattern(None, self.window, self.sinks)

  def keys_at(self, length: int) -> int:
    """How many keys the query at position length-1 reads."""
    return min(max(of_share(self.budget, length), self.window + 1 + self.sinks), length)

  def _counts(self, length: int) -> np.ndarray:
    """int32 [length]: how many keys the query at each position reads."""
    return by_length(TopK.keys_at, self, range(1, length + 1))

  def _scores(self, q: Queries, k: Keys, positions: Positions, origin: Origin) -> Array:
    """float32 [B, T, M, S], every key's own score or draw; -inf for keys after the query."""
    q, k = jax.lax.stop_gradient((q, k))
    kv_heads, count = k.shape[2], k.shape[1]
    if self.selector == "random":
      scores = scoring.draw(self, origin, scoring.heads_that_choose(self, q, kv_heads), positions, count)
    else:
      scores = scoring.by_group(self, scoring.product("btkgh,bskh->btkgs")(scoring.grouped(q, kv_heads), k))
    visible = seen(None, positions, jnp.arange(count, dtype=jnp.int32))[:, :, None]
    return jnp.where(visible, scoring.without_nan(scores), -jnp.inf)

  def _read(self, scores: Array, positions: Positions) -> Mask:
    """Which keys are read: bool [B, T, M, S]. Each query has a threshold; of keys that equal it the first are read."""
    count = scores.shape[-1]
    forced = seen(self.forced, positions, jnp.arange(count, dtype=jnp.int32))[:, :, None]
    priority = jnp.where(forced, jnp.inf, scores)
    allowed = jnp.asarray(self._counts(count))[jnp.clip(positions, 0, count - 1)][:, :, None, None]
    top, _ = jax.lax.top_k(priority, int(self._counts(count).max()))
    least = jnp.take_along_axis(top, jnp.broadcast_to(allowed - 1, (*top.shape[:3], 1)), axis=-1)
    above, level = priority > least, priority == least
    left = allowed - jnp.sum(above, axis=-1, keepdims=True)
    read = above | (level & (jnp.cumsum(level, axis=-1) <= left))
    return read & (priority > -jnp.inf)

  # How it attends and counts.

  def attend(self, heads: Heads, at: Placement, origin: Origin) -> Array:
    keys = heads.choosing_keys

    def mask(query: dict[str, Array]) -> Mask:
      scores = self._scores(query["q"], keys, query["positions"], origin)
      return to_groups(self._read(scores, query["positions"]), heads.k.shape[2])

    out, _ = softmax.attend_masked(*heads[:3], {"q": heads.q, "positions": at.queries}, mask)
    return out.astype(heads.q.dtype)

  def attend_cached(self, heads: Heads, held: Held, positions: Positions, origin: Origin) -> Array:
    return self.attend(*joined(heads, held, positions), origin).astype(jnp.float32)

  def select(self, heads: Heads, at: Placement, origin: Origin) -> Selection:
    """The keys that every query chooses, as a Selection of blocks of one key each, so that P = S."""
    keys, count = heads.choosing_keys, heads.k.shape[1]

    def rows(query: dict[str, Array]) -> Selection:
      scores = self._scores(query["q"], keys, query["positions"], origin)
      read, most = self._read(scores, query["positions"]), int(self._counts(count).max())
      blocks = jnp.sort(jnp.where(read, jnp.arange(count, dtype=jnp.int32), count), axis=-1)[..., :most]
      return Selection(blocks, blocks < count, scores, jnp.sum(read, axis=-1, dtype=jnp.int32))

    return softmax.by_chunks(rows, {"q": heads.q, "positions": at.queries})

  def most_read(self, lengths: np.ndarray, prompt_length: int | None = None) -> np.ndarray:
    return np.array([self.keys_at(int(length)) for length in lengths])
