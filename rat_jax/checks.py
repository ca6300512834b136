"""Checks of what a caller hands in, before anything is computed: shapes, types and, where they can be seen, values."""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import arguments
from pallas_kernels.arguments import is_concrete as is_concrete
from rat_jax.axes import Array, ArrayLike, HostOrDevice, Keys, Queries


def as_tokens(tokens: ArrayLike, vocab_size: int, *, lengths: ArrayLike | None = None,
              segment_ids: ArrayLike | None = None, positions: ArrayLike | None = None) -> Array:
  """Tokens as int32 [B, T], 0 where `lengths`, `segment_ids` (0) or `positions` (negative) declare padding.

  Padding may be any integer. Raises ValueError for another shape or type and, where values can be seen, for a real
  token outside the vocabulary.
  """
  given = as_array(tokens, "tokens")
  if given.ndim != 2 or 0 in given.shape or not jnp.issubdtype(given.dtype, jnp.integer):
    raise ValueError(f"tokens has shape {given.shape} and type {given.dtype}; give integers [B, T]; B is at least 1,"
                     " T is at least 1.")
  real: list[HostOrDevice] = []
  if lengths is not None:
    as_lengths(lengths, given.shape)
    real.append(np.arange(given.shape[1], dtype=np.int32) < as_array(lengths, "lengths")[:, None])
  if segment_ids is not None:
    real.append(as_integers("segment_ids", segment_ids, given.shape) != 0)
  if positions is not None:
    real.append(as_integers("positions", positions, given.shape) >= 0)
  if real:
    on_host = isinstance(given, np.ndarray) and all(isinstance(mask, np.ndarray) for mask in real)
    given = (np if on_host else jnp).where(functools.reduce(operator.and_, real), given, 0)
  _check_vocabulary("tokens", given, vocab_size)
  return jnp.asarray(given, jnp.int32)


def as_next_tokens(tokens: ArrayLike, batch: int, vocab_size: int) -> Array:
  """The next token of every row as int32 [B]. As `as_tokens`, but an array on a device is not waited for."""
  on_host = not isinstance(tokens, jax.Array)
  given = as_integers("next_tokens", tokens, (batch,))
  if on_host:
    _check_vocabulary("next_tokens", given, vocab_size)
  return jnp.asarray(given, jnp.int32)


def as_lengths(lengths: ArrayLike | None, shape: tuple[int, ...], name: str = "lengths") -> Array:
  """Lengths of the rows of an array [B, T, ...] as int32 [B]; None is T everywhere. Raises ValueError for another
  shape or type and, where values can be seen, for one outside 0..T."""
  batch, width = shape[:2]
  if lengths is None:
    return jnp.full(batch, width, jnp.int32)
  given = as_array(lengths, name)
  if given.shape == (batch, width):
    raise ValueError(f"{name} has shape {given.shape}, that of a mask; rows are padded on the right here, so call"
                     " tokens, lengths = rat_jax.to_right_padding(tokens, mask) first.")
  given = as_integers(name, given, (batch,))
  if is_concrete(given):
    values = np.asarray(given)
    if ((values < 0) | (values > width)).any():
      raise ValueError(f"{name}={values.tolist()}; every row counts the real tokens of an array of width {width}, so"
                       f" use 0..{width}.")
  return jnp.asarray(given, jnp.int32)


def as_row_ids(row_ids: ArrayLike | None, batch: int) -> Array:
  """The numbers of rows, for random draws, as int32 [B]; None is zeros. Raises ValueError as `as_integers`."""
  if row_ids is None:
    return jnp.zeros(batch, jnp.int32)
  return jnp.asarray(as_integers("row_ids", row_ids, (batch,)), jnp.int32)


def as_rows(index: ArrayLike, rows: int) -> Array:
  """Numbers of rows as int32 [B']. Raises ValueError for another shape or type and, where values can be seen, for one
  outside 0..rows-1."""
  given = as_array(index, "index")
  if given.ndim != 1 or not given.size or not jnp.issubdtype(given.dtype, jnp.integer):
    raise ValueError(f"index has shape {given.shape} and type {given.dtype}; give the numbers of rows, integers [B'].")
  if is_concrete(given):
    values = np.asarray(given)
    if ((values < 0) | (values >= rows)).any():
      raise ValueError(f"index={values.tolist()}; the cache has the rows 0..{rows - 1}.")
  return jnp.asarray(given, jnp.int32)


