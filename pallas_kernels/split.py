"""Runs what is written for one device on every device of its arguments' mesh, each with its share of the arguments."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax

from pallas_kernels import devices

P = jax.sharding.PartitionSpec
Letters = str | tuple["Letters", ...] | None  # an array's axes, those of a tuple of arrays, or of what is left out
CONTEXT = "context"  # the axis of the mesh that cuts sequences
# The letters of the axes that an axis of the mesh cuts, by its name, where the arrays themselves do not say. Names that
# are not here cut nothing.
CONVENTION = {"data": "B", "fsdp": "B", "tensor": "NKC", CONTEXT: "TR"}
_TOGETHER = ("B", "NK", "C", "T", "R")  # query heads are cut as their key/value heads are


@dataclasses.dataclass(frozen=True)
class Cut:
  """How arguments are cut over the axes of a mesh.

  Attributes:
    letters: of the arguments' arrays, in the order of `jax.tree.leaves`.
    cuts: (letter, (axes of the mesh that cut it)) of every axis that is cut.
    picks: axes of the mesh, of which a device's place says which key/value head its query heads read: there are fewer
      of these than pieces of query heads, so that every device has all of them.
    complete: whether nothing is computed twice that the compiler might have split: every axis of the mesh is known, by
      the arrays or by its name, and what the arrays are cut along is cut, as are sequences by the axis for them.
  """

  mesh: jax.sharding.AbstractMesh
  letters: tuple[str, ...]
  cuts: tuple[tuple[str, tuple[str, ...]], ...]
  picks: tuple[str, ...]
  complete: bool

  @property
  def of_sequences(self) -> bool:
    """Whether sequences are cut, so that pieces of a result need more than their pieces of the arguments."""
    return self.mesh.shape.get(CONTEXT, 1) > 1 and any(
        letter in "TR" and CONTEXT in axes for letter, axes in self.cuts)

  def spec(self, letters: str) -> jax.sharding.PartitionSpec:
    """How an array of these axes is cut."""
    return P(*(dict(self.cuts).get(letter) for letter in letters))

  def share(self, arguments: Any) -> Any:
    """The shapes and types of what one device gets of the arguments."""
    leaves, tree = jax.tree.flatten(arguments)
    shares = [self._share(jax.typeof(x), of) for x, of in zip(leaves, self.letters, strict=True)]
    return jax.tree.unflatten(tree, shares)

  def _share(self, x: Any, letters: str) -> jax.ShapeDtypeStruct:
    pieces = {letter: _size(self.mesh, axes) for letter, axes in self.cuts}
    if self.picks and "K" in letters:
      pieces["K"] = x.shape[letters.index("K")]
    shape = [n // pieces.get(letter, 1) for n, letter in zip(x.shape, letters, strict=False)]
    return jax.ShapeDtypeStruct((*shape, *x.shape[len(letters):]), x.dtype)


def cut(arguments: Any, letters: Letters, independent: str, unit: int = 1) -> Cut | None:
  """How to cut arguments with axes of these letters, of which `independent` may be cut; None on one device.

  An axis of the mesh cuts what it cuts in the arrays, where these say (Explicit axes; arrays that are no tracers), else
  what its name means (`CONVENTION`); but query and key/value heads only together, and only what it divides. Of
  sequences (T, R) pieces are multiples of `unit`.
  """
  leaves = jax.tree.leaves(arguments)
  mesh = devices.mesh_of(*leaves)
  rest = [axis for axis in mesh.axis_names if axis not in mesh.manual_axes]
  if not mesh.explicit_axes and _size(mesh, rest) == 1:
    return None
  of_leaves = tuple(jax.tree.leaves(letters))
  sizes = {letter: n for x, of in zip(leaves, of_leaves, strict=True)
           for letter, n in zip(of, jax.typeof(x).shape, strict=False)}
  known = _known(mesh, leaves, of_leaves)
  cuts: dict[str, tuple[str, ...]] = {}
  picks: tuple[str, ...] = ()
  complete = True
  for axis in rest:
    alone = mesh.shape[axis] == 1  # cuts nothing; but along what no axis is said to cut, gradients are summed
    if alone and axis in mesh.explicit_axes:
      continue
    wanted = CONVENTION.get(axis) if alone else known.get(axis, CONVENTION.get(axis))
    if wanted is None:
      complete &= alone
      continue
    together = next((of for of in _TOGETHER if set(of) & set(wanted) & set(sizes)), "")
    group = [letter for letter in together if letter in sizes and letter in independent
             and (letter not in "TR" or axis == CONTEXT)]
    whole = {letter: _size(mesh, (*cuts.get(letter, ()), axis)) * (unit if letter in "TR" else 1) for letter in group}
    fits = all(sizes[letter] % whole[letter] == 0 for letter in group)
    if fits:
      cuts |= {letter: (*cuts.get(letter, ()), axis) for letter in group}
    elif set(group) == set("NK") and not picks and sizes["N"] % whole["N"] == 0 == whole["N"] % sizes["K"]:
      fits, picks = True, (*cuts.get("N", ()), axis)
      cuts = {letter: axes for letter, axes in cuts.items() if letter != "K"} | {"N": picks}
    complete &= alone or axis not in known or set(known[axis]) <= set(group if fits else "")
    complete &= alone or axis != CONTEXT or (bool(group) and fits)
  return Cut(mesh, of_leaves, tuple(cuts.items()), picks, complete)


def run(f: Callable[..., Any], cut: Cut | None, arguments: tuple[Any, ...], results: Letters,
        options: dict[str, Any]) -> Any:
  """f of arguments and options, on every device's share; `results` are the letters of f's results."""
  if cut is None:
    return f(*arguments, **options)
  leaves, tree = jax.tree.flatten(arguments)
  return _program(f, tree, cut, results, tuple(options.items()))(*leaves)


@functools.lru_cache
def _program(f: Callable[..., Any], tree: Any, cut: Cut, results: Letters, options: tuple[tuple[str, Any], ...]
             ) -> Callable[..., Any]:
  """The compiled form of `run`, of the arguments' arrays."""
  specs = tuple(map(cut.spec, cut.letters))
  explicit = set(cut.mesh.explicit_axes)

  def of_device(*leaves: Any) -> Any:
    own = [_picked(x, letters, cut.picks) for x, letters in zip(leaves, cut.letters, strict=True)]
    return f(*jax.tree.unflatten(tree, own), **dict(options))

  # Kernels do not say over which axes their results vary, so nothing checks it.
  split = jax.shard_map(of_device, mesh=cut.mesh, in_specs=specs, out_specs=jax.tree.map(cut.spec, results),
                        axis_names=set(cut.mesh.axis_names) - set(cut.mesh.manual_axes), check_vma=False)

  def placed(x: Any, spec: jax.sharding.PartitionSpec) -> Any:
    """x cut as it will be taken: along Explicit axes nothing moves by itself."""
    if not explicit:
      return x
    only = P(*(tuple(axis for axis in mesh_axes(entry) if axis in explicit) or None for entry in spec))
    return jax.sharding.reshard(x, jax.sharding.NamedSharding(cut.mesh, only))

  return jax.jit(lambda *leaves: split(*map(placed, leaves, specs)))


