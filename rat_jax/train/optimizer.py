"""AdamW as the RAT+ authors run it: torch's, on every parameter, with their clipping and schedule."""

from __future__ import annotations

import fnmatch
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rat_jax import checks
from rat_jax.axes import Array, Params


class Optimizer(NamedTuple):
  """An optax transformation with an injected learning rate, and the schedule that sets it.

  Attributes:
    transform: optax.inject_hyperparams over AdamW.
    schedule: the learning rate of a batch, from its number (0, 1, ...).
    clip_norm: the gradient's global norm is scaled down to this before an update.
    rates: factors of the learning rate by parameter, as `make_optimizer` takes them.
  """

  transform: optax.GradientTransformation
  schedule: Callable[[Array], Array]
  clip_norm: float
  rates: tuple[tuple[str, float], ...] = ()

  def factor(self, path: tuple[Any, ...]) -> float:
    """The factor of the learning rate of the parameter at a path of the tree."""
    return _factor(self.rates, path)


def _factor(rates: Sequence[tuple[str, float]], path: tuple[Any, ...]) -> float:
  name = jax.tree_util.keystr(path, simple=True, separator="/")
  return next((factor for pattern, factor in rates if fnmatch.fnmatchcase(name, pattern)), 1.0)


def make_optimizer(learning_rate: float, *, total_steps: int, warmup_steps: int = 0, min_learning_rate: float = 1e-6,
                   b1: float = 0.9, b2: float = 0.95, weight_decay: float = 0.1, clip_norm: float = 1.0,
                   rates: Sequence[tuple[str, float]] = ()) -> Optimizer:
  """AdamW (eps 1e-8, decay on every parameter) with linear warm-up and a cosine down to `min_learning_rate`.

  The schedule counts batches, not updates: ARL's two updates of a batch share one rate. Batch e of w warm-up
  batches has rate learning_rate * (e+1) / w.

  Args:
    rates: (pattern, factor) pairs; the first pattern (`fnmatch`) that fits a parameter's name, such as
      "layers/memory_gate*", multiplies its learning rate. A parameter of factor 0 is frozen: it has no moments, and its
      gradient is no part of the norm.

  Raises ValueError for values out of range.
  """
  _check_settings({"learning_rate": learning_rate, "min_learning_rate": min_learning_rate, "b1": b1, "b2": b2,
                   "weight_decay": weight_decay, "clip_norm": clip_norm}, total_steps, warmup_steps, rates)
  rates = tuple((str(pattern), float(factor)) for pattern, factor in rates)

  def schedule(count: Array) -> Array:
    count = jnp.asarray(count, jnp.float32)
    warmup = learning_rate * (count + 1) / max(warmup_steps, 1)
    progress = jnp.clip((count - warmup_steps) / max(total_steps - warmup_steps, 1), 0.0, 1.0)
    cosine = min_learning_rate + (learning_rate - min_learning_rate) * (1 + jnp.cos(jnp.pi * progress)) / 2
    return jnp.where(count < warmup_steps, warmup, cosine)

  def adamw(learning_rate: Array) -> optax.GradientTransformation:
    every = optax.adamw(learning_rate, b1=b1, b2=b2, eps=1e-8, weight_decay=weight_decay)
    if not rates:
      return every
    scaled = lambda updates, _: jax.tree.map_with_path(lambda path, u: u * _factor(rates, path), updates)
    return optax.chain(optax.masked(every, _trained), optax.stateless(scaled))

  def _trained(tree: Params) -> Any:  # a tree of bools
    return jax.tree.map_with_path(lambda path, _: _factor(rates, path) > 0, tree)

  injected = optax.inject_hyperparams(adamw, hyperparam_dtype=jnp.float32)(learning_rate=learning_rate)
  return Optimizer(injected, schedule, clip_norm, rates)


