"""Prefill, extension and decoding on typed caches. All three are one function, `advance`, on a cache."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import softmax
from rat_jax import attention, cache as caches, layout as layouts, transformer
from rat_jax.axes import Array, Lengths, Logits, Params, Positions, Stream, Tokens
from rat_jax.cache import Cache, KVCache, Slots
from rat_jax.layout import Layout
from rat_jax.model import RATPlusLM
from rat_jax.modes import Dense, Mode, layer_runs
from rat_jax.transformer import Attended


def prefill(model: RATPlusLM, params: Params, tokens: Tokens, lengths: Lengths | None = None, *, mode: Mode = Dense(),
            max_length: int = 2048, chunk: int | None = None) -> tuple[Array, Cache]:
  """Runs a prompt and makes a cache of it.

  Args:
    tokens: int [B, T]; lengths: int [B], the real tokens of each row (default T; 0 leaves the row empty).
    mode: the mode of the prompt and of all that follows.
    max_length: the most tokens that a row will ever have, prompt included.
    chunk: the prompt goes through in pieces of that many tokens, which bounds memory and changes no number.

  Returns:
    (logits, cache): float32 [B, V] after each row's last real token, and the cache.

  Raises:
    ValueError: a prompt longer than max_length, tokens outside the vocabulary, lengths outside 0..T, chunk < 1.
  """
  config = model.config
  tokens = layouts.as_tokens(tokens, config.vocab_size)
  lengths = layouts.as_lengths(lengths, *tokens.shape)
  longest = int(np.max(np.asarray(lengths))) if layouts.is_concrete(lengths) else tokens.shape[1]
  if longest > max_length:
    raise ValueError(f"max_length={max_length} is below the prompt's {longest} tokens; raise max_length.")
  if chunk is not None and chunk < 1:
    raise ValueError(f"chunk={chunk}; use at least 1, or None for the whole prompt at once.")
  return _prefill(config, mode, max_length, chunk, params, tokens, lengths)


def extend(model: RATPlusLM, params: Params, tokens: Tokens, cache: Cache, lengths: Lengths | None = None, *,
           prompt: bool = False) -> tuple[Logits, Cache]:
  """Feeds a chunk of tokens to a cache; the same numbers as one `decode_step` per token.

  Args:
    tokens: int [B, T]; lengths: int [B], the real tokens of each row (default T; 0 leaves the row as it is).
    prompt: the tokens belong to the prompt. The modes here treat prompt and later tokens alike.

  Returns:
    (logits, cache): float32 [B, T, V] after every token, and the new cache. The old one stays usable.

  Raises:
    ValueError: a cache of another model or one that would overflow, tokens outside the vocabulary.
  """
  del prompt
  _check_cache(model, cache)
  tokens = layouts.as_tokens(tokens, model.config.vocab_size)
  if tokens.shape[0] != cache.lengths.shape[0]:
    raise ValueError(f"tokens has {tokens.shape[0]} rows and the cache {cache.lengths.shape[0]}; give every row of the"
                     " cache its tokens (lengths 0 leaves a row as it is).")
  lengths = layouts.as_lengths(lengths, *tokens.shape)
  if layouts.is_concrete(cache.lengths) and layouts.is_concrete(lengths):
    total = np.asarray(cache.lengths) + np.asarray(lengths)
    if (total > cache.max_length).any():
      raise ValueError(f"the cache has max_length={cache.max_length} and rows would grow to {total.tolist()} tokens;"
                       " make it with a larger max_length.")
  return _extend(params, tokens, cache, lengths)


def decode_step(model: RATPlusLM, params: Params, next_tokens: Array, cache: Cache) -> tuple[Array, Cache]:
  """One token for every row: int [B] in, float32 [B, V] logits and the new cache out.

  A row whose cache is full is not written and gets NaN logits. Raises ValueError for a cache of another model and for
  tokens that are not one integer for each row; values are looked at only where they lie on the host.
  """
  _check_cache(model, cache)
  tokens = layouts.as_next_tokens(next_tokens, cache.lengths.shape[0], model.config.vocab_size)
  logits, cache = _extend(params, tokens[:, None], cache, jnp.ones_like(cache.lengths))
  return logits[:, 0], cache


def _check_cache(model: RATPlusLM, cache: Cache) -> None:
  if cache.config != model.config:
    raise ValueError(f"the cache belongs to another model ({cache.config.difference(model.config)}); make one with"
                     " `prefill` of this model.")


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _prefill(config, mode, max_length, chunk, params, tokens, lengths):
  batch, length = tokens.shape
  cache = caches.empty_cache(config, mode, batch, max_length)
  if chunk is None or chunk >= length:
    x, cache = advance(params, tokens, cache, lengths, fresh=True)
    last = jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    last = jnp.where(lengths[:, None] > 0, last, 0)  # an empty row has no last token
    return transformer.logits(config, params, last), cache

  def body(carry, piece):
    cache, last = carry
    start, tokens = piece
    count = jnp.clip(lengths - start, 0, chunk)
    x, cache = advance(params, tokens, cache, count)
    ends_here = (count > 0) & (lengths <= start + chunk)
    x = jnp.take_along_axis(x, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    return (cache, jnp.where(ends_here[:, None], x, last)), None

  pieces = softmax.split(tokens, chunk)
  starts = jnp.arange(pieces.shape[0], dtype=jnp.int32) * chunk
  (cache, last), _ = jax.lax.scan(body, (cache, jnp.zeros((batch, config.embed_dim))), (starts, pieces))
  return transformer.logits(config, params, last), cache


@jax.jit
def _extend(params, tokens, cache, lengths):
  fits = cache.lengths + lengths <= cache.max_length
  x, cache = advance(params, tokens, cache, jnp.where(fits, lengths, 0))
  logits = transformer.logits(cache.config, params, x)
  return jnp.where(fits[:, None, None], logits, jnp.nan), cache


def advance(params: Params, tokens: Tokens, cache: Cache, lengths: Lengths, *, fresh: bool = False
            ) -> tuple[Stream, Cache]:
  """The stream [B, T, E] of new tokens that follow those in the cache, and the cache with them in it.

  The layers read the cache as it was and the new tokens; what is new is written once, after the last layer of a
  run, so that the compiler can do it in place. `fresh` says that the cache is empty: attention then takes the
  fast forms for whole sequences, and every layer makes its part of the cache at once.
  """
  config = cache.config
  layout = dataclasses.replace(layouts.consecutive(cache.lengths, lengths, tokens.shape[1]), plain=fresh)
  total = cache.lengths + lengths
  x = transformer.embed(params, tokens)
  runs, states = [], []
  for run, kv in zip(layer_runs(cache.mode, config.num_layers), cache.runs, strict=True):
    slots = Slots.of(run.mode, cache.max_length)
    cached = None if fresh else slots.readable(cache.lengths)

    def layer(x, at_layer, mode=run.mode, slots=slots, cached=cached):
      p, state, kv = at_layer
      x, state, at = transformer.block(config, p, x, layout, state, lambda at: _attend(mode, layout, at, kv, cached))
      return x, (state, caches.fill(slots, at.k, at.v, total) if fresh else KVCache(at.k, at.v))

    layers = (transformer.layers_of(params, run.start, run.stop),
              jax.tree.map(lambda s, run=run: s[run.start:run.stop], cache.state), None if fresh else kv)
    x, (state, new) = jax.lax.scan(layer, x, layers)
    runs.append(new if fresh else caches.append(slots, kv, new.keys, new.values, layout.positions, total))
    states.append(state)
  state = jax.tree.map(lambda *s: jnp.concatenate(s), *states) if config.memory else None
  return x, dataclasses.replace(cache, lengths=total, runs=tuple(runs), state=state)


def _attend(mode: Mode, layout: Layout, at: Attended, kv: KVCache | None, cached: Positions | None) -> Array:
  """Attention of new tokens to themselves and to the rows of a cache, whose positions are `cached`; one softmax."""
  if kv is None or cached is None:
    return attention.attend_sequence(at.q, at.k, at.v, mode, layout)
  old_k, old_v = jnp.swapaxes(kv.keys, 1, 2), jnp.swapaxes(kv.values, 1, 2)
  return softmax.merge([attention.attend_keys(at.q, old_k, old_v, mode, layout.positions, cached),
                        attention.attend_keys(at.q, at.k, at.v, mode, layout.positions, layout.positions)])
