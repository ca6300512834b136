"""Training several seeds of a model at once, on all devices."""

from __future__ import annotations

import concurrent.futures
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import rat_jax
from experiments.needles.seeds import mesh, over_seeds
from rat_jax import RATPlusLM
from rat_jax.modes import Mode
from rat_jax.train import Optimizer, TrainState


class Programs:
  """The compiled programs of a run, each over all seeds, spread over the devices. Nothing runs while they compile.

  A stage of the curriculum is anything hashable, such as its length and rows.

  Args:
    batch: (stage, seed, step, *text) -> the batch of a seed.
    accuracy: (stage, params, step) -> the share of questions that a seed answers right, [tasks].
    text: arrays that all seeds share.
  """

  def __init__(self, model: RATPlusLM, optimizer: Optimizer, plan: Sequence[Hashable], sets: list[tuple[Mode, ...]],
               state: TrainState, seeds: jax.Array, *, batch: Callable[..., Any], accuracy: Callable[..., Any],
               text: tuple[np.ndarray, ...]):
    self._text = tuple(jax.device_put(one, NamedSharding(mesh(), PartitionSpec())) for one in text)

    def of_stage(stage):
      batches = self._compile(functools.partial(batch, stage), seeds, shared=self._text)
      return batches, self._compile(functools.partial(accuracy, stage), state.params)

    def of_update(stage, modes):
      made = jax.eval_shape(jax.vmap(lambda seed: batch(stage, seed, 0, *self._text)), seeds)
      step = lambda s, b, _: rat_jax.train_step(model, optimizer, s, b, modes=modes)
      return self._compile(step, state, made, donate=True)

    with concurrent.futures.ThreadPoolExecutor() as pool:
      steps = {(stage, modes): pool.submit(of_update, stage, modes) for stage in plan for modes in sets}
      others = {stage: pool.submit(of_stage, stage) for stage in plan}
      self._update = {key: future.result() for key, future in steps.items()}
      self._others = {stage: future.result() for stage, future in others.items()}

  @staticmethod
  def _compile(f: Callable, *of_seeds: Any, shared: tuple[jax.Array, ...] = (), donate: bool = False) -> Any:
    """f(*of_seeds, number, *shared) of one seed -> the program of all seeds, which share number and `shared`."""
    axis, n = PartitionSpec("seeds"), len(of_seeds)
    mapped = jax.shard_map(lambda *a: jax.vmap(lambda *b: f(*b, *a[n:]))(*a[:n]), mesh=mesh(), check_vma=False,
                           in_specs=(axis,) * n + (PartitionSpec(),) * (1 + len(shared)), out_specs=axis)
    spread = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=over_seeds()), of_seeds)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh(), PartitionSpec()))
    return jax.jit(mapped, donate_argnums=(0,) if donate else ()).lower(*spread, number, *shared).compile()

  def train(self, stage: Hashable, modes: tuple[Mode, ...], state: TrainState, seeds: jax.Array, step: int
            ) -> tuple[TrainState, dict[str, jax.Array]]:
    batches = self._others[stage][0](seeds, np.int32(step), *self._text)
    return self._update[stage, modes](state, batches, np.int32(step))

  def accuracy(self, stage: Hashable, params: Any, step: int) -> np.ndarray:
    """The share of single questions answered right under the last mode: [seeds, tasks]."""
    return np.asarray(self._others[stage][1](params, np.int32(step)))

  def final_accuracy(self, stage: Hashable, params: Any, step: int) -> np.ndarray:
    """`accuracy` on sixteen times as many questions, after the last step."""
    return np.mean([self.accuracy(stage, params, step + 1 + i) for i in range(16)], axis=0)
