"""What a mode is: what a query may read, how that is attended to, and what a cache keeps for it.

A mode is a frozen, hashable dataclass, so it can be a static argument of a compiled program. To add a
position-only mode, write one file with `name`, the fields, `sees`, and put its class into the table of
`rat_jax.modes`: whole sequences, caches, decoding, text form and command lines follow from that.

A position-only mode answers two questions:
  sees(t, s)   the static rule, on positions.
  pattern      the rule as dilation, window and sinks, where it is one: this opens the fast forms and the compact
               cache. None (the default) keeps a full cache and masks it.
Modes that choose keys by the query derive from `rat_jax.modes.selecting.SelectingMode`; those that choose blocks from
`rat_jax.modes.block_mode.BlockMode`, and say how a block is summed up and how many are read. What the library asks of
any mode are the methods of `Mode`.
"""

from __future__ import annotations

import dataclasses
import numbers
from typing import TYPE_CHECKING, ClassVar

import jax.numpy as jnp
import numpy as np

from pallas_kernels.arguments import as_int32
from pallas_kernels.pattern import Pattern, seen
from rat_jax.attention import by_rule, over_context
from rat_jax.attention.terms import Heads, Held, Origin, Placement
from rat_jax.axes import Array, ArrayLike, Lengths, Positions
from rat_jax.batch import Batch
from rat_jax.caches.compact import smallest
from rat_jax.caches.store import Store
from rat_jax.modes import text

if TYPE_CHECKING:
  from rat_jax.modes.snapkv import Kept
  from rat_jax.selection.choice import Selection