def check_count(name: str, value: object, least: int = 1) -> None:
  """Raises ValueError for what is no integer of at least `least`."""
  if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
    raise ValueError(f"{name}={value!r}; use an integer of at least {least}.")


def as_integers(name: str, value: ArrayLike, shape: tuple[int, ...]) -> HostOrDevice:
  """`value` (a list too) as an array. Raises ValueError unless it holds integers of that shape."""
  given = as_array(value, name)
  if given.shape != shape or not jnp.issubdtype(given.dtype, jnp.integer):
    raise ValueError(f"{name} has shape {given.shape} and type {given.dtype}; it must be integers of shape {shape}.")
  check_int32(name, given)
  return given


def check_int32(name: str, given: HostOrDevice) -> None:
  """Raises ValueError, where values can be seen, for integers that int32 does not hold: a cast would wrap them."""
  if beyond := arguments.beyond_int32(given):
    raise ValueError(f"{name} run from {beyond[0]} to {beyond[1]}; use numbers that int32 holds, {arguments.LEAST} to"
                     f" {arguments.MOST}.")


def as_array(value: ArrayLike, name: str) -> HostOrDevice:
  """An array on the host, unless something of the value (a list too) is on a device or traced.

  Raises ValueError for lists of several lengths.
  """
  try:
    return arguments.as_array(value)
  except (TypeError, ValueError) as error:
    raise ValueError(f"{name} is no array with one length for all rows; pad its rows on the right, and give the real"
                     " tokens of each as lengths.") from error


def _check_vocabulary(name: str, tokens: HostOrDevice, vocab_size: int) -> None:
  if is_concrete(tokens) and tokens.size:
    low, high = np.min(np.asarray(tokens)), np.max(np.asarray(tokens))
    if low < 0 or high >= vocab_size:
      raise ValueError(f"{name} run from {low} to {high}; the vocabulary of this model is 0..{vocab_size - 1}."
                       " Check the tokenizer and vocab_size.")


def check_heads_fit(q: Queries, k: Keys, v: Keys | None = None) -> None:
  """Raises ValueError unless q is [B, T, N, H], k and v [B, S, K, H] with N a multiple of K, all of one float type,
  and nothing is empty."""
  fits = q.ndim == k.ndim == 4 and 0 not in (*q.shape, *k.shape) and q.shape[0] == k.shape[0] and (
      q.shape[3] == k.shape[3] and q.shape[2] % k.shape[2] == 0)
  if not fits:
    raise ValueError(f"q, k have shapes {q.shape}, {k.shape}; give q [B, T, N, H] and k [B, S, K, H] with N a multiple"
                     " of K, and at least one of everything.")
  if v is not None and k.shape != v.shape:
    raise ValueError(f"k, v have shapes {k.shape}, {v.shape}; give [B, S, K, H] each.")
  types = [str(x.dtype) for x in (q, k, v) if x is not None]
  if len(set(types)) > 1 or not jnp.issubdtype(q.dtype, jnp.floating):
    raise ValueError(f"{'q, k, v' if v is not None else 'q, k'} have types {', '.join(types)}; give one floating type"
                     " for all, such as float32 or bfloat16.")


def check_growth(positions: HostOrDevice, documents: Array, counted: Array) -> None:
  """Raises ValueError, where values can be seen, for positions [B, T] that do not grow by 1 inside a document.

  There, positions and the count of the document's tokens keep their distance.
  """
  if not (is_concrete(positions) and is_concrete(documents)):
    return
  for row, document, count in zip(*map(np.asarray, (positions, documents, counted)), strict=True):
    for number in np.unique(document[document > 0]):
      if len(np.unique((row - count)[document == number])) > 1:
        raise ValueError(f"positions={row.tolist()} do not grow by 1 inside a document; the memory reads tokens in"
                         " their order, so give consecutive positions, or segment_ids that mark the documents.")
