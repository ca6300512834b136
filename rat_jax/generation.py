"""Generation: a prompt through `prefill`, then one compiled loop of decode steps."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from rat_jax import checks, transformer
from rat_jax.axes import Array, ArrayLike, Params, Tokens
from rat_jax.caches.cache import Cache
from rat_jax.inference import advance, prefill
from rat_jax.model import RATPlusLM
from rat_jax.modes import Dense, Mode

# How many tokens there are, the logits [B, V] of the next, the cache, which rows are done [B], the tokens.
_Carry = tuple[Array, Array, Cache, Array, Tokens]


def generate(model: RATPlusLM, params: Params, tokens: ArrayLike, lengths: ArrayLike | None = None, *,
             mode: Mode = Dense(), prefill_mode: Mode | None = None, max_new_tokens: int, temperature: float = 0.0,
             top_p: float = 1.0, eos_id: int | None = None, key: Array | None = None,
             row_ids: ArrayLike | None = None) -> Tokens:
  """Continues every row of a batch of prompts.

  Args:
    tokens: int [B, T]; lengths: int [B], the real tokens of each row (default T).
    mode: the mode of the new tokens; the prompt runs in its prompt form, or under `prefill_mode`.
    max_new_tokens: how many tokens every row gets.
    temperature: 0 takes the likeliest token; above 0, logits are divided by it and sampled.
    top_p: sample among the likeliest tokens whose probability adds up to it, in (0, 1].
    eos_id: a row that has produced it is done, and gets only `eos_id` from there on.
    key: the random key for sampling; row i's draws depend on it and on i alone.
    row_ids: int [B], what random selection of a row depends on; default 0.

  Returns:
    int32 [B, max_new_tokens].

  Raises:
    ValueError: a temperature above 0 without a key, an empty prompt, and what `prefill` refuses.
  """
  checks.check_count("max_new_tokens", max_new_tokens)
  if not (math.isfinite(temperature) and temperature >= 0 and 0 < top_p <= 1):
    raise ValueError(f"temperature={temperature}, top_p={top_p}; use a finite temperature of 0 or more and top_p in"
                     " (0, 1].")
  if temperature > 0 and key is None:
    raise ValueError(f"temperature={temperature} samples and needs a random key; pass key=jax.random.key(seed).")
  if eos_id is not None and not 0 <= eos_id < model.config.vocab_size:
    raise ValueError(f"eos_id={eos_id} is outside the vocabulary 0..{model.config.vocab_size - 1}.")
  tokens = checks.as_tokens(tokens, model.config.vocab_size)
  lengths = checks.as_lengths(lengths, tokens.shape)
  if checks.is_concrete(lengths) and not np.all(lengths):
    raise ValueError(f"the prompt of row {np.argmin(lengths)} is empty; give every row at least one token.")
  logits, cache = prefill(model, params, tokens, lengths, mode=mode, prefill_mode=prefill_mode,
                          max_length=tokens.shape[1] + max_new_tokens, row_ids=row_ids)
  key = jax.random.key(0) if key is None else key
  continued: Tokens = _continue(max_new_tokens, temperature > 0, top_p < 1, eos_id, params, logits, cache, key,
                                jnp.float32(temperature), jnp.float32(top_p))
  return continued


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _continue(max_new_tokens: int, sampled: bool, truncated: bool, eos_id: int | None, params: Params, logits: Array,
              cache: Cache, key: Array, temperature: Array, top_p: Array) -> Tokens:
  batch = logits.shape[0]
  row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch))
  one = jnp.ones(batch, jnp.int32)

  def choose(logits: Array, step: Array) -> Array:
    if not sampled:
      return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if truncated:
      logits = keep_nucleus(logits, top_p)
    keys = jax.vmap(lambda k: jax.random.fold_in(k, step))(row_keys)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)

  def unfinished(carry: _Carry) -> Array:
    step, _, _, done, _ = carry
    return (step < max_new_tokens) & ~jnp.all(done)

  def body(carry: _Carry) -> _Carry:
    step, logits, cache, done, out = carry
    token = choose(logits, step)
    if eos_id is not None:
      token = jnp.where(done, eos_id, token)
      done |= token == eos_id
    x, cache = advance(params, token[:, None], cache, one)
    return step + 1, transformer.logits(cache.config, params, x)[:, 0], cache, done, out.at[:, step].set(token)

  out = jnp.full((batch, max_new_tokens), 0 if eos_id is None else eos_id, jnp.int32)
  start = (jnp.int32(0), logits, cache, jnp.zeros(batch, bool), out)
  last: _Carry = jax.lax.while_loop(unfinished, body, start)
  return last[-1]


def keep_nucleus(logits: Array, top_p: Array) -> Array:
  """-inf for all but the likeliest tokens of each row [B, V] whose probability first reaches top_p."""
  order = jnp.flip(jnp.argsort(logits, axis=-1), axis=-1)
  probability = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
  before = jnp.cumsum(probability, axis=-1) - probability
  rank = jnp.argsort(order, axis=-1)
  return jnp.where(jnp.take_along_axis(before, rank, axis=-1) < top_p, logits, -jnp.inf)
