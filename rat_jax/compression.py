"""SnapKV's compression: which tokens of a prompt a cache keeps, and attention to what was kept."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import softmax
from pallas_kernels.gather import take_rows
from rat_jax import layout as layouts, selection
from rat_jax.axes import Array, Keys, Lengths, Positions, Queries
from rat_jax.modes import Mode, SnapKV, mode_of_layer
from rat_jax.selection import Origin


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kept:
  """What a prompt was compressed to; Ksel is N with group="head" and K with group="kv".

  Attributes:
    positions: int32 [B, Ksel, capacity], ascending; -1 in empty slots, which come last.
    k, v: [B, capacity, Ksel, H], the rows at these positions; zeros in empty slots.
    scores: float32 [B, Ksel, S - obs_window], pooled; -inf where a row has no such position before its window.
  """

  positions: Array
  k: Array
  v: Array
  scores: Array


def compress(q_window: Queries, k: Keys, v: Keys, mode: Mode, *, lengths: Lengths | None = None, layer: int = 0,
             row_ids: Array | None = None) -> Kept:
  """The keys and values that SnapKV keeps of a prompt, for any model's arrays.

  Args:
    q_window: [B, obs_window, N, H], the prompt's last queries, right-aligned: entry j is position lengths[b] -
      obs_window + j, entries below 0 are ignored. k, v: [B, S, K, H]. All already rotated.
    mode: a SnapKV; of a PerLayer, its mode number `layer`.
    lengths: int32 [B], the tokens of each prompt; default S.
    layer, row_ids: int32 [B], default 0: what random draws depend on besides seed, head, prompt length and key.

  Raises:
    ValueError: another mode, shapes that do not match.
  """
  mode = mode_of_layer(mode, layer)
  if not isinstance(mode, SnapKV):
    raise ValueError(f"compress: mode={mode}; give a SnapKV.")
  q_window, k, v = jnp.asarray(q_window), jnp.asarray(k), jnp.asarray(v)
  selection.positions_of(q_window, k, None, lengths)
  if k.shape != v.shape or q_window.shape[1] != mode.obs_window:
    raise ValueError(f"q_window, k, v have shapes {q_window.shape}, {k.shape}, {v.shape}; give q_window [B, obs_window="
                     f"{mode.obs_window}, N, H] and k, v [B, S, K, H].")
  length = k.shape[1]
  count = layouts.as_lengths(lengths, k.shape)
  positions, scores = keep(mode, q_window, k, count, selection.origin_of(q_window, layer, row_ids))
  empty = mode.capacity_at(length) - positions.shape[2]
  positions = jnp.pad(positions, ((0, 0), (0, 0), (0, max(empty, 0))), constant_values=-1)
  k, v = (jnp.swapaxes(take_kept(jnp.swapaxes(x, 1, 2), positions), 1, 2) for x in (k, v))
  return Kept(positions, k, v, scores)


def kept_rows(mode: SnapKV, length: int) -> int:
  """The most rows that a prompt in an array of `length` tokens is compressed to."""
  return min(mode.capacity_at(length), length)


def keep(mode: SnapKV, q_window: Queries, k: Keys, lengths: Lengths, origin: Origin) -> tuple[Array, Array]:
  """(positions [B, Ksel, kept_rows], scores [B, Ksel, S - obs_window]) as in `Kept`."""
  q_window, k = jax.lax.stop_gradient((q_window, k))
  batch, window, heads, width = q_window.shape
  length, kv = k.shape[1:3]
  earlier = max(length - window, 0)
  in_window = lengths[:, None] - window + jnp.arange(window, dtype=jnp.int32)
  real = (jnp.arange(earlier) < lengths[:, None] - window)[:, None]
  if mode.selector == "random":
    scores = selection.draw(mode, origin, kv if mode.group == "kv" else heads, lengths[:, None], earlier)[:, 0]
  else:
    grouped = q_window.astype(jnp.float32).reshape(batch, window, kv, heads // kv, width)
    at = jnp.arange(length, dtype=jnp.int32)
    weights = selection.dense_weights(grouped, k, in_window, jnp.where(at < lengths[:, None], at, -1))
    scores = jnp.sum(weights, axis=1)[..., :earlier]
    if mode.selector == "score":
      scores = _pool(mode, jnp.where(real[:, None], scores, 0.0))
    scores = jnp.mean(scores, axis=2) if mode.group == "kv" else scores.reshape(batch, heads, earlier)
  scores = jnp.where(real, scores, -jnp.inf)
  rows = kept_rows(mode, length)
  capacity = jnp.asarray(_capacities(mode, length))[lengths]
  top, best = jax.lax.top_k(scores, max(rows - window, 0))
  chosen = (jnp.arange(top.shape[-1]) < (capacity - window)[:, None, None]) & (top > -jnp.inf)
  in_window = jnp.broadcast_to(in_window[:, None], (*scores.shape[:2], window))
  positions = jnp.concatenate([jnp.where(chosen, best, length), jnp.where(in_window >= 0, in_window, length)], axis=2)
  positions = jnp.sort(positions, axis=2)[..., :rows]
  return jnp.where(positions < length, positions, -1), scores


@functools.lru_cache(maxsize=64)
def _capacities(mode: SnapKV, length: int) -> np.ndarray:
  """int32 [length + 1]: the capacity of a prompt of 0..length tokens."""
  return np.array([mode.capacity_at(n) for n in range(length + 1)], np.int32)


def take_kept(rows: Array, positions: Array) -> Array:
  """rows [B, K, S, H] at positions [B, Ksel, X] of each head: [B, Ksel, X, H]; zeros for position -1."""
  taken = take_rows(rows, jnp.maximum(positions, 0))
  return jnp.where((positions >= 0)[..., None], taken, 0)


def last_queries(q: Queries, lengths: Lengths, window: int) -> Queries:
  """The queries [B, window, N, H] before each row's end, right-aligned; those before its start are arbitrary."""
  at = lengths[:, None] - window + jnp.arange(window)
  return jnp.take_along_axis(q, jnp.clip(at, 0, q.shape[1] - 1)[:, :, None, None], axis=1)


