"""The Flax shell: `RATPlusLM` holds the parameters, `rat_jax.transformer` does the work."""

from __future__ import annotations

import functools
from typing import Any, Literal

import flax.linen as nn
import numpy as np

from rat_jax import ablation, attention, layout as layouts, transformer
from rat_jax.axes import Array, Lengths, Logits, Positions, SegmentIds, Stream, Tokens
from rat_jax.config import RATPlusConfig
from rat_jax.modes import Dense, Mode, SelectingMode, SnapKV, check_modes, layer_modes, layer_runs


class RATPlusLM(nn.Module):
  """A RAT+ language model; with `config.memory=False`, the attention baseline.

  `model.init(key, tokens)["params"]` makes one parameter tree, `model.apply({"params": params}, tokens, mode=...)`
  runs it under any mode.
  """

  config: RATPlusConfig

  def setup(self) -> None:
    self.weights = {name: self.param(name, draw) for name, draw in transformer.initializers(self.config).items()}

  def __call__(self, tokens: Tokens, **arguments: Any) -> Logits:
    """Logits of whole sequences, float32 [B, T, V]; arguments and errors as in `stream`.

    Rows of padding are finite and otherwise unspecified.
    """
    return transformer.logits(self.config, self.weights, self.stream(tokens, **arguments))

  def stream(self, tokens: Tokens, *, mode: Mode = Dense(), segment_ids: SegmentIds | None = None,
             positions: Positions | None = None, lengths: Lengths | None = None,
             prompt_lengths: Lengths | None = None, prefill_mode: Mode | None = None, row_ids: Array | None = None,
             select_from: Literal["memory", "plain"] = "memory", attend_to: Literal["memory", "plain"] = "memory",
             remat: transformer.Remat = "products", unroll: bool = False) -> Stream:
    """The residual stream of whole sequences after the last layer, float32 [B, T, E]: logits but for norm and head.

    Args:
      tokens: int [B, T].
      mode: who sees whom; static under `jit`. Every token is a decode step of the mode, but for the prompt's.
      segment_ids: int [B, T] for packed rows: attention and memory stop where the id changes, positions restart;
        0 is padding.
      positions: int [B, T], growing by 1 inside a document; default 0..T-1 in each. Negative ones are padding.
      lengths: int [B], the real tokens of every row, which come first.
      prompt_lengths: int [B], how many first tokens of a row are its prompt: they run as `prefill` runs them, the
        rest as the decode steps after it. SnapKV needs it. What is known when this is compiled (numbers, not an
        argument of the compiled function) is not computed twice: steps start at the shortest prompt.
      prefill_mode: overrides the mode's form of the prompt; only with `prompt_lengths`.
      row_ids: int [B], what random selection of a row depends on; default 0.
      select_from, attend_to: "plain" takes keys (and values) without the memory for choosing, or for attention: an
        experiment (`rat_jax.ablation`).
      remat, unroll: how gradients are computed; see `train_step`.

    Raises:
      ValueError: shapes that do not match, tokens outside the vocabulary, a PerLayer of the wrong length, SnapKV or
        `prefill_mode` without `prompt_lengths`, positions other than 0..T-1 under a mode that chooses by the query.
      NotImplementedError: packed rows under such a mode.
    """
    config = self.config
    tokens = layouts.as_tokens(tokens, config.vocab_size)
    if positions is not None:
      positions = layouts.as_integers("positions", positions, tokens.shape)
    _check_call(config, mode, prefill_mode, prompt_lengths, segment_ids, positions, tokens.shape)
    if _chooses(config, mode, prefill_mode):
      positions = None  # they are 0..T-1
    layout = layouts.of_tokens(tokens.shape, positions=positions, segment_ids=segment_ids, lengths=lengths)
    prompts = layouts.prompts_within(prompt_lengths, lengths, tokens.shape)
    row_ids = layouts.as_row_ids(row_ids, tokens.shape[0])
    run = functools.partial(transformer.hidden_states, remat=remat, unroll=unroll)
    if (select_from, attend_to) != ("memory", "memory"):
      run = functools.partial(ablation.hidden_states, select_from=select_from, attend_to=attend_to)
    return run(config, self.weights, tokens, mode, layout, prompts=prompts, prefill_mode=prefill_mode,
               row_ids=row_ids)


def _chooses(config: RATPlusConfig, mode: Mode, prefill_mode: Mode | None) -> bool:
  return any(isinstance(m, SelectingMode) for run in layer_runs(mode, config.num_layers, prefill_mode)
             for m in (run.mode, run.form))


def _check_call(config: RATPlusConfig, mode: Mode, prefill_mode: Mode | None, prompt_lengths: Lengths | None,
                segment_ids: SegmentIds | None, positions: Positions | None, shape: tuple[int, ...]) -> None:
  check_modes(mode, prefill_mode, config)
  if prompt_lengths is None:
    if prefill_mode is not None:
      raise ValueError(f"prefill_mode={prefill_mode} without prompt_lengths; say how many tokens of each row are its"
                       " prompt.")
    if any(isinstance(one, SnapKV) for one in layer_modes(mode, config.num_layers)):
      raise ValueError(f"mode={mode} needs prompt_lengths: SnapKV compresses when the prompt ends.")
  if prompt_lengths is not None and segment_ids is not None:
    raise ValueError("prompt_lengths with segment_ids; a packed row has several prompts, so give each its own row.")
  if segment_ids is not None:
    for one in layer_modes(mode, config.num_layers):
      attention.refuse_packed(one)
  if positions is not None and _chooses(config, mode, prefill_mode) and not (
      layouts.is_concrete(positions) and (np.asarray(positions) == np.arange(shape[1])).all()):
    raise ValueError(f"positions with mode={mode}; its blocks stand at positions 0..T-1, so leave positions out.")
