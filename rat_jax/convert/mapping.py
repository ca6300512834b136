"""A conversion as a table: which foreign tensor holds which of our leaves, and how it lies there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rat_jax.axes import Params
from rat_jax.config import RATPlusConfig
from rat_jax.convert.tensors import Tensors

Place = Callable[[str, np.ndarray], Any]
_LAYERS = "layers/"


class Piece(NamedTuple):
  """One of our leaves in a foreign tensor, or in some of its rows.

  Attributes:
    leaf: our name; of a leaf under "layers/" every layer is a piece of its own.
    name: the foreign name, with {i} for the layer.
    shape: of the piece as it lies there.
    to_ours, to_theirs: between that and our leaf (of one layer).
    first_row: where it starts in a tensor that holds several pieces, one below the other.
  """

  leaf: str
  name: str
  shape: tuple[int, ...]
  to_ours: Callable[[np.ndarray], np.ndarray] = lambda x: x
  to_theirs: Callable[[np.ndarray], np.ndarray] = lambda x: x
  first_row: int = 0

  def layers(self, num_layers: int) -> range:
    """The layers that have this piece; (0,) for what no layer has."""
    return range(num_layers if self.leaf.startswith(_LAYERS) else 1)


def heads_of_rows(leaf: str, name: str, heads: int, head_dim: int, width: int, first_row: int = 0) -> Piece:
  """The piece of a projection to heads: [heads * H, E] there, [E, heads, H] here."""
  return Piece(leaf, name, (heads * head_dim, width), lambda x: x.reshape(heads, head_dim, width).transpose(2, 0, 1),
               lambda x: x.transpose(1, 2, 0).reshape(heads * head_dim, width), first_row)


def heads_of_columns(leaf: str, name: str, heads: int, head_dim: int, width: int) -> Piece:
  """The piece of a projection from heads: [E, heads * H] there, [heads, H, E] here."""
  return Piece(leaf, name, (width, heads * head_dim), lambda x: x.T.reshape(heads, head_dim, width),
               lambda x: x.reshape(heads * head_dim, width).T)


def transposed(leaf: str, name: str, rows: int, columns: int) -> Piece:
  """The piece of a matrix: [out, in] there, [in, out] here."""
  return Piece(leaf, name, (rows, columns), np.transpose, np.transpose)


def check(pieces: Sequence[Piece], tensors: Tensors, num_layers: int, ignored: frozenset[str] = frozenset()) -> None:
  """Raises ValueError for missing, misshapen and unknown tensors, before anything is read."""
  found = tensors.specs()
  if num_layers > len(found):  # before any number of names is made, for a config is not to be trusted
    raise ValueError(f"the config has {num_layers} layers, and the weights hold {len(found)} tensors in all; are they"
                     " of one model?")
  expected = foreign_shapes(pieces, num_layers)
  for name, shape in expected.items():
    if name not in found:
      raise ValueError(f"the weights lack {name!r}; they hold {len(found)} tensors, for instance {sorted(found)[:3]}.")
    if found[name].shape != shape:
      raise ValueError(f"{name!r} has shape {found[name].shape}; this config needs {shape}.")
  unknown = sorted(found.keys() - expected.keys() - ignored)
  if unknown:
    raise ValueError(f"the weights hold tensors that this config has no place for: {unknown[:5]}.")


def foreign_shapes(pieces: Sequence[Piece], num_layers: int) -> dict[str, tuple[int, ...]]:
  """{foreign name: shape} of all tensors, pieces below one another put together."""
  shapes: dict[str, tuple[int, ...]] = {}
  for piece in pieces:
    for i in piece.layers(num_layers):
      name = piece.name.format(i=i)
      rows = shapes[name][0] if name in shapes else 0
      shapes[name] = (rows + piece.shape[0], *piece.shape[1:])
  return shapes


def leaves(pieces: Sequence[Piece], tensors: Tensors, config: RATPlusConfig) -> Iterator[tuple[str, np.ndarray]]:
  """Reads our leaves: (name, leaf) one after another, in `config.param_dtype`; layers stacked, a tensor at a time."""
  for piece in pieces:
    yield piece.leaf, _leaf_of(piece, tensors, config)  # no name is bound to it: it goes when the caller drops it


def _leaf_of(piece: Piece, tensors: Tensors, config: RATPlusConfig) -> np.ndarray:
  dtype = jnp.dtype(config.param_dtype)

  def read(i: int) -> np.ndarray:
    rows = slice(piece.first_row, piece.first_row + piece.shape[0])
    return piece.to_ours(tensors.read(piece.name.format(i=i), rows))

  if not piece.leaf.startswith(_LAYERS):
    return np.require(read(0), dtype, ["C", "W"])  # a copy of what is a file's
  first = read(0)
  stacked = np.empty((config.num_layers, *first.shape), dtype)
  stacked[0] = first
  for i in range(1, config.num_layers):
    stacked[i] = read(i)
  return stacked


def foreign(pieces: Sequence[Piece], params: Params, num_layers: int) -> Iterator[tuple[str, np.ndarray]]:
  """Makes foreign tensors of our leaves, (foreign name, tensor) one after another: the inverse of `leaves`."""
  by_name: dict[str, list[tuple[Piece, int]]] = {}
  for piece in pieces:
    for i in piece.layers(num_layers):
      by_name.setdefault(piece.name.format(i=i), []).append((piece, i))
  for name, of_name in by_name.items():
    parts = [piece.to_theirs(np.asarray(_leaf(params, piece.leaf, i)))
             for piece, i in sorted(of_name, key=lambda one: one[0].first_row)]
    yield name, parts[0] if len(parts) == 1 else np.concatenate(parts)


def _leaf(params: Params, name: str, layer: int) -> Any:
  """A leaf, or a layer of a stacked one."""
  return params["layers"][name.removeprefix(_LAYERS)][layer] if name.startswith(_LAYERS) else params[name]


def tree(named: Iterable[tuple[str, np.ndarray]], place: Place) -> Params:
  """The parameter tree {"layers": {"query": place("layers/query", x)}} of pairs ("layers/query", x), one at a time."""
  params: Params = {}
  for name, leaf in named:
    *folders, last = name.split("/")
    node = params
    for folder in folders:
      node = node.setdefault(folder, {})
    node[last] = place(name, leaf)
    del leaf
  return params


def as_is(name: str, leaf: np.ndarray) -> np.ndarray:
  """Returns the leaf as it is, a numpy array."""
  del name
  return leaf
