"""What attention is given: a layer's heads, where they stand, and a cache that they follow."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rat_jax.axes import Array, CacheRows, Keys, Lengths, Positions, Queries, RowIds
from rat_jax.batch import Batch, Places
from rat_jax.selection.summary import Summaries


class Heads(NamedTuple):
  """A layer's queries, keys and values, as attention takes them and caches keep them: rotated, after the memory.

  Attributes:
    q: [B, T, N, H]; k, v: [B, S, K, H].
    chosen_by: [B, S, K, H], the keys that queries choose by, where these are not k (the 2x2 of arXiv 2605.28640).
  """

  q: Queries
  k: Keys
  v: Keys
  chosen_by: Keys | None = None

  @property
  def choosing_keys(self) -> Keys:
    """The keys that queries choose by."""
    return self.k if self.chosen_by is None else self.chosen_by

  def queries_from(self, first: int) -> Heads:
    """The same keys, and the queries from number `first` on."""
    return self._replace(q=self.q[:, first:]) if first else self

  def last_queries(self, lengths: Lengths, count: int) -> Heads:
    """The same keys, and the last `count` queries before each row's end, right-aligned: q is [B, count, N, H].

    Those before a row's start are any.
    """
    at = lengths[:, None] - count + jnp.arange(count, dtype=jnp.int32)
    return self._replace(q=jnp.take_along_axis(self.q, jnp.clip(at, 0, self.q.shape[1] - 1)[:, :, None, None], axis=1))


class Origin(NamedTuple):
  """Where random draws come from, besides the mode's seed: the rows' numbers int32 [B] and the layer's."""

  row_ids: RowIds
  layer: Array | int


class Placement(NamedTuple):
  """Where queries and keys stand.

  Attributes:
    queries: int32 [B, T]; keys: int32 [B, S]; -1 is padding. Under a mode that chooses, key s stands at position s.
    q_documents, k_documents: int32 [B, T], [B, S]; documents see themselves alone. None: one document.
    plain: T = S, and both stand at 0, 1, ... but for padding after them.
    isolated: what is not finite in a key stays with the queries that see it, whatever that costs.
  """

  queries: Positions
  keys: Positions
  q_documents: Array | None = None
  k_documents: Array | None = None
  plain: bool = False
  isolated: bool = False

  @classmethod
  def of(cls, places: Batch | Places, first: int = 0) -> Placement:
    """A whole sequence that attends to itself; of its queries those from number `first` on."""
    documents = places.documents
    of_queries = None if documents is None else documents[:, first:]
    return cls(places.positions[:, first:], places.positions, of_queries, documents, places.plain and first == 0)


class Held(NamedTuple):
  """What a cache holds for new tokens to read.

  Attributes:
    keys, values: [L, B, K, R, H] each, of which `layer` is read; a compressed cache may have N heads for K.
    layer: int32 [], which one.
    positions: int32 [B, R], the position that each row holds, or [B, K, R] where heads differ; -1 for none.
    lengths: int32 [B], the tokens so far.
    max_length: the most that a row will ever have.
    summaries: of the blocks of these tokens, [B, K, P, H] each, if the cache keeps those that the mode asks for.
  """

  keys: CacheRows
  values: CacheRows
  layer: Array
  positions: Positions
  lengths: Lengths
  max_length: int
  summaries: Summaries | None = None

  def of_layer(self) -> tuple[Keys, Keys]:
    """Its keys and values, [B, R, K, H] each: a copy."""
    k, v = (jnp.swapaxes(jax.lax.dynamic_index_in_dim(x, self.layer, keepdims=False), 1, 2)
            for x in (self.keys, self.values))
    return k, v
