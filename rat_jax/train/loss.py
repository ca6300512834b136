"""The training loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from rat_jax import checks, transformer
from rat_jax.axes import Array, Logits, Params, Stream
from rat_jax.model import RATPlusLM

IGNORED = -100  # a target that does not count
_LOGITS = 1 << 27  # logits that are held at a time, 512 MiB


def check_batch(batch: Mapping[str, Any], vocab_size: int) -> None:
  """Raises ValueError for missing or misshapen arrays and, where values can be seen, for what is no token of ours."""
  missing = {"tokens", "targets"} - batch.keys()
  if missing:
    raise ValueError(f"the batch has {sorted(batch)} and lacks {sorted(missing)}; give \"tokens\" and \"targets\".")
  shape = checks.as_tokens(batch["tokens"], vocab_size).shape
  for name in ("targets", "segment_ids"):
    if name in batch:
      checks.as_integers(f"batch[{name!r}]", batch[name], shape)
  if "weights" in batch and np.shape(batch["weights"]) != shape:
    raise ValueError(f"batch['weights'] has shape {np.shape(batch['weights'])}; tokens have {shape}.")
  if checks.is_concrete(batch["targets"]):
    targets = np.asarray(batch["targets"])
    counted = targets[targets != IGNORED]
    if counted.size and (counted.min() < 0 or counted.max() >= vocab_size):
      raise ValueError(f"targets run from {counted.min()} to {counted.max()}; use tokens 0..{vocab_size - 1}, or"
                       f" {IGNORED} where none counts.")


def sequence_loss(model: RATPlusLM, params: Params, batch: Mapping[str, Any], **arguments: Any
                  ) -> tuple[Array, Array]:
  """`cross_entropy` of a batch under `arguments` of `model.apply`, without the logits of all tokens at once.

  Logits, and their gradients, are made for some tokens at a time: at a vocabulary of 100 thousand, those of a batch of
  8 x 4096 tokens would take 13 GB.
  """
  stream = cast(Stream, model.apply({"params": params}, batch["tokens"], method="stream",
                                    segment_ids=batch.get("segment_ids"), **arguments))
  weights = batch["weights"] if "weights" in batch else jnp.ones(batch["targets"].shape, jnp.float32)
  tokens = batch["targets"].size
  chunks = -(-tokens * model.config.vocab_size // _LOGITS)
  size = -(-tokens // chunks)

  def split(x: Array, fill: int) -> Array:
    x = x.reshape(tokens, *x.shape[2:])
    x = jnp.pad(x, ((0, chunks * size - tokens),) + ((0, 0),) * (x.ndim - 1), constant_values=fill)
    return x.reshape(chunks, size, *x.shape[1:])

  def of_chunk(sums: tuple[Array | float, Array | float], chunk: tuple[Array, Array, Array]
               ) -> tuple[tuple[Array, Array], None]:
    x, targets, weights = chunk
    total, count = cross_entropy(transformer.logits(model.config, params, x), targets, weights)
    return (sums[0] + total, sums[1] + count), None

  parts = (split(stream, 0), split(jnp.asarray(batch["targets"]), IGNORED), split(jnp.asarray(weights), 0))
  if chunks == 1:
    return of_chunk((0.0, 0.0), jax.tree.map(lambda x: x[0], parts))[0]
  sums: tuple[Array, Array] = jax.lax.scan(jax.checkpoint(of_chunk), (jnp.float32(0), jnp.float32(0)), parts)[0]
  return sums


def cross_entropy(logits: Logits, targets: Array, weights: Array | None = None) -> tuple[Array, Array]:
  """(sum of -log p(target) in nats, number of targets) over the targets [...] that are not `IGNORED`; float32.

  With weights [...], both are weighted: their quotient is the weighted mean.
  """
  counted = targets != IGNORED
  safe = jnp.where(counted, targets, 0)
  log_p = jnp.take_along_axis(logits, safe[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
  weighted = counted if weights is None else jnp.where(counted, weights.astype(jnp.float32), 0.0)
  return -jnp.sum(jnp.where(counted, log_p, 0.0) * weighted), jnp.sum(weighted)
