"""AdamW as the RAT+ authors run it: torch's, on every parameter, with their clipping and schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rat_jax.axes import Array, Params


class Optimizer(NamedTuple):
  """An optax transformation with an injected learning rate, and the schedule that sets it.

  Attributes:
    transform: optax.inject_hyperparams over AdamW.
    schedule: the learning rate of a batch, from its number (0, 1, ...).
    clip_norm: the gradient's global norm is scaled down to this before an update.
  """

  transform: optax.GradientTransformation
  schedule: Callable[[Array], Array]
  clip_norm: float


def make_optimizer(learning_rate: float, *, total_steps: int, warmup_steps: int = 0, min_learning_rate: float = 1e-6,
                   b1: float = 0.9, b2: float = 0.95, weight_decay: float = 0.1, clip_norm: float = 1.0) -> Optimizer:
  """AdamW (eps 1e-8, decay on every parameter) with linear warm-up and a cosine down to `min_learning_rate`.

  The schedule counts batches, not updates: ARL's two updates of a batch share one rate. Batch e of w warm-up
  batches has rate learning_rate * (e+1) / w. Raises ValueError for values out of range.
  """
  if learning_rate <= 0 or min_learning_rate < 0:
    raise ValueError(f"learning_rate={learning_rate}, min_learning_rate={min_learning_rate}; use a rate above 0 and a"
                     " minimum of 0 or more.")
  if total_steps < 1 or not 0 <= warmup_steps <= total_steps:
    raise ValueError(f"total_steps={total_steps}, warmup_steps={warmup_steps}; use at least one step and at most as"
                     " many of warm-up.")
  if clip_norm <= 0:
    raise ValueError(f"clip_norm={clip_norm}; use a number above 0 (inf for no clipping).")

  def schedule(count):
    count = jnp.asarray(count, jnp.float32)
    warmup = learning_rate * (count + 1) / max(warmup_steps, 1)
    progress = jnp.clip((count - warmup_steps) / max(total_steps - warmup_steps, 1), 0.0, 1.0)
    cosine = min_learning_rate + (learning_rate - min_learning_rate) * (1 + jnp.cos(jnp.pi * progress)) / 2
    return jnp.where(count < warmup_steps, warmup, cosine)

  adamw = optax.inject_hyperparams(
      optax.adamw, static_args=("b1", "b2", "eps", "weight_decay"), hyperparam_dtype=jnp.float32)(
      learning_rate=learning_rate, b1=b1, b2=b2, eps=1e-8, weight_decay=weight_decay)
  return Optimizer(adamw, schedule, clip_norm)


def update(optimizer: Optimizer, params: Params, opt_state: optax.OptState, grads: Params, learning_rate: Array
           ) -> tuple[Params, optax.OptState, Array]:
  """One clipped update, in float32 whatever the parameters' type.

  Returns the new parameters, the new optimizer state and the norm before clipping.
  """
  grads = as_float32(grads)
  norm = optax.tree.norm(grads)
  scale = jnp.minimum(1.0, optimizer.clip_norm / (norm + 1e-6))
  grads = jax.tree.map(lambda g: g * scale, grads)
  opt_state = opt_state._replace(hyperparams=opt_state.hyperparams | {"learning_rate": learning_rate})
  updates, opt_state = optimizer.transform.update(grads, opt_state, as_float32(params))
  return optax.apply_updates(params, updates), opt_state, norm


def as_float32(tree: Params) -> Params:
  """The tree with every leaf in float32."""
  return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
