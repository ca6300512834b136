"""Choosing blocks of keys by the query: statistics, scores, and the shared rule that forces, groups and picks.

A block p of size `block` holds the keys at positions p * block .. (p+1) * block - 1. Of a query at position t, blocks
before its own are complete, its own one counts up to t, later ones do not exist. Scores are float32 at the highest
precision of matrix products; nothing here is differentiated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import softmax
from rat_jax import layout as layouts
from rat_jax.axes import Array, Keys, Lengths, Positions, Queries
from rat_jax.modes import BlockMode, Mode, mode_of_layer, visible
from rat_jax.modes.block_mode import SelectingMode, block_counts

Statistics = tuple[Array, ...]  # of blocks: [B, K, P, H] each; of a query's own block: [B, T, K, H] each


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selection:
  """What queries chose. N is K where the mode chooses once per key/value head; P = ceil(S / block).

  Attributes:
    blocks: int32 [B, T, N, n], ascending; invalid entries come last and are P.
    valid: bool [B, T, N, n].
    scores: float32 [B, T, N, P], every block's own score, of forced ones too; -inf where none may be chosen.
    tokens: int32 [B, T, N], the keys that are read, those of a position-only rule included.
  """

  blocks: Array
  valid: Array
  scores: Array
  tokens: Array


class Origin(NamedTuple):
  """Where random draws come from, besides the mode's seed: the rows' numbers int32 [B] and the layer's."""

  row_ids: Array
  layer: Array | int


class Statistic(NamedTuple):
  """How blocks are summarized. `combine` is associative; `score` reduces over H by `product`."""

  lift: Callable[[Array], Statistics]
  combine: Callable[[Statistics, Statistics], Statistics]
  score: Callable[[Callable[[Array, Array], Array], Array, Statistics, Any], Array]  # (product, q, statistics, count)


def _minmax_score(product, q, statistics, count):
  """sum_d max(q_d min_d, q_d max_d): positive channels meet the maximum, negative ones the minimum."""
  del count
  return product(jnp.maximum(q, 0), statistics[1]) + product(jnp.minimum(q, 0), statistics[0])


STATISTICS = {
    "minmax": Statistic(lambda k: (k, k), lambda a, b: (jnp.minimum(a[0], b[0]), jnp.maximum(a[1], b[1])),
                        _minmax_score),
    "mean": Statistic(lambda k: (k.astype(jnp.float32),), lambda a, b: (a[0] + b[0],),
                      lambda product, q, statistics, count: product(q, statistics[0]) / count),
    "last": Statistic(lambda k: (k,), lambda a, b: b, lambda product, q, statistics, count: product(q, statistics[0])),
}


def select(q: Queries, k: Keys, mode: Mode, *, q_positions: Positions | None = None, lengths: Lengths | None = None,
           layer: int = 0, row_ids: Array | None = None) -> Selection:
  """The blocks that every query reads under Quest, MoBA or DilatedTopK, for any model's arrays.

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
  if not isinstance(mode, BlockMode):
    raise ValueError(f"select: mode={mode} chooses no blocks; give Quest, MoBA or DilatedTopK (SnapKV: `compress`).")
  q, k = jnp.asarray(q), jnp.asarray(k)
  q_positions, k_positions = positions_of(q, k, q_positions, lengths)
  q_positions = within(q_positions, k_positions)
  return select_rows(mode, q, k, q_positions, k_positions, origin_of(q, layer, row_ids))


def positions_of(q: Queries, k: Keys, q_positions: Positions | None, lengths: Lengths | None
                 ) -> tuple[Positions, Positions]:
  """Positions of queries [B, T] and keys [B, S] of an operator's arrays. Raises ValueError for misshapen arguments."""
  fits = q.ndim == k.ndim == 4 and 0 not in (*q.shape, *k.shape) and q.shape[0] == k.shape[0] and (
      q.shape[3] == k.shape[3] and q.shape[2] % k.shape[2] == 0)
  if not fits:
    raise ValueError(f"q, k have shapes {q.shape}, {k.shape}; give q [B, T, N, H] and k [B, S, K, H] with N a multiple"
                     " of K, and at least one of everything.")
  count = layouts.as_lengths(lengths, k.shape)
  if q_positions is None:
    q_positions = count[:, None] + jnp.arange(-q.shape[1], 0, dtype=jnp.int32)
  q_positions = jnp.asarray(layouts.as_integers("q_positions", q_positions, q.shape[:2]), jnp.int32)
  return q_positions, layouts.consecutive(jnp.zeros_like(count), count, k.shape[1]).positions


