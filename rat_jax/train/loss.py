"""The training loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rat_jax.axes import Array, Logits

IGNORED = -100  # a target that does not count


def cross_entropy(logits: Logits, targets: Array) -> tuple[Array, Array]:
  """(sum of -log p(target) in nats, number of targets) over the targets [B, T] that are not `IGNORED`; float32."""
  counted = targets != IGNORED
  safe = jnp.where(counted, targets, 0)
  log_p = jnp.take_along_axis(logits, safe[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
  return -jnp.sum(jnp.where(counted, log_p, 0.0)), jnp.sum(counted)
