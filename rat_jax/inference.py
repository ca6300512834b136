"""Prefill, extension and decoding with a cache: `_start` takes whole prompts, `advance` all that follows a cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import devices
from pallas_kernels.attention import softmax
from rat_jax import batch as batches, checks, transformer
from rat_jax.attention import over_context
from rat_jax.attention.terms import Origin, Placement
from rat_jax.axes import Array, ArrayLike, Lengths, Logits, Params, RowIds, State, Stream, Tokens
from rat_jax.caches.cache import Cache, arrived, arriving, empty_cache
from rat_jax.caches.store import NewTokens
from rat_jax.config import RATPlusConfig
from rat_jax.leaves import check_params
from rat_jax.model import RATPlusLM
from rat_jax.modes import Dense, Mode
from rat_jax.parallel import constrain
from rat_jax.plan import check_modes, layer_runs
from rat_jax.transformer import AtLayer


def prefill_many(model: RATPlusLM, params: Params, tokens: ArrayLike, lengths: ArrayLike | None = None, *,
                 modes: Sequence[Mode], max_length: int = 2048, row_ids: ArrayLike | None = None
                 ) -> tuple[Array, tuple[Cache, ...]]:
  """Runs a prompt once and makes a cache of it for each of several modes, which have one form of the prompt.

  Returns (logits, caches): what `prefill` returns under each mode. Arguments and errors are those of `prefill`, and
  ValueError for no mode, and for modes whose layers run the prompt in different forms, such as Dense and Dilated.
  """
  config, modes = model.config, tuple(modes)
  if not modes:
    raise ValueError("modes=() is empty; give one mode at least.")
  tokens, lengths = _checked_prompt(config, tokens, lengths, max_length)
  for mode in modes:
    check_modes(mode, None, config)
  forms = [[(run.form, run.start, run.stop) for run in layer_runs(mode, config.num_layers)] for mode in modes]
  for mode, form in zip(modes, forms, strict=True):
    if form != forms[0]:
      raise ValueError(f"modes={', '.join(map(str, modes))}: {modes[0]} and {mode} run the prompt in different forms,"
                       " or have runs of different layers; call `prefill` for each.")
  row_ids = checks.as_row_ids(row_ids, tokens.shape[0])
  made: tuple[Array, tuple[Cache, ...]] = _prefill(config, modes, None, max_length, None, params, tokens, lengths,
                                                   row_ids)
  return made


def prefill(model: RATPlusLM, params: Params, tokens: ArrayLike, lengths: ArrayLike | None = None, *,
            mode: Mode = Dense(), prefill_mode: Mode | None = None, max_length: int = 2048, chunk: int | None = None,
            row_ids: ArrayLike | None = None) -> tuple[Array, Cache]:
  """Runs a prompt and makes a cache of it.

  Args:
    tokens: int [B, T]; lengths: int [B], the real tokens of each row (default T; 0 leaves the row empty).
    mode: the mode of all that follows; the prompt runs in its prompt form (Quest, DilatedTopK and SnapKV: dense).
    prefill_mode: overrides that form.
    max_length: the most tokens that a row will ever have, prompt included.
    chunk: the prompt goes through in pieces of that many tokens, which bounds memory and changes no number.
    row_ids: int [B], what random selection of a row depends on; default 0.

  Returns:
    (logits, cache): float32 [B, V] after each row's last real token, and the cache.

  Raises:
    ValueError: a prompt longer than max_length, real tokens outside the vocabulary, lengths outside 0..T, chunk < 1,
      SnapKV as prefill_mode, parameters of another configuration.
  """
  config = model.config
  tokens, lengths = _checked_prompt(config, tokens, lengths, max_length)
  if chunk is not None:
    checks.check_count("chunk", chunk)
  check_modes(mode, prefill_mode, config)
  row_ids = checks.as_row_ids(row_ids, tokens.shape[0])
  logits, (cache,) = _prefill(config, (mode,), prefill_mode, max_length, chunk, params, tokens, lengths, row_ids)
  return logits, cache


def _checked_prompt(config: RATPlusConfig, tokens: ArrayLike, lengths: ArrayLike | None, max_length: int
                    ) -> tuple[Tokens, Lengths]:
  """The tokens and lengths of a prompt as arrays. Raises ValueError as `prefill`."""
  tokens = checks.as_tokens(tokens, config.vocab_size, lengths=lengths)
  lengths = checks.as_lengths(lengths, tokens.shape)
  checks.check_count("max_length", max_length)
  longest = int(np.max(np.asarray(lengths))) if checks.is_concrete(lengths) else tokens.shape[1]
  if longest > max_length:
    raise ValueError(f"max_length={max_length} is below the prompt's {longest} tokens; raise max_length.")
  return tokens, lengths


def extend(model: RATPlusLM, params: Params, tokens: ArrayLike, cache: Cache, lengths: ArrayLike | None = None, *,
           prompt: bool = False) -> tuple[Logits, Cache]:
  """Runs several new tokens of every row after those in the cache, with the numbers of one `decode_step` per token.

  Args:
    tokens: int [B, T]; lengths: int [B], the real tokens of each row (default T; 0 leaves the row as it is).
    prompt: the tokens belong to the prompt, and run in its form as if `prefill` had had them too.

  Returns:
    (logits, cache): float32 [B, T, V] after every token, and the new cache. The old one stays usable.

  Raises:
    ValueError: a cache or parameters of another model, a cache that would overflow, real tokens outside the vocabulary;
      with `prompt`, a cache that does not hold what the prompt's form reads.
  """
  _check_cache(model, cache)
  if not isinstance(prompt, bool):
    raise ValueError(f"prompt={prompt!r}; use True or False.")
  if prompt:
    for run, store in zip(cache.plan, cache.stores, strict=True):
      if not store.serves(run.form):
        raise ValueError(f"the cache of {run.mode} does not hold what {run.form} reads, so the prompt cannot go on;"
                         " give `prefill` the whole prompt (`chunk` bounds its memory).")
  tokens = checks.as_tokens(tokens, model.config.vocab_size, lengths=lengths)
  if tokens.shape[0] != cache.lengths.shape[0]:
    raise ValueError(f"tokens has {tokens.shape[0]} rows and the cache {cache.lengths.shape[0]}; give every row of the"
                     " cache its tokens (lengths 0 leaves a row as it is).")
  lengths = checks.as_lengths(lengths, tokens.shape)
  room = cache.room()
  if checks.is_concrete(room) and checks.is_concrete(lengths) and (np.asarray(lengths) > np.asarray(room)).any():
    total = np.asarray(cache.lengths) + np.asarray(lengths)
    raise ValueError(f"the cache has max_length={cache.max_length} and rows would grow to {total.tolist()} tokens, past"
                     f" their room for {np.asarray(room).tolist()} more; make it with a larger max_length.")
  made: tuple[Logits, Cache] = _extend(prompt, params, tokens, cache, lengths)
  return made


def decode_step(model: RATPlusLM, params: Params, next_tokens: ArrayLike, cache: Cache) -> tuple[Array, Cache]:
  """Runs one new token of every row after those in the cache.

  Takes int [B] tokens, returns float32 [B, V] logits and the new cache. A row whose cache is full is not written and
  gets NaN logits. Raises ValueError for a cache of another model and for tokens that are not one integer for each row;
  values are looked at only where they lie on the host.
  """
  _check_cache(model, cache)
  tokens = checks.as_next_tokens(next_tokens, cache.lengths.shape[0], model.config.vocab_size)
  logits, cache = _extend(False, params, tokens[:, None], cache, jnp.ones_like(cache.lengths))
  return logits[:, 0], cache


def _check_cache(model: RATPlusLM, cache: Cache) -> None:
  if not isinstance(cache, Cache):
    raise ValueError(f"cache is a {type(cache).__name__}; give the cache alone that `prefill` or a step made beside its"
                     " logits.")
  if cache.config != model.config:
    raise ValueError(f"the cache belongs to another model ({cache.config.difference(model.config)}); make one with"
                     " `prefill` of this model.")


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _prefill(config: RATPlusConfig, modes: tuple[Mode, ...], prefill_mode: Mode | None, max_length: int,
             chunk: int | None, params: Params, tokens: Tokens, lengths: Lengths, row_ids: RowIds
             ) -> tuple[Array, tuple[Cache, ...]]:
  """The logits, and a cache for every mode; a prompt in pieces has one mode."""
  check_params(params, config, same_type=False)  # of shapes alone: at run time it costs nothing
  batch, length = tokens.shape
  caches = tuple(_for_prompt(empty_cache(config, mode, batch, max_length, prefill_mode=prefill_mode,
                                         prompt_width=length, row_ids=row_ids), lengths) for mode in modes)
  if chunk is None or chunk >= length:
    x, caches = _start(params, tokens, caches, lengths, row_ids)
    last = jnp.where(lengths[:, None] > 0, _last(x, lengths), 0)  # an empty row has no last token
  else:
    last, cache = _in_pieces(params, tokens, arriving(caches[0], length), lengths, chunk)
    caches = (arrived(cache),)
  return transformer.logits(config, params, last), constrain.tree(caches, params)


def _for_prompt(cache: Cache, lengths: Lengths) -> Cache:
  return cache if cache.prompt_lengths is None else dataclasses.replace(cache, prompt_lengths=lengths)


def _last(x: Stream, count: Lengths) -> Array:
  """The stream [B, E] at the last of the first `count` [B] tokens; of an empty row that of any."""
  return jnp.take_along_axis(x, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]


def _in_pieces(params: Params, tokens: Tokens, cache: Cache, lengths: Lengths, chunk: int) -> tuple[Array, Cache]:
  """(the stream [B, E] after each row's last token, the cache) of a prompt that goes through its cache in pieces."""

  def body(carry: tuple[Cache, Array], piece: tuple[Array, Tokens]) -> tuple[tuple[Cache, Array], None]:
    cache, last = carry
    start, tokens = piece
    count = jnp.clip(lengths - start, 0, chunk)
    x, cache = advance(params, tokens, cache, count, prompt=True)
    ends_here = (count > 0) & (lengths <= start + chunk)
    return (cache, jnp.where(ends_here[:, None], _last(x, count), last)), None

  pieces = softmax.split(tokens, chunk)
  starts = jnp.arange(pieces.shape[0], dtype=jnp.int32) * chunk
  empty = jnp.zeros((tokens.shape[0], cache.config.embed_dim), jnp.float32)
  (cache, last), _ = jax.lax.scan(body, (cache, empty), (starts, pieces))
  return last, cache


@functools.partial(jax.jit, static_argnums=0)
def _extend(prompt: bool, params: Params, tokens: Tokens, cache: Cache, lengths: Lengths) -> tuple[Logits, Cache]:
  check_params(params, cache.config, same_type=False)
  fits = lengths <= cache.room()
  x, cache = advance(params, tokens, cache, jnp.where(fits, lengths, 0), prompt=prompt)
  logits = transformer.logits(cache.config, params, x)
  return jnp.where(fits[:, None, None], logits, jnp.nan), constrain.tree(cache, params)


def _start(params: Params, tokens: Tokens, caches: tuple[Cache, ...], lengths: Lengths, row_ids: RowIds
           ) -> tuple[Stream, tuple[Cache, ...]]:
  """The stream [B, T, E] of whole prompts, and the caches of them, whose plans differ in what follows the prompt alone.

  Attention takes the fast forms for whole sequences, and every layer makes its part of the caches at once.
  """
  first = caches[0]
  batch = dataclasses.replace(batches.following(tokens, first.lengths, lengths, row_ids), plain=True)
  stores = dict(zip(first.plan, zip(*(cache.stores for cache in caches), strict=True), strict=True))

  def layer(x: Stream, at: AtLayer) -> tuple[Stream, tuple[State | None, Any]]:
    origin = Origin(batch.row_ids, at.number)
    x, state, heads = transformer.block(
        first.config, at, x, batch, at.carried,
        lambda heads: over_context.attend(at.run.form, heads, Placement.of(batch), origin))
    return x, (state, tuple(store.of_prompt(heads.last_queries(lengths, store.window), lengths, origin)
                            for store in stores[at.run]))

  x, made = transformer.walk(params, first.plan, transformer.embed(params, tokens), layer, first.state)
  return x, tuple(_with(cache, lengths, made, [rows[i] for _, rows in made]) for i, cache in enumerate(caches))


def advance(params: Params, tokens: Tokens, cache: Cache, lengths: Lengths, *, prompt: bool = False
            ) -> tuple[Stream, Cache]:
  """The stream [B, T, E] of new tokens that follow those in the cache, and the cache with them in it.

  The layers read the cache as it was and the new tokens; what is new is written once, after the last layer of a
  run, so that the compiler can do it in place. `prompt` runs the tokens in the prompt's form.
  """
  batch, after = batches.following(tokens, cache.lengths, lengths, cache.numbers), cache.lengths + lengths
  new = NewTokens(batch.positions, cache.lengths, after, cache.prompt_lengths)
  parts = dict(zip(cache.plan, zip(cache.stores, cache.runs, strict=True), strict=True))

  def layer(x: Stream, at: AtLayer) -> tuple[Stream, tuple[State | None, Any]]:
    origin, (store, rows) = Origin(batch.row_ids, at.number), parts[at.run]
    mode, index = at.run.form if prompt else at.run.mode, at.number - at.run.start
    x, state, heads = transformer.block(
        cache.config, at, x, batch, at.carried,
        lambda heads: store.attend(rows, index, mode, heads, new, origin))
    return x, (state, store.added(rows, index, heads, new))

  # A step is all reading of matrices: see `transformer.unrolled`.
  alone = tokens.shape[1] == 1 and devices.platform_of(params["embedding"]) == "gpu"
  x, made = transformer.walk(params, cache.plan, transformer.embed(params, tokens), layer, cache.state, unroll=alone)
  runs = [store.append(rows, added, new) for (store, rows), (_, added) in zip(parts.values(), made, strict=True)]
  return x, _with(cache, after, made, runs)


def _with(cache: Cache, lengths: Lengths, made: list[tuple[State | None, Any]], runs: list[Any]) -> Cache:
  """The cache with other lengths and rows, and with the memory's states that layers made besides."""
  state = jax.tree.map(lambda *s: jnp.concatenate(s), *(state for state, _ in made)) if cache.config.memory else None
  return dataclasses.replace(cache, lengths=lengths, runs=tuple(runs), state=state)
