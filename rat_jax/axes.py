"""The letters of axes, and types of arrays, that every signature and docstring of the library uses.

  B batch            T query position     S key position      R row of a cache
  N query heads      K key/value heads    G = N / K           H head width
  E model width      F MLP width          V vocabulary        L layers
  P blocks of keys   n blocks that a query chose              M the heads that choose, N or K

Numbers with a letter: D dilation, W window (tokens before the query), S0 sinks (first tokens that all read).
Arrays are float32 or bfloat16 unless the alias says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

Array = jax.Array
ArrayLike = jax.typing.ArrayLike | Sequence[Any]  # what a user may hand in; the docstring says its shape
HostOrDevice = Array | np.ndarray  # looked at, and not yet moved

Tokens = Array      # int32 [B, T]
Positions = Array   # int32 [B, T]; -1 is padding
SegmentIds = Array  # int32 [B, T]; 0 is padding
Lengths = Array     # int32 [B]
RowIds = Array      # int32 [B]
Stream = Array     # float32 [B, T, E], the residual stream
Queries = Array    # [B, T, N, H]
Keys = Array       # [B, S, K, H], also values
CacheRows = Array  # [L, B, K, R, H], keys or values as a cache keeps them: the rows of a head lie together
Mask = Array       # bool, who reads what
Scores = Array     # float32 [B, T, M, P]
Blocks = Array     # int32 [B, T, M, n], numbers of blocks
Logits = Array     # float32 [B, T, V]
State = tuple[Array, Array]  # the memory after the last token, k~ and v~ before RoPE: float32 [B, K, H] each
Params = dict[str, Any]      # the parameter tree (rat_jax.transformer.initializers)
