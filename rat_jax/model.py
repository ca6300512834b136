"""The model as a Flax module: `RATPlusLM` holds the parameters, `rat_jax.transformer` computes with them."""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np

from rat_jax import batch as batches, checks, transformer
from rat_jax.axes import ArrayLike, Logits, Stream
from rat_jax.batch import Batch
from rat_jax.config import RATPlusConfig
from rat_jax.modes import Dense, Mode
from rat_jax.plan import check_modes, layer_modes, layer_runs, refuse_packed
from rat_jax.transformer import Forward, Sources


class RATPlusLM(nn.Module):
  """A RAT+ language model; with `config.memory=False`, the attention baseline.

  `model.init(key, tokens)["params"]` makes one parameter tree, `model.apply({"params": params}, tokens, mode=...)`
  runs it under any mode. What runs is compiled once for each configuration, mode and shape, inside or outside of `jit`.
  """

  config: RATPlusConfig

  def setup(self) -> None:
    self.weights = {name: self.param(name, draw) for name, draw in transformer.initializers(self.config).items()}

  def __call__(self, tokens: ArrayLike, **arguments: Any) -> Logits:
    """Logits of whole sequences, float32 [B, T, V]; arguments and errors as in `checked`.

    Rows of padding are finite and otherwise unspecified.
    """
    logits: Logits = transformer.logits(self.config, self.weights, self.stream(tokens, **arguments))
    return logits

  def stream(self, tokens: ArrayLike, **arguments: Any) -> Stream:
    """The residual stream of whole sequences after the last layer, float32 [B, T, E]: logits but for norm and head.

    Arguments and errors as in `checked`.
    """
    how, batch = self.checked(tokens, **arguments)
    stream: Stream = transformer.hidden_states(self.config, how, self.weights, batch)
    return stream

  def checked(self, tokens: ArrayLike, *, mode: Mode = Dense(), segment_ids: ArrayLike | None = None,
              positions: ArrayLike | None = None, lengths: ArrayLike | None = None,
              prompt_lengths: ArrayLike | None = None, prefill_mode: Mode | None = None,
              row_ids: ArrayLike | None = None,
              select_from: Literal["memory", "plain"] = "memory", attend_to: Literal["memory", "plain"] = "memory",
              remat: transformer.Remat = "products", unroll: bool = False) -> tuple[Forward, Batch]:
    """How a call runs, and its batch: all of its arguments, checked before anything is computed.

    Args:
      tokens: int [B, T].
      mode: who sees whom; static under `jit`. Every token is a decode step of the mode, but for the prompt's.
      segment_ids: int [B, T] for packed rows: attention and memory stop where the id changes, positions restart;
        0 is padding.
      positions: int [B, T], growing by 1 inside a document; default 0..T-1 in each. Negative ones are padding.
      lengths: int [B], the real tokens of every row, which come first.
      prompt_lengths: int [B], how many first tokens of a row are its prompt: they run as `prefill` runs them, the
        rest as the decode steps after it. SnapKV needs it. In a function that you compile, numbers that are no
        argument of it are part of the program, and then nothing is computed twice: steps start at the shortest prompt.
      prefill_mode: overrides the mode's form of the prompt; only with `prompt_lengths`.
      row_ids: int [B], what random selection of a row depends on; default 0.
      select_from, attend_to: "plain" takes keys (and values) without the memory for choosing, or for attention: an
        experiment (`rat_jax.transformer.Sources`).
      remat, unroll: how gradients are computed; see `train_step`.

    Raises:
      ValueError: shapes that do not match, tokens outside the vocabulary, a PerLayer of the wrong length, SnapKV or
        `prefill_mode` without `prompt_lengths`, positions other than 0..T-1 under a mode that chooses by the query,
        an unknown `select_from`, `attend_to` or `remat`.
      NotImplementedError: packed rows under such a mode.
    """
    how = Forward(mode, prefill_mode, Sources(select_from, attend_to), remat, unroll)
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((self.weights, tokens)))
    return how, _batch(self.config, how, tokens, segment_ids=segment_ids, positions=positions, lengths=lengths,
                       prompt_lengths=prompt_lengths, row_ids=row_ids, traced=traced)


def _batch(config: RATPlusConfig, how: Forward, given_tokens: ArrayLike, *, segment_ids: ArrayLike | None,
           positions: ArrayLike | None, lengths: ArrayLike | None, prompt_lengths: ArrayLike | None,
           **arguments: Any) -> Batch:
  mode, prefill_mode = how.mode, how.prefill_mode
  tokens = checks.as_tokens(given_tokens, config.vocab_size, lengths=lengths, segment_ids=segment_ids,
                            positions=positions)
  if positions is not None:
    positions = checks.as_integers("positions", positions, tokens.shape)
  check_modes(mode, prefill_mode, config)
  how.check(config)
  if prompt_lengths is None:
    if prefill_mode is not None:
      raise ValueError(f"prefill_mode={prefill_mode} without prompt_lengths; say how many tokens of each row are its"
                       " prompt.")
    for one in layer_modes(mode, config.num_layers):
      if one.after_prompt:
        raise ValueError(f"mode={mode} needs prompt_lengths: {one.after_prompt}.")
  if prompt_lengths is not None and segment_ids is not None:
    raise ValueError("prompt_lengths with segment_ids; a packed row has several prompts, so give each its own row.")
  if segment_ids is not None:
    for one in layer_modes(mode, config.num_layers):
      refuse_packed(one)
  if positions is not None and any(one.chooses for run in layer_runs(mode, config.num_layers, prefill_mode)
                                   for one in (run.mode, run.form)):
    if not (checks.is_concrete(positions) and (np.asarray(positions) == np.arange(tokens.shape[1])).all()):
      raise ValueError(f"positions with mode={mode}; its blocks stand at positions 0..T-1, so leave positions out.")
    positions = None
  return batches.of_call(tokens, segment_ids=segment_ids, positions=positions, lengths=lengths,
                         prompt_lengths=prompt_lengths, **arguments)
