"""Attention under a mode: the mask form for every mode, and the fast forms for whole sequences.

`attend` is the operator on plain arrays; `attend_layer` and `attend_keys` are its halves, which the model uses. All
give one softmax per query, float32 inside, and zeros where a query sees nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, softmax
from pallas_kernels.dilated_attention.api import dilated_attention
from rat_jax import compression, layout as layouts, selection
from rat_jax.axes import Array, Keys, Lengths, Positions, Queries
from rat_jax.layout import Layout, Prompts
from rat_jax.modes import BlockMode, Mode, Run, SelectingMode, SnapKV, mode_of_layer, visible
from rat_jax.selection import Origin, Statistics

# Below this length the scores of dense attention [T, T] are small enough to be held at once.
_WHOLE_DENSE = 1024


def attend(q: Queries, k: Keys, v: Keys, mode: Mode, *, q_positions: Positions | None = None,
           lengths: Lengths | None = None, segment_ids: Array | None = None, layer: int = 0,
           row_ids: Array | None = None) -> Array:
  """Attention of q to k, v under a mode, for any model's arrays. Every query is a step of its own.

  Args:
    q: [B, T, N, H]; k, v: [B, S, K, H]; already rotated and, for RAT+, already through the memory.
    mode: who sees whom; of a PerLayer, its mode number `layer`; `dense_layers` are ignored.
    q_positions: int32 [B, T]; default: the last T positions of every row, so T=1 is a decode step. For a mode that
      chooses, one past the row's keys counts as that of its last key.
    lengths: int32 [B], the keys that a row has; default S.
    segment_ids: int [B, T] for packed rows, T = S; positions restart in every document.
    layer, row_ids: int32 [B], default 0: what random draws depend on besides seed, head, position and block.

  Returns:
    [B, T, N, H] in q's type.

  Raises:
    ValueError: shapes that do not match, `segment_ids` together with `q_positions` or `lengths`, a PerLayer without
      such a layer, SnapKV (`compress` serves it).
    NotImplementedError: packed rows under a mode that chooses blocks.
  """
  mode = mode_of_layer(mode, layer)
  q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
  q_at, k_at = selection.positions_of(q, k, q_positions, lengths)
  if k.shape != v.shape:
    raise ValueError(f"k, v have shapes {k.shape}, {v.shape}; give [B, S, K, H] each.")
  mode.check_heads(k.shape[2])
  if isinstance(mode, SnapKV):
    raise ValueError("SnapKV compresses a cache after the prompt and is no attention of its own; use rat_jax.compress,"
                     " then attend to what it kept under Dense().")
  if segment_ids is not None:
    if q_positions is not None or lengths is not None or q.shape[1] != k.shape[1]:
      raise ValueError("segment_ids serve whole sequences (T = S) without q_positions and lengths; mark padding by"
                       " segment id 0.")
    refuse_packed(mode)
    return attend_sequence(q, k, v, mode, layouts.of_tokens(k.shape[:2], segment_ids=segment_ids))
  if isinstance(mode, BlockMode):
    q_at = selection.within(q_at, k_at)
    statistics, own = selection.own_statistics(mode, k, q_at)
    origin = selection.origin_of(q, layer, row_ids)
    return attend_blocks(q, k, v, mode, q_at, k_at, statistics, own, origin, k.shape[1]).astype(q.dtype)
  if q_positions is None and lengths is None and q.shape[1] == k.shape[1]:
    return attend_sequence(q, k, v, mode, layouts.of_tokens(k.shape[:2]))
  return attend_keys(q, k, v, mode, q_at, k_at, isolated=True)[0].astype(q.dtype)


def refuse_packed(mode: Mode) -> None:
  """Raises NotImplementedError for a mode that does not serve packed rows."""
  if isinstance(mode, SelectingMode):
    raise NotImplementedError(f"{mode} does not serve packed rows (segment_ids): its blocks would span documents. Give"
                              " every document its own row.")


def attend_layer(q: Queries, k: Keys, v: Keys, run: Run, layout: Layout, prompts: Prompts | None,
                 origin: Origin, select_k: Keys | None = None) -> Array:
  """Attention of a whole sequence in a layer of `run`: the prompt in its form, later queries as steps of the mode.

  Without prompts every query is a step. Choices are made by the keys `select_k`, where these are not k.
  [B, T, N, H] in q's type.
  """
  if prompts is None or run.form == run.mode:
    return attend_sequence(q, k, v, run.mode, layout, origin, select_k)
  first = prompts.shortest if layout.plain else 0  # no row before it is a step
  prompt = attend_sequence(q, k, v, run.form, layout, origin, select_k)
  steps = _attend_steps(q, k, v, run.mode, layout, prompts.lengths, first, origin, k if select_k is None else select_k)
  in_prompt = layout.positions[:, first:] < prompts.lengths[:, None]
  steps = jnp.where(in_prompt[:, :, None, None], prompt[:, first:], steps.astype(q.dtype))
  return jnp.concatenate([prompt[:, :first], steps], axis=1)


def _attend_steps(q: Queries, k: Keys, v: Keys, mode: Mode, layout: Layout, prompt_lengths: Lengths, first: int,
                  origin: Origin, select_k: Keys) -> Array:
  """Steps after a prompt, of the queries from row `first` on; rows of the prompt among them are arbitrary."""
  at = layout.positions
  if isinstance(mode, SnapKV):
    return compression.attend_after_prompt(q, k, v, mode, at, prompt_lengths, first, origin, select_k)
  if first == 0:
    return attend_sequence(q, k, v, mode, layout, origin, select_k)
  if isinstance(mode, BlockMode):
    statistics, own = selection.own_statistics(mode, select_k, at[:, first:])
    return attend_blocks(q[:, first:], k, v, mode, at[:, first:], at, statistics, own, origin, k.shape[1], select_k)
  return attend_keys(q[:, first:], k, v, mode, at[:, first:], at)[0]


def attend_sequence(q: Queries, k: Keys, v: Keys, mode: Mode, layout: Layout, origin: Origin | None = None,
                    select_k: Keys | None = None) -> Array:
  """Causal attention of a whole sequence to itself, by the fastest form that serves; [B, T, N, H] in q's type."""
  pattern, at = mode.pattern, layout.positions
  if isinstance(mode, BlockMode):
    assert origin is not None
    select_k = k if select_k is None else select_k
    statistics, own = selection.own_statistics(mode, select_k, at)
    return attend_blocks(q, k, v, mode, at, at, statistics, own, origin, k.shape[1], select_k).astype(q.dtype)
  if not layout.plain or pattern is None:
    return attend_keys(q, k, v, mode, at, at, layout.documents, layout.documents)[0].astype(q.dtype)
  # Right padding needs no mask of its own: it comes after every real query.
  if pattern.dilation == 1:
    return _dense(q, k, v, mode, layout)
  return dilated_attention(q, k, v, dilation=pattern.dilation, window=pattern.window, sinks=pattern.sinks)


