"""What a mode is: a rule that says which keys a query reads. And `visible`, the one place that asks it.

A mode is a frozen, hashable dataclass, so it can be a static argument of a compiled program. To add a
position-only mode, write one file with `name`, the fields, `sees`, and put its class into the table of
`rat_jax.modes`: whole sequences, caches, decoding, text form and command lines follow from that.

A position-only mode answers two questions:
  sees(t, s)   the static rule, on positions.
  pattern      the rule as dilation, window and sinks, where it is one: this opens the fast forms and the compact
               cache. None (the default) keeps a full cache and masks it.
Modes that choose keys by the query derive from `rat_jax.modes.block_mode.BlockMode` and say how blocks are scored and
how many are read. Any mode may say how a prompt is processed (`prompt_form`) and what a layer does (`of_layer`).
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from rat_jax.modes import text

if TYPE_CHECKING:
  from rat_jax.modes.dilated import Dilated

Array = jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Mode:
  """Base class of all modes."""

  name: ClassVar[str]  # in `str(mode)`, `parse_mode` and on command lines
  after_prompt: ClassVar[bool] = False  # acts once the prompt has ended, so it is no form of a prompt

  def sees(self, t: Array, s: Array) -> Array:
    """Which keys s a query t reads, given that 0 <= s <= t: bool, `t` and `s` int32 broadcast together."""
    raise NotImplementedError(f"{type(self).__name__} has no rule on positions alone.")

  @property
  def pattern(self) -> Dilated | None:
    """The same rule as dilation, window and sinks, or None where it is not one."""
    return None

  @property
  def prompt_form(self) -> Mode:
    """The mode that the prompt's tokens run under."""
    return self

  def of_layer(self, layer: int, num_layers: int) -> Mode:
    """The mode of one layer of a model."""
    del layer, num_layers
    return self

  def check_heads(self, num_kv_heads: int) -> None:
    """Raises ValueError where the mode does not fit so many key/value heads."""

  def __str__(self) -> str:
    return text.write(self)

  # Python holds 1 == 1.0 == True; a budget of 1 block and one of everything are different programs.
  def __eq__(self, other: object) -> bool:
    return type(self) is type(other) and self._key() == other._key()  # type: ignore[attr-defined]

  def __hash__(self) -> int:
    return hash(self._key())

  def _key(self) -> tuple:
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

  def _settle_modes(self, unit: str) -> None:
    """Checks that the field `modes` holds something, and stores it as a tuple; each is one of `unit`."""
    modes: Any = self.modes  # type: ignore[attr-defined]
    if not isinstance(modes, Iterable):
      raise ValueError(f"{type(self).__name__}: modes={modes!r}; give a tuple with one mode for each {unit}.")
    object.__setattr__(self, "modes", tuple(modes))
    if not self.modes:  # type: ignore[attr-defined]
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


def check_mode(mode: Mode) -> None:
  """Raises ValueError for what is no mode."""
  if not isinstance(mode, Mode):
    raise ValueError(f"mode={mode!r} is no mode; give one such as Dilated(16), or read a text with rat_jax.parse_mode.")


def visible(mode: Mode, q_pos: Any, k_pos: Any) -> Array:
  """Who sees whom: the definition that every mask, cache and kernel is tested against.

  Args:
    mode: a position-only mode.
    q_pos: int [..., T], positions of the queries; a negative one sees nothing.
    k_pos: int [..., S], positions of the keys; a negative one is seen by nobody.

  Returns:
    bool [..., T, S]: causal, and read by the mode's rule; of a PerHead [..., K, T, S].

  Raises:
    ValueError: a PerLayer (ask one of its modes), and modes that choose by the query.
  """
  check_mode(mode)
  t = jnp.asarray(q_pos, jnp.int32)[..., :, None]
  s = jnp.asarray(k_pos, jnp.int32)[..., None, :]
  causal, rule = (s >= 0) & (s <= t), mode.sees(t, s)
  if rule.ndim > causal.ndim:
    causal = causal[..., None, :, :]
  return causal & rule
