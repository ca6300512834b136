"""Whether a model answers mini-NIAH's questions, teacher forced: whole sequences at once, under any mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from rat_jax.axes import Array, Lengths, Params
from rat_jax.model import RATPlusLM
from rat_jax.modes import Dense, Mode


def answered(model: RATPlusLM, params: Params, batch: Mapping[str, Array], *, mode: Mode = Dense(),
             prefill_mode: Mode | None = None, prompt_lengths: Lengths | None = None, row_ids: Array | None = None
             ) -> Array:
  """Which rows are answered wholly right: bool [B]. A pure function, to be compiled by the caller.

  Every symbol of the answer must be the likeliest after the right ones before it, which is greedy decoding but for
  ties. The arguments after `batch` (of `mini_niah.batch`) are those of `model.apply`.
  """
  logits: Any = model.apply({"params": params}, batch["tokens"], mode=mode, prefill_mode=prefill_mode,
                            prompt_lengths=prompt_lengths, row_ids=row_ids)
  right = jnp.argmax(logits, axis=-1) == batch["targets"]
  return jnp.all(right | ~batch["answers"], axis=1)
