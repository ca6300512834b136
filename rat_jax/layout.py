"""Where the tokens of a [B, T] array stand: positions, packed documents, padding. One rule for all who ask."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.packing import number_documents
from rat_jax.axes import Array, Lengths, Positions, Tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layout:
  """Positions and documents of a batch of tokens.

  Attributes:
    positions: int32 [B, T], what RoPE and the modes use; -1 for padding.
    documents: int32 [B, T], numbered 1, 2, ... along the row, 0 for padding; None: one document per row.
    plain: row b is tokens 0..n-1 of one document, then padding alone. This opens the fast forms of attention.
    padded: there may be padding.
  """

  positions: Array
  documents: Array | None = None
  plain: bool = dataclasses.field(default=False, metadata=dict(static=True))
  padded: bool = dataclasses.field(default=True, metadata=dict(static=True))

  @property
  def segment_ids(self) -> Array | None:
    """int32 [B, T] for the memory: which document a token belongs to, 0 for padding; None: one, and no padding."""
    if self.documents is None and self.padded:
      return (self.positions >= 0).astype(jnp.int32)
    return self.documents


def consecutive(start: Lengths, count: Lengths, length: int) -> Layout:
  """`length` tokens per row that go on at position start[b], of which the first count[b] are real."""
  offset = jnp.arange(length, dtype=jnp.int32)
  return Layout(jnp.where(offset < count[:, None], start[:, None] + offset, -1))


def of_tokens(shape: tuple[int, ...], *, positions: Positions | None = None, segment_ids: Array | None = None,
              lengths: Lengths | None = None) -> Layout:
  """The layout of tokens of a shape [B, T], from `apply`'s arguments.

  Positions restart in every document of `segment_ids`; `lengths` and segment id 0 mark padding. Raises ValueError
  for shapes that do not match and, outside of compilation, for positions that do not grow by 1 in a document and
  for lengths outside 0..T.
  """
  batch, length = shape
  for name, value, wanted in (("positions", positions, (batch, length)), ("segment_ids", segment_ids, (batch, length)),
                             ("lengths", lengths, (batch,))):
    if value is not None and value.shape != wanted:
      raise ValueError(f"{name} has shape {value.shape}; it must be {wanted} for tokens {shape}.")
  check_lengths(lengths, length)
  count = jnp.full(batch, length, jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)
  plain = dataclasses.replace(consecutive(jnp.zeros(batch, jnp.int32), count, length), plain=True,
                              padded=lengths is not None)
  if positions is None and segment_ids is None:
    return plain
  ids = jnp.ones((batch, length), jnp.int32) if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)
  ids = jnp.where(plain.positions >= 0, ids, 0)
  if positions is not None:
    ids = jnp.where(jnp.asarray(positions) < 0, 0, ids)
  documents, counted = number_documents(ids)
  if positions is not None:
    _check_growth(positions, documents, counted)
    counted = jnp.where(ids != 0, jnp.asarray(positions, jnp.int32), -1)
  return Layout(counted, documents)


def is_concrete(x: object) -> bool:
  """Whether the values of x can be looked at: not while a program is being traced."""
  return x is not None and not isinstance(x, jax.core.Tracer)


def check_lengths(lengths: Lengths | None, most: int) -> None:
  """Raises ValueError for lengths outside 0..most, where their values can be looked at."""
  if is_concrete(lengths):
    bad = (np.asarray(lengths) < 0) | (np.asarray(lengths) > most)
    if bad.any():
      raise ValueError(f"lengths={np.asarray(lengths).tolist()}; every row counts the real tokens of an array of"
                       f" width {most}, so use 0..{most}.")


def check_tokens(tokens: Tokens, vocab_size: int) -> None:
  """Raises ValueError for tokens that are no int [B, T] or, where values can be seen, outside the vocabulary."""
  if tokens.ndim != 2 or not tokens.shape[1] or not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(f"tokens has shape {tokens.shape} and type {tokens.dtype}; give integers [B, T], T is at least 1.")
  if is_concrete(tokens) and tokens.size:
    low, high = np.min(np.asarray(tokens)), np.max(np.asarray(tokens))
    if low < 0 or high >= vocab_size:
      raise ValueError(f"tokens run from {low} to {high}; the vocabulary of this model is 0..{vocab_size - 1}."
                       " Check the tokenizer and vocab_size.")


def _check_growth(positions: Positions, documents: Array, counted: Array) -> None:
  """Inside a document, positions and the count of its tokens keep their distance."""
  if not (is_concrete(positions) and is_concrete(documents)):
    return
  for row, document, count in zip(*map(np.asarray, (positions, documents, counted)), strict=True):
    for number in np.unique(document[document > 0]):
      if len(np.unique((row - count)[document == number])) > 1:
        raise ValueError(f"positions={row.tolist()} do not grow by 1 inside a document; the memory reads tokens in"
                         " their order, so give consecutive positions, or segment_ids that mark the documents.")
