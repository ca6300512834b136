"""Which keys every query of a model reads, as a mask, under modes that choose them."""

from __future__ import annotations

import numpy as np
from jax.typing import ArrayLike

import rat_jax
from rat_jax import RATPlusLM, Selection
from rat_jax.axes import Params
from rat_jax.modes import Mode


def chosen_keys(model: RATPlusLM, params: Params, tokens: ArrayLike, mode: Mode, prompt_length: int,
                prefill_mode: Mode | None = None) -> np.ndarray:
  """The keys that queries of tokens [1, T] chose, or that the prompt's compression kept: bool [layers, heads, T, T].

  What `rat_jax.inspect` tells of every layer that chooses, with the tokens after a compressed prompt, which all later
  queries read. Heads are those that choose. A mode that chooses nothing has no layers here; `visible` shows its keys.
  """
  found = []
  at = np.arange(np.shape(tokens)[1])
  for layer in rat_jax.inspect(model, params, tokens, mode, prefill_mode=prefill_mode,
                               prompt_lengths=np.array([prompt_length])):
    if isinstance(layer, Selection):
      blocks = np.where(np.asarray(layer.valid), np.asarray(layer.blocks), -1)[0].swapaxes(0, 1)  # [heads, T, blocks]
      read = (blocks[..., None] == at // mode.block).any(axis=2)  # type: ignore[attr-defined]  # it chooses blocks
    else:
      read = np.stack([np.isin(at, kept) for kept in np.asarray(layer.positions)[0]])[:, None] | (at >= prompt_length)
    found.append(read & (at <= at[:, None]))
  return np.stack(found) if found else np.zeros((0, 0, len(at), len(at)), bool)
