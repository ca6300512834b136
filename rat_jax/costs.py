"""What a mode costs: keys that a query reads, operations of training. (A cache's size: `rat_jax.cache_bytes`.)"""

from __future__ import annotations

import functools
import math

import jax
import numpy as np

from rat_jax import transformer
from rat_jax.checks import check_count
from rat_jax.config import RATPlusConfig
from rat_jax.modes import Mode
from rat_jax.plan import check_modes, layer_modes

# Operations per second of matrix products in bfloat16, as the makers state them, by `jax.Device.device_kind`.
PEAK_FLOPS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100-SXM4-80GB": 312e12,
              "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v6 lite": 918e12}


def tokens_read(config: RATPlusConfig, mode: Mode, length: int, prompt_length: int | None = None) -> tuple[int, ...]:
  """Keys that the query at position length-1 reads, for every layer; where that depends on data or head, the most.

  The first `prompt_length` tokens are the prompt, whose queries read in the prompt's form; without it the query is a
  decode step. SnapKV needs it. Raises ValueError for numbers out of range.
  """
  check_count("length", length)
  if prompt_length is not None:
    check_count("prompt_length", prompt_length, least=0)
  check_modes(mode, None, config)
  counts: dict[Mode, int] = {}
  for one in layer_modes(mode, config.num_layers):
    if one not in counts:
      counts[one] = _count(one, length, prompt_length)
  return tuple(counts[one] for one in layer_modes(mode, config.num_layers))


def training_flops(config: RATPlusConfig, mode: Mode, length: int) -> float:
  """Floating-point operations per token, forward and backward, of training under a mode on sequences of `length`.

  6 for every entry of a matrix that a token is multiplied by, and 12 N H for every key that its query reads (the mean
  of 64 positions). Norms, the memory, softmax, selection and what is computed twice to save memory are not counted.
  Raises ValueError for a length below 1.
  """
  check_count("length", length)
  layers = jax.eval_shape(transformer.initializers(config)["layers"], jax.random.key(0))
  matrices: int = sum(math.prod(leaf.shape) for name, leaf in layers.items() if not name.endswith(("_norm", "_bias")))
  check_modes(mode, None, config)
  keys = sum(_mean_keys(one, length) for one in layer_modes(mode, config.num_layers))
  matrices += config.vocab_size * config.embed_dim  # the head
  return 6.0 * matrices + 12.0 * config.num_heads * config.head_dim * keys


@functools.cache
def _mean_keys(mode: Mode, length: int) -> float:
  return float(np.mean(mode.most_read(np.unique(np.linspace(1, length, 64).astype(int)))))


def _count(mode: Mode, length: int, prompt_length: int | None) -> int:
  if prompt_length is not None and length <= prompt_length and mode.prompt_form != mode:
    mode, prompt_length = mode.prompt_form, None
  return int(mode.most_read(np.array([length]), prompt_length)[0])
