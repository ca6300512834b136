"""Where the tokens of a [B, T] array stand: positions, packed documents, padding. One rule for all who ask."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.packing import number_documents
from rat_jax.axes import Array, Lengths, Positions, SegmentIds, Tokens


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


def of_tokens(shape: tuple[int, ...], *, positions: Positions | None = None, segment_ids: SegmentIds | None = None,
              lengths: Lengths | None = None) -> Layout:
  """The layout of tokens of a shape [B, T], from `apply`'s arguments.

  Positions restart in every document of `segment_ids`; `lengths` and segment id 0 mark padding. Raises ValueError
  for shapes that do not match and, outside of compilation, for positions that do not grow by 1 in a document and
  for lengths outside 0..T.
  """
  batch, length = shape
  if positions is not None:
    positions = as_integers("positions", positions, shape)
  if segment_ids is not None:
    segment_ids = as_integers("segment_ids", segment_ids, shape)
  count = as_lengths(lengths, shape)
  plain = dataclasses.replace(consecutive(jnp.zeros(batch, jnp.int32), count, length), plain=True,
                              padded=lengths is not None)
  if positions is None and segment_ids is None:
    return plain
  ids = jnp.ones((batch, length), jnp.int32) if segment_ids is None else jnp.asarray(segment_ids)
  ids = jnp.where(plain.positions >= 0, ids, 0)
  if positions is not None:
    ids = jnp.where(jnp.asarray(positions) < 0, 0, ids)
  documents, counted = number_documents(ids)
  if positions is not None:
    _check_growth(positions, documents, counted)
    counted = jnp.where(ids != 0, jnp.asarray(positions, jnp.int32), -1)
  return Layout(counted, documents)


def is_concrete(x: object) -> bool:
  """Whether the values of x can be looked at: not while a program is traced, nor where other hosts hold a part."""
  return x is not None and not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)


def as_tokens(tokens: Tokens, vocab_size: int) -> Array:
  """Tokens as int32 [B, T]. Raises ValueError for another shape or type and, where values can be seen, for what is
  outside the vocabulary."""
  tokens = _as_array(tokens)
  if tokens.ndim != 2 or not tokens.shape[1] or not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(f"tokens has shape {tokens.shape} and type {tokens.dtype}; give integers [B, T], T is at least 1.")
  _check_vocabulary("tokens", tokens, vocab_size)
  return jnp.asarray(tokens, jnp.int32)


def as_next_tokens(tokens: Tokens, batch: int, vocab_size: int) -> Array:
  """The next token of every row as int32 [B]. As `as_tokens`, but an array on a device is not waited for."""
  on_host = not isinstance(tokens, jax.Array)
  tokens = as_integers("next_tokens", tokens, (batch,))
  if on_host:
    _check_vocabulary("next_tokens", tokens, vocab_size)
  return jnp.asarray(tokens, jnp.int32)


def as_lengths(lengths: Lengths | None, shape: tuple[int, ...], name: str = "lengths") -> Array:
  """Lengths of the rows of an array [B, T, ...] as int32 [B]; None is T everywhere. Raises ValueError for another
  shape or type and, where values can be seen, for one outside 0..T."""
  batch, width = shape[:2]
  if lengths is None:
    return jnp.full(batch, width, jnp.int32)
  lengths = as_integers(name, lengths, (batch,))
  if is_concrete(lengths):
    values = np.asarray(lengths)
    if ((values < 0) | (values > width)).any():
      raise ValueError(f"{name}={values.tolist()}; every row counts the real tokens of an array of width {width}, so"
                       f" use 0..{width}.")
  return jnp.asarray(lengths, jnp.int32)


def as_row_ids(row_ids: Array | np.ndarray | None, batch: int) -> Array:
  """The numbers of rows, for random draws, as int32 [B]; None is zeros. Raises ValueError as `as_integers`."""
  if row_ids is None:
    return jnp.zeros(batch, jnp.int32)
  return jnp.asarray(as_integers("row_ids", row_ids, (batch,)), jnp.int32)


class Prompts(NamedTuple):
  """How many first tokens of every row are its prompt: int32 [B], and as far as is known when compiling the fewest."""

  lengths: Array
  shortest: int


def prompts_within(prompt_lengths: Lengths | None, lengths: Lengths | None, shape: tuple[int, ...]) -> Prompts | None:
  """The rows' prompts, none beyond its row's real tokens; None stays. Raises as `as_lengths`."""
  if prompt_lengths is None:
    return None
  count = jnp.minimum(as_lengths(prompt_lengths, shape, name="prompt_lengths"), as_lengths(lengths, shape))
  bounds = [_as_array(x) for x in (prompt_lengths, lengths) if x is not None]
  known = all(map(is_concrete, bounds))
  return Prompts(count, min(int(np.min(x, initial=shape[1])) for x in bounds) if known else 0)


def check_count(name: str, value: object, least: int = 1) -> None:
  """Raises ValueError for what is no integer of at least `least`."""
  if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
    raise ValueError(f"{name}={value!r}; use an integer of at least {least}.")


def as_integers(name: str, value: Array | np.ndarray, shape: tuple[int, ...]) -> Array | np.ndarray:
  """`value` (a list too) as an array. Raises ValueError unless it holds integers of that shape."""
  value = _as_array(value)
  if value.shape != shape or not jnp.issubdtype(value.dtype, jnp.integer):
    raise ValueError(f"{name} has shape {value.shape} and type {value.dtype}; it must be integers of shape {shape}.")
  return value


def _as_array(value: object) -> Array | np.ndarray:
  """An array on the host, unless something of the value (a list too) is on a device or traced."""
  on_device = any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value))
  return jnp.asarray(value) if on_device else np.asarray(value)


def _check_vocabulary(name: str, tokens: Tokens, vocab_size: int) -> None:
  if is_concrete(tokens) and tokens.size:
    low, high = np.min(np.asarray(tokens)), np.max(np.asarray(tokens))
    if low < 0 or high >= vocab_size:
      raise ValueError(f"{name} run from {low} to {high}; the vocabulary of this model is 0..{vocab_size - 1}."
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