def attend_blocks(q: Queries, k: Keys, v: Keys, mode: BlockMode, q_positions: Positions, k_positions: Positions,
                  statistics: Statistics, own: Statistics, origin: Origin, max_length: int,
                  oracle_keys: Keys | None = None) -> Array:
  """The mask form for modes that choose blocks: [B, T, N, H] float32.

  Args:
    statistics: of all blocks; own: of the queries' own blocks, up to each query.
    max_length: above all positions.
    oracle_keys: the keys that the oracle looks at, where they are not `k`.
  """
  keys = (k if oracle_keys is None else oracle_keys, k_positions)

  def mask(query):
    scores = selection.score_blocks(mode, query, statistics, keys, origin)
    blocks, _ = selection.pick(mode, scores, query["position"], max_length)
    return selection.to_groups(
        selection.seen_keys(mode, blocks, scores.shape[-1], query["position"], k_positions), k.shape[2])

  return softmax.attend_masked(q, k, v, {"q": q, "own": own, "position": q_positions}, mask)[0]


def attend_keys(q: Queries, k: Keys, v: Keys, mode: Mode, q_positions: Positions, k_positions: Positions,
                q_documents: Array | None = None, k_documents: Array | None = None, isolated: bool = False
                ) -> softmax.Part:
  """The mask form: attention of q [B, T, N, H] to any keys k, v [B, S, K, H] with a position [B or 1, S] each.

  Positions may differ by head: [B, K, S]. Documents, where given, see themselves alone. Returns the float32 output
  and its log-sum-exp, to be merged with the attention to other keys. Memory grows with T and S, not with T * S.
  What is not finite stays in its document, and, `isolated`, with the queries that see it.
  """

  def mask(query):
    t = query["position"] if k_positions.ndim == 2 else query["position"][:, None]
    seen = visible(mode, t, k_positions)
    seen = seen[:, None] if seen.ndim == 3 else seen
    if k_documents is not None:
      seen &= (query["document"][:, :, None] == k_documents[:, None, :])[:, None]
    return seen

  query = {"position": q_positions}
  if q_documents is not None:
    query["document"] = q_documents
  return softmax.attend_masked(q, k, v, query, mask, isolated=isolated or k_documents is not None)


def _dense(q: Queries, k: Keys, v: Keys, mode: Mode, layout: Layout) -> Array:
  served = dispatch.check_device("cudnn") is None and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
  if served and q.dtype == jnp.bfloat16:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
  if q.shape[1] <= _WHOLE_DENSE and not (q.dtype == jnp.bfloat16 and jax.default_backend() == "cpu"):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")
  return attend_keys(q, k, v, mode, layout.positions, layout.positions)[0].astype(q.dtype)
