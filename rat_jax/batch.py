"""What a model is given: tokens, where they stand, which of them are prompts. One rule for all who ask."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.packing import number_documents
from rat_jax import checks
from rat_jax.axes import Array, ArrayLike, Lengths, Positions, RowIds, Tokens


class Places(NamedTuple):
  """Where the tokens of a [B, T] array stand.

  Attributes:
    positions: int32 [B, T], what RoPE and the modes use; -1 for padding.
    documents: int32 [B, T], numbered 1, 2, ... along the row, 0 for padding; None: one document per row.
    lengths: int32 [B], how many tokens of a row are real, if these come first.
    plain: row b is tokens 0..n-1 of one document, then padding alone. This opens the fast forms of attention.
    padded: there may be padding.
  """

  positions: Positions
  documents: Array | None
  lengths: Lengths
  plain: bool
  padded: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """A batch of token rows. A pytree, so that a compiled program takes it as one argument.

  Attributes:
    tokens: int32 [B, T].
    positions, documents, lengths, plain, padded: as in `Places`.
    row_ids: int32 [B], the rows' numbers, which random draws depend on.
    prompts: int32 [B], how many first tokens of every row are its prompt; None: none, every token is a step.
    first_step: static: no token before it is a step, in any row. What is not known when compiling is 0.
  """

  tokens: Tokens
  positions: Positions
  documents: Array | None
  lengths: Lengths
  row_ids: RowIds
  prompts: Lengths | None = None
  plain: bool = dataclasses.field(default=False, metadata=dict(static=True))
  padded: bool = dataclasses.field(default=True, metadata=dict(static=True))
  first_step: int = dataclasses.field(default=0, metadata=dict(static=True))

  @property
  def segment_ids(self) -> Array | None:
    """int32 [B, T] for the memory: which document a token belongs to, 0 for padding; None: one, and no padding."""
    if self.documents is None and self.padded:
      return (self.positions >= 0).astype(jnp.int32)
    return self.documents


def following(tokens: Tokens, start: Lengths, count: Lengths, row_ids: RowIds) -> Batch:
  """Tokens [B, T] that go on at position start[b], of which the first count[b] are real."""
  return Batch(tokens, consecutive(start, count, tokens.shape[1]), None, count, row_ids)


def of_call(tokens: Tokens, *, positions: ArrayLike | None = None, segment_ids: ArrayLike | None = None,
            lengths: ArrayLike | None = None, prompt_lengths: ArrayLike | None = None, row_ids: ArrayLike | None = None,
            traced: bool = False) -> Batch:
  """The batch of `model.apply`'s arguments; `tokens` int32 [B, T].

  `traced` says that a program is being compiled for these very prompts, so that their shortest may be part of it.
  Raises ValueError as `places`, `checks.as_lengths` and `checks.as_row_ids`.
  """
  at = places(tokens.shape, positions=positions, segment_ids=segment_ids, lengths=lengths)
  prompts, first_step = None, 0
  if prompt_lengths is not None:
    prompts = jnp.minimum(checks.as_lengths(prompt_lengths, tokens.shape, name="prompt_lengths"),
                          checks.as_lengths(lengths, tokens.shape))
    bounds = [checks.as_array(x, name) for name, x in (("prompt_lengths", prompt_lengths), ("lengths", lengths))
              if x is not None]
    if traced and at.plain and all(map(checks.is_concrete, bounds)):
      first_step = min(int(np.min(x, initial=tokens.shape[1])) for x in bounds)
  return Batch(tokens, at.positions, at.documents, at.lengths, checks.as_row_ids(row_ids, tokens.shape[0]), prompts,
               at.plain, at.padded, first_step)


def places(shape: tuple[int, ...], *, positions: ArrayLike | None = None, segment_ids: ArrayLike | None = None,
           lengths: ArrayLike | None = None) -> Places:
  """Where tokens of a shape [B, T] stand.

  Positions restart in every document of `segment_ids`; `lengths` and segment id 0 mark padding. Raises ValueError
  for shapes that do not match and, outside of compilation, for positions that do not grow by 1 in a document and
  for lengths outside 0..T.
  """
  batch, length = shape
  given = None if positions is None else checks.as_integers("positions", positions, shape)
  segments = None if segment_ids is None else checks.as_integers("segment_ids", segment_ids, shape)
  count = checks.as_lengths(lengths, shape)
  plain = consecutive(jnp.zeros(batch, jnp.int32), count, length)
  if given is None and segments is None:
    return Places(plain, None, count, plain=True, padded=lengths is not None)
  ids = jnp.ones((batch, length), jnp.int32) if segments is None else jnp.asarray(segments)
  ids = jnp.where(plain >= 0, ids, 0)
  if given is not None:
    ids = jnp.where(jnp.asarray(given) < 0, 0, ids)
  documents, counted = number_documents(ids)
  if given is not None:
    checks.check_growth(given, documents, counted)
    counted = jnp.where(ids != 0, jnp.asarray(given, jnp.int32), -1)
  return Places(counted, documents, count, plain=False, padded=True)


def to_right_padding(tokens: ArrayLike, mask: ArrayLike) -> tuple[Tokens, Lengths]:
  """(tokens int32 [B, T], lengths int32 [B]) of rows that are padded on the left, as other libraries make them.

  Args:
    tokens: int [B, T].
    mask: bool or 0/1 [B, T], true for real tokens. They move to the front in their order; the rest becomes 0.

  Raises:
    ValueError: misshapen arguments, and where values can be seen, tokens beyond int32 and a mask of other numbers.
  """
  given, real = checks.as_array(tokens, "tokens"), checks.as_array(mask, "mask")
  if given.ndim != 2 or not jnp.issubdtype(given.dtype, jnp.integer):
    raise ValueError(f"tokens has shape {given.shape} and type {given.dtype}; give integers [B, T].")
  if real.shape != given.shape or not (real.dtype == bool or jnp.issubdtype(real.dtype, jnp.integer)):
    raise ValueError(f"mask has shape {real.shape} and type {real.dtype}; give booleans, or 0 and 1, of shape"
                     f" {given.shape}.")
  checks.check_int32("tokens", given)
  if checks.is_concrete(real) and not np.isin(np.asarray(real), (0, 1)).all():
    raise ValueError(f"mask holds {np.unique(np.asarray(real)).tolist()}; give 1 for real tokens and 0 for padding.")
  real = jnp.asarray(real, bool)
  order = jnp.argsort(~real, axis=1, stable=True)
  moved = jnp.take_along_axis(jnp.where(real, jnp.asarray(given, jnp.int32), 0), order, axis=1)
  return moved, jnp.sum(real, axis=1, dtype=jnp.int32)


def consecutive(start: Lengths, count: Lengths, length: int) -> Positions:
  """int32 [B, length]: positions from start[b] on, of the first count[b] tokens; -1 for the rest, which is padding."""
  offset = jnp.arange(length, dtype=jnp.int32)
  return jnp.where(offset < count[:, None], start[:, None] + offset, -1)
