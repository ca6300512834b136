"""The modes as operators on plain arrays, for other people's models and for tests: `attend`, `select`, `compress`."""

from __future__ import annotations

import jax.numpy as jnp

from rat_jax import checks
from rat_jax.attention.terms import Heads, Origin, Placement
from rat_jax.axes import Array, ArrayLike, Queries
from rat_jax.batch import consecutive, places
from rat_jax.modes import Mode
from rat_jax.modes.snapkv import Kept
from rat_jax.plan import mode_of_layer, refuse_packed
from rat_jax.selection.choice import Selection


def attend(q: ArrayLike, k: ArrayLike, v: ArrayLike, mode: Mode, *, q_positions: ArrayLike | None = None,
           lengths: ArrayLike | None = None, segment_ids: ArrayLike | None = None, layer: int = 0,
           row_ids: ArrayLike | None = None) -> Array:
  """Attention of q to k, v under a mode, for any model's arrays. Every query is a step of its own.

  Args:
    q: [B, T, N, H]; k, v: [B, S, K, H]; already rotated and, for RAT+, already through the memory.
    mode: who sees whom; of a PerLayer, its mode number `layer`; `dense_layers` are ignored.
    q_positions: int32 [B, T]; default: the last T positions of every row, so T=1 is a decode step. For a mode that
      chooses, one past the row's keys counts as that of its last key.
    lengths: int32 [B], the keys that a row has; default S.
    segment_ids: int [B, T] for packed rows, T = S; positions restart in every document.
    layer, row_ids: int32 [B], default 0: what random draws depend on besides seed, head, position and block.

  Returns:
    [B, T, N, H] in q's type.

  Raises:
    ValueError: shapes or types that do not match, more queries than keys without `q_positions`, `segment_ids` with
      `q_positions` or `lengths`, a PerLayer without such a layer, SnapKV (`compress` serves it).
    NotImplementedError: packed rows under a mode that chooses blocks.
  """
  mode, heads = mode_of_layer(mode, layer), Heads(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v))
  at = _placement(mode, heads, q_positions, lengths)
  shape, whole = heads.k.shape, heads.q.shape[1] == heads.k.shape[1] and q_positions is None and lengths is None
  mode.check_heads(shape[2])
  mode.check_operator()
  if segment_ids is not None:
    if not whole:
      raise ValueError("segment_ids serve whole sequences (T = S) without q_positions and lengths; mark padding by"
                       " segment id 0.")
    refuse_packed(mode)
  if whole:
    at = Placement.of(places(shape[:2], segment_ids=segment_ids))
  return mode.attend(heads, at, _origin(heads.q, layer, row_ids)).astype(heads.q.dtype)


def select(q: ArrayLike, k: ArrayLike, mode: Mode, *, q_positions: ArrayLike | None = None,
           lengths: ArrayLike | None = None, layer: int = 0, row_ids: ArrayLike | None = None) -> Selection:
  """The blocks that every query reads under Quest, MoBA or DilatedTopK (under TopK: keys), for any model's arrays.

  Args:
    q: [B, T, N, H]; k: [B, S, K, H]; already rotated and, for RAT+, already through the memory.
    mode: of a PerLayer, its mode number `layer`; `dense_layers` are ignored.
    q_positions: int32 [B, T]; default: the last T positions of every row. One past the row's keys counts as that of
      its last key.
    lengths: int32 [B], the keys that a row has; default S.
    layer, row_ids: int32 [B], default 0: what random draws depend on besides seed, head, position and block.

  Raises:
    ValueError: a mode that chooses no blocks, shapes that do not match.
  """
  mode = mode_of_layer(mode, layer)
  heads = Heads(jnp.asarray(q), jnp.asarray(k), jnp.asarray(k))
  at = _placement(mode, heads, q_positions, lengths)
  return mode.select(heads, at, _origin(heads.q, layer, row_ids))


def compress(q_window: ArrayLike, k: ArrayLike, v: ArrayLike, mode: Mode, *, lengths: ArrayLike | None = None,
             layer: int = 0, row_ids: ArrayLike | None = None) -> Kept:
  """The keys and values that SnapKV keeps of a prompt, for any model's arrays.

  A step after the prompt is then `attend(q, kept.k, kept.v, Dense(), lengths=kept.lengths)`.

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
  heads = Heads(jnp.asarray(q_window), jnp.asarray(k), jnp.asarray(v))
  checks.check_heads_fit(heads.q, heads.k, heads.v)
  return mode.compress(heads, checks.as_lengths(lengths, heads.k.shape), _origin(heads.q, layer, row_ids))


def _placement(mode: Mode, heads: Heads, q_positions: ArrayLike | None, lengths: ArrayLike | None) -> Placement:
  """Where an operator's queries and keys stand. Raises ValueError for misshapen arguments."""
  checks.check_heads_fit(heads.q, heads.k, heads.v)
  q, k = heads.q, heads.k
  count = checks.as_lengths(lengths, k.shape)
  if q_positions is None:
    if q.shape[1] > k.shape[1]:
      raise ValueError(f"q has {q.shape[1]} queries and k {k.shape[1]} keys, so the first queries stand before every"
                       " key; swap q and k if they are mixed up, or give q_positions.")
    q_positions = count[:, None] + jnp.arange(-q.shape[1], 0, dtype=jnp.int32)
  q_positions = jnp.asarray(checks.as_integers("q_positions", q_positions, q.shape[:2]), jnp.int32)
  if mode.chooses:  # beyond the last key of a row there is nothing to choose
    q_positions = jnp.minimum(q_positions, count[:, None] - 1)
  return Placement(q_positions, consecutive(jnp.zeros_like(count), count, k.shape[1]), isolated=True)


def _origin(q: Queries, layer: int, row_ids: ArrayLike | None) -> Origin:
  return Origin(checks.as_row_ids(row_ids, q.shape[0]), layer)
