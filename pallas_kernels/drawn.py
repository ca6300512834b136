"""Arguments that are drawn, for tests, benchmarks and the check of a device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> jax.Array:
  """Of a standard normal distribution."""
  return jnp.asarray(rng.standard_normal(shape), dtype)
