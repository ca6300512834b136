"""Generation: a prompt through `prefill`, then decode steps: one compiled loop, or one compiled step at a time."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from rat_jax import checks, transformer
from rat_jax.axes import Array, ArrayLike, Logits, Params, Tokens
from rat_jax.caches.cache import Cache
from rat_jax.inference import advance, prefill
from rat_jax.model import RATPlusLM
from rat_jax.modes import Dense, Mode

# Logits over less than the first overflow, and the likeliest token is certain long before.
_TEMPERATURES = (1e-30, 1e38)


class State(NamedTuple):
  """A continuation between two steps.

  Attributes:
    step: int32 [], tokens so far; logits: [B, V], of the next one; cache: after those so far.
    token: int32 [B], the last one; done: bool [B], the rows that have ended.
    lost_at: int32 [B], the step at which a row's logits were first not finite; -1 for never.
  """

  step: Array
  logits: Logits
  cache: Cache
  token: Array
  done: Array
  lost_at: Array

  @classmethod
  def after(cls, logits: Logits, cache: Cache) -> State:
    """Before the first step."""
    none = jnp.zeros(logits.shape[0], jnp.int32)
    return cls(jnp.int32(0), logits, cache, none, jnp.zeros(logits.shape[0], bool), none - 1)


@dataclasses.dataclass(frozen=True)
class Choice:
  """What a program of steps depends on: whether tokens are sampled, of the likeliest alone, and which end a row."""

  sampled: bool
  truncated: bool
  ends: tuple[int, ...]


class Draws(NamedTuple):
  """What sampling is given: a key for every row [B], temperature and top_p float32 []."""

  keys: Array
  temperature: Array
  top_p: Array


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
  state, choice, draws = _begun(model, params, tokens, lengths, mode=mode, prefill_mode=prefill_mode,
                                max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, eos_id=eos_id,
                                key=key, row_ids=row_ids)
  new: Tokens
  new, lost_at = _continue(max_new_tokens, choice, params, state, draws)
  if checks.is_concrete(lost_at):
    _check_finite(np.asarray(lost_at), max_new_tokens)
  return new


def stream(model: RATPlusLM, params: Params, tokens: ArrayLike, lengths: ArrayLike | None = None, *,
           mode: Mode = Dense(), prefill_mode: Mode | None = None, max_new_tokens: int, temperature: float = 0.0,
           top_p: float = 1.0, eos_id: int | Sequence[int] | None = None, key: Array | None = None,
           row_ids: ArrayLike | None = None) -> Iterator[np.ndarray]:
  """Continues every row of a batch of prompts, and hands every token out as it is made.

  Arguments and errors as of `generate`, whose numbers these are. They are checked, and the prompt runs, at once; errors
  of a step come with the step.

  Returns:
    An iterator of int32 [B], one a step, from one compiled step: `max_new_tokens` of them, fewer where all rows end.
  """
  state, choice, draws = _begun(model, params, tokens, lengths, mode=mode, prefill_mode=prefill_mode,
                                max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, eos_id=eos_id,
                                key=key, row_ids=row_ids)
  return (np.asarray(state.token) for state in steps(params, state, choice, draws, max_new_tokens))


def steps(params: Params, state: State, choice: Choice, draws: Draws, count: int) -> Iterator[State]:
  """Up to `count` steps, until all rows have ended; a state that was handed out is used up by the next step.

  Raises FloatingPointError for logits that are not finite.
  """
  for _ in range(count):
    state = _step(choice, params, state, draws)
    _check_finite(np.asarray(state.lost_at), count)
    yield state
    if bool(np.all(state.done)):
      return


def choice_of(vocab_size: int, batch: int, *, temperature: float, top_p: float, eos_id: int | Sequence[int] | None,
              key: Array | None) -> tuple[Choice, Draws]:
  """How tokens are chosen. Raises ValueError as `generate` says."""
  temperature, top_p = _number("temperature", temperature), _number("top_p", top_p)
  if not (temperature >= 0 and 0 < top_p <= 1):
    raise ValueError(f"temperature={temperature}, top_p={top_p}; use a finite temperature of 0 or more and top_p in"
                     " (0, 1].")
  if temperature > 0 and key is None:
    raise ValueError(f"temperature={temperature} samples and needs a random key; pass key=jax.random.key(seed).")
  choice = Choice(temperature > 0, top_p < 1, _ends(eos_id, vocab_size))
  checked = _checked_key(key)
  keys = jax.vmap(lambda row: jax.random.fold_in(checked, row))(jnp.arange(batch, dtype=jnp.int32))
  return choice, Draws(keys, jnp.float32(np.clip(temperature, *_TEMPERATURES)), jnp.float32(top_p))


def _begun(model: RATPlusLM, params: Params, tokens: ArrayLike, lengths: ArrayLike | None, *, mode: Mode,
           prefill_mode: Mode | None, max_new_tokens: int, row_ids: ArrayLike | None, **how: Any
           ) -> tuple[State, Choice, Draws]:
  """The arguments of `generate`, checked, and the prompts done."""
  checks.check_count("max_new_tokens", max_new_tokens)
  tokens = checks.as_tokens(tokens, model.config.vocab_size, lengths=lengths)
  choice, draws = choice_of(model.config.vocab_size, tokens.shape[0], **how)
  lengths = checks.as_lengths(lengths, tokens.shape)
  if checks.is_concrete(lengths) and not np.all(lengths):
    raise ValueError(f"the prompt of row {np.argmin(lengths)} is empty; give every row at least one token.")
  logits, cache = prefill(model, params, tokens, lengths, mode=mode, prefill_mode=prefill_mode,
                          max_length=tokens.shape[1] + max_new_tokens, row_ids=row_ids)
  return State.after(logits, cache), choice, draws


def _check_finite(lost_at: np.ndarray, max_new_tokens: int) -> None:
  if lost_at.max() >= 0:
    row = int(np.argmax(lost_at >= 0))
    raise FloatingPointError(f"the logits of row {row} are not finite at step {lost_at[row]} of"
                             f" max_new_tokens={max_new_tokens} ({(lost_at >= 0).sum()} of {len(lost_at)} rows in all);"
                             " look for NaN or inf in the parameters.")


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


@functools.partial(jax.jit, static_argnums=(0, 1))
def _continue(max_new_tokens: int, choice: Choice, params: Params, state: State, draws: Draws) -> tuple[Tokens, Array]:
  """(tokens int32 [B, max_new_tokens], int32 [B]: the step at which a row's logits were not finite, or -1)."""

  def unfinished(carry: tuple[State, Tokens]) -> Array:
    state, _ = carry
    return (state.step < max_new_tokens) & ~jnp.all(state.done)

  def body(carry: tuple[State, Tokens]) -> tuple[State, Tokens]:
    state, out = carry
    after = _next(choice, params, state, draws)
    return after, out.at[:, state.step].set(after.token)

  out = jnp.zeros((state.token.shape[0], max_new_tokens), jnp.int32)
  last, out = jax.lax.while_loop(unfinished, body, (state, out))
  made = jnp.arange(max_new_tokens, dtype=jnp.int32) < last.step
  return jnp.where(made, out, last.token[:, None]), last.lost_at


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _step(choice: Choice, params: Params, state: State, draws: Draws) -> State:
  return _next(choice, params, state, draws)


def _next(choice: Choice, params: Params, state: State, draws: Draws) -> State:
  """One token more of every row that has not ended."""
  lost = ~state.done & ~jnp.all(jnp.isfinite(state.logits), axis=-1)
  token = jnp.where(state.done, state.token, _chosen(choice, state, draws))
  ended = functools.reduce(jnp.logical_or, (token == end for end in choice.ends), jnp.zeros_like(state.done))
  x, cache = advance(params, token[:, None], state.cache, jnp.ones_like(token))
  return State(state.step + 1, transformer.logits(cache.config, params, x)[:, 0], cache, token,
               state.done | lost | ended, jnp.where(lost, state.step, state.lost_at))


def _chosen(choice: Choice, state: State, draws: Draws) -> Array:
  if not choice.sampled:
    return jnp.argmax(state.logits, axis=-1).astype(jnp.int32)
  logits = state.logits / draws.temperature
  if choice.truncated:
    logits = keep_nucleus(logits, draws.top_p)
  keys = jax.vmap(lambda k: jax.random.fold_in(k, state.step))(draws.keys)
  return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def keep_nucleus(logits: Array, top_p: Array) -> Array:
  """The logits [B, V] with -inf for all but each row's likeliest tokens whose probability first reaches top_p."""
  order = jnp.flip(jnp.argsort(logits, axis=-1), axis=-1)
  probability = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
  before = jnp.cumsum(probability, axis=-1) - probability
  rank = jnp.argsort(order, axis=-1)
  kept = (jnp.take_along_axis(before, rank, axis=-1) < top_p) | (rank == 0)  # a tiny top_p is 0 in float32
  return jnp.where(kept, logits, -jnp.inf)
