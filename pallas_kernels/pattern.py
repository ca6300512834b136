"""Dilation, window and sinks: the rule on positions that modes and kernels share (arXiv 2602.18196, section 3)."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

Array = jax.Array


class Rule(Protocol):
  """Which keys a query reads, by positions alone. Frozen and hashable, so that a compiled program can depend on it."""

  def sees(self, t: Array, s: Array) -> Array:
    """Whether query t reads key s, given that 0 <= s <= t: bool, `t` and `s` int32 broadcast together.

    A rule that differs by key/value head (rat_jax's PerHead) has an axis K before those of queries and keys; only
    `seen` takes such a one.
    """


class Pattern(NamedTuple):
  """Query t reads key s iff (s+1) % dilation == 0, or t - s <= window, or s < sinks.

  `dilation=1` is dense; `dilation=None` reads window and sinks alone.
  """

  dilation: int | None
  window: int = 0
  sinks: int = 0

  def sees(self, t: Array, s: Array) -> Array:
    """As `Rule.sees`."""
    if self.dilation == 1:
      return jnp.broadcast_to(True, jnp.broadcast_shapes(t.shape, s.shape))
    reads = (t - s <= self.window) | (s < self.sinks)
    return reads if self.dilation is None else reads | ((s + 1) % self.dilation == 0)

  @property
  def offset(self) -> int:
    """The first query that sees a strided key beyond window and sinks; 0 without strided keys (`dilation=None`)."""
    return self.window + self.dilation * (1 + self.sinks // self.dilation) if self.dilation else 0


DENSE = Pattern(1)  # reads every key


def seen(rule: Rule | None, q_positions: Array, k_positions: Array) -> Array:
  """Who sees whom: causal, and read by the rule. What every mask, cache and kernel is tested against.

  Args:
    rule: None leaves causality alone.
    q_positions: int32 [..., T]; a negative one sees nothing. k_positions: [..., S]; a negative one is seen by nobody.

  Returns:
    bool [..., T, S]; where the rule has heads, [..., K, T, S].
  """
  t, s = q_positions[..., :, None], k_positions[..., None, :]
  causal = (s >= 0) & (s <= t)
  if rule is None:
    return causal
  read = rule.sees(t, s)
  return (causal[..., None, :, :] if read.ndim > causal.ndim else causal) & read
