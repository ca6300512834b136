"""The two ends of a model, where the vocabulary may be cut over the axis "tensor": looking tokens up, and the loss.

Both run on every device's tokens with its part of the vocabulary. Left to the compiler, the lookup would gather the
stream, and the loss the gradient of the head for every chunk of tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from pallas_kernels.split import mesh_axes
from rat_jax.axes import Array, Stream, Tokens
from rat_jax.parallel import constrain

P = jax.sharding.PartitionSpec
TENSOR = "tensor"


def look_up(embedding: Array, tokens: Tokens) -> Stream:
  """The rows of `embedding` [V, E] for tokens [B, T]: float32 [B, T, E]."""
  mesh = constrain.mesh_to_cut(embedding, tokens)
  if mesh is None:
    return embedding[tokens].astype(jnp.float32)
  of_tokens = constrain.spec_of(mesh, tokens.shape, ("batch", "tokens"))
  pieces, of_table = mesh.shape.get(TENSOR, 1), _table_cut(mesh, embedding, of_tokens)

  def of_part(table: Array, tokens: Array) -> Array:
    table = _whole_width(table, of_table)
    if pieces == 1:
      return table[tokens].astype(jnp.float32)
    own = tokens - jax.lax.axis_index(TENSOR) * table.shape[0]
    found = (own >= 0) & (own < table.shape[0])
    rows = table[jnp.where(found, own, 0)].astype(jnp.float32)
    summed: Array = jax.lax.psum(jnp.where(found[..., None], rows, 0), TENSOR)
    return summed

  in_parts = jax.shard_map(of_part, mesh=mesh, in_specs=(of_table, of_tokens),
                           out_specs=P(*of_tokens, None))
  stream: Stream = in_parts(_filled_up(embedding, pieces), tokens)
  return stream


# (head [V, E], norm [E], stream [B, T, E], targets and weights [B, T], words, axis) -> sums of losses and of weights.
# The head's rows from number `words` on are no words; parts of the head lie over `axis` of the mesh, all if it is None.
Loss = Callable[..., tuple[Array, Array]]


def over_tokens(loss: Loss, head: Array, norm: Array, x: Stream, targets: Array, weights: Array
                ) -> tuple[Array, Array]:
  """`loss` of all tokens, by every device of its own."""
  mesh = constrain.mesh_to_cut(head, x)
  words = head.shape[0]
  if mesh is None:
    return loss(head, norm, x, targets, weights, words, None)
  of_tokens = constrain.spec_of(mesh, targets.shape, ("batch", "tokens"))
  of_words = TENSOR if mesh.shape.get(TENSOR, 1) > 1 else None
  of_head = _table_cut(mesh, head, of_tokens)
  over = tuple(axis for axes in of_tokens for axis in mesh_axes(axes))

  def of_device(head: Array, norm: Array, x: Array, targets: Array, weights: Array) -> tuple[Array, Array]:
    head = _whole_width(head, of_head)
    own = words - jax.lax.axis_index(of_words) * head.shape[0] if of_words else words
    sums: tuple[Array, Array] = jax.lax.psum(loss(head, norm, x, targets, weights, own, of_words), over)
    return sums

  split = jax.shard_map(of_device, mesh=mesh, out_specs=P(),
                        in_specs=(of_head, P(), P(*of_tokens, None), of_tokens, of_tokens))
  sums: tuple[Array, Array] = split(_filled_up(head, mesh.shape.get(TENSOR, 1)), norm, x, targets, weights)
  return sums


def _table_cut(mesh: AbstractMesh, table: Array, of_tokens: P) -> P:
  """How the table [V, E] is cut when it was filled up: along E as it lies, but over axes that cut tokens too."""
  along_width = mesh_axes(constrain.spec_of(mesh, table.shape[1:], ("embed",))[0])
  of_rows = mesh_axes(of_tokens[0])
  return P(TENSOR if mesh.shape.get(TENSOR, 1) > 1 else None, tuple(a for a in along_width if a in of_rows) or None)


def _whole_width(table: Array, cut: P) -> Array:
  """A device's words with all of E: gathered here, so that of their gradient every device is sent its own part."""
  whole: Array = table if cut[1] is None else jax.lax.all_gather(table, cut[1], axis=1, tiled=True)
  return whole


def _filled_up(table: Array, pieces: int) -> Array:
  """The table [V, E] with rows of zeros at the end, so that the pieces divide it."""
  missing = -table.shape[0] % pieces
  return jnp.pad(table, ((0, missing), (0, 0))) if missing else table
