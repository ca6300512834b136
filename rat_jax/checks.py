"""Checks of what a caller hands in, before anything is computed: shapes, types and, where they can be seen, values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from rat_jax.axes import Array, ArrayLike, HostOrDevice, Keys, Queries


def is_concrete(x: object) -> bool:
  """Whether the values of x can be looked at: not while a program is traced, nor where other hosts hold a part."""
  return x is not None and not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)


def as_tokens(tokens: ArrayLike, vocab_size: int) -> Array:
  """Tokens as int32 [B, T]. Raises ValueError for another shape or type and, where values can be seen, for what is
  outside the vocabulary."""
  given = as_array(tokens)
  if given.ndim != 2 or not given.shape[1] or not jnp.issubdtype(given.dtype, jnp.integer):
    raise ValueError(f"tokens has shape {given.shape} and type {given.dtype}; give integers [B, T], T is at least 1.")
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
  given = as_integers(name, lengths, (batch,))
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


def check_count(name: str, value: object, least: int = 1) -> None:
  """Raises ValueError for what is no integer of at least `least`."""
  if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
    raise ValueError(f"{name}={value!r}; use an integer of at least {least}.")


def as_integers(name: str, value: ArrayLike, shape: tuple[int, ...]) -> HostOrDevice:
  """`value` (a list too) as an array. Raises ValueError unless it holds integers of that shape."""
  given = as_array(value)
  if given.shape != shape or not jnp.issubdtype(given.dtype, jnp.integer):
    raise ValueError(f"{name} has shape {given.shape} and type {given.dtype}; it must be integers of shape {shape}.")
  return given


def as_array(value: ArrayLike) -> HostOrDevice:
  """An array on the host, unless something of the value (a list too) is on a device or traced."""
  on_device = any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value))
  return jnp.asarray(value) if on_device else np.asarray(value)


def _check_vocabulary(name: str, tokens: HostOrDevice, vocab_size: int) -> None:
  if is_concrete(tokens) and tokens.size:
    low, high = np.min(np.asarray(tokens)), np.max(np.asarray(tokens))
    if low < 0 or high >= vocab_size:
      raise ValueError(f"{name} run from {low} to {high}; the vocabulary of this model is 0..{vocab_size - 1}."
                       " Check the tokenizer and vocab_size.")


def check_heads_fit(q: Queries, k: Keys) -> None:
  """Raises ValueError unless q is [B, T, N, H] and k [B, S, K, H] with N a multiple of K, and nothing is empty."""
  fits = q.ndim == k.ndim == 4 and 0 not in (*q.shape, *k.shape) and q.shape[0] == k.shape[0] and (
      q.shape[3] == k.shape[3] and q.shape[2] % k.shape[2] == 0)
  if not fits:
    raise ValueError(f"q, k have shapes {q.shape}, {k.shape}; give q [B, T, N, H] and k [B, S, K, H] with N a multiple"
                     " of K, and at least one of everything.")


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
