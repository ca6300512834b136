"""The training loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rat_jax import layout as layouts
from rat_jax.axes import Array, Logits

IGNORED = -100  # a target that does not count


def check_batch(batch: Mapping[str, Any], vocab_size: int) -> None:
  """Raises ValueError for arrays of different shapes and, where values can be seen, for what is no token of ours."""
  layouts.check_tokens(batch["tokens"], vocab_size)
  for name in batch.keys() & {"targets", "segment_ids"}:
    if batch[name].shape != batch["tokens"].shape:
      raise ValueError(f"batch[{name!r}] has shape {batch[name].shape}; tokens have {batch['tokens'].shape}.")
  if isinstance(batch["targets"], np.ndarray):  # one on a device is not waited for
    counted = batch["targets"][batch["targets"] != IGNORED]
    if counted.size and (counted.min() < 0 or counted.max() >= vocab_size):
      raise ValueError(f"targets run from {counted.min()} to {counted.max()}; use tokens 0..{vocab_size - 1}, or"
                       f" {IGNORED} where none counts.")


def cross_entropy(logits: Logits, targets: Array) -> tuple[Array, Array]:
  """(sum of -log p(target) in nats, number of targets) over the targets [B, T] that are not `IGNORED`; float32."""
  counted = targets != IGNORED
  safe = jnp.where(counted, targets, 0)
  log_p = jnp.take_along_axis(logits, safe[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
  return -jnp.sum(jnp.where(counted, log_p, 0.0)), jnp.sum(counted)
