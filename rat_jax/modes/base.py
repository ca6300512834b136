"""What a mode is: a rule that says which keys a query reads. And `visible`, the one place that asks it.

A mode is a frozen, hashable dataclass, so it can be a static argument of a compiled program. To add a
position-only mode, write one file with `name`, the fields, `sees`, and put its class into the table of
`rat_jax.modes`: whole sequences, caches, decoding, text form and command lines follow from that.

A mode answers up to three questions:
  sees(t, s)   the static rule, on positions. Every mode has one.
  pattern      the rule as dilation, window and sinks, where it is one: this opens the fast forms and the compact
               cache. None (the default) keeps a full cache and masks it.
  selection    the keys that a query reads on top because of what they hold. No mode here has one; those that do
               add a score per block of keys, and read `sees or selected` in one softmax.
"""

from __future__ import annotations

import dataclasses
import numbers
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp

from rat_jax.modes import text

if TYPE_CHECKING:
  from rat_jax.modes.dilated import Dilated

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Mode:
  """Base class of all modes."""

  name: ClassVar[str]  # in `str(mode)`, `parse_mode` and on command lines

  def sees(self, t: Array, s: Array) -> Array:
    """Which keys s a query t reads, given that 0 <= s <= t: bool, `t` and `s` int32 broadcast together."""
    raise NotImplementedError(f"{type(self).__name__} has no rule on positions alone.")

  @property
  def pattern(self) -> Dilated | None:
    """The same rule as dilation, window and sinks, or None where it is not one."""
    return None

  def __str__(self) -> str:
    return text.write(self)

  def _settle_int(self, field: str, *, least: int, fix: str) -> None:
    """Checks that a field is an integer of at least `least` and stores it as a Python int."""
    value = getattr(self, field)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not least <= int(value) < 2**31:
      raise ValueError(f"{type(self).__name__}: {field}={value!r}; {fix} (and below 2**31).")
    object.__setattr__(self, field, int(value))


def visible(mode: Mode, q_pos: Any, k_pos: Any) -> Array:
  """Who sees whom: the definition that every mask, cache and kernel is tested against.

  Args:
    mode: a position-only mode.
    q_pos: int [..., T], positions of the queries; a negative one sees nothing.
    k_pos: int [..., S], positions of the keys; a negative one is seen by nobody.

  Returns:
    bool [..., T, S]: causal, and read by the mode's rule.

  Raises:
    ValueError: a PerLayer; ask one of its modes.
  """
  t = jnp.asarray(q_pos, jnp.int32)[..., :, None]
  s = jnp.asarray(k_pos, jnp.int32)[..., None, :]
  return (s >= 0) & (s <= t) & mode.sees(t, s)
