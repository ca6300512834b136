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
  """Raises ValueError for missing or misshapen arrays and, where values can be seen, for what is no token of ours."""
  missing = {"tokens", "targets"} - batch.keys()
  if missing:
    raise ValueError(f"the batch has {sorted(batch)} and lacks {sorted(missing)}; give \"tokens\" and \"targets\".")
  shape = layouts.as_tokens(batch["tokens"], vocab_size).shape
  for name in ("targets", "segment_ids"):
    if name in batch:
      layouts.as_integers(f"batch[{name!r}]", batch[name], shape)
  if "weights" in batch and np.shape(batch["weights"]) != shape:
    raise ValueError(f"batch['weights'] has shape {np.shape(batch['weights'])}; tokens have {shape}.")
  if layouts.is_concrete(batch["targets"]):
    targets = np.asarray(batch["targets"])
    counted = targets[targets != IGNORED]
    if counted.size and (counted.min() < 0 or counted.max() >= vocab_size):
      raise ValueError(f"targets run from {counted.min()} to {counted.max()}; use tokens 0..{vocab_size - 1}, or"
                       f" {IGNORED} where none counts.")


def cross_entropy(logits: Logits, targets: Array, weights: Array | None = None) -> tuple[Array, Array]:
  """(sum of -log p(target) in nats, number of targets) over the targets [B, T] that are not `IGNORED`; float32.

  With weights [B, T], both are weighted: their quotient is the weighted mean.
  """
  counted = targets != IGNORED
  safe = jnp.where(counted, targets, 0)
  log_p = jnp.take_along_axis(logits, safe[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
  weighted = counted if weights is None else jnp.where(counted, weights.astype(jnp.float32), 0.0)
  return -jnp.sum(jnp.where(counted, log_p, 0.0) * weighted), jnp.sum(weighted)
