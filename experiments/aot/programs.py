"""The programs of a model on a mesh, traced for it: a training step, a prompt, a step of decoding."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rat_jax
from rat_jax import RATPlusConfig, RATPlusLM
from rat_jax.modes import Mode
from rat_jax.parallel import shardings
from rat_jax.transformer import Remat

KINDS = ("train", "prefill", "decode")


@dataclasses.dataclass(frozen=True)
class Work:
  """What is asked of a mesh.

  Attributes:
    rows, length: of a training batch of tokens; accumulation: its micro-batches; remat: as `rat_jax.train_step`.
    served: rows of a prompt of `length` tokens, and of a cache of so many rows.
    modes: of the updates of a training batch; the first is that of the prompt and of decoding too.
  """

  config: RATPlusConfig
  rows: int
  length: int
  accumulation: int
  remat: Remat
  served: int
  modes: tuple[Mode, ...]


@dataclasses.dataclass(frozen=True)
class Traced:
  """A program before it is compiled, and the bytes of its arguments on a device, by what they are.

  `kept`: bytes of what layers keep for the gradient; the compiler counts them among all that it needs.
  """

  program: Any
  held: Mapping[str, float]
  kept: float = 0.0


def traced(kind: str, work: Work, mesh: jax.sharding.Mesh) -> Traced:
  """The program of a kind. Raises ValueError where the mesh does not fit the model or the rows."""
  return {"train": _train, "prefill": _prefill, "decode": _decode}[kind](work, mesh)


def _train(work: Work, mesh: jax.sharding.Mesh) -> Traced:
  model = RATPlusLM(work.config)
  optimizer = rat_jax.make_optimizer(3e-4, total_steps=1000)
  state = jax.eval_shape(lambda params: rat_jax.init_train_state(model, params, optimizer), _parameters(model))
  tokens = _tokens(work.rows, work.length)
  state, batch = _placed(state, mesh), _placed({"tokens": tokens, "targets": tokens}, mesh)
  step = functools.partial(rat_jax.train_step, model, optimizer, modes=work.modes, accumulation=work.accumulation,
                           remat=work.remat)
  part = _tokens(work.rows // work.accumulation, work.length)
  return Traced(jax.jit(step, donate_argnums=0).trace(state, batch),
                {"parameters": _bytes(state.params), "optimizer": _bytes(state.opt_state)},
                max(_kept(model, mode, work.remat, part) for mode in work.modes) / mesh.size)


def _kept(model: RATPlusLM, mode: Mode, remat: Remat, tokens: Any) -> float:
  """Bytes of what the layers keep for the gradient of an update, but for parameters and tokens themselves."""
  def gradient(params: Any, tokens: Any) -> Any:
    return jax.vjp(lambda params: model.apply({"params": params}, tokens, method="stream", mode=mode, remat=remat),
                   params)[1]

  params = _parameters(model)
  given = {(x.shape, x.dtype) for x in (*jax.tree.leaves(params), tokens)}
  kept = jax.tree.leaves(jax.eval_shape(gradient, params, tokens))
  return float(sum(x.size * x.dtype.itemsize for x in kept if (x.shape, x.dtype) not in given))


def _prefill(work: Work, mesh: jax.sharding.Mesh) -> Traced:
  model = _served(work)
  params, batch = _placed(_parameters(model), mesh), _placed({"tokens": _tokens(work.served, work.length)}, mesh)

  def run(params: Any, tokens: Any) -> Any:
    return rat_jax.prefill(model, params, tokens, mode=work.modes[0], max_length=work.length + 1)

  return Traced(jax.jit(run).trace(params, batch["tokens"]), {"parameters": _bytes(params)})


def _decode(work: Work, mesh: jax.sharding.Mesh) -> Traced:
  model = _served(work)
  params = _parameters(model)
  cache = jax.eval_shape(lambda params, tokens: rat_jax.prefill(model, params, tokens, mode=work.modes[0],
                                                                max_length=work.length)[1],
                         params, _tokens(work.served, 1))
  params, cache = _placed(params, mesh), _placed(cache, mesh)
  step = jax.jit(functools.partial(rat_jax.decode_step, model), donate_argnums=2)
  return Traced(step.trace(params, jax.ShapeDtypeStruct((work.served,), jnp.int32), cache),
                {"parameters": _bytes(params), "cache": _bytes(cache)})


def _served(work: Work) -> RATPlusLM:
  """The model with parameters of the type that it computes in."""
  return RATPlusLM(dataclasses.replace(work.config, param_dtype=work.config.dtype))


def _tokens(rows: int, length: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((rows, length), jnp.int32)


def _parameters(model: RATPlusLM) -> Any:
  return jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8), np.int32))["params"]


def _placed(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """The shapes of a tree with where they lie on a mesh."""
  return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree,
                      shardings(tree, mesh))


def _bytes(tree: Any) -> float:
  """Of one device's part."""
  return float(sum(np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))
