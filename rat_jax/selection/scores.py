"""Scores by which queries choose keys, or blocks of keys: float32 at the highest precision, without a gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.pattern import seen
from rat_jax.attention.terms import Origin
from rat_jax.axes import Array, Keys, Positions, Queries, Scores
from rat_jax.selection.summary import Product, Summaries

if TYPE_CHECKING:
  from rat_jax.modes.block_mode import BlockMode
  from rat_jax.modes.selecting import SelectingMode


class Choosers(NamedTuple):
  """Queries that choose among blocks.

  Attributes:
    q: [B, T, N, H]; positions: int32 [B, T].
    own: the summaries of the queries' own blocks, up to each query: [B, T, K, H] each.
  """

  q: Queries
  positions: Positions
  own: Summaries


def without_nan(scores: Scores) -> Scores:
  """NaN as the largest number: it is chosen, and shows in what is attended to, rather than displacing or hiding."""
  return jnp.where(jnp.isnan(scores), np.finfo(np.float32).max, scores)


def score_blocks(mode: BlockMode, choosers: Choosers, summaries: Summaries, keys: tuple[Keys, Positions],
                 origin: Origin) -> Scores:
  """The scores of all blocks, float32 [B, T, N or K, P]; -inf for blocks that do not exist yet.

  Args:
    summaries: of the complete blocks, [B, K, P, H] each.
    keys: all keys [B, S, K, H] and their positions [B, S], which the oracle looks at.
  """
  choosers, summaries, keys = jax.lax.stop_gradient((choosers, summaries, keys))
  t, (kv_heads, count) = choosers.positions, summaries[0].shape[1:3]
  own_block, index = (t // mode.block)[:, :, None, None], jnp.arange(count, dtype=jnp.int32)
  if mode.selector == "random":
    scores = draw(mode, origin, heads_that_choose(mode, choosers.q, kv_heads), t, count)
  elif mode.selector == "oracle":
    scores = by_group(mode, _mass(mode, grouped(choosers.q, kv_heads), keys, t, count))
  else:
    q, own_count = grouped(choosers.q, kv_heads), (t % mode.block + 1)[:, :, None, None]
    of_blocks = mode.summary.score(product("btkgh,bkph->btkgp"), q, summaries, mode.block)
    of_own = mode.summary.score(product("btkgh,btkh->btkg"), q, choosers.own, own_count)
    scores = by_group(mode, jnp.where(index == own_block[..., None], of_own[..., None], of_blocks))
  return jnp.where(index <= own_block, scores, -jnp.inf)


def heads_that_choose(mode: SelectingMode, q: Queries, kv_heads: int) -> int:
  """How many heads choose, M: every query head for itself, or one for the query heads of a key/value head."""
  return kv_heads if mode.group == "kv" else q.shape[2]


def grouped(q: Queries, kv_heads: int) -> Array:
  """Queries by the key/value head that they share: [B, T, N, H] -> float32 [B, T, K, G, H]."""
  batch, length, heads, width = q.shape
  return q.astype(jnp.float32).reshape(batch, length, kv_heads, heads // kv_heads, width)


def by_group(mode: SelectingMode, scores: Array) -> Array:
  """Scores [B, T, K, G, X] of every query head, [B, T, N, X], or their mean over the group, [B, T, K, X]."""
  batch, length, kv_heads, group, count = scores.shape
  return jnp.mean(scores, axis=3) if mode.group == "kv" else scores.reshape(batch, length, kv_heads * group, count)


def product(subscripts: str) -> Product:
  """`jnp.einsum` in float32 at the highest precision."""
  return lambda q, x: jnp.einsum(subscripts, q, x.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def draw(mode: SelectingMode, origin: Origin, heads: int, positions: Positions, count: int) -> Array:
  """Uniform numbers [B, T, heads, count] that depend on seed, row, layer, head, position and index alone."""
  fold = jax.random.fold_in

  def of_row(row: Array, at: Array) -> Array:
    row_key = fold(fold(jax.random.key(mode.seed), row), origin.layer)
    head_keys = jax.vmap(lambda head: fold(row_key, head))(jnp.arange(heads, dtype=jnp.int32))

    def of_query(key: Array, position: Array) -> Array:
      key = fold(key, position)
      return jax.vmap(lambda i: jax.random.uniform(fold(key, i), dtype=jnp.float32))(jnp.arange(count, dtype=jnp.int32))

    return jax.vmap(lambda t: jax.vmap(lambda key: of_query(key, t))(head_keys))(jnp.maximum(at, 0))

  return jax.vmap(of_row)(origin.row_ids, positions)


def dense_weights(q: Array, k: Keys, t: Positions, s: Positions) -> Array:
  """Softmax weights of dense causal attention of q [B, T, K, G, H] to k [B, S, K, H]: float32 [B, T, K, G, S].

  Zeros for a query that sees nothing.
  """
  scores = product("btkgh,bskh->btkgs")(q, k) * k.shape[-1] ** -0.5
  visible = seen(None, t, s)[:, :, None, None]
  top = jnp.max(scores, axis=-1, keepdims=True, where=visible, initial=-1e30)
  weights = jnp.where(visible, jnp.exp(scores - top), 0.0)
  return weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30)


def _mass(mode: BlockMode, q: Array, keys: tuple[Keys, Positions], t: Positions, count: int) -> Array:
  """The softmax mass of every block under dense attention, less that of the keys that the mode's rule reads anyway."""
  k, positions = keys
  weights = dense_weights(q, k, t, positions)
  if mode.rule is not None:
    weights = jnp.where(seen(mode.rule, t, positions)[:, :, None, None], 0.0, weights)
  block_of = (jnp.maximum(positions, 0) // mode.block)[:, :, None] == jnp.arange(count, dtype=jnp.int32)
  block_of = jnp.broadcast_to(block_of, (k.shape[0], *block_of.shape[1:]))
  return product("btkgs,bsp->btkgp")(weights, block_of)
