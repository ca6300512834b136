"""The choice of blocks: what is forced, how many there may be, which are best; and what was chosen, as a record."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pallas_kernels.attention import softmax
from pallas_kernels.attention.masks import keys_read
from rat_jax.attention.terms import Heads, Origin, Placement
from rat_jax.axes import Array, Blocks, Mask, Positions, Scores
from rat_jax.selection.scores import Choosers, score_blocks, without_nan

if TYPE_CHECKING:
  from rat_jax.modes.block_mode import BlockMode


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

  def without(self, rows: Mask, tokens: Array) -> Selection:
    """The selection with no valid block in `rows` [B, T], whose queries read `tokens` [B, T, 1 or heads] keys."""
    rows, heads = rows[:, :, None], self.tokens.shape[2]
    if tokens.shape[2] < heads:  # one for each key/value head, or for all
      tokens = jnp.repeat(tokens, heads // tokens.shape[2], axis=2)
    elif tokens.shape[2] > heads:  # one for each query head; of a group the most
      tokens = jnp.max(tokens.reshape(*tokens.shape[:2], heads, -1), axis=3)
    valid = self.valid & ~rows[..., None]
    return Selection(jnp.where(valid, self.blocks, self.scores.shape[-1]), valid,
                     jnp.where(rows[..., None], -jnp.inf, self.scores), jnp.where(rows, tokens, self.tokens))


def pick(mode: BlockMode, scores: Scores, positions: Positions, max_length: int) -> tuple[Blocks, Mask]:
  """(blocks, valid): the forced blocks and the best of the others, as many as the mode reads; ties to the lower index.

  Args:
    scores: [B, T, M, P]; positions: [B, T], below `max_length`.
  """
  count, own_block = scores.shape[-1], (positions // mode.block)[:, :, None, None]
  most = mode.block_counts(max_length)
  forced = mode.forced(jnp.arange(count, dtype=jnp.int32), own_block)
  scores = without_nan(scores)
  priority = jnp.where(forced & (scores > -jnp.inf), jnp.inf, scores)
  top, blocks = jax.lax.top_k(priority, min(count, int(most.max())))
  allowed = jnp.asarray(most)[jnp.clip(positions, 0, max_length - 1)][:, :, None, None]
  valid = (jnp.arange(blocks.shape[-1], dtype=jnp.int32) < allowed) & (top > -jnp.inf)
  blocks = jnp.sort(jnp.where(valid, blocks, count), axis=-1)
  return blocks, blocks < count


def select_blocks(mode: BlockMode, heads: Heads, at: Placement, origin: Origin) -> Selection:
  """What queries choose of keys that stand at positions 0..S-1."""
  k, count = heads.choosing_keys, heads.k.shape[1]
  summaries, own = mode.summary.of_blocks_and_own(mode.block, k, at.queries)

  def rows(choosers: Choosers) -> Selection:
    scores = score_blocks(mode, choosers, summaries, (k, at.keys), origin)
    blocks, valid = pick(mode, scores, choosers.positions, count)
    read = keys_read(blocks, choosers.positions, count, mode.block, mode.rule)
    return Selection(blocks, valid, scores, jnp.sum(read, axis=-1, dtype=jnp.int32))

  return softmax.by_chunks(rows, Choosers(heads.q, at.queries, own))


def is_chosen(blocks: Blocks, count: int, of: Array) -> Mask:
  """Whether the blocks `of` [B or 1, T or 1, M or 1, X] are among the chosen ones [B, T, M, n]: bool [B, T, M, X]."""
  chosen = jnp.any(blocks[..., None] == jnp.arange(count, dtype=jnp.int32), axis=-2)
  return jnp.take_along_axis(chosen, jnp.broadcast_to(of, (*chosen.shape[:3], of.shape[3])), axis=-1)
