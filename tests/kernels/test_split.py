"""How arguments are cut over a mesh, by what the arrays say and by what its axes are called. No devices are needed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from pallas_kernels import split

LETTERS = {"q": "BTNH", "k": "BTKH"}


def cut(axes, shapes, independent="BNK", kind=AxisType.Auto, specs=None, manual=(), unit=1):
  """`split.cut` of arrays q and k on a mesh {axis: size}: ({letter: axes of the mesh}, complete), or None."""
  types = tuple(AxisType.Manual if axis in manual else kind for axis in axes)
  mesh = AbstractMesh(tuple(axes.values()), tuple(axes), types)
  found = []

  def f(arrays):
    found.append(split.cut(tuple(arrays.values()), tuple(LETTERS[name] for name in arrays), independent, unit))
    return arrays

  struct = lambda name: jax.ShapeDtypeStruct(
      shapes[name], jnp.float32, sharding=NamedSharding(mesh, (specs or {}).get(name, jax.P())))
  jax.jit(f).trace({name: struct(name) for name in LETTERS})
  return found[0] and (dict(found[0].cuts), found[0].complete)


SHAPES = {"q": (8, 5, 4, 16), "k": (8, 5, 2, 16)}
HEADS = {"N": ("tensor",), "K": ("tensor",)}


@pytest.mark.parametrize(("axes", "shapes", "expected"), [
    ({"data": 2, "fsdp": 4, "tensor": 2}, SHAPES, ({"B": ("data", "fsdp"), **HEADS}, True)),
    ({"fsdp": 4, "data": 1, "tensor": 1}, SHAPES, ({"B": ("fsdp", "data"), **HEADS}, True)),
    ({"data": 2, "fsdp": 8}, SHAPES, ({"B": ("data",)}, True)),                          # 8 rows are not 16
    ({"tensor": 4}, SHAPES, ({"N": ("tensor",)}, True)),                                 # two share a key/value head
    ({"tensor": 2}, {"q": (8, 5, 4, 16), "k": (8, 5, 1, 16)}, ({"N": ("tensor",)}, True)),
    ({"tensor": 4}, {"q": (8, 5, 6, 16), "k": (8, 5, 3, 16)}, ({}, True)),               # nor 6 heads 4
    ({"data": 2, "rows": 2}, SHAPES, ({"B": ("data",)}, False)),                         # a name that means nothing
    ({"data": 2, "context": 2}, SHAPES, ({"B": ("data",)}, False)),                      # the operation is not told how
    ({"data": 1, "context": 1}, SHAPES, None),
    ({"data": 1}, SHAPES, None)])
def test_by_the_names_of_the_axes(axes, shapes, expected):
  assert cut(axes, shapes) == expected


@pytest.mark.parametrize(("axes", "specs", "expected"), [
    ({"a": 2, "b": 2}, {"q": jax.P("a"), "k": jax.P(None, None, "b")}, ({"B": ("a",), "N": ("b",), "K": ("b",)}, True)),
    ({"a": 2}, {"q": jax.P(None, None, "a")}, ({"N": ("a",), "K": ("a",)}, True)),       # keys follow
    ({"data": 2}, {}, ({}, True)),                                                       # they say that they are whole
    ({"a": 5}, {"q": jax.P(None, "a")}, ({}, False)),                                    # along time nothing may be cut
    ({"a": 4}, {"q": jax.P(None, None, "a")}, ({"N": ("a",)}, True)),                     # two share a key/value head
    ({"a": 1}, {}, ({}, True))])
def test_by_what_the_arrays_say(axes, specs, expected):
  assert cut(axes, SHAPES, kind=AxisType.Explicit, specs=specs) == expected


def test_what_an_implementation_does_not_let_be_cut_stays_whole():
  assert cut({"data": 2, "tensor": 2}, SHAPES, independent="B") == ({"B": ("data",)}, True)


@pytest.mark.parametrize(("context", "unit", "expected"), [
    (5, 1, ({"B": ("data",), "T": ("context",)}, True)), (2, 1, ({"B": ("data",)}, False)),
    (5, 2, ({"B": ("data",)}, False))])
def test_sequences_are_cut_into_whole_units(context, unit, expected):
  assert cut({"data": 2, "context": context}, {"q": (8, 5, 4, 16), "k": (8, 5, 2, 16)}, "BNKT", unit=unit) == expected


def test_inside_shard_map_only_the_other_axes_cut():
  assert cut({"data": 2, "tensor": 2}, SHAPES, manual=("data", "tensor")) is None
  assert cut({"data": 2, "tensor": 2}, SHAPES, manual=("data",)) == (HEADS, True)
