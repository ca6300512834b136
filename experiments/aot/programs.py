"""The programs of a model on a mesh, traced for it: a training step, a prompt, a step of decoding."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rat_jax
from rat_jax import Dense, RATPlusConfig, RATPlusLM
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
    mode: of the prompt and of decoding; training has an update under it and a dense one.
  """

  config: RATPlusConfig
  rows: int
  length: int
  accumulation: int
  remat: Remat
  served: int
  mode: Mode

  @property
  def modes(self) -> tuple[Mode, ...]:
    """Of the updates of a batch."""
    return tuple(dict.fromkeys((self.mode, Dense())))


@dataclasses.dataclass(frozen=True)
class Traced:
  """A program before it is compiled, and the bytes of each of its arguments on a device, by what they are."""

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
  tokens = jax.ShapeDtypeStruct((work.rows, work.length), jnp.int32)
  state, batch = (_placed(tree, mesh) for tree in (state, {"tokens": tokens, "targets": tokens}))
  step = functools.partial(rat_jax.train_step, model, optimizer, modes=work.modes, accumulation=work.accumulation,
                           remat=work.remat)
  program = _jitted(step, donate_argnums=0).trace(state, batch)
  part = jax.ShapeDtypeStruct((work.rows // work.accumulation, work.length), jnp.int32)
  return Traced(program, {"parameters": _bytes(state.params), "optimizer": _bytes(state.opt_state)},
                _kept(model, work, part) / mesh.size)


def _kept(model: RATPlusLM, work: Work, tokens: Any) -> float:
  """Bytes of what the layers of a micro-batch keep for the gradient: of the update that keeps the most."""
  def gradient(mode: Mode, params: Any, tokens: Any) -> Any:
    return jax.vjp(lambda params: model.apply({"params": params}, tokens, method="stream", mode=mode,
                                              remat=work.remat), params)[1]

  params = _parameters(model)
  known = {(x.shape, x.dtype) for x in (*jax.tree.leaves(params), tokens)}
  return max(sum(float(x.size) * x.dtype.itemsize for x in
                 jax.tree.leaves(jax.eval_shape(functools.partial(gradient, mode), params, tokens))
                 if (x.shape, x.dtype) not in known) for mode in work.modes)


def _serving(work: Work) -> tuple[RATPlusLM, Any]:
  model = RATPlusLM(dataclasses.replace(work.config, param_dtype=work.config.dtype))
  return model, _parameters(model)


def _prefill(work: Work, mesh: jax.sharding.Mesh) -> Traced:
  model, params = _serving(work)
  tokens = {"tokens": jax.ShapeDtypeStruct((work.served, work.length), jnp.int32)}
  params, tokens = _placed(params, mesh), _placed(tokens, mesh)["tokens"]
  run = functools.partial(rat_jax.prefill, model, mode=work.mode, max_length=work.length + 1)
  program = _jitted(lambda params, tokens: run(params, tokens)).trace(params, tokens)
  return Traced(program, {"parameters": _bytes(params)})


def _decode(work: Work, mesh: jax.sharding.Mesh) -> Traced:
  model, params = _serving(work)
  tokens = jax.ShapeDtypeStruct((work.served, 1), jnp.int32)
  cache = jax.eval_shape(lambda params, tokens: rat_jax.prefill(model, params, tokens, mode=work.mode,
                                                                max_length=work.length)[1], params, tokens)
  params, cache = _placed(params, mesh), _placed(cache, mesh)
  step = functools.partial(rat_jax.decode_step, model)
  program = _jitted(step, donate_argnums=2).trace(params, jax.ShapeDtypeStruct((work.served,), jnp.int32), cache)
  return Traced(program, {"parameters": _bytes(params), "cache": _bytes(cache)})


def _jitted(f: Callable[..., Any], **options: Any) -> Any:
  return jax.jit(f, **options)


def _parameters(model: RATPlusLM) -> Any:
  return jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8), np.int32))["params"]


def _placed(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """The shapes of a tree with where they lie on a mesh."""
  return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree,
                      shardings(tree, mesh))


def _bytes(tree: Any) -> float:
  """Of one device's part."""
  return sum(float(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree))
