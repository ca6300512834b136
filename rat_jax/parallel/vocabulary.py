"""The two ends of a model, where the vocabulary may be cut over the axis "tensor": looking tokens up, and the loss.

Both run on every device's tokens with its part of the vocabulary. Left to the compiler, the lookup would gather the
stream, and the loss the gradient of the head for every chunk of tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rat_jax.axes import Array, Stream, Tokens
from rat_jax.parallel import constrain

P = jax.sharding.PartitionSpec
TENSOR = "tensor"


def look_up(embedding: Array, tokens: Tokens) -> Stream:
  """The rows of `embedding` [V, E] for tokens [B, T]: float32 [B, T, E]."""
  mesh = constrain.mesh_to_cut(embedding, tokens)
  if mesh is None:
    return embedding[tokens].astype(jnp.float32)
  of_tokens = constrain.cut(mesh, tokens.shape, ("batch", "tokens"))
  if mesh.shape.get(TENSOR, 1) == 1:
    whole = jax.shard_map(lambda table, tokens: table[tokens].astype(jnp.float32), mesh=mesh,
                          in_specs=(P(), of_tokens), out_specs=P(*of_tokens, None))
    return whole(embedding, tokens)

  def of_part(table: Array, tokens: Array) -> Array:
    own = tokens - jax.lax.axis_index(TENSOR) * table.shape[0]
    found = (own >= 0) & (own < table.shape[0])
    rows = table[jnp.where(found, own, 0)].astype(jnp.float32)
    return jax.lax.psum(jnp.where(found[..., None], rows, 0), TENSOR)

  in_parts = jax.shard_map(of_part, mesh=mesh, in_specs=(P(TENSOR), of_tokens), out_specs=P(*of_tokens, None))
  return in_parts(_filled_up(embedding, mesh.shape[TENSOR]), tokens)


# (sums of losses and of weights) of a stream [B, T, E], targets and weights [B, T], and a head [V, E], of which the
# rows from number `first` on are no words; `axis`: over which of the mesh's axes parts of the head lie, None for one.
Loss = Callable[..., tuple[Array, Array]]


def over_tokens(loss: Loss, head: Array, x: Stream, targets: Array, weights: Array) -> tuple[Array, Array]:
  """`loss` of all tokens, by every device of its own."""
  mesh = constrain.mesh_to_cut(head, x)
  words = head.shape[0]
  if mesh is None:
    return loss(head, x, targets, weights, words, None)
  of_tokens = constrain.cut(mesh, targets.shape, ("batch", "tokens"))
  of_words = TENSOR if mesh.shape.get(TENSOR, 1) > 1 else None
  over = tuple(axis for axes in of_tokens if axes for axis in ((axes,) if isinstance(axes, str) else axes))

  def of_device(head: Array, x: Array, targets: Array, weights: Array) -> tuple[Array, Array]:
    own = words
    if of_words:
      own = words - jax.lax.axis_index(of_words) * head.shape[0]
    return jax.lax.psum(loss(head, x, targets, weights, own, of_words), over)

  split = jax.shard_map(of_device, mesh=mesh, in_specs=(P(of_words), P(*of_tokens, None), of_tokens, of_tokens),
                        out_specs=P())
  return split(_filled_up(head, mesh.shape.get(TENSOR, 1)), x, targets, weights)


def _filled_up(table: Array, pieces: int) -> Array:
  """The table [V, E] with rows of zeros at the end, so that the pieces divide it."""
  missing = -table.shape[0] % pieces
  return jnp.pad(table, ((0, missing), (0, 0))) if missing else table