def within(q_positions: Positions, k_positions: Positions) -> Positions:
  """Positions of queries that choose, none past the last key of its row: beyond it there are no blocks."""
  return jnp.minimum(q_positions, jnp.max(k_positions, axis=1, keepdims=True))


def origin_of(q: Queries, layer: Array | int, row_ids: Array | None) -> Origin:
  """The origin of random draws of a batch like q's; row_ids default to zeros."""
  return Origin(layouts.as_row_ids(row_ids, q.shape[0]), layer)


def select_rows(mode: BlockMode, q: Queries, k: Keys, q_positions: Positions, k_positions: Positions, origin: Origin
                ) -> Selection:
  """As `select`, for queries at known positions and keys at 0..S-1; `k_positions` says which of these are real."""
  statistics, own = own_statistics(mode, k, q_positions)

  def rows(query):
    scores = score_blocks(mode, query, statistics, (k, k_positions), origin)
    blocks, valid = pick(mode, scores, query["position"], k.shape[1])
    seen = seen_keys(mode, blocks, scores.shape[-1], query["position"], k_positions)
    return Selection(blocks, valid, scores, jnp.sum(seen, axis=-1, dtype=jnp.int32))

  length = q.shape[1]
  size = softmax.chunk_size(length, softmax.CHUNK)
  query = jax.tree.map(lambda x: softmax.split(x, size, fill=-1), {"q": q, "own": own, "position": q_positions})
  return jax.tree.map(lambda x: softmax.join(x, length), softmax.map_chunks(rows, query))


def running(mode: BlockMode, k: Keys, positions: Positions | None = None, before: Statistics | None = None
            ) -> Statistics:
  """The statistics of every token's own block up to that token: [B, T, K, H] each.

  Args:
    k: [B, T, K, H], at consecutive `positions` [B, T]; default 0..T-1.
    before: [B, K, H] each, the statistics so far of the block that the first token is in, if it is not its first.
  """
  statistic = STATISTICS[mode.statistic]
  if positions is None:
    positions = jnp.broadcast_to(jnp.arange(k.shape[1], dtype=jnp.int32), k.shape[:2])
  values, restart = statistic.lift(k), (positions % mode.block == 0)[:, :, None, None]
  if mode.statistic == "last":
    return values
  if before is None:
    restart = restart.at[:, 0].set(True)
  else:
    first = statistic.combine(tuple(b.astype(v.dtype) for b, v in zip(before, values, strict=True)),
                              tuple(v[:, 0] for v in values))
    values = tuple(v.at[:, 0].set(jnp.where(restart[:, 0], v[:, 0], f)) for v, f in zip(values, first, strict=True))

  def combine(a, b):
    joined = statistic.combine(a[1], b[1])
    return a[0] | b[0], tuple(jnp.where(b[0], new, both) for new, both in zip(b[1], joined, strict=True))

  return jax.lax.associative_scan(combine, (restart, values), axis=1)[1]


