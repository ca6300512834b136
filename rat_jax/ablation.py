"""The 2x2 experiment: choose by plain or remembered keys, attend to plain or remembered keys and values.

It separates the two ways in which the memory may help query-aware sparsity (arXiv 2605.28640): better choices, and
kept tokens that carry what was skipped. Whole sequences only; nothing else in the library knows of it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rat_jax import attention, transformer
from rat_jax.axes import Array, Params, Stream, Tokens
from rat_jax.config import RATPlusConfig
from rat_jax.layout import Layout, Prompts
from rat_jax.modes import Mode, layer_runs
from rat_jax.selection import Origin


def hidden_states(config: RATPlusConfig, params: Params, tokens: Tokens, mode: Mode, layout: Layout, *,
                  select_from: str, attend_to: str, row_ids: Array, prompts: Prompts | None = None,
                  prefill_mode: Mode | None = None) -> Stream:
  """As `transformer.hidden_states`. Prompts in a dense or position-only form attend as `attend_to` says too.

  Raises ValueError for a choice that is neither "memory" nor "plain", and a model without a memory.
  """
  for name, value in (("select_from", select_from), ("attend_to", attend_to)):
    if value not in ("memory", "plain"):
      raise ValueError(f"{name}={value!r} is unknown; use \"memory\" or \"plain\".")
  if not config.memory:
    raise ValueError(f"select_from={select_from!r}, attend_to={attend_to!r} with memory=False: there is no memory to"
                     " leave out.")
  x = transformer.embed(params, tokens)
  for run in layer_runs(mode, config.num_layers, prefill_mode):

    def layer(x, at_layer, run=run):
      p, index = at_layer
      projections = transformer.project(config, p, x)
      kinds = {"memory": transformer.remember(config, projections, layout, None)[0],
               "plain": transformer.remember(config, projections._replace(gate_logits=None), layout, None)[0]}
      at = kinds[attend_to]
      y = attention.attend_layer(at.q, at.k, at.v, run, layout, prompts, Origin(row_ids, index),
                                 select_k=kinds[select_from].k)
      x = transformer.attention_branch(config, p, x, y, projections.output_gate)
      return transformer.mlp_branch(config, p, x), None

    x, _ = jax.lax.scan(layer, x, (transformer.layers_of(params, run.start, run.stop),
                                   jnp.arange(run.start, run.stop)))
  return x
