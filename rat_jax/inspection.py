"""What a model's layers chose: the selections of a whole forward pass, for pictures and measurements."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from rat_jax import transformer
from rat_jax.attention.terms import Heads, Origin, Placement
from rat_jax.axes import Array, ArrayLike, Params, Stream
from rat_jax.batch import Batch
from rat_jax.config import RATPlusConfig
from rat_jax.leaves import check_params
from rat_jax.model import RATPlusLM
from rat_jax.modes import Mode
from rat_jax.modes.snapkv import Kept
from rat_jax.plan import Run, layer_runs
from rat_jax.selection.choice import Selection
from rat_jax.transformer import AtLayer, Forward


def inspect(model: RATPlusLM, params: Params, tokens: ArrayLike, mode: Mode, **arguments: Any
            ) -> list[Selection | Kept]:
  """One Selection for every layer that chooses blocks, and for SnapKV what `compress` returns, in order of layers.

  Args:
    mode, arguments: as of `model.apply`. Rows of the prompt have no valid entry where it runs in another form; where
      the mode itself chooses nothing and `prefill_mode` does, the prompt's choices are returned.

  Raises:
    ValueError, NotImplementedError: as `model.apply`, and ValueError for the ablation's arguments.
  """
  if {arguments.get(name, "memory") for name in ("select_from", "attend_to")} != {"memory"}:
    raise ValueError("inspect takes no select_from and attend_to but \"memory\"; it shows the model as it is.")
  check_params(params, model.config, same_type=False)
  given: Any = model.apply({"params": params}, tokens, mode=mode, method="checked", **arguments)
  how, batch = given
  if batch.documents is not None:
    return []  # no mode that chooses serves packed rows
  found = _choices(model.config, how, params, batch)
  layers = [jax.tree.map(lambda x, i=i: x[i], of_run) for of_run in found if of_run is not None
            for i in range(len(jax.tree.leaves(of_run)[0]))]
  return layers


@functools.partial(jax.jit, static_argnums=(0, 1))
def _choices(config: RATPlusConfig, how: Forward, params: Params, batch: Batch
             ) -> list[Selection | Kept | None]:
  """What the layers of each run chose, [layers of the run, ...] each; None for a run that chooses nothing."""

  def layer(x: Stream, at: AtLayer) -> tuple[Stream, Selection | Kept | None]:
    origin, chosen = Origin(batch.row_ids, at.number), list[Selection | Kept | None]()

    def attend(heads: Heads) -> Array:
      chosen.append(_of_layer(heads, at.run, batch, origin))
      return transformer.attend(heads, at.run, batch, origin)

    x, _, _ = transformer.block(config, at, x, batch, None, attend)
    return x, chosen[0]

  runs = layer_runs(how.mode, config.num_layers, how.prefill_mode)
  return transformer.walk(params, runs, transformer.embed(params, batch.tokens), layer)[1]


def _of_layer(heads: Heads, run: Run, batch: Batch, origin: Origin) -> Selection | Kept | None:
  at = Placement.of(batch)
  in_prompt = jnp.zeros_like(at.queries, bool) if batch.prompts is None else at.queries < batch.prompts[:, None]
  chosen, others, form = run.mode.choices(heads, batch, origin), in_prompt, run.form
  if chosen is None and batch.prompts is not None and not run.form.after_prompt:
    chosen, others, form = run.form.choices(heads, batch, origin), ~in_prompt, run.mode
  if not isinstance(chosen, Selection) or run.form == run.mode:
    return chosen
  return chosen.without(others, form.keys_read(heads, at, origin))
