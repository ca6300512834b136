"""Prefill, extension and decoding on typed caches. All three are one function, `advance`, on a cache."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import decode_attention, softmax
from rat_jax import attention, block_step, cache as caches, compression, layout as layouts, selection, transformer
from rat_jax.axes import Array, Lengths, Logits, Params, Positions, Stream, Tokens
from rat_jax.cache import Cache, KVCache, Slots
from rat_jax.layout import Layout
from rat_jax.model import RATPlusLM
from rat_jax.modes import BlockMode, Dense, Mode, PerLayer, Run, SnapKV, check_modes, visible
from rat_jax.selection import Origin, Statistics
from rat_jax.transformer import Attended


def prefill(model: RATPlusLM, params: Params, tokens: Tokens, lengths: Lengths | None = None, *, mode: Mode = Dense(),
            prefill_mode: Mode | None = None, max_length: int = 2048, chunk: int | None = None,
            row_ids: Array | None = None) -> tuple[Array, Cache]:
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
    ValueError: a prompt longer than max_length, tokens outside the vocabulary, lengths outside 0..T, chunk < 1,
      SnapKV as prefill_mode.
  """
  config = model.config
  tokens = layouts.as_tokens(tokens, config.vocab_size)
  lengths = layouts.as_lengths(lengths, tokens.shape)
  layouts.check_count("max_length", max_length)
  longest = int(np.max(np.asarray(lengths))) if layouts.is_concrete(lengths) else tokens.shape[1]
  if longest > max_length:
    raise ValueError(f"max_length={max_length} is below the prompt's {longest} tokens; raise max_length.")
  if chunk is not None:
    layouts.check_count("chunk", chunk)
  check_modes(mode, prefill_mode, config)
  row_ids = layouts.as_row_ids(row_ids, tokens.shape[0])
  return _prefill(config, mode, prefill_mode, max_length, chunk, params, tokens, lengths, row_ids)


def extend(model: RATPlusLM, params: Params, tokens: Tokens, cache: Cache, lengths: Lengths | None = None, *,
           prompt: bool = False) -> tuple[Logits, Cache]:
  """Feeds a chunk of tokens to a cache; the same numbers as one `decode_step` per token.

  Args:
    tokens: int [B, T]; lengths: int [B], the real tokens of each row (default T; 0 leaves the row as it is).
    prompt: the tokens belong to the prompt, and run in its form as if `prefill` had had them too.

  Returns:
    (logits, cache): float32 [B, T, V] after every token, and the new cache. The old one stays usable.

  Raises:
    ValueError: a cache of another model or one that would overflow, tokens outside the vocabulary; with `prompt`, a
      cache that does not hold what the prompt's form reads.
  """
  _check_cache(model, cache)
  if prompt:
    for run in cache.layer_runs:
      if not _serves_prompt(run, cache.max_length):
        raise ValueError(f"the cache of {run.mode} does not hold what {run.form} reads, so the prompt cannot go on;"
                         " give `prefill` the whole prompt (`chunk` bounds its memory).")
  tokens = layouts.as_tokens(tokens, model.config.vocab_size)
  if tokens.shape[0] != cache.lengths.shape[0]:
    raise ValueError(f"tokens has {tokens.shape[0]} rows and the cache {cache.lengths.shape[0]}; give every row of the"
                     " cache its tokens (lengths 0 leaves a row as it is).")
  lengths = layouts.as_lengths(lengths, tokens.shape)
  room = cache.room()
  if layouts.is_concrete(room) and layouts.is_concrete(lengths) and (np.asarray(lengths) > np.asarray(room)).any():
    total = np.asarray(cache.lengths) + np.asarray(lengths)
    raise ValueError(f"the cache has max_length={cache.max_length} and rows would grow to {total.tolist()} tokens, past"
                     f" their room for {np.asarray(room).tolist()} more; make it with a larger max_length.")
  return _extend(prompt, params, tokens, cache, lengths)


