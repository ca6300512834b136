"""Generation: a prompt through `prefill`, then one compiled loop of decode steps."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from rat_jax import checks, transformer
from rat_jax.axes import Array, ArrayLike, Params, Tokens
from rat_jax.caches.cache import Cache
from rat_jax.inference import advance, prefill
from rat_jax.model import RATPlusLM
from rat_jax.modes import Dense, Mode

# Logits over less than the first overflow, and the likeliest token is certain long before.
_TEMPERATURES = (1e-30, 1e38)
# How many tokens there are, the logits [B, V] of the next, the cache, the last tokens [B], which rows are done [B], at
# which step a row's logits were first not finite [B] (-1: never), the tokens.
_Carry = tuple[Array, Array, Cache, Tokens, Array, Array, Tokens]


def generate(model: RATPlusLM, params: Params, tokens: ArrayLike, lengths: ArrayLike | None = None, *,
             mode: Mode = Dense(), prefill_mode: Mode | None = None, max_new_tokens: int, temperature: float = 0.0,
             top_p: float = 1.0, eos_id: int | Sequence[int] | None = None, key: Array | None = None,
             row_ids: ArrayLike | None = None) -> Tokens:
  """Continues every row of a batch of prompts.

  Args:
    tokens: int [B, T]; lengths: int [B], the real tokens of each row (default T).
    mode: the mode of the new tokens; the prompt runs in its prompt form, or under `prefill_mode`.
    max_new_tokens: how many tokens every row gets.
    temperature: 0 takes the likeliest token; above 0, logits are divided by it and sampled.
    top_p: sample among the likeliest tokens whose probability adds up to it, in (0, 1].
    eos_id: a row that has produced it, or one of several, is done: it gets the same token from there on.
    key: the random key for sampling; row i's draws depend on it and on i alone.
    row_ids: int [B], what random selection of a row depends on; default 0.

  Returns:
    int32 [B, max_new_tokens].

  Raises:
    ValueError: a temperature above 0 without a key, a key that is none, an empty prompt, and what `prefill` refuses.
    FloatingPointError: outside of compilation, logits that are not finite, such as those of parameters with a NaN. A
      loop of your own asks `jnp.isfinite`.

  Every shape [B, T] and `max_new_tokens` is a program of its own, which takes seconds to compile: pad prompts to few
  widths, with `lengths`.
  """
  checks.check_count("max_new_tokens", max_new_tokens)
  temperature, top_p = _number("temperature", temperature), _number("top_p", top_p)
  if not (temperature >= 0 and 0 < top_p <= 1):
    raise ValueError(f"temperature={temperature}, top_p={top_p}; use a finite temperature of 0 or more and top_p in"
                     " (0, 1].")
  if temperature > 0 and key is None:
    raise ValueError(f"temperature={temperature} samples and needs a random key; pass key=jax.random.key(seed).")
  ends = _ends(eos_id, model.config.vocab_size)
  tokens = checks.as_tokens(tokens, model.config.vocab_size, lengths=lengths)
  lengths = checks.as_lengths(lengths, tokens.shape)
  if checks.is_concrete(lengths) and not np.all(lengths):
    raise ValueError(f"the prompt of row {np.argmin(lengths)} is empty; give every row at least one token.")
  logits, cache = prefill(model, params, tokens, lengths, mode=mode, prefill_mode=prefill_mode,
                          max_length=tokens.shape[1] + max_new_tokens, row_ids=row_ids)
  key = _checked_key(key)
  continued, lost_at = _continue(max_new_tokens, temperature > 0, top_p < 1, ends, params, logits, cache, key,
                                 jnp.float32(np.clip(temperature, *_TEMPERATURES)), jnp.float32(top_p))
  if checks.is_concrete(lost_at) and (steps := np.asarray(lost_at)).max() >= 0:
    row = int(np.argmax(steps >= 0))
    raise FloatingPointError(f"the logits of row {row} are not finite at step {steps[row]} of"
                             f" max_new_tokens={max_new_tokens} ({(steps >= 0).sum()} of {len(steps)} rows in all);"
                             " look for NaN or inf in the parameters.")
  new: Tokens = continued
  return new


def _number(name: str, value: object) -> float:
  """A finite float, of a number of Python, numpy or jax. Raises ValueError for anything else."""
  try:
    number = math.nan if isinstance(value, (bool, str, bytes)) else float(value)  # type: ignore[arg-type]  # may refuse
  except (TypeError, ValueError, OverflowError):
    number = math.nan
  if not math.isfinite(number):
    raise ValueError(f"{name}={value!r}; use a finite number.")
  return number


def _checked_key(key: object) -> Array:
  """One random key, of jax's new kind or its old one; None is any. Raises ValueError for what is no key, or several."""
  if key is None:
    return jax.random.key(0)
  try:
    jax.eval_shape(jax.random.fold_in, key, 0)
  except (TypeError, ValueError) as error:
    raise ValueError(f"key={key!r} is no single random key; pass key=jax.random.key(seed).") from error
  return cast(Array, key)


