"""The axis alphabet, used in every signature and docstring of the library.

  B batch            T query position     S key position      R row of a cache
  N query heads      K key/value heads    G = N / K           H head width
  E model width      F MLP width          V vocabulary        L layers

Arrays are float32 or bfloat16 unless the alias says otherwise.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

Array = jax.Array

# Inputs may be numpy arrays or jax arrays.
Tokens = Array | np.ndarray     # int32 [B, T]
Positions = Array | np.ndarray  # int32 [B, T]; -1 is padding
SegmentIds = Array | np.ndarray  # int32 [B, T]; 0 is padding
Lengths = Array | np.ndarray    # int32 [B]
Stream = Array     # float32 [B, T, E], the residual stream
Queries = Array    # [B, T, N, H]
Keys = Array       # [B, S, K, H], also values
Logits = Array     # float32 [B, T, V]
State = tuple[Array, Array]  # the memory after the last token, k~ and v~ before RoPE: float32 [B, K, H] each
Params = dict[str, Any]      # the parameter tree (rat_jax.transformer.initializers)
