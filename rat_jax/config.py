"""The model's configuration: frozen, validated when built, JSON in and out."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import typing
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from rat_jax.rope import RopeScaling

# Programs compute in float32, where they take what is smaller than _SMALLEST for 0.
_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class RATPlusConfig:
  """Sizes and choices of a RAT+ model, or with `memory=False` of the plain attention baseline.

  Fields left at None are filled in when the object is built, so they can be read as numbers; to change a size
  with `dataclasses.replace`, set the fields that follow from it to None too.
  """

  vocab_size: int
  num_layers: int
  embed_dim: int                            # E
  num_heads: int                            # N
  num_kv_heads: int = typing.cast(int, None)  # K, = num_heads
  head_dim: int = typing.cast(int, None)      # H, = embed_dim // num_heads
  mlp_dim: int = typing.cast(int, None)       # F, = 4 * embed_dim
  mlp: Literal["gelu", "swiglu"] = "gelu"   # exact GELU, or SiLU-gated
  memory: bool = True                       # False: keys and values reach attention as they are
  gate_bias: float | None = None            # a start value with zero gate weights, for retrofits; None: no bias
  output_gate: bool = True                  # attention output times sigmoid(o)
  norm_placement: Literal["pre", "post"] = "pre"  # f(norm(x)), or norm(f(x)) as in OLMo 2
  qk_norm: bool | Literal["head"] = False   # RMSNorm of q and k, before memory and RoPE: over all heads, or per head
  attention_bias: bool = False              # of the projections to queries, keys and values
  rope_base: float = 10000.0
  rope_scaling: RopeScaling | None = None   # for positions past the length that a model was trained on
  no_rope_layers: Sequence[int] = ()        # numbers of layers whose queries and keys are not rotated
  norm_eps: float = 1e-6
  tie_embeddings: bool = True
  init_std: float | None = 0.02             # None: 1/sqrt(fan-in), residual writers over sqrt(2L) too
  dtype: Literal["float32", "bfloat16"] = "float32"        # of matrix products and attention
  param_dtype: Literal["float32", "bfloat16"] = "float32"

  def __post_init__(self) -> None:
    for name in ("vocab_size", "num_layers", "embed_dim", "num_heads"):
      self._settle_size(name, default=None)
    if self.head_dim is None and self.embed_dim % self.num_heads:
      raise ValueError(f"num_heads={self.num_heads} does not divide embed_dim={self.embed_dim};"
                       " choose sizes that divide, or give head_dim.")
    self._settle_size("num_kv_heads", default=self.num_heads)
    self._settle_size("head_dim", default=self.embed_dim // self.num_heads)
    self._settle_size("mlp_dim", default=4 * self.embed_dim)
    if self.num_heads % self.num_kv_heads:
      raise ValueError(f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads};"
                       " every key/value head serves the same number of query heads.")
    if self.head_dim % 2:
      raise ValueError(f"head_dim={self.head_dim} is odd; RoPE rotates pairs, so give an even width.")
    for name, hint in typing.get_type_hints(type(self)).items():
      choices, value = typing.get_args(hint), getattr(self, name)
      if typing.get_origin(hint) is Literal and not (isinstance(value, str) and value in choices):
        raise ValueError(f"{name}={value!r} is unknown; use one of {choices}.")
      if hint is bool and not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is not a bool; use True or False.")
    if not isinstance(self.qk_norm, bool) and self.qk_norm != "head":
      raise ValueError(f"qk_norm={self.qk_norm!r} is unknown; use False, True (over all heads) or \"head\".")
    if self.rope_scaling is not None and not isinstance(self.rope_scaling, RopeScaling):
      raise ValueError(f"rope_scaling={self.rope_scaling!r} is no RopeScaling; use rat_jax.RopeScaling(...) or None.")
    self._settle_layers("no_rope_layers")
    self._settle_float("rope_base", "use a finite number of at least 1 that float32 can hold", least=1.0)
    self._settle_float("norm_eps", "use a finite number above 0 that float32 can hold", least=_SMALLEST)
    if self.init_std is not None:
      self._settle_float("init_std", "use a finite number above 0 that float32 can hold, or None for 1/sqrt(fan-in)",
                         least=_SMALLEST)
    if self.gate_bias is not None:
      self._settle_float("gate_bias", "use a finite number that float32 can hold, or None for no bias")
      if not self.memory:
        raise ValueError(f"gate_bias={self.gate_bias} with memory=False; use None: attention has no gate.")

  def _settle_size(self, name: str, default: int | None) -> None:
    value = getattr(self, name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
      raise ValueError(f"{name}={value!r}; use an integer of at least 1.")
    object.__setattr__(self, name, int(value))

  def _settle_layers(self, name: str) -> None:
    value = getattr(self, name)
    numbered = isinstance(value, tuple | list | range) and all(
        isinstance(i, int) and not isinstance(i, bool) and 0 <= i < self.num_layers for i in value)
    if not numbered or len(set(value)) != len(value):
      raise ValueError(f"{name}={value!r}; use different numbers of layers, 0 to {self.num_layers - 1}.")
    object.__setattr__(self, name, tuple(sorted(int(i) for i in value)))

  def _settle_float(self, name: str, fix: str, least: float = -_LARGEST) -> None:
    value = getattr(self, name)
    try:
      number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an integer beyond all floats
      number = math.inf
    if not least <= number <= _LARGEST:
      raise ValueError(f"{name}={value!r}; {fix}.")
    object.__setattr__(self, name, number)

  @classmethod
  def preset(cls, name: str) -> RATPlusConfig:
    """A published or ready-made size. Raises ValueError for an unknown name."""
    if not isinstance(name, str) or name not in _PRESETS:
      raise ValueError(f"preset {name!r} is unknown; use one of {tuple(_PRESETS)}.")
    return cls(**_PRESETS[name])

  def to_json(self) -> str:
    """The configuration as JSON text, every field written out."""
    return json.dumps(dataclasses.asdict(self), indent=2)

  @classmethod
  def from_json(cls, text: str) -> RATPlusConfig:
    """The inverse of `to_json`; fields that are absent take their defaults. Raises ValueError otherwise."""
    try:
      fields = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
      raise ValueError(f"the configuration is not JSON: {error}.") from error
    known = {f.name: f for f in dataclasses.fields(cls)}
    if not isinstance(fields, dict) or fields.keys() - known.keys():
      extra = sorted(fields.keys() - known.keys()) if isinstance(fields, dict) else type(fields).__name__
      raise ValueError(f"the configuration has unknown fields {extra}; known are {tuple(known)}.")
    if isinstance(fields.get("rope_scaling"), dict):
      fields["rope_scaling"] = RopeScaling.from_fields(fields["rope_scaling"])
    missing = [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in fields]
    if missing:
      raise ValueError(f"the configuration lacks {missing}.")
    return cls(**fields)

  def difference(self, other: RATPlusConfig) -> str:
    """The fields in which two configurations differ, "field: mine, theirs" each; empty when they are equal."""
    pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self))
    return "; ".join(f"{name}: {mine!r}, {theirs!r}" for name, mine, theirs in pairs if mine != theirs)


def _ratplus(num_layers: int, embed_dim: int) -> dict[str, Any]:
  """A size of arXiv 2602.18196: head width 128, vocabulary of LLaMA 2, trained in bfloat16."""
  return dict(vocab_size=32000, num_layers=num_layers, embed_dim=embed_dim, num_heads=embed_dim // 128,
              dtype="bfloat16")


def _olmo2(num_layers: int, embed_dim: int, mlp_dim: int, num_kv_heads: int | None = None) -> dict[str, Any]:
  """A size of OLMo 2 as released: attention without a memory, and no gate on attention's output."""
  return dict(vocab_size=100352, num_layers=num_layers, embed_dim=embed_dim, num_heads=embed_dim // 128,
              num_kv_heads=num_kv_heads, mlp_dim=mlp_dim, mlp="swiglu", memory=False, output_gate=False,
              norm_placement="post", qk_norm=True, rope_base=500000.0, tie_embeddings=False, dtype="bfloat16")


_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(vocab_size=256, num_layers=4, embed_dim=256, num_heads=4, init_std=None),
    "ratplus-1b": _ratplus(24, 2048),
    "ratplus-3b": _ratplus(28, 2560),
    "ratplus-7b": _ratplus(32, 4096),
    "olmo2-1b": _olmo2(16, 2048, 8192),
    "olmo2-7b": _olmo2(32, 4096, 11008),
    "olmo2-13b": _olmo2(40, 5120, 13824),
    "olmo2-32b": _olmo2(64, 5120, 27648, num_kv_heads=8),
}