def _ends(eos_id: int | Sequence[int] | None, vocab_size: int) -> tuple[int, ...]:
  """The tokens that end a row. Raises ValueError for what is no integer of the vocabulary."""
  if eos_id is None:
    return ()
  given = np.asarray(eos_id).tolist() if isinstance(eos_id, (np.ndarray, jax.Array)) else eos_id
  ends = tuple(given) if isinstance(given, (list, tuple)) else (given,)
  for end in ends:
    if isinstance(end, bool) or not isinstance(end, (int, np.integer)) or not 0 <= end < vocab_size:
      raise ValueError(f"eos_id={eos_id!r}; use an integer of the vocabulary 0..{vocab_size - 1}, or several.")
  return tuple(int(end) for end in ends)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _continue(max_new_tokens: int, sampled: bool, truncated: bool, ends: tuple[int, ...], params: Params, logits: Array,
              cache: Cache, key: Array, temperature: Array, top_p: Array) -> tuple[Tokens, Array]:
  """(tokens int32 [B, max_new_tokens], int32 [B]: the step at which a row's logits were not finite, or -1)."""
  batch = logits.shape[0]
  row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch, dtype=jnp.int32))
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
    step, _, _, _, done, _, _ = carry
    return (step < max_new_tokens) & ~jnp.all(done)

  def body(carry: _Carry) -> _Carry:
    step, logits, cache, token, done, lost_at, out = carry
    lost = ~done & ~jnp.all(jnp.isfinite(logits), axis=-1)
    lost_at = jnp.where(lost, step, lost_at)
    token = jnp.where(done, token, choose(logits, step))
    done |= lost | functools.reduce(jnp.logical_or, (token == end for end in ends), jnp.zeros_like(done))
    x, cache = advance(params, token[:, None], cache, one)
    logits = transformer.logits(cache.config, params, x)[:, 0]
    return step + 1, logits, cache, token, done, lost_at, out.at[:, step].set(token)

  none = jnp.zeros(batch, jnp.int32)
  start = (jnp.int32(0), logits, cache, none, jnp.zeros(batch, bool), none - 1,
           jnp.zeros((batch, max_new_tokens), jnp.int32))
  last: _Carry = jax.lax.while_loop(unfinished, body, start)
  step, _, _, token, _, lost_at, out = last
  return jnp.where(jnp.arange(max_new_tokens, dtype=jnp.int32) < step, out, token[:, None]), lost_at


def keep_nucleus(logits: Array, top_p: Array) -> Array:
  """The logits [B, V] with -inf for all but each row's likeliest tokens whose probability first reaches top_p."""
  order = jnp.flip(jnp.argsort(logits, axis=-1), axis=-1)
  probability = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
  before = jnp.cumsum(probability, axis=-1) - probability
  rank = jnp.argsort(order, axis=-1)
  kept = (jnp.take_along_axis(before, rank, axis=-1) < top_p) | (rank == 0)  # a tiny top_p is 0 in float32
  return jnp.where(kept, logits, -jnp.inf)
