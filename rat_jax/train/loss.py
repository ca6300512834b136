"""The training loss."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from rat_jax import checks, transformer
from rat_jax.axes import Array, HostOrDevice, Logits, Params, Stream
from rat_jax.config import RATPlusConfig
from rat_jax.model import RATPlusLM
from rat_jax.parallel import vocabulary

IGNORED = -100  # a target that does not count
# What other libraries call parts of a batch, and what stands for them here.
_OTHER_NAMES = {"input_ids": "tokens", "labels": "targets, the next tokens", "segment_id": "segment_ids",
                "segments": "segment_ids", "position_ids": "segment_ids", "positions": "segment_ids",
                "weight": "weights", "mask": "weights, or targets of -100", "loss_mask": "weights, or targets of -100",
                "attention_mask": "segment_ids, 0 for padding", "lengths": "segment_ids, 0 for padding"}
_LOGITS = 1 << 27  # logits that are held at a time, 512 MiB


def as_batch(batch: Mapping[str, Any], vocab_size: int) -> dict[str, Array]:
  """A batch as the loss takes it: tokens, targets and segment_ids int32 [B, T], weights float32 [B, T].

  An unsigned type would take `IGNORED` for one of its own numbers. Targets of padding (segment id 0) do not count.
  Raises ValueError for missing or misshapen arrays, for names that other libraries use and, where values can be seen,
  for what is no token of the vocabulary and weights that are negative or not finite.
  """
  if not isinstance(batch, Mapping):
    raise ValueError(f"the batch is a {type(batch).__name__}; give a dict with \"tokens\" and \"targets\".")
  missing = {"tokens", "targets"} - batch.keys()
  if missing:
    raise ValueError(f"the batch has {sorted(batch)} and lacks {sorted(missing)}; give \"tokens\" and \"targets\","
                     " which are the next tokens.")
  if unread := sorted(batch.keys() & _OTHER_NAMES.keys()):
    raise ValueError(f"the batch has {unread[0]!r}, which is not read here; give {_OTHER_NAMES[unread[0]]}, or leave it"
                     " out.")
  made = {"tokens": checks.as_tokens(batch["tokens"], vocab_size, segment_ids=batch.get("segment_ids"))}
  shape = made["tokens"].shape
  for name in ("targets", "segment_ids"):
    if name in batch:
      given = checks.as_integers(f"batch[{name!r}]", batch[name], shape)
      if name == "targets":
        _check_targets(given, vocab_size)
      made[name] = jnp.asarray(given, jnp.int32)
  if "weights" in batch:
    weights = checks.as_array(batch["weights"], "batch['weights']")
    if weights.shape != shape or not any(jnp.issubdtype(weights.dtype, kind) for kind in (jnp.integer, jnp.floating)):
      raise ValueError(f"batch['weights'] has shape {weights.shape} and type {weights.dtype}; tokens have {shape}, and"
                       " weights are numbers.")
    if checks.is_concrete(weights):
      values = np.asarray(weights, np.float64)
      if not (np.isfinite(values) & (values >= 0)).all():
        raise ValueError(f"batch['weights'] run from {values.min()} to {values.max()}; use finite numbers of 0 or"
                         " more.")
    made["weights"] = jnp.asarray(weights, jnp.float32)
  if "segment_ids" in made:
    made["targets"] = jnp.where(made["segment_ids"] == 0, IGNORED, made["targets"])
  return made


def _check_targets(targets: HostOrDevice, vocab_size: int) -> None:
  if checks.is_concrete(targets):
    values = np.asarray(targets)
    counted = values[values != IGNORED]
    if counted.size and (counted.min() < 0 or counted.max() >= vocab_size):
      raise ValueError(f"targets run from {counted.min()} to {counted.max()}; use tokens 0..{vocab_size - 1}, or"
                       f" {IGNORED} where none counts.")


def sequence_loss(model: RATPlusLM, params: Params, batch: Mapping[str, Any], **arguments: Any
                  ) -> tuple[Array, Array]:
  """`cross_entropy` of a batch under `arguments` of `model.apply`, without the logits of all tokens at once.

  Logits, and their gradients, are made for some tokens at a time: at a vocabulary of 100 thousand, those of a batch of
  8 x 4096 tokens would take 13 GB.
  """
  batch = as_batch(batch, model.config.vocab_size)
  stream = cast(Stream, model.apply({"params": params}, batch["tokens"], method="stream",
                                    segment_ids=batch.get("segment_ids"), **arguments))
  return vocabulary.over_tokens(functools.partial(_sums, model.config), transformer.head(model.config, params),
                                params["final_norm"], stream, batch["targets"], weights_of(batch))


def _sums(config: RATPlusConfig, head: Array, norm: Array, x: Stream, targets: Array, weights: Array,
          words: Array | int, axis: str | None) -> tuple[Array, Array]:
  """A `vocabulary.Loss`."""
  tokens = targets.size
  chunks = -(-tokens * head.shape[0] // _LOGITS)
  size = -(-tokens // chunks)

  def split(x: Array, fill: int) -> Array:
    x = x.reshape(tokens, *x.shape[2:])
    x = jnp.pad(x, ((0, chunks * size - tokens),) + ((0, 0),) * (x.ndim - 1), constant_values=fill)
    return x.reshape(chunks, size, *x.shape[1:])

  def of_chunk(chunk: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    x, targets, weights = chunk
    logits = transformer.words(transformer.final(config, norm, x), head)
    return cross_entropy(logits, targets, weights) if axis is None else _of_parts(logits, targets, weights, words, axis)

  parts = (split(x, 0), split(targets, IGNORED), split(weights, 0))
  if chunks == 1:
    return of_chunk(jax.tree.map(lambda x: x[0], parts))
  # A loop whose results are summed afterwards, as sums that are carried would have to say over which devices they vary.
  sums: tuple[Array, Array] = jax.tree.map(jnp.sum, jax.lax.map(jax.checkpoint(of_chunk), parts))
  return sums


def _of_parts(logits: Logits, targets: Array, weights: Array, words: Array | int, axis: str) -> tuple[Array, Array]:
  """`cross_entropy` of a device's part of the logits [..., V], of which only the first `words` are of words."""
  logits = jnp.where(jnp.arange(logits.shape[-1], dtype=jnp.int32) < words, logits, -jnp.inf)
  top = jax.lax.pmax(jax.lax.stop_gradient(jnp.max(logits, axis=-1)), axis)
  total = jax.lax.psum(jnp.sum(jnp.exp(logits - top[..., None]), axis=-1), axis)
  own = targets - jax.lax.axis_index(axis) * logits.shape[-1]
  here = (own >= 0) & (own < logits.shape[-1])
  found = jnp.take_along_axis(logits, jnp.where(here, own, 0)[..., None], axis=-1)[..., 0]
  log_p = jax.lax.psum(jnp.where(here, found, 0.0), axis) - top - jnp.log(total)
  return _mean_parts(log_p, targets, weights)


def weights_of(batch: Mapping[str, Array]) -> Array:
  """float32 [B, T], what every target of `as_batch` counts: its weight, or 1; 0 where none counts."""
  counted = batch["targets"] != IGNORED
  return jnp.where(counted, batch.get("weights", jnp.float32(1)), jnp.float32(0))


def cross_entropy(logits: Logits, targets: Array, weights: Array | None = None) -> tuple[Array, Array]:
  """(sum of -log p(target) in nats, number of targets) over the targets [...] that are not `IGNORED`; float32.

  With weights [...], both are weighted: their quotient is the weighted mean.
  """
  safe = jnp.where(targets != IGNORED, targets, 0)
  log_p = jnp.take_along_axis(logits, safe[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
  return _mean_parts(log_p, targets, weights)


def _mean_parts(log_p: Array, targets: Array, weights: Array | None) -> tuple[Array, Array]:
  """What a mean loss is a quotient of: the weighted sum of -log_p over targets that count, and that of weights."""
  counted = targets != IGNORED
  weighted = counted if weights is None else jnp.where(counted, weights.astype(jnp.float32), 0.0)
  return -jnp.sum(jnp.where(counted, log_p, 0.0) * weighted), jnp.sum(weighted, dtype=jnp.float32)
