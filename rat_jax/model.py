"""The Flax shell: `RATPlusLM` holds the parameters, `rat_jax.transformer` does the work."""

from __future__ import annotations

import flax.linen as nn

from rat_jax import layout as layouts, transformer
from rat_jax.axes import Array, Lengths, Logits, Positions, Tokens
from rat_jax.config import RATPlusConfig
from rat_jax.modes import Dense, Mode


class RATPlusLM(nn.Module):
  """A RAT+ language model; with `config.memory=False`, the attention baseline.

  `model.init(key, tokens)["params"]` makes one parameter tree, `model.apply({"params": params}, tokens, mode=...)`
  runs it under any mode.
  """

  config: RATPlusConfig

  @nn.compact
  def __call__(self, tokens: Tokens, *, mode: Mode = Dense(), segment_ids: Array | None = None,
               positions: Positions | None = None, lengths: Lengths | None = None) -> Logits:
    """Logits of whole sequences.

    Args:
      tokens: int [B, T].
      mode: who sees whom; static under `jit`.
      segment_ids: int [B, T] for packed rows: attention and memory stop where the id changes, positions restart;
        0 is padding.
      positions: int [B, T], growing by 1 inside a document; default 0..T-1 in each. Negative ones are padding.
      lengths: int [B], the real tokens of every row, which come first.

    Returns:
      float32 [B, T, V]. Rows of padding are finite and otherwise unspecified.

    Raises:
      ValueError: shapes that do not match, tokens outside the vocabulary, a PerLayer of the wrong length.
    """
    config = self.config
    tokens = layouts.as_tokens(tokens, config.vocab_size)
    layout = layouts.of_tokens(tokens.shape, positions=positions, segment_ids=segment_ids, lengths=lengths)
    params = {name: self.param(name, draw) for name, draw in transformer.initializers(config).items()}
    x = transformer.hidden_states(config, params, tokens, mode, layout)
    return transformer.logits(config, params, x)