def _check_settings(settings: dict[str, float], total_steps: int, warmup_steps: int,
                    rates: Sequence[tuple[str, float]]) -> None:
  """Raises ValueError for settings of `make_optimizer` that are out of range or no numbers."""
  for name, value in settings.items():
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or math.isnan(value) or (
        math.isinf(value) and name != "clip_norm"):
      raise ValueError(f"{name}={value!r}; use a finite number.")
  learning_rate, min_learning_rate, b1, b2, weight_decay, clip_norm = settings.values()
  if learning_rate <= 0 or min_learning_rate < 0:
    raise ValueError(f"learning_rate={learning_rate}, min_learning_rate={min_learning_rate}; use a rate above 0 and a"
                     " minimum of 0 or more.")
  for name, count in (("total_steps", total_steps), ("warmup_steps", warmup_steps)):
    checks.check_count(name, count, least=0)
  if total_steps < 1 or warmup_steps > total_steps:
    raise ValueError(f"total_steps={total_steps}, warmup_steps={warmup_steps}; use at least one step and at most as"
                     " many of warm-up.")
  if not (0 <= b1 < 1 and 0 <= b2 < 1 and weight_decay >= 0):
    raise ValueError(f"b1={b1}, b2={b2}, weight_decay={weight_decay}; use b1 and b2 in [0, 1), and a decay of 0 or"
                     " more.")
  if clip_norm <= 0:
    raise ValueError(f"clip_norm={clip_norm}; use a number above 0 (inf for no clipping).")
  if isinstance(rates, Mapping) or any(isinstance(pair, str) or len(pair) != 2 for pair in rates):
    raise ValueError(f"rates={rates!r}; give pairs of a pattern and a factor, such as"
                     " [('layers/memory_gate*', 10.0)].")
  for pattern, factor in rates:
    if not 0 <= float(factor) < math.inf:
      raise ValueError(f"rates: {pattern!r} has the factor {factor}; use 0 (frozen) or more.")


class MasterWeights(NamedTuple):
  """The optimizer's state for parameters that are not all float32, and these in float32, where updates add up."""

  opt_state: optax.OptState
  params: Params


def check_rates(optimizer: Optimizer, names: Sequence[str]) -> None:
  """Raises ValueError for a pattern of the optimizer's rates that fits no parameter of these names."""
  for pattern, _ in optimizer.rates:
    if not fnmatch.filter(names, pattern):
      raise ValueError(f"rates: {pattern!r} fits no parameter; they are {', '.join(names)}.")


def initial(optimizer: Optimizer, params: Params) -> optax.OptState | MasterWeights:
  """The state before the first update, in float32; with master weights where parameters are not."""
  opt_state = optimizer.transform.init(as_float32(params))
  if all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params)):
    return opt_state
  return MasterWeights(opt_state, jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), params))  # copies: donated


def update(optimizer: Optimizer, params: Params, opt_state: optax.OptState, grads: Params, learning_rate: Array
           ) -> tuple[Params, optax.OptState, Array]:
  """One clipped update, in float32 whatever the parameters' type.

  Returns the new parameters, the new optimizer state and the norm before clipping.
  """
  if isinstance(opt_state, MasterWeights):
    made, inner, norm = update(optimizer, opt_state.params, opt_state.opt_state, grads, learning_rate)
    return jax.tree.map(lambda new, old: new.astype(old.dtype), made, params), MasterWeights(inner, made), norm
  grads = jax.tree.map_with_path(lambda path, g: g if optimizer.factor(path) else jnp.zeros_like(g), as_float32(grads))
  norm = optax.tree.norm(grads)
  scale = jnp.minimum(1.0, optimizer.clip_norm / (norm + 1e-6))
  grads = jax.tree.map(lambda g: g * scale, grads)
  opt_state = opt_state._replace(hyperparams=opt_state.hyperparams | {"learning_rate": learning_rate})
  updates, opt_state = optimizer.transform.update(grads, opt_state, as_float32(params))
  return optax.apply_updates(params, updates), opt_state, norm


def as_float32(tree: Params) -> Params:
  """The tree with every leaf in float32."""
  converted: Params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
  return converted
