"""Rotary position embedding, half-split: channel d turns with channel d + H/2 (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np

from rat_jax.axes import Array, Positions

Kind = Literal["linear", "llama3", "yarn"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How RoPE turns slower than it was trained to, for longer contexts (`transformers`, modeling_rope_utils.py).

  Attributes:
    kind: "linear" divides all frequencies by `factor`; "llama3" those whose waves are long beside `original_length`;
      "yarn" likewise by the number of turns in it (arXiv 2309.00071), and lengthens queries and keys.
    factor: at least 1.
    original_length: tokens that the model was trained on before; None for "linear".
    low_freq_factor, high_freq_factor: of "llama3", where waves are long and short: `original_length` over these.
    beta_slow, beta_fast: of "yarn", the turns below which frequencies are divided and above which they stay.
    attention_factor: of "yarn", what queries and keys are multiplied by; None: 0.1 ln(factor) + 1.
    truncate: of "yarn", whether the channels where a ramp begins and ends are rounded outwards.
  """

  kind: Kind
  factor: float
  original_length: int | None = None
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float | None = None
  truncate: bool = True

  def __post_init__(self) -> None:
    if self.kind not in get_args(Kind):
      raise ValueError(f"kind={self.kind!r} is unknown; use one of {get_args(Kind)}.")
    for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"):
      given = getattr(self, name)
      if name == "attention_factor" and given is None:
        continue
      value = float(given) if isinstance(given, numbers.Real) and not isinstance(given, bool) else math.nan
      if not 0 < value < math.inf or (name == "factor" and value < 1):
        raise ValueError(f"rope_scaling: {name}={given!r}; use a finite number above 0, and a factor of at least 1.")
      object.__setattr__(self, name, value)
    length = self.original_length
    is_length = isinstance(length, int) and not isinstance(length, bool) and length >= 1
    if is_length == (self.kind == "linear") or not (is_length or length is None):
      raise ValueError(f"rope_scaling: original_length={length!r} with kind={self.kind!r}; use the tokens that the"
                       " model was trained on, or None for \"linear\".")
    if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
      raise ValueError(f"rope_scaling: low_freq_factor={self.low_freq_factor} is not below"
                       f" high_freq_factor={self.high_freq_factor}; long waves must be longer than short ones.")
    if not isinstance(self.truncate, bool):
      raise ValueError(f"rope_scaling: truncate={self.truncate!r}; use True or False.")

  @classmethod
  def from_fields(cls, fields: Mapping[str, Any]) -> RopeScaling:
    """Of a JSON object. Raises ValueError for fields that are unknown or missing."""
    known = [field.name for field in dataclasses.fields(cls)]
    if fields.keys() - set(known) or not {"kind", "factor"} <= fields.keys():
      raise ValueError(f"rope_scaling has the fields {sorted(fields)}; it needs kind and factor, and knows {known}.")
    return cls(**fields)

  def scaled(self, frequencies: np.ndarray, base: float) -> np.ndarray:
    """Frequencies [H/2] in radians a token, float64, scaled."""
    if self.kind == "linear":
      return frequencies / self.factor
    assert self.original_length is not None
    turns = self.original_length * frequencies / (2 * math.pi)
    if self.kind == "llama3":
      stays = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
    else:
      first, last = (len(frequencies) * math.log(self.original_length / (2 * math.pi * beta)) / math.log(base)
                     for beta in (self.beta_fast, self.beta_slow))  # the channels that make so many turns
      if self.truncate:
        first, last = math.floor(first), math.ceil(last)
      first, last = max(first, 0), min(last, 2 * len(frequencies) - 1)
      last = last + 1e-3 if first == last else last
      stays = 1 - np.clip((np.arange(len(frequencies)) - first) / (last - first), 0, 1)
    return frequencies * (stays + (1 - stays) / self.factor)

  @property
  def length_factor(self) -> float:
    """What queries and keys are multiplied by."""
    if self.kind != "yarn":
      return 1.0
    return 0.1 * math.log(self.factor) + 1.0 if self.attention_factor is None else self.attention_factor


def rotate(x: Array, positions: Positions, base: float, scaling: RopeScaling | None = None) -> Array:
  """x [B, T, heads, H] turned by its positions [B, T]; float32. Padding (position -1) is turned as position 0."""
  half = x.shape[-1] // 2
  if scaling is None:
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  else:
    frequency = jnp.asarray(scaling.scaled(base ** (-np.arange(half) / half), base), jnp.float32)
  angle = jnp.maximum(positions, 0)[:, :, None, None].astype(jnp.float32) * frequency
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  if scaling is not None and scaling.length_factor != 1:
    cos, sin = cos * scaling.length_factor, sin * scaling.length_factor
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
