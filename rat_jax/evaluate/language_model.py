"""Held-out loss of one model under any list of modes."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rat_jax.axes import Array, Params
from rat_jax.leaves import check_params
from rat_jax.model import RATPlusLM
from rat_jax.modes import Mode
from rat_jax.train.loss import IGNORED, as_batch, sequence_loss


def loss_by_mode(model: RATPlusLM, params: Params, batches: Iterable[Mapping[str, Any]], modes: Sequence[Mode],
                 prompt_length: int | None = None) -> dict[Mode, float]:
  """The (weighted) mean of -log p(target) in nats over all counted targets of `batches`, for every mode.

  Args:
    batches: dicts of "tokens", "targets", optional "segment_ids" and "weights", as `train_step` takes; of equal shape.
    modes: the modes; SnapKV needs a `prompt_length`.
    prompt_length: so many first tokens of every row are its prompt, and the targets after them alone count; each is
      predicted by a decode step of the mode. Without it every token is such a step.

  Raises:
    ValueError: batches without a single counted target, a prompt that leaves nothing to score.
  """
  check_params(params, model.config, same_type=False)
  if isinstance(batches, Mapping):
    raise ValueError(f"batches is one batch, with {sorted(batches)}; give a sequence of batches, such as [batch].")
  sums, count = dict.fromkeys(modes, 0.0), 0.0
  if not sums:
    raise ValueError("modes is empty; give at least one mode.")
  for batch in batches:
    batch = as_batch(batch, model.config.vocab_size)
    width = batch["tokens"].shape[1]
    if prompt_length is not None and not 1 <= prompt_length < width:
      raise ValueError(f"prompt_length={prompt_length} with sequences of {width} tokens; use 1..{width - 1}.")
    for mode in sums:
      total, targets = _loss(model, mode, prompt_length, params, batch)
      sums[mode] += float(total)
    count += float(targets)
  if not count:
    raise ValueError("the batches hold no target that counts; give at least one batch with targets other than -100.")
  return {mode: total / count for mode, total in sums.items()}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _loss(model: RATPlusLM, mode: Mode, prompt_length: int | None, params: Params, batch: Mapping[str, Array]
          ) -> tuple[Array, Array]:
  tokens, targets, prompts = batch["tokens"], batch["targets"], None
  if prompt_length is not None:
    prompts = jnp.full(tokens.shape[0], prompt_length, jnp.int32)
    targets = jnp.where(jnp.arange(tokens.shape[1], dtype=jnp.int32) < prompt_length, IGNORED, targets)
  return sequence_loss(model, params, {**batch, "targets": targets}, mode=mode, prompt_lengths=prompts)
