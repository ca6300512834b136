"""A memory for a trained attention model: it starts as the identity, so that the model begins where it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from rat_jax.axes import Params
from rat_jax.config import RATPlusConfig
from rat_jax.leaves import check_params

GATE_BIAS = -12.0  # where the gates of a memory that is added start: the state counts for sigmoid(-12), 6e-6


def add_memory(config: RATPlusConfig, params: Params, gate_bias: float = GATE_BIAS) -> tuple[RATPlusConfig, Params]:
  """(config, parameters) of the model with a memory whose gates are sigmoid(gate_bias) everywhere.

  At -12 logits change by less than 1e-3 (arXiv 2605.28640 does not say how its retrofit of OLMo 2 starts). Raises
  ValueError for a model that has a memory.
  """
  if config.memory:
    raise ValueError("memory=True: the model has a memory already.")
  check_params(params, config, same_type=False)
  config = dataclasses.replace(config, memory=True, gate_bias=gate_bias)
  return config, params | {"layers": params["layers"] | dict(memory_leaves(config))}


def memory_leaves(config: RATPlusConfig) -> Iterator[tuple[str, np.ndarray]]:
  """The entries of "layers" that a memory adds, as they start, one after another: no gate weights, and the bias."""
  shape, dtype = (config.num_kv_heads, config.head_dim), jnp.dtype(config.param_dtype)
  yield "memory_gate", np.zeros((config.num_layers, config.embed_dim, *shape), dtype)
  yield "memory_gate_bias", np.full((config.num_layers, *shape), config.gate_bias, dtype)