def attend_after_prompt(q: Queries, k: Keys, v: Keys, mode: SnapKV, positions: Positions, prompt_lengths: Lengths,
                        first: int, origin: Origin, select_k: Keys) -> Array:
  """What the queries from row `first` on read after the prompt: its kept tokens, and all after it; float32."""
  window = last_queries(q, prompt_lengths, mode.obs_window)
  kept, _ = keep(mode, window, select_k, prompt_lengths, origin)
  batch, length = k.shape[:2]
  row, head = jnp.arange(batch)[:, None, None], jnp.arange(kept.shape[1])[:, None]
  readable = jnp.zeros((batch, kept.shape[1], length), bool).at[row, head, jnp.where(kept < 0, length, kept)].set(
      True, mode="drop")
  readable |= (positions >= prompt_lengths[:, None])[:, None]

  def mask(query):
    causal = (positions >= 0)[:, None] & (positions[:, None] <= query["position"][:, :, None])
    return selection.to_groups(causal[:, :, None] & readable[:, None], k.shape[2])

  return softmax.attend_masked(q[:, first:], k, v, {"position": positions[:, first:]}, mask)[0]


def _pool(mode: SnapKV, scores: Array) -> Array:
  """Pooled over neighbours [..., S], stride 1; an average counts the zeros beyond the edges."""
  window, strides = (1,) * (scores.ndim - 1) + (mode.kernel,), (1,) * scores.ndim
  if mode.pool == "max":
    return jax.lax.reduce_window(scores, -jnp.inf, jax.lax.max, window, strides, "SAME")
  return jax.lax.reduce_window(scores, 0.0, jax.lax.add, window, strides, "SAME") / mode.kernel
