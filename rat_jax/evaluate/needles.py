"""Whether a model answers mini-NIAH's questions, teacher forced: whole sequences at once, under any mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import jax.numpy as jnp

from rat_jax.axes import Array, Logits, Params
from rat_jax.model import RATPlusLM


def answered(model: RATPlusLM, params: Params, batch: Mapping[str, Array], **arguments: Any) -> Array:
  """Which rows are answered wholly right: bool [B]; a row without an answer is not. To be compiled by the caller.

  Every symbol of the answer must be the likeliest after the right ones before it, which is greedy decoding but for
  ties. `batch` is one of `mini_niah.batch`, `arguments` are those of `model.apply`: mode, prompt_lengths, ...
  """
  logits = cast(Logits, model.apply({"params": params}, batch["tokens"], **arguments))
  right = jnp.argmax(logits, axis=-1) == batch["targets"]
  return jnp.all(right | ~batch["answers"], axis=1) & jnp.any(batch["answers"], axis=1)
