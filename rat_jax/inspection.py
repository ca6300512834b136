"""What a model's layers chose: the selections of a whole forward pass, for pictures and measurements."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from rat_jax import attention, compression, layout as layouts, selection, transformer
from rat_jax.axes import Array, Params, Tokens
from rat_jax.compression import Kept
from rat_jax.layout import Layout, Prompts
from rat_jax.model import RATPlusLM
from rat_jax.modes import BlockMode, Mode, Run, SnapKV, layer_runs, visible
from rat_jax.selection import Origin, Selection
from rat_jax.transformer import Attended


def inspect(model: RATPlusLM, params: Params, tokens: Tokens, mode: Mode, **arguments: Any) -> list[Selection | Kept]:
  """One Selection for every layer that chooses blocks, and for SnapKV what `compress` returns, in order of layers.

  Args:
    mode, arguments: as of `model.apply`. Rows of the prompt have no valid entry where it runs in another form; where
      the mode itself chooses nothing and `prefill_mode` does, the prompt's choices are returned.

  Raises:
    ValueError, NotImplementedError: as `model.apply`, and ValueError for the ablation's arguments.
  """
  if {arguments.get(name, "memory") for name in ("select_from", "attend_to")} != {"memory"}:
    raise ValueError("inspect takes no select_from and attend_to but \"memory\"; it shows the model as it is.")
  jax.eval_shape(lambda p: model.apply({"params": p}, tokens, mode=mode, **arguments), params)  # checks them all
  prefill_mode = arguments.get("prefill_mode")
  rest = {name: None if value is None else jnp.asarray(value) for name, value in arguments.items()
          if name in ("lengths", "prompt_lengths", "row_ids")}
  if arguments.get("segment_ids") is not None:
    return []  # no mode that chooses serves packed rows
  return _inspect(model.config, mode, prefill_mode, params, jnp.asarray(tokens), **rest)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _inspect(config, mode, prefill_mode, params, tokens, lengths=None, prompt_lengths=None, row_ids=None):
  layout = layouts.of_tokens(tokens.shape, lengths=lengths)
  prompts = layouts.prompts_within(prompt_lengths, lengths, tokens.shape)
  rows = layouts.as_row_ids(row_ids, tokens.shape[0])
  x, found = transformer.embed(params, tokens), []
  for run in layer_runs(mode, config.num_layers, prefill_mode):
    for i in range(run.start, run.stop):
      origin = Origin(rows, i)

      def attend(at, run=run, origin=origin):
        found.extend(_choices(run, at, layout, prompts, origin))
        return attention.attend_layer(at.q, at.k, at.v, run, layout, prompts, origin)

      p = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
      x, _, _ = transformer.block(config, p, x, layout, None, attend)
  return found


def _choices(run: Run, at: Attended, layout: Layout, prompts: Prompts | None, origin: Origin
             ) -> list[Selection | Kept]:
  t = layout.positions
  if isinstance(run.mode, SnapKV):
    assert prompts is not None
    window = compression.last_queries(at.q, prompts.lengths, run.mode.obs_window)
    return [compression.compress(window, at.k, at.v, run.mode, lengths=prompts.lengths, layer=int(origin.layer),
                                 row_ids=origin.row_ids)]
  in_prompt = jnp.zeros_like(t, bool) if prompts is None else t < prompts.lengths[:, None]
  if isinstance(run.mode, BlockMode):
    chosen = selection.select_rows(run.mode, at.q, at.k, t, t, origin)
    return [chosen if run.form == run.mode else _without(chosen, in_prompt, _keys_read(run.form, at, t, origin))]
  if isinstance(run.form, BlockMode) and prompts is not None:
    chosen = selection.select_rows(run.form, at.q, at.k, t, t, origin)
    return [_without(chosen, ~in_prompt, _keys_read(run.mode, at, t, origin))]
  return []


def _keys_read(mode: Mode, at: Attended, t: Array, origin: Origin) -> Array:
  """The keys that every query reads: int32 [B, T, 1 or heads]."""
  if isinstance(mode, BlockMode):
    return selection.select_rows(mode, at.q, at.k, t, t, origin).tokens
  seen = visible(mode, t, t)
  seen = jnp.moveaxis(seen, 1, 2) if seen.ndim == 4 else seen[:, :, None]
  return jnp.sum(seen, axis=-1, dtype=jnp.int32)


def _without(chosen: Selection, rows: Array, tokens: Array) -> Selection:
  """The selection with no valid entry in `rows` [B, T], which read `tokens` keys."""
  rows, heads = rows[:, :, None], chosen.tokens.shape[2]
  if tokens.shape[2] < heads:  # one for each key/value head, or for all
    tokens = jnp.repeat(tokens, heads // tokens.shape[2], axis=2)
  elif tokens.shape[2] > heads:  # one for each query head; of a group the most
    tokens = jnp.max(tokens.reshape(*tokens.shape[:2], heads, -1), axis=3)
  valid = chosen.valid & ~rows[..., None]
  return Selection(jnp.where(valid, chosen.blocks, chosen.scores.shape[-1]), valid,
                   jnp.where(rows[..., None], -jnp.inf, chosen.scores), jnp.where(rows, tokens, chosen.tokens))