def decode_step(model: RATPlusLM, params: Params, next_tokens: Array, cache: Cache) -> tuple[Array, Cache]:
  """One token for every row: int [B] in, float32 [B, V] logits and the new cache out.

  A row whose cache is full is not written and gets NaN logits. Raises ValueError for a cache of another model and for
  tokens that are not one integer for each row; values are looked at only where they lie on the host.
  """
  _check_cache(model, cache)
  tokens = layouts.as_next_tokens(next_tokens, cache.lengths.shape[0], model.config.vocab_size)
  logits, cache = _extend(False, params, tokens[:, None], cache, jnp.ones_like(cache.lengths))
  return logits[:, 0], cache


def _check_cache(model: RATPlusLM, cache: Cache) -> None:
  if cache.config != model.config:
    raise ValueError(f"the cache belongs to another model ({cache.config.difference(model.config)}); make one with"
                     " `prefill` of this model.")


def _serves_prompt(run: Run, max_length: int) -> bool:
  """Whether the cache of a run holds all that the prompt's form reads, so that a prompt can go through it in pieces."""
  if isinstance(run.mode, SnapKV):
    return False
  slots, form = Slots.of(run.mode, max_length), run.form.pattern
  if run.form == run.mode or slots == Slots(max_length):
    return True
  if form is None or run.mode.pattern is None:
    return False
  mode = run.mode.pattern
  strided = form.dilation is None or (mode.dilation is not None and form.dilation % mode.dilation == 0)
  return strided and form.window <= mode.window and form.sinks <= mode.sinks


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _prefill(config, mode, prefill_mode, max_length, chunk, params, tokens, lengths, row_ids):
  batch, length = tokens.shape
  cache = caches.empty_cache(config, mode, batch, max_length, prefill_mode=prefill_mode, prompt_width=length,
                             row_ids=row_ids)
  if cache.prompt_lengths is not None:
    cache = dataclasses.replace(cache, prompt_lengths=lengths)
  if chunk is None or chunk >= length:
    x, cache = advance(params, tokens, cache, lengths, fresh=True, prompt=True)
    last = jnp.take_along_axis(x, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    last = jnp.where(lengths[:, None] > 0, last, 0)  # an empty row has no last token
    return transformer.logits(config, params, last), cache
  if all(_serves_prompt(run, max_length) for run in cache.layer_runs):
    last, cache = _prefill_pieces(params, tokens, cache, lengths, chunk)
  else:
    last, whole = _prefill_pieces(params, tokens, _whole_cache(cache, length), lengths, chunk)
    cache = _from_whole(cache, whole)
  return transformer.logits(config, params, last), cache


def _prefill_pieces(params, tokens, cache, lengths, chunk):
  """(the stream [B, E] after each row's last token, the cache) of a prompt that goes through its cache in pieces."""

  def body(carry, piece):
    cache, last = carry
    start, tokens = piece
    count = jnp.clip(lengths - start, 0, chunk)
    x, cache = advance(params, tokens, cache, count, prompt=True)
    ends_here = (count > 0) & (lengths <= start + chunk)
    x = jnp.take_along_axis(x, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    return (cache, jnp.where(ends_here[:, None], x, last)), None

  pieces = softmax.split(tokens, chunk)
  starts = jnp.arange(pieces.shape[0], dtype=jnp.int32) * chunk
  empty = jnp.zeros((tokens.shape[0], cache.config.embed_dim))
  (cache, last), _ = jax.lax.scan(body, (cache, empty), (starts, pieces))
  return last, cache


def _whole_cache(cache: Cache, length: int) -> Cache:
  """An empty cache that keeps all of a prompt of `length`, for modes whose own cache does not."""
  config, runs = cache.config, cache.layer_runs
  forms = PerLayer(tuple(run.form for run in runs for _ in range(run.start, run.stop)))
  whole = caches.empty_cache(config, Dense(), cache.lengths.shape[0], length, prefill_mode=forms, row_ids=cache.row_ids)
  windows = [run.mode.obs_window for run in runs if isinstance(run.mode, SnapKV)]
  if not windows:
    return whole

  def with_queries(run, kv):
    shape = (run.stop - run.start, cache.lengths.shape[0], max(windows), config.num_heads, config.head_dim)
    return dataclasses.replace(kv, queries=jnp.zeros(shape, config.dtype))

  return dataclasses.replace(whole, runs=tuple(map(with_queries, whole.layer_runs, whole.runs)))


def _from_whole(cache: Cache, whole: Cache) -> Cache:
  """The cache of a mode, from a prompt's whole cache."""
  kv = jax.tree.map(lambda *runs: jnp.concatenate(runs), *whole.runs)

  def run_cache(run):
    def layer(_, at_layer):
      kv, index = at_layer
      window = kv.queries[:, kv.queries.shape[1] - run.mode.obs_window:] if isinstance(run.mode, SnapKV) else None
      return None, caches.of_prompt(run, window, jnp.swapaxes(kv.keys, 1, 2), jnp.swapaxes(kv.values, 1, 2),
                                    whole.lengths, cache.max_length, _origin(cache, index))

    layers = (jax.tree.map(lambda x: x[run.start:run.stop], kv), jnp.arange(run.start, run.stop))
    return jax.lax.scan(layer, None, layers)[1]

  return dataclasses.replace(cache, lengths=whole.lengths, state=whole.state,
                             runs=tuple(run_cache(run) for run in cache.layer_runs))


@functools.partial(jax.jit, static_argnums=0)
def _extend(prompt, params, tokens, cache, lengths):
  fits = lengths <= cache.room()
  x, cache = advance(params, tokens, cache, jnp.where(fits, lengths, 0), prompt=prompt)
  logits = transformer.logits(cache.config, params, x)
  return jnp.where(fits[:, None, None], logits, jnp.nan), cache


def advance(params: Params, tokens: Tokens, cache: Cache, lengths: Lengths, *, prompt: bool = False,
            fresh: bool = False) -> tuple[Stream, Cache]:
  """The stream [B, T, E] of new tokens that follow those in the cache, and the cache with them in it.

  The layers read the cache as it was and the new tokens; what is new is written once, after the last layer of a
  run, so that the compiler can do it in place. `prompt` runs the tokens in the prompt's form. `fresh` says that the
  cache is empty and this the whole prompt: attention then takes the fast forms for whole sequences, and every layer
  makes its part of the cache at once.
  """
  config = cache.config
  layout = dataclasses.replace(layouts.consecutive(cache.lengths, lengths, tokens.shape[1]), plain=fresh)
  total = cache.lengths + lengths
  x = transformer.embed(params, tokens)
  runs, states = [], []
  for run, kv in zip(cache.layer_runs, cache.runs, strict=True):
    rule = run.form if prompt else run.mode

    def layer(x, at_layer, run=run, rule=rule, whole=kv):
      p, state, kv, index = at_layer
      origin = _origin(cache, index)

      def attend(at):
        if fresh:
          return attention.attend_sequence(at.q, at.k, at.v, rule, layout, origin)
        if tokens.shape[1] > 1:
          return _attend_cached(run, rule, layout, at, kv, cache, origin)
        if isinstance(rule, BlockMode):
          return block_step.attend_step(at.q, at.k, at.v, rule, layout.positions, whole, index - run.start,
                                        _statistics(run, rule, kv, cache), cache.lengths, origin, cache.max_length)
        return _attend_step(run, rule, layout, at, whole, cache, index)

      x, state, at = transformer.block(config, p, x, layout, state, attend)
      if not fresh:
        return x, (state, _new_rows(run, at, kv, layout, cache))
      window = None
      if isinstance(run.mode, SnapKV):
        window = compression.last_queries(at.q, total, run.mode.obs_window)
      return x, (state, caches.of_prompt(run, window, at.k, at.v, total, cache.max_length, origin))

    layers = (transformer.layers_of(params, run.start, run.stop),
              jax.tree.map(lambda s, run=run: s[run.start:run.stop], cache.state), None if fresh else kv,
              jnp.arange(run.start, run.stop))
    # A step is all reading of matrices: see `unrolled`.
    alone = tokens.shape[1] == 1 and jax.default_backend() == "gpu"
    x, (state, new) = jax.lax.scan(layer, x, layers, unroll=transformer.unrolled(run.stop - run.start, alone))
    runs.append(new if fresh else caches.append(cache, run, kv, new, layout.positions, total))
    states.append(state)
  state = jax.tree.map(lambda *s: jnp.concatenate(s), *states) if config.memory else None
  return x, dataclasses.replace(cache, lengths=total, runs=tuple(runs), state=state)


def _origin(cache: Cache, layer: Array) -> Origin:
  return Origin(jnp.zeros_like(cache.lengths) if cache.row_ids is None else cache.row_ids, layer)


def _new_rows(run: Run, at: Attended, kv: KVCache, layout: Layout, cache: Cache) -> KVCache:
  """What a layer adds to its part `kv` of the cache."""
  new = KVCache(at.k, at.v, queries=None if kv.queries is None else at.q)
  if kv.statistics and isinstance(run.mode, BlockMode):
    running = selection.continued(run.mode, kv.statistics, at.k, layout.positions, cache.lengths)
    new = dataclasses.replace(new, statistics=running)
  return new


def _attend_step(run: Run, rule: Mode, layout: Layout, at: Attended, kv: KVCache, cache: Cache, layer: Array) -> Array:
  """`_attend_cached` of one token a row, in `layer` of the model; `kv` is of the whole run, so nothing is sliced."""
  index = layer - run.start
  rule, cached = _cached_positions(run, rule, kv.positions, cache)
  if kv.positions is not None:
    cached = cached[index]
  seen = visible(rule, layout.positions if cached.ndim == 2 else layout.positions[:, None], cached)
  # A compressed cache may have a head for every query head.
  own_k, own_v = (jnp.repeat(x[:, 0], kv.keys.shape[2] // x.shape[2], axis=1) for x in (at.k, at.v))
  out, _ = decode_attention(at.q[:, 0], kv.keys, kv.values, jnp.squeeze(seen, -2), layer=index, own=(own_k, own_v))
  return out[:, None]


def _attend_cached(run: Run, rule: Mode, layout: Layout, at: Attended, kv: KVCache, cache: Cache, origin: Origin
                   ) -> Array:
  """Attention of new tokens, under `rule`, to themselves and to a layer's part `kv` of the cache; one softmax."""
  positions = layout.positions
  if isinstance(rule, BlockMode):
    return _attend_cached_blocks(run, rule, positions, at, kv, cache, origin)
  rule, cached = _cached_positions(run, rule, kv.positions, cache)
  old_k, old_v = jnp.swapaxes(kv.keys, 1, 2), jnp.swapaxes(kv.values, 1, 2)
  return softmax.merge([attention.attend_keys(at.q, old_k, old_v, rule, positions, cached),
                        attention.attend_keys(at.q, at.k, at.v, rule, positions, positions)])


def _cached_positions(run: Run, rule: Mode, kept: Array | None, cache: Cache) -> tuple[Mode, Array]:
  """The rule by which the cache is read and the positions of its rows: `kept`, where the cache holds them."""
  if kept is not None:  # all that was kept and generated
    return Dense(), kept
  return rule, Slots.of(run.mode, cache.max_length).readable(cache.lengths)


def _statistics(run: Run, rule: BlockMode, kv: KVCache, cache: Cache) -> Statistics:
  """Those of the blocks of a layer's part `kv` of the cache: kept, where `rule` is what they are kept for."""
  if rule == run.mode and kv.statistics:
    return kv.statistics
  return selection.block_statistics(rule, jnp.swapaxes(kv.keys, 1, 2), cache.lengths)


def _attend_cached_blocks(run: Run, rule: BlockMode, positions: Positions, at: Attended, kv: KVCache, cache: Cache,
                          origin: Origin) -> Array:
  """The same for a rule that chooses blocks; the cache is full."""
  old_k, old_v = jnp.swapaxes(kv.keys, 1, 2), jnp.swapaxes(kv.values, 1, 2)
  statistics = _statistics(run, rule, kv, cache)
  own = selection.continued(rule, statistics, at.k, positions, cache.lengths)
  blocks = caches.BlockSlots(rule.block, statistics[0].shape[2])
  total = cache.lengths + jnp.sum(positions >= 0, axis=1)
  statistics = tuple(caches.write(blocks, old[None], new[None], positions, total)[0]
                     for old, new in zip(statistics, own, strict=True))
  cached = Slots(cache.max_length).held(cache.lengths)
  k, v = jnp.concatenate([old_k, at.k], axis=1), jnp.concatenate([old_v, at.v], axis=1)
  return attention.attend_blocks(at.q, k, v, rule, positions, jnp.concatenate([cached, positions], axis=1), statistics,
                                 own, origin, cache.max_length)