def block_statistics(mode: BlockMode, k: Keys, lengths: Lengths | None = None,
                     at_token: Statistics | None = None) -> Statistics:
  """The statistics of all blocks of keys [B, S, K, H] at positions 0..S-1: [B, K, P, H] each.

  Args:
    lengths: int32 [B], the keys that count; default S.
    at_token: `running` of these keys, where it is known.
  """
  batch, length = k.shape[:2]
  at_token = running(mode, k) if at_token is None else at_token
  ends = jnp.arange(1, -(-length // mode.block) + 1, dtype=jnp.int32) * mode.block
  count = jnp.full((batch, 1), length, jnp.int32) if lengths is None else lengths[:, None]
  at = jnp.maximum(jnp.minimum(ends, count) - 1, 0)[:, :, None, None]
  return tuple(jnp.swapaxes(jnp.take_along_axis(x, at, axis=1), 1, 2) for x in at_token)


def own_statistics(mode: BlockMode, k: Keys, q_positions: Positions) -> tuple[Statistics, Statistics]:
  """(of all blocks [B, K, P, H] each, of the queries' own blocks up to the query [B, T, K, H] each); keys at 0..S-1."""
  at_token = running(mode, k)
  at = jnp.clip(q_positions, 0, k.shape[1] - 1)[:, :, None, None]
  return block_statistics(mode, k, at_token=at_token), tuple(jnp.take_along_axis(x, at, axis=1) for x in at_token)


def continued(mode: BlockMode, statistics: Statistics, k: Keys, positions: Positions, lengths: Lengths) -> Statistics:
  """`running` of new keys [B, T, K, H] that follow `lengths` [B] tokens with these statistics."""
  at = jnp.minimum(lengths // mode.block, statistics[0].shape[2] - 1)[:, None, None, None]
  before = tuple(jnp.take_along_axis(x, at, axis=2)[:, :, 0] for x in statistics)
  return running(mode, k, positions, before)


def score_blocks(mode: BlockMode, query: dict[str, Any], statistics: Statistics, keys: tuple[Keys, Positions],
                 origin: Origin) -> Array:
  """The scores of all blocks, float32 [B, T, N or K, P]; -inf for blocks that do not exist yet.

  Args:
    query: of T queries "q" [B, T, N, H], "position" [B, T], and "own", the statistics of their own blocks.
    statistics: of the complete blocks.
    keys: all keys and their positions, which the oracle looks at.
  """
  query, statistics, keys = jax.lax.stop_gradient((query, statistics, keys))
  q, t = query["q"].astype(jnp.float32), query["position"]
  kv, count = statistics[0].shape[1:3]
  batch, length, heads, width = q.shape
  grouped = q.reshape(batch, length, kv, heads // kv, width)
  own_block = (t // mode.block)[:, :, None, None]
  index = jnp.arange(count, dtype=jnp.int32)
  if mode.selector == "random":
    scores = draw(mode, origin, kv if mode.group == "kv" else heads, t, count)
  elif mode.selector == "oracle":
    scores = _group(mode, _mass(mode, grouped, keys, t, count))
  else:
    score, own_count = STATISTICS[mode.statistic].score, (t % mode.block + 1)[:, :, None, None]
    of_blocks = score(_product("btkgh,bkph->btkgp"), grouped, statistics, mode.block)
    of_own = score(_product("btkgh,btkh->btkg"), grouped, query["own"], own_count)
    scores = _group(mode, jnp.where(index == own_block[..., None], of_own[..., None], of_blocks))
  return jnp.where(index <= own_block, scores, -jnp.inf)


def pick(mode: BlockMode, scores: Array, positions: Positions, max_length: int) -> tuple[Array, Array]:
  """(blocks, valid): the forced blocks and the best of the others, as many as the mode reads; ties to the lower index.

  Args:
    scores: [B, T, N, P]; positions: [B, T], below `max_length`.
  """
  count, own_block = scores.shape[-1], (positions // mode.block)[:, :, None, None]
  index, most = jnp.arange(count, dtype=jnp.int32), block_counts(mode, max_length)
  forced = (index == own_block) & mode.forces_own
  if mode.keep_first:
    forced |= index == 0
  priority = jnp.where(forced & (scores > -jnp.inf), jnp.inf, scores)
  top, blocks = jax.lax.top_k(priority, min(count, int(most.max())))
  allowed = jnp.asarray(most)[jnp.clip(positions, 0, max_length - 1)][:, :, None, None]
  valid = (jnp.arange(blocks.shape[-1]) < allowed) & (top > -jnp.inf)
  blocks = jnp.sort(jnp.where(valid, blocks, count), axis=-1)
  return blocks, blocks < count


def seen_keys(mode: BlockMode, blocks: Array, count: int, q_positions: Positions, k_positions: Positions) -> Array:
  """Which keys are read: bool [B, T, N, S], from the chosen blocks [B, T, N, n] of `count` and the mode's rule."""
  seen = is_chosen(blocks, count, jnp.maximum(k_positions, 0)[:, None, None, :] // mode.block)
  t, s = q_positions[:, :, None, None], k_positions[:, None, None, :]
  if mode.rule is not None:
    seen |= visible(mode.rule, q_positions, k_positions)[:, :, None]
  return seen & (s >= 0) & (s <= t)


def is_chosen(blocks: Array, count: int, of: Array) -> Array:
  """Whether the blocks `of` [B or 1, T or 1, N or 1, X] are among the chosen ones [B, T, N, n]: bool [B, T, N, X]."""
  chosen = jnp.any(blocks[..., None] == jnp.arange(count, dtype=jnp.int32), axis=-2)
  return jnp.take_along_axis(chosen, jnp.broadcast_to(of, (*chosen.shape[:3], of.shape[3])), axis=-1)


def to_groups(seen: Array, kv_heads: int) -> Array:
  """bool [B, T, N or K, S] as a mask [B, K, G or 1, T, S] of `pallas_kernels.softmax`."""
  seen = jnp.moveaxis(seen, 2, 1)
  return seen.reshape(seen.shape[0], kv_heads, -1, *seen.shape[2:])


def draw(mode: SelectingMode, origin: Origin, heads: int, positions: Positions, count: int) -> Array:
  """Uniform numbers [B, T, heads, count] that depend on seed, row, layer, head, position and index alone."""
  fold = jax.random.fold_in

  def of_row(row, at):
    row_key = fold(fold(jax.random.key(mode.seed), row), origin.layer)
    head_keys = jax.vmap(lambda head: fold(row_key, head))(jnp.arange(heads))

    def of_query(key, position):
      key = fold(key, position)
      return jax.vmap(lambda i: jax.random.uniform(fold(key, i)))(jnp.arange(count))

    return jax.vmap(lambda t: jax.vmap(lambda key: of_query(key, t))(head_keys))(jnp.maximum(at, 0))

  return jax.vmap(of_row)(origin.row_ids, positions)


def _product(subscripts: str) -> Callable[[Array, Array], Array]:
  return lambda q, x: jnp.einsum(subscripts, q, x.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def _group(mode: BlockMode, scores: Array) -> Array:
  """[B, T, K, G, P] -> one score per query head, or their mean over the group."""
  return jnp.mean(scores, axis=3) if mode.group == "kv" else scores.reshape(*scores.shape[:2], -1, scores.shape[-1])


def _mass(mode: BlockMode, grouped: Array, keys: tuple[Keys, Positions], t: Array, count: int) -> Array:
  """The softmax mass of every block under dense attention, less that of the keys that the mode's rule reads anyway."""
  k, positions = keys
  weights = dense_weights(grouped, k, t, positions)
  if mode.rule is not None:
    weights = jnp.where(visible(mode.rule, t, positions)[:, :, None, None], 0.0, weights)
  block_of = (jnp.maximum(positions, 0) // mode.block)[:, :, None] == jnp.arange(count, dtype=jnp.int32)
  block_of = jnp.broadcast_to(block_of, (k.shape[0], *block_of.shape[1:]))
  return _product("btkgs,bsp->btkgp")(weights, block_of)


def dense_weights(grouped: Array, k: Keys, t: Positions, s: Positions) -> Array:
  """Softmax weights of dense causal attention, float32 [B, T, K, G, S]; zeros for a query that sees nothing."""
  scores = _product("btkgh,bskh->btkgs")(grouped, k) * k.shape[-1] ** -0.5
  seen = ((s >= 0)[:, None] & (s[:, None] <= t[:, :, None]))[:, :, None, None]
  weights = jnp.where(seen, jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True, where=seen, initial=-1e30)), 0.0)
  return weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30)