def _picked(x: Any, letters: str, picks: tuple[str, ...]) -> Any:
  """Of all key/value heads the one that the device's query heads read."""
  if not picks or "K" not in letters:
    return x
  axis = letters.index("K")
  own = jax.lax.axis_index(picks) * x.shape[axis] // jax.lax.axis_size(picks)
  return jax.lax.dynamic_slice_in_dim(x, own, 1, axis)


def _known(mesh: jax.sharding.AbstractMesh, leaves: list[Any], letters: tuple[str, ...]) -> dict[str, str]:
  """{axis of the mesh: the letters of what it cuts in the arrays}, of the axes of which the arrays say that."""
  specs = [jax.typeof(x).sharding.spec for x in leaves]
  told: Iterable[str] = mesh.explicit_axes
  if not any(isinstance(x, jax.core.Tracer) for x in leaves):
    shardings = [getattr(x, "sharding", None) for x in leaves]
    if any(isinstance(sharding, jax.sharding.NamedSharding) for sharding in shardings):
      told = mesh.axis_names
      specs = [sharding.spec if isinstance(sharding, jax.sharding.NamedSharding) else P() for sharding in shardings]
  known = dict.fromkeys(told, "")
  for spec, of in zip(specs, letters, strict=True):
    for i, entry in enumerate(spec):
      for axis in mesh_axes(entry):
        if axis in known:
          known[axis] += of[i] if i < len(of) else "?"
  return known


def pieces(arguments: Any) -> int:
  """Into how many pieces the mesh of the arguments cuts sequences; 1 without such a mesh."""
  mesh = devices.mesh_of(*jax.tree.leaves(arguments))
  return 1 if CONTEXT not in mesh.axis_names or CONTEXT in mesh.manual_axes else mesh.shape[CONTEXT]


def mesh_axes(entry: Any) -> tuple[str, ...]:
  """The axes of the mesh in an entry of a PartitionSpec."""
  if entry is None:
    return ()
  return (entry,) if isinstance(entry, str) else tuple(entry)


def _size(mesh: jax.sharding.AbstractMesh, axes: Iterable[str]) -> int:
  size = 1
  for axis in axes:
    size *= mesh.shape[axis]
  return size