@dataclasses.dataclass(frozen=True, eq=False)
class Mode:
  """The base class of all modes: what the library asks of a mode, with answers that fit the position-only ones."""

  name: ClassVar[str]  # in `str(mode)`, `parse_mode` and on command lines
  chooses: ClassVar[bool] = False  # by what keys hold: positions are then 0..T-1, and a row is one document
  after_prompt: ClassVar[str] = ""  # why it starts once the prompt has ended, so that it is no form of a prompt

  def __post_init__(self) -> None:
    """Stores lists as tuples, for a mode is hashed. Modes that check their fields have a form of their own."""
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if isinstance(value, list):
        object.__setattr__(self, field.name, tuple(value))

  # Who sees whom.

  def sees(self, t: Array, s: Array) -> Array:
    """Which keys s a query t reads, given that 0 <= s <= t: bool, `t` and `s` int32 broadcast together."""
    if self.pattern is None:
      raise NotImplementedError(f"{type(self).__name__} has no rule on positions alone.")
    return self.pattern.sees(t, s)

  @property
  def pattern(self) -> Pattern | None:
    """The same rule as dilation, window and sinks, or None where it is not one."""
    return None

  @property
  def heads_differ(self) -> bool:
    """Whether a head's attention depends on which head it is, so that heads cannot be computed apart."""
    return self.draws

  @property
  def draws(self) -> bool:
    """Whether the mode chooses at random, so that results depend on the numbers of the rows."""
    return False

  # Prompts and layers.

  @property
  def prompt_form(self) -> Mode:
    """The mode that the prompt's tokens run under."""
    return self

  def of_layer(self, layer: int, num_layers: int) -> Mode:
    """The mode of one layer of a model."""
    del layer, num_layers
    return self

  def of_any_layer(self, layer: int) -> Mode:
    """The mode of one layer whose number of layers is not known, as for operators on plain arrays."""
    del layer
    return self

  def check_heads(self, num_kv_heads: int) -> None:
    """Raises ValueError where the mode does not fit so many key/value heads."""

  # Attention.

  def check_operator(self) -> None:
    """Raises ValueError for a mode that is no attention on plain arrays, such as one that acts on a cache."""

  def attend(self, heads: Heads, at: Placement, origin: Origin) -> Array:
    """Attention of queries to keys, every query a step of its own: [B, T, N, H] in q's type."""
    del origin
    return by_rule.attend(self, self.pattern, heads, at)

  def attend_after_prompt(self, heads: Heads, batch: Batch, origin: Origin) -> Array:
    """Attention of the queries from number `batch.first_step` on, as steps after their row's prompt.

    [B, T - first_step, N, H]; what stands at rows of the prompt is arbitrary.
    """
    return over_context.attend(self, heads.queries_from(batch.first_step), Placement.of(batch, batch.first_step),
                               origin)

  def attend_cached(self, heads: Heads, held: Held, positions: Positions, origin: Origin) -> Array:
    """Attention of new tokens, at `positions` [B, T], to a cache and to themselves: float32 [B, T, N, H]."""
    del origin
    return by_rule.attend_cached(self, heads, held, positions)

  def store(self, max_length: int, prompt_width: int | None = None) -> Store:
    """How a run of layers caches up to `max_length` tokens, of which the prompt's array holds `prompt_width`."""
    del prompt_width
    return smallest(self.pattern, max_length)

  # What was chosen, and what is read.

  def select(self, heads: Heads, at: Placement, origin: Origin) -> Selection:
    """The blocks that queries choose. Raises ValueError where the mode chooses no blocks."""
    raise ValueError(f"select: mode={self} chooses no blocks; give Quest, MoBA or DilatedTopK (SnapKV: `compress`).")

  def compress(self, heads: Heads, lengths: Lengths, origin: Origin) -> Kept:
    """The keys and values kept of prompts of `lengths` [B] tokens; `heads.q` are their last queries, right-aligned.

    Raises ValueError where the mode compresses no prompt, and for misshapen arrays.
    """
    raise ValueError(f"compress: mode={self}; give a SnapKV.")

  def choices(self, heads: Heads, batch: Batch, origin: Origin) -> Selection | Kept | None:
    """The blocks or keys that the tokens of a batch choose, as `inspect` shows them; None where nothing is chosen."""
    return None

  def keys_read(self, heads: Heads, at: Placement, origin: Origin) -> Array:
    """How many keys every query reads: int32 [B, T, 1 or heads]."""
    visible = seen(self, at.queries, at.keys)
    visible = jnp.moveaxis(visible, 1, 2) if visible.ndim == 4 else visible[:, :, None]
    return jnp.sum(visible, axis=-1, dtype=jnp.int32)

  def most_read(self, lengths: np.ndarray, prompt_length: int | None = None) -> np.ndarray:
    """How many keys the query of a row of each length [X] reads; where that depends on data or head, the most."""
    del prompt_length
    visible = np.asarray(seen(self, jnp.asarray(lengths - 1), jnp.arange(lengths.max(), dtype=jnp.int32)))
    most: np.ndarray = visible.sum(axis=-1).reshape(-1, len(lengths)).max(axis=0)
    return most

  def __str__(self) -> str:
    return text.write(self)

  # Python holds 1 == 1.0 == True; a budget of 1 block and one of everything are different programs.
  def __eq__(self, other: object) -> bool:
    return isinstance(other, Mode) and type(self) is type(other) and self._key() == other._key()

  def __hash__(self) -> int:
    try:
      return hash(self._key())
    except TypeError as error:
      raise TypeError(f"{type(self).__name__}: {self._unhashable()}; a mode is a static argument, so store a number, a"
                      " text, a mode or a tuple of them.") from error

  def _unhashable(self) -> str:
    """The fields that cannot be hashed, with their values."""
    values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    return ", ".join(f"{name}={value!r}" for name, value in values.items() if not _is_hashable(value))

  def _key(self) -> tuple[object, ...]:
    values = [getattr(self, field.name) for field in dataclasses.fields(self)]
    return type(self).__name__, *((type(value), value) for value in values)

  def _settle_int(self, field: str, *, least: int, fix: str) -> None:
    """Checks that a field is an integer of at least `least` and stores it as a Python int."""
    value = getattr(self, field)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not least <= int(value) <= 2**30:
      raise ValueError(f"{type(self).__name__}: {field}={value!r}; {fix} (and 2**30 at most).")
    object.__setattr__(self, field, int(value))

  def _settle_bool(self, field: str) -> None:
    value = getattr(self, field)
    if not isinstance(value, (bool, np.bool_)):
      raise ValueError(f"{type(self).__name__}: {field}={value!r}; use True or False.")
    object.__setattr__(self, field, bool(value))

  def _settle_modes(self, modes: object, unit: str) -> None:
    """Checks that the field `modes` is a filled list or tuple, and stores it as a tuple; each is one of `unit`."""
    if not isinstance(modes, (list, tuple)):  # a set or a dict has an order of its own, or none
      raise ValueError(f"{type(self).__name__}: modes={modes!r}; give a tuple with one mode for each {unit}.")
    settled = tuple(modes)
    object.__setattr__(self, "modes", settled)
    if not settled:
      raise ValueError(f"{type(self).__name__}: modes=() is empty; give one mode for each {unit}.")

  def _settle_choice(self, field: str, choices: tuple[str, ...]) -> None:
    value = getattr(self, field)
    if not isinstance(value, str) or value not in choices:
      raise ValueError(f"{type(self).__name__}: {field}={value!r} is unknown; use one of {choices}.")
    object.__setattr__(self, field, str(value))

  def _settle_budget(self, field: str, least: int, why: str) -> None:
    """An integer of at least `least`, or a share in (0, 1]; stored as a Python int or float."""
    value = getattr(self, field)
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
      self._settle_int(field, least=least, fix=f"use at least {least} ({why}), or a share such as 0.25")
    elif isinstance(value, (float, np.floating)) and 0 < float(value) <= 1:
      object.__setattr__(self, field, float(str(value)))  # of a numpy scalar, the decimal that it shows
    else:
      raise ValueError(f"{type(self).__name__}: {field}={value!r}; use an integer of at least {least} ({why}) or a"
                       " share in (0, 1].")


def _is_hashable(value: object) -> bool:
  try:
    hash(value)
  except TypeError:
    return False
  return True


def check_mode(mode: Mode) -> None:
  """Raises ValueError for what is no mode."""
  if not isinstance(mode, Mode):
    raise ValueError(f"mode={mode!r} is no mode; give one such as Dilated(16), or read a text with rat_jax.parse_mode.")


def visible(mode: Mode, q_pos: ArrayLike, k_pos: ArrayLike) -> Array:
  """Who sees whom: the definition that every mask, cache and kernel is tested against.

  Args:
    mode: a position-only mode.
    q_pos: int [..., T], positions of the queries; a negative one sees nothing.
    k_pos: int [..., S], positions of the keys; a negative one is seen by nobody.

  Returns:
    bool [..., T, S]: causal, and read by the mode's rule; of a PerHead [..., K, T, S].

  Raises:
    ValueError: a PerLayer (ask one of its modes), and modes that choose by the query; positions without an axis, that
      are no integers or, where values can be seen, that int32 does not hold.
  """
  check_mode(mode)
  positions = []
  for name, value, axes in (("q_pos", q_pos, "[..., T]"), ("k_pos", k_pos, "[..., S]")):
    given = as_int32(name, value, axes)
    if not given.ndim:
      raise ValueError(f"{name} is {given.dtype} {given.shape}; give integers {axes}, with at least one axis.")
    positions.append(given)
  return seen(mode, *positions)
