"""The training step: one batch, one or several modes (arXiv 2602.18196, active recurrence learning).

ARL trains a sparse and a dense configuration on every batch, so that the memory learns to carry what dilation
skips. As published these are two clipped updates at one learning rate, the sparse one first; the summed loss in
one update is the alternative.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from rat_jax import checks, transformer
from rat_jax.axes import Array, Params
from rat_jax.leaves import check_params, named_leaves
from rat_jax.model import RATPlusLM
from rat_jax.modes import Dense, Dilated, Mode
from rat_jax.parallel import constrain
from rat_jax.train import optimizer as optimizers
from rat_jax.train.loss import IGNORED, as_batch, sequence_loss, weights_of
from rat_jax.train.optimizer import Optimizer
from rat_jax.transformer import Remat

Batch = dict[str, Array]
Metrics = dict[str, Array]
_Carried = tuple[Params, optax.OptState]  # from update to update
Combine = Literal["sequential", "sum"]
AccumulateBy = Literal["batch", "target"]
ARL = (Dilated(64), Dense())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """What training carries from batch to batch: parameters, optimizer state, and the number of batches done."""

  params: Params
  opt_state: optax.OptState
  step: Array


def init_train_state(model: RATPlusLM, params: Params, optimizer: Optimizer) -> TrainState:
  """The state before the first batch.

  Parameters that are not float32 have a float32 master copy in the optimizer's state (`optimizers.MasterWeights`), 4
  bytes each beside the 8 of both moments: a step of 2e-5 is too small for a bfloat16 norm of 1 to move.

  Raises ValueError for an optimizer that is none of `make_optimizer`, rates for parameters that are not there, and
  parameters that are not the model's.
  """
  _check_optimizer(optimizer)
  check_params(params, model.config, same_type=False)
  optimizers.check_rates(optimizer, list(named_leaves(params)))
  return TrainState(params, optimizers.initial(optimizer, params), jnp.int32(0))


def _check_optimizer(optimizer: object) -> None:
  if not isinstance(optimizer, Optimizer):
    raise ValueError(f"optimizer is a {type(optimizer).__name__}; give one of rat_jax.make_optimizer, which knows its"
                     " schedule and its clipping.")


def train_step(model: RATPlusLM, optimizer: Optimizer, state: TrainState, batch: Batch, *,
               modes: Sequence[Mode] = ARL, combine: Combine = "sequential", accumulation: int = 1,
               accumulate_by: AccumulateBy = "batch", remat: Remat = "products", unroll: bool = False
               ) -> tuple[TrainState, Metrics]:
  """One batch of training.

  Compiled once for each set of the arguments after `batch`. To give the old state's memory away, wrap it, as
  `rat_jax.train.train` does: `jax.jit(functools.partial(rat_jax.train_step, model, optimizer, modes=...),
  donate_argnums=0, compiler_options=rat_jax.compiler_options())`.

  Args:
    batch: "tokens" int [B, T], "targets" int [B, T] with -100 where none counts, optional "segment_ids" [B, T] (0 is
      padding, whose targets do not count) and "weights" float [B, T] of the targets.
    modes: one loss for each, the (weighted) mean over the counted targets. (Dense(),) is plain training, a single
      sparse mode adapts to that mode.
    combine: "sequential" makes one clipped update per mode, in order; "sum" makes one on the summed loss.
    accumulation: the batch axis is cut into so many equal micro-batches.
    accumulate_by: "batch" takes the mean of the micro-batches' means, as the RAT+ authors do, right where all targets
      count; "target" gives every target of the batch the same weight, as without accumulation.
    remat: what a layer keeps for its gradient beside its input: "products" of matrices and the memory's states,
      "nothing" (the least memory, about a third more work), "everything" (the most memory).
    unroll: compiles layers one by one, which takes longer; on a GPU the step is then faster (docs/kernels.md).

  Returns:
    (state, metrics): "loss" [modes], "grad_norm" [updates] before clipping, "learning_rate", "tokens" (counted
    targets of the batch).

  Raises:
    ValueError: no modes, an unknown `combine`, `accumulate_by` or `remat`, a batch that `accumulation` does not divide,
      rows of a micro-batch that the axes data and fsdp of the mesh do not divide, misshapen targets, another model's
      parameters, an optimizer that is none of `make_optimizer`; outside of compilation, tokens or targets that are not
      in the vocabulary.
  """
  _check_optimizer(optimizer)
  if isinstance(modes, str) or not isinstance(modes, Iterable):
    raise ValueError(f"modes={modes!r}; give a sequence of modes, such as (Dense(),).")
  modes = tuple(modes)
  if not modes or combine not in ("sequential", "sum"):
    raise ValueError(f"modes={modes}, combine={combine!r}; give at least one mode and 'sequential' or 'sum'.")
  if accumulate_by not in ("batch", "target"):
    raise ValueError(f"accumulate_by={accumulate_by!r}; use 'batch' or 'target'.")
  transformer.check_gradients(remat, unroll)
  checks.check_count("accumulation", accumulation)
  checked = as_batch(batch, model.config.vocab_size)
  size = checked["tokens"].shape[0]
  if size % accumulation:
    raise ValueError(f"accumulation={accumulation} does not divide the batch of {size} rows.")
  constrain.check_rows(size // accumulation, state.params)
  state, metrics = _train_step(model, optimizer, modes, combine, accumulation, accumulate_by, remat, unroll, state,
                               checked)
  return state, metrics


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5, 6, 7))
def _train_step(model: RATPlusLM, optimizer: Optimizer, modes: tuple[Mode, ...], combine: Combine, accumulation: int,
                accumulate_by: AccumulateBy, remat: Remat, unroll: bool, state: TrainState, batch: Batch
                ) -> tuple[TrainState, Metrics]:
  check_params(state.params, model.config, same_type=False)  # of shapes alone: at run time it costs nothing
  learning_rate = optimizer.schedule(state.step)
  groups: list[tuple[Mode, ...]] = [(mode,) for mode in modes] if combine == "sequential" else [modes]
  gradients = [functools.partial(_loss_and_gradient, model, group, accumulation, accumulate_by, remat, unroll)
               for group in groups]

  def update(carried: _Carried, gradient: Callable[[Params, Batch], tuple[Array, Params]]
             ) -> tuple[_Carried, tuple[Array, Array]]:
    params, opt_state = carried
    losses, grads = gradient(params, batch)
    grads = constrain.tree(grads, params)
    params, opt_state, norm = optimizers.update(optimizer, params, opt_state, grads, learning_rate)
    return constrain.tree((params, opt_state), carried), (losses, norm)

  carried, found = (state.params, state.opt_state), []
  if transformer.unrolled(state.params, model.config.num_layers, unroll):
    for gradient in gradients:
      carried, of_update = update(carried, gradient)
      found.append(of_update)
    losses, norms = jax.tree.map(lambda *x: jnp.stack(x), *found)
  else:
    # A loop, though the updates differ: else XLA lets the loops over layers of all of them start from the same zeros,
    # and so holds the activations of all of them at once.
    carried, (losses, norms) = jax.lax.scan(lambda carried, i: update(carried, functools.partial(
        jax.lax.switch, i, gradients)), carried, jnp.arange(len(groups), dtype=jnp.int32))
  metrics = {"loss": losses.reshape(-1), "grad_norm": norms, "learning_rate": learning_rate,
             "tokens": jnp.sum(batch["targets"] != IGNORED, dtype=jnp.int32)}
  return TrainState(*carried, state.step + 1), metrics


def _loss_and_gradient(model: RATPlusLM, modes: tuple[Mode, ...], accumulation: int, accumulate_by: AccumulateBy,
                       remat: Remat, unroll: bool, params: Params, batch: Batch) -> tuple[Array, Params]:
  """(loss of each mode [modes], gradient of their sum), means over the micro-batches."""
  # What a micro-batch's losses are divided by: the count of its own targets, or its share of all.
  share = jnp.sum(weights_of(batch)) / accumulation if accumulate_by == "target" else None

  def loss_fn(params: Params, part: Batch) -> tuple[Array, Array]:
    def mean_loss(mode: Mode) -> Array:
      total, own = sequence_loss(model, params, part, mode=mode, remat=remat, unroll=unroll)
      count = own if share is None else share
      return total / jnp.where(count > 0, count, 1)

    losses = jnp.stack([mean_loss(mode) for mode in modes])
    return jnp.sum(losses), losses

  gradient = jax.grad(loss_fn, has_aux=True)
  if accumulation == 1:
    grads, losses = gradient(params, batch)
    return losses, grads
  # Rows move, so that every device has its share of each micro-batch.
  parts = jax.tree.map(lambda a: constrain.by_axes(a.reshape(accumulation, -1, *a.shape[1:]), ("", "batch", "tokens")),
                       batch)

  def body(total: tuple[Params, Array], part: Batch) -> tuple[tuple[Params, Array], None]:
    return jax.tree.map(jnp.add, total, gradient(params, part)), None

  zero = (jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params), jnp.zeros(len(modes), jnp.float32))
  (grads, losses), _ = jax.lax.scan(body, zero, parts)
  return losses / accumulation, jax.tree.map(lambda g: g / accumulation, grads)
