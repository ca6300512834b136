"""SnapKV: after the prompt, a cache of the keys that its last queries look at (Li et al., arXiv 2404.14469)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import softmax
from pallas_kernels.attention.masks import to_groups
from pallas_kernels.pattern import seen
from rat_jax.attention.terms import Heads, Held, Origin, Placement
from rat_jax.axes import Array, Keys, Lengths, Mask, Positions, Queries
from rat_jax.batch import Batch
from rat_jax.caches.compressed import Compressed, take_kept
from rat_jax.caches.store import Store
from rat_jax.modes.selecting import SelectingMode, by_length, of_share
from rat_jax.selection import scores as scoring


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kept:
  """What a prompt was compressed to; M is N with group="head" and K with group="kv".

  Attributes:
    positions: int32 [B, M, capacity], ascending; -1 in empty slots, which come last.
    k, v: [B, capacity, M, H], the rows at these positions; zeros in empty slots.
    scores: float32 [B, M, S - obs_window], pooled; -inf where a row has no such position before its window.
    lengths: int32 [B], how many slots of a row hold a key, the same for all heads: `attend`'s `lengths`.
  """

  positions: Array
  k: Array
  v: Array
  scores: Array
  lengths: Lengths


@dataclasses.dataclass(frozen=True, eq=False)
class SnapKV(SelectingMode):
  """The prompt is dense; then the cache keeps the last `obs_window` tokens and the best of the others.

  Attributes:
    capacity: tokens kept of a prompt, window included; a float in (0, 1] is a share of the row's prompt, never
      under obs_window + 1. A prompt of at most `capacity` tokens is kept whole.
    obs_window: last tokens of the prompt, whose attention scores the others; always kept.
    kernel, pool: the scores are pooled over `kernel` (odd) neighbours, by their "avg" or "max".
    dense_layers: layers that keep everything.

  Generated tokens are appended. Raises ValueError for a capacity of at most obs_window or a share outside (0, 1].
  """

  name: ClassVar[str] = "snapkv"
  after_prompt: ClassVar[str] = "SnapKV compresses when the prompt ends"
  capacity: int | float
  obs_window: int = 64
  kernel: int = 5
  pool: Literal["avg", "max"] = "avg"
  dense_layers: tuple[int, ...] = ()

  def __post_init__(self) -> None:
    self._settle_int("obs_window", least=1, fix="use at least 1 token")
    self._settle_int("kernel", least=1, fix="use an odd number of neighbours")
    if self.kernel % 2 == 0:
      raise ValueError(f"SnapKV: kernel={self.kernel}; use an odd number of neighbours.")
    self._settle_choice("pool", ("avg", "max"))
    self._settle_budget("capacity", self.obs_window + 1, f"the obs_window={self.obs_window} tokens are kept and count")
    self._settle_options()

  @classmethod
  def upstream(cls) -> SnapKV:
    """SnapKV with the settings of its authors' scripts."""
    return cls(2048, obs_window=32, kernel=7, pool="max")

  def capacity_at(self, prompt_length: int) -> int:
    """How many tokens are kept of a prompt, if it has so many."""
    return max(of_share(self.capacity, prompt_length), self.obs_window + 1)

  def kept_rows(self, length: int) -> int:
    """The most rows that a prompt in an array of `length` tokens is compressed to."""
    return min(self.capacity_at(length), length)

  # Which keys are kept.

  def keep(self, q_window: Queries, k: Keys, lengths: Lengths, origin: Origin) -> tuple[Positions, Array]:
    """What is kept of prompts of `lengths` [B] tokens, by the votes of their last queries.

    Args:
      q_window: [B, obs_window, N, H], right-aligned; k: [B, S, K, H].

    Returns:
      (positions [B, M, kept_rows(S)], scores [B, M, S - obs_window]) as in `Kept`.
    """
    q_window, k = jax.lax.stop_gradient((q_window, k))
    window, length = q_window.shape[1], k.shape[1]
    scores = self._votes(q_window, k, lengths, origin)
    rows = self.kept_rows(length)
    capacity = jnp.asarray(by_length(SnapKV.capacity_at, self, range(length + 1)))[lengths]
    top, best = jax.lax.top_k(scores, max(rows - window, 0))
    chosen = (jnp.arange(top.shape[-1], dtype=jnp.int32) < (capacity - window)[:, None, None]) & (top > -jnp.inf)
    in_window = jnp.broadcast_to(_window_positions(lengths, window)[:, None], (*scores.shape[:2], window))
    positions = jnp.concatenate([jnp.where(chosen, best, length), jnp.where(in_window >= 0, in_window, length)], axis=2)
    positions = jnp.sort(positions, axis=2)[..., :rows]
    return jnp.where(positions < length, positions, -1), scores

  def _votes(self, q_window: Queries, k: Keys, lengths: Lengths, origin: Origin) -> Array:
    """The scores of the keys before the window: float32 [B, M, S - obs_window]; -inf where there is none."""
    window, (length, kv_heads) = q_window.shape[1], k.shape[1:3]
    earlier = max(length - window, 0)
    real = (jnp.arange(earlier, dtype=jnp.int32) < lengths[:, None] - window)[:, None]
    if self.selector == "random":
      choosing = scoring.heads_that_choose(self, q_window, kv_heads)
      scores = scoring.draw(self, origin, choosing, lengths[:, None], earlier)[:, 0]
    else:
      at = jnp.arange(length, dtype=jnp.int32)
      weights = scoring.dense_weights(scoring.grouped(q_window, kv_heads), k, _window_positions(lengths, window),
                                      jnp.where(at < lengths[:, None], at, -1))
      scores = jnp.sum(weights, axis=1)[..., :earlier]
      if self.selector == "score":
        scores = self._pooled(jnp.where(real[:, None], scores, 0.0))
      scores = scoring.by_group(self, scores[:, None])[:, 0]
    return jnp.where(real, scoring.without_nan(scores), -jnp.inf)

  def _pooled(self, scores: Array) -> Array:
    """The scores [..., S] pooled over their neighbours, stride 1; an average counts the zeros beyond the edges."""
    window, strides = (1,) * (scores.ndim - 1) + (self.kernel,), (1,) * scores.ndim
    pooled: Array
    if self.pool == "max":
      pooled = jax.lax.reduce_window(scores, -jnp.inf, jax.lax.max, window, strides, "SAME")
    else:
      pooled = jax.lax.reduce_window(scores, 0.0, jax.lax.add, window, strides, "SAME") / self.kernel
    return pooled

  # How it attends, caches and counts.

  def check_operator(self) -> None:
    raise ValueError("SnapKV compresses a cache after the prompt and is no attention of its own; use rat_jax.compress,"
                     " then attend to what it kept: attend(q, kept.k, kept.v, Dense(), lengths=kept.lengths).")

  def attend_after_prompt(self, heads: Heads, batch: Batch, origin: Origin) -> Array:
    """Attention to the kept tokens of the prompt and to all after it."""
    assert batch.prompts is not None
    window = heads.last_queries(batch.prompts, self.obs_window).q
    kept, _ = self.keep(window, heads.choosing_keys, batch.prompts, origin)
    rows, length = heads.k.shape[:2]
    row, head = jnp.arange(rows, dtype=jnp.int32)[:, None, None], jnp.arange(kept.shape[1], dtype=jnp.int32)[:, None]
    readable = jnp.zeros((rows, kept.shape[1], length), bool).at[row, head, jnp.where(kept < 0, length, kept)].set(
        True, mode="drop")
    readable |= (batch.positions >= batch.prompts[:, None])[:, None]

    def mask(positions: Positions) -> Mask:
      visible = seen(None, positions, batch.positions)[:, :, None] & readable[:, None]
      return to_groups(visible, heads.k.shape[2])

    heads, at = heads.queries_from(batch.first_step), Placement.of(batch, batch.first_step)
    return softmax.attend_masked(*heads[:3], at.queries, mask)[0]

  def attend_cached(self, heads: Heads, held: Held, positions: Positions, origin: Origin) -> Array:
    raise NotImplementedError("SnapKV reads the cache that it compressed, all of it; see caches/compressed.py.")

  def store(self, max_length: int, prompt_width: int | None = None) -> Store:
    assert prompt_width is not None
    return Compressed(max_length, self, prompt_width)

  def compress(self, heads: Heads, lengths: Lengths, origin: Origin) -> Kept:
    q_window, k, v = heads[:3]
    if k.shape != v.shape or q_window.shape[1] != self.obs_window:
      raise ValueError(f"q_window, k, v have shapes {q_window.shape}, {k.shape}, {v.shape}; give q_window [B,"
                       f" obs_window={self.obs_window}, N, H] and k, v [B, S, K, H].")
    positions, scores = self.keep(q_window, k, lengths, origin)
    empty = self.capacity_at(k.shape[1]) - positions.shape[2]
    positions = jnp.pad(positions, ((0, 0), (0, 0), (0, max(empty, 0))), constant_values=-1)
    k, v = (jnp.swapaxes(take_kept(x, positions), 1, 2) for x in (k, v))
    return Kept(positions, k, v, scores, jnp.sum(positions[:, 0] >= 0, axis=1, dtype=jnp.int32))

  def choices(self, heads: Heads, batch: Batch, origin: Origin) -> Kept:
    assert batch.prompts is not None
    return self.compress(heads.last_queries(batch.prompts, self.obs_window), batch.prompts, origin)

  def most_read(self, lengths: np.ndarray, prompt_length: int | None = None) -> np.ndarray:
    if prompt_length is None:
      raise ValueError(f"mode={self} needs prompt_length: {self.after_prompt}.")
    return self.kept_rows(prompt_length) + lengths - prompt_length


def _window_positions(lengths: Lengths, window: int) -> Positions:
  """int32 [B, window]: where the last queries of prompts of `lengths` [B] tokens stand; negative before the start."""
  return lengths[:, None] - window + jnp.arange(window, dtype=jnp.int32)
