"""A random model in the Hugging Face form, with a tokenizer that has a chat template."""

from __future__ import annotations

import pathlib

import jax
import numpy as np

import rat_jax
from rat_jax import RATPlusConfig, RATPlusLM
from rat_jax.convert import families
from tests.rat_jax.data.test_chat import write_tokenizer


def write(folder: pathlib.Path) -> pathlib.Path:
  """The folder with the model in it."""
  size = dict(vocab_size=300, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, memory=False, init_std=0.3)
  config = RATPlusConfig(**size | families.FAMILIES["llama"].ours)
  params = RATPlusLM(config).init(jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
  rat_jax.convert.export(folder, config, params, family="llama")
  write_tokenizer(folder)
  return folder
